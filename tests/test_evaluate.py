"""Evaluation: scores that do not tie, batches that change nothing, files that others can read."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.signal
import torch
from conftest import refused

from osscl_min import checkpoint
from osscl_min.checkpoint import _live_entries
from osscl_min.config import AudioConfig, Config, EvaluateConfig, ModelConfig
from osscl_min.data.clips import BENCHMARK
from osscl_min.data.reader import open_data
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.evaluate import evaluate, score_clips
from osscl_min.features import ZeroPhaseFilter
from osscl_min.losses import anomaly_score
from osscl_min.metrics import evaluate_scores, read_scores
from osscl_min.model import OSSCL
from osscl_min.runtime.files import read_csv

PLAIN = EvaluateConfig(score="exact", bootstrap=0)


@pytest.fixture
def data(tiny_run, tmp_path):
    """A copy of the run's data, to be changed."""
    return shutil.copytree(tiny_run / "data", tmp_path / "data")


def save(path, machines, **settings):
    """A checkpoint with drawn weights of `machines` in clips of one second."""
    torch.manual_seed(0)
    model = ModelConfig(audio=AudioConfig(seconds=1.0), classes=len(machines), inputs=("log_mel",))
    content = {"ema": OSSCL(model).state_dict(), "epoch": 0}
    checkpoint.save(path, content, Config(model=model), machines, synthetic=True)
    return path


def test_score_is_the_cross_entropy_and_does_not_saturate():
    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(6, 41, dtype=torch.float64), torch.arange(6)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(anomaly_score(logits, labels), expected, rtol=1e-12, atol=0)
    sure = torch.zeros(3, 41)
    sure[:, 0] = torch.tensor([60.0, 80.0, 100.0])
    plain = torch.nn.functional.cross_entropy(sure, torch.zeros(3, dtype=torch.long), reduction="none")
    assert (plain == 0).all()  # the tie that is avoided
    assert torch.equal(anomaly_score(sure, torch.zeros(3, dtype=torch.long), "upstream"), plain.double())
    scores = anomaly_score(sure, torch.zeros(3, dtype=torch.long))
    assert scores[0] > scores[1] > scores[2] > 0


def test_batches_change_nothing(tiny_run, trained):
    reader = open_data(tiny_run / "data", trained.config.model.audio, splits=["test"]).test
    one, many = (score_clips(trained, reader, config=EvaluateConfig(size)) for size in (1, 7))
    assert len(one.scores) == len(reader) == 48
    np.testing.assert_allclose(one.scores, many.scores, rtol=1e-4)
    assert np.array_equal(one.predicted, many.predicted)
    few = replace(trained, classes=trained.classes[:3])
    with refused("never trained on"):
        score_clips(few, reader)


def test_the_files_of_an_evaluation(tiny_run):
    folder = tiny_run / "evaluation"
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary["clips"] == 48 and summary["synthetic"] and summary["machines"] == 12
    assert summary["config"]["model"]["audio"]["seconds"] == 1.0
    metrics = json.loads((folder / "metrics.json").read_text())
    again = evaluate_scores(read_scores(folder))  # from the DCASE-format files, by file name
    for key in ("ids", "types"):
        without = [{k: v for k, v in entry.items() if k != "interval"} for entry in metrics[key]]
        assert without == again[key]
    rows = read_csv(folder / "scores.csv")
    assert len(rows) == 48 and {row["anomaly"] for row in rows} == {"0", "1"}
    assert np.load(folder / "embeddings.npz")["embeddings"].shape == (48, 128)


def test_test_clips_alone_are_scored_and_unlabelled_ones_are_not_measured(tiny_run, data, tmp_path):
    best, out = tiny_run / "best.pt", tmp_path / "out"
    for train in data.glob("*/train"):
        shutil.rmtree(train)
    for number, name in enumerate(["normal_id_00_00000000", "anomaly_id_00_00000000"]):
        (data / "fan" / "test" / f"{name}.wav").rename(data / "fan" / "test" / f"id_00_{number:08d}.wav")
    result = evaluate(best, data, out, config=PLAIN)
    assert result["clips"] == 48 and result["unlabelled"] == 2
    assert sum(entry["normal"] + entry["anomaly"] for entry in result["metrics"]["ids"]) == 46
    assert not (out / "evaluation_set").exists()
    (data / "eval_data_list.csv").write_text(
        "fan\nid_00_00000000.wav,normal_id_00_00000000.wav,0\nid_00_00000001.wav,anomaly_id_00_00000000.wav,1\n"
    )
    again = evaluate(best, data, out, config=PLAIN)
    assert again["identity_accuracy"] == result["identity_accuracy"]  # the sets are not pooled
    apart = json.loads((out / "evaluation_set" / "metrics.json").read_text())
    assert [(entry["id"], entry["normal"], entry["anomaly"]) for entry in apart["ids"]] == [("00", 1, 1)]


def test_machines_never_trained_on_are_told(tiny_run, trained, tmp_path):
    data = tiny_run / "data"
    others = tuple(machine for machine in trained.classes if machine != ("pump", "02")) + (("drill", "00"),)
    result = evaluate(save(tmp_path / "other.pt", others), data, tmp_path / "out", config=PLAIN)
    assert result["not_scored"] == "4 test clips of machines never trained on are not scored: pump 02 (4)"
    assert result["clips"] == 44
    with refused("no test clip is of a machine that this checkpoint was trained on"):
        evaluate(save(tmp_path / "drill.pt", (("drill", "00"),)), data, tmp_path / "out")


def test_the_authors_checkpoints_score_like_ours(tmp_path):
    torch.manual_seed(0)
    model = OSSCL()
    theirs = {name: value for name, (_, value) in _live_entries(model).items()}
    theirs |= {f"{name}.weight": torch.zeros(2, 2) for name in ("TFgramNet.fc1", "mobilefacenet.fc_out")}
    theirs |= {"TFgramNet.pre_bn0.num_batches_tracked": torch.tensor(3)}
    torch.save(theirs, tmp_path / "authors.pth")
    checkpoint.save(tmp_path / "ours.pt", {"ema": model.state_dict(), "epoch": 0}, Config(), BENCHMARK, False)
    config = SynthConfig(seconds=10.0, ids_per_type=1, train_clips=1, test_normal=1, test_anomaly=1)
    data = write_dataset(tmp_path / "data", config)
    for machine_type in ("fan", "pump", "slider", "ToyCar"):
        shutil.rmtree(data / machine_type)
    (data / "synthetic.json").unlink()
    for name in ("authors.pth", "ours.pt"):
        evaluate(tmp_path / name, data, tmp_path / name.split(".")[0], config=EvaluateConfig(bootstrap=0))
    assert (tmp_path / "authors" / "scores.csv").read_text() == (tmp_path / "ours" / "scores.csv").read_text()


def test_the_filter_keeps_and_removes_what_it_should():
    time = torch.arange(32_000, dtype=torch.float64) / 16_000
    low, high = (torch.sin(2 * torch.pi * frequency * time).float() for frequency in (500, 5000))
    inner = slice(4000, -4000)
    for kind, kept, removed in (("low-pass", low, high), ("high-pass", high, low)):
        zero_phase = ZeroPhaseFilter(kind, 2000.0)
        out = zero_phase((low + high)[None])
        assert out.dtype == torch.float32
        assert (out[0, inner] - kept[inner]).abs().max() < 1e-3  # in phase, at full height
        assert zero_phase(removed[None])[0, inner].abs().max() < 1e-3
        noise = np.random.default_rng(0).standard_normal((2, 9000))
        expected = scipy.signal.sosfiltfilt(zero_phase.sections, noise, padlen=4000)
        np.testing.assert_allclose(zero_phase(torch.from_numpy(noise)), expected, rtol=0, atol=1e-4)
