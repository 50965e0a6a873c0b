"""Evaluation: scores that do not tie, batches that change nothing, files that others can read."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import scipy.signal
import torch

from osscl_min import checkpoint
from osscl_min.checkpoint import Checkpoint, _live_entries
from osscl_min.config import AudioConfig, Config, EvaluateConfig, ModelConfig
from osscl_min.data.clips import BENCHMARK
from osscl_min.data.reader import open_data
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.evaluate import evaluate, score_clips
from osscl_min.experiments.variants import examine
from osscl_min.features import ZeroPhaseFilter
from osscl_min.losses import anomaly_score
from osscl_min.metrics import evaluate_scores, read_scores
from osscl_min.model import OSSCL
from osscl_min.runtime.files import UserError

SHORT = Config(model=ModelConfig(audio=AudioConfig(seconds=1.0)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config = SynthConfig(seconds=1.0, ids_per_type=2, train_clips=1, test_normal=2, test_anomaly=2)
    return write_dataset(tmp_path_factory.mktemp("tiny") / "data", config)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint with drawn weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "drawn.pt"
    content = {"ema": OSSCL(SHORT.model).state_dict(), "epoch": 0}
    checkpoint.save(path, content, SHORT, BENCHMARK, synthetic=True)
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


def test_batches_change_nothing(data, weights):
    trained = checkpoint.load(weights)
    reader = open_data(data, SHORT.model.audio, splits=["test"]).test
    one, many = (score_clips(trained, reader, config=EvaluateConfig(size)) for size in (1, 7))
    assert len(one.scores) == len(reader) == 48
    np.testing.assert_allclose(one.scores, many.scores, rtol=1e-4)
    assert np.array_equal(one.predicted, many.predicted)


def test_the_files_of_an_evaluation(data, weights, tmp_path):
    result = evaluate(weights, data, tmp_path, config=EvaluateConfig(batch_size=8, bootstrap=10))
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert summary["clips"] == 48 and summary["synthetic"] and summary["machines"] == 12
    assert summary["config"]["model"]["audio"]["seconds"] == 1.0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == result["metrics"]
    again = evaluate_scores(read_scores(tmp_path))  # from the DCASE-format files, by file name
    for key in ("ids", "types"):
        without = [{k: v for k, v in entry.items() if k != "interval"} for entry in metrics[key]]
        assert without == again[key]
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48 and {row["anomaly"] for row in rows} == {"0", "1"}
    assert np.load(tmp_path / "embeddings.npz")["embeddings"].shape == (48, 128)


def copy_of(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def test_unlabelled_clips_are_scored_and_not_measured(data, weights, tmp_path):
    folder = copy_of(data, tmp_path)
    for number, name in enumerate(["normal_id_00_00000000", "anomaly_id_00_00000000"]):
        (folder / "fan" / "test" / f"{name}.wav").rename(folder / "fan" / "test" / f"id_00_{number:08d}.wav")
    result = evaluate(weights, folder, tmp_path / "out", config=EvaluateConfig(bootstrap=0))
    assert result["clips"] == 48 and result["unlabelled"] == 2
    assert sum(entry["normal"] + entry["anomaly"] for entry in result["metrics"]["ids"]) == 46
    assert not (tmp_path / "out" / "evaluation_set").exists()
    (folder / "eval_data_list.csv").write_text(
        "fan\nid_00_00000000.wav,normal_id_00_00000000.wav,0\nid_00_00000001.wav,anomaly_id_00_00000000.wav,1\n"
    )
    evaluate(weights, folder, tmp_path / "out", config=EvaluateConfig(bootstrap=0))
    apart = json.loads((tmp_path / "out" / "evaluation_set" / "metrics.json").read_text())
    assert [(entry["id"], entry["normal"], entry["anomaly"]) for entry in apart["ids"]] == [("00", 1, 1)]


def test_machines_never_trained_on_are_told(data, weights, tmp_path):
    folder = copy_of(data, tmp_path)
    content = checkpoint.read(weights)
    classes = tuple(machine for machine in BENCHMARK if machine != ("pump", "02")) + (("drill", "00"),)
    checkpoint.save(
        tmp_path / "other.pt", {"ema": content["ema"], "epoch": 0}, SHORT, classes, synthetic=True
    )
    result = evaluate(tmp_path / "other.pt", folder, tmp_path / "out", config=EvaluateConfig(bootstrap=0))
    assert result["not_scored"] == "4 test clips are of machines never trained on and not scored: pump 02 (4)"
    assert result["clips"] == 44
    only = replace(SHORT, model=replace(SHORT.model, classes=1))
    torch.manual_seed(0)
    content = {"ema": OSSCL(only.model).state_dict(), "epoch": 0}
    checkpoint.save(tmp_path / "drill.pt", content, only, (("drill", "00"),), synthetic=True)
    with pytest.raises(UserError, match="no test clip is of a machine that this checkpoint was trained on"):
        evaluate(tmp_path / "drill.pt", folder, tmp_path / "out")


@pytest.mark.parametrize("whole", [True, False])
def test_the_authors_checkpoints_score_like_ours(whole, tmp_path):
    torch.manual_seed(0)
    model = OSSCL()
    theirs = {name: value for name, (_, value) in _live_entries(model).items()}
    if whole:
        theirs |= {
            "TFgramNet.fc1.weight": torch.zeros(2, 2),
            "mobilefacenet.fc_out.weight": torch.zeros(2, 2),
        }
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


class Malicious:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such checkpoint"),
        (lambda path: path.write_bytes(b"PK\3\4 not a zip"), "not a readable checkpoint"),
        (lambda path: torch.save({"format": 1, "bad": Malicious()}, path), "not a readable checkpoint"),
        (lambda path: torch.save([1, 2], path), "not a checkpoint, but a list"),
        (lambda path: torch.save({"a": torch.zeros(1)}, path), "neither a checkpoint of this package nor"),
        (lambda path: torch.save({"format": 99}, path), "checkpoint format 99"),
        (
            lambda path: torch.save({"format": 1, "config": {"modle": 1}, "ema": {}}, path),
            "unknown setting modle",
        ),
    ],
)
def test_files_that_are_no_checkpoint(write, message, tmp_path, capsys):
    path = tmp_path / "some.pt"
    write(path)
    with pytest.raises(UserError, match=message):
        checkpoint.load(path)
    assert "ran" not in capsys.readouterr().out


def test_a_damaged_checkpoint_and_one_of_another_configuration(weights, tmp_path):
    half = tmp_path / "half.pt"
    half.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(half)
    content = checkpoint.read(weights)
    wrong = replace(SHORT, model=replace(SHORT.model, inputs=("log_mel",)))
    checkpoint.save(tmp_path / "wrong.pt", {"ema": content["ema"], "epoch": 0}, wrong, BENCHMARK, False)
    with pytest.raises(UserError, match="its weights do not fit its configuration"):
        checkpoint.load(tmp_path / "wrong.pt")


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


def test_high_frequency_ablation(data, weights, tmp_path):
    config = EvaluateConfig(bootstrap=0)
    result = examine("high-frequency", {"given": [weights]}, data, tmp_path, config, (1000.0, 7900.0))
    written = json.loads((tmp_path / "high_frequency.json").read_text())
    assert written.pop("note") and result == written
    conditions = {(item["filter"], item["cutoff_hz"]): item["metrics"] for item in result["conditions"]}
    assert len(conditions) == 5
    plain = evaluate(weights, data, tmp_path / "plain", config=config)["metrics"]
    assert conditions["none", None] == plain
    assert conditions["low-pass", 1000.0] != plain != conditions["high-pass", 1000.0]
    with pytest.raises(UserError, match="between 0 and 8000 Hz, got 9000"):
        examine("high-frequency", {"given": [weights]}, data, tmp_path, config, (9000.0,))


def test_scoring_against_a_machine_that_is_unknown_is_refused(data, weights):
    trained = checkpoint.load(weights)
    reader = open_data(data, SHORT.model.audio, splits=["test"]).test
    few = Checkpoint(trained.path, trained.model, trained.config, BENCHMARK[:3], 0)
    with pytest.raises(UserError, match="never trained on"):
        score_clips(few, reader)
