"""Experiments in their smallest form: they measure what they say, and their files agree and name the data."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny

from osscl_min import checkpoint
from osscl_min.config import AudioConfig, EvaluateConfig
from osscl_min.data.reader import open_data
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.evaluate import evaluate
from osscl_min.experiments import analyses as probes
from osscl_min.experiments import embeddings, probe_tables
from osscl_min.experiments import figures as experiment_figures
from osscl_min.experiments import variants as experiments
from osscl_min.experiments.sweep import origin
from osscl_min.features import LogMel, to_wave
from osscl_min.metrics import evaluate_scores
from osscl_min.runtime.files import UserError

AUDIO = AudioConfig(seconds=1.0)
SCORING = EvaluateConfig(batch_size=24, bootstrap=30)
TINY = tiny({"epochs": 1}, evaluate=SCORING)
SUFFIXES = ("json", "csv", "md", "tex", "png", "pdf")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    counts = SynthConfig(seconds=1.0, ids_per_type=2, train_clips=3, test_normal=3, test_anomaly=3)
    return write_dataset(tmp_path_factory.mktemp("tiny") / "data", counts)


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """Every experiment that examines detectors, on one sweep: three variants, the first with two seeds."""
    folder = tmp_path_factory.mktemp("experiments")
    common = {"device": "cpu", "jobs": 2}
    experiments.run("scores", data, folder, TINY, seeds=(0, 1), **common)
    for name in ("noise", "embeddings", "bands"):
        experiments.run(name, data, folder, TINY, seeds=(0,), **common)
    experiments.run("high-frequency", data, folder, TINY, seeds=(0, 1), cutoffs=(2000.0,), **common)
    return folder


@pytest.fixture(scope="module")
def baseline(out):
    return [out / "runs" / f"os-scl-seed{seed}" / "best.pt" for seed in (0, 1)]


@pytest.fixture(scope="module")
def subject(baseline, data):
    ((_, found),) = probes.subjects({"one": baseline[:1]}, data, ("train", "test"), SCORING)
    return found


def read(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_every_experiment_leaves_its_files_and_names_the_data(out):
    for name in (*(probe.replace("-", "_") for probe in probes.PROBES), "embeddings"):
        for suffix in SUFFIXES:
            assert (out / f"{name}.{suffix}").stat().st_size > 200, (name, suffix)
        for suffix in ("md", "tex"):
            text = (out / f"{name}.{suffix}").read_text()
            assert "Synthetic: simulated machines" in text and "commit" in text and "1 epochs" in text
    assert len(list((out / "runs").iterdir())) == 4  # two seeds, in noise, without head: all else is shared


def test_the_first_condition_is_the_plain_evaluation(out, baseline, data, tmp_path):
    for name in ("high_frequency", "scores"):
        row = read(out, name)["conditions"][0]
        each = [evaluate(path, data, tmp_path, config=SCORING)["metrics"]["average"]["auc_id_mean"]
                for path in baseline]  # fmt: skip
        assert row["each"] == each and row["seeds"] == [0, 1]
        assert row["metrics"]["average"]["auc_id_mean"] == pytest.approx(np.mean(each))
        assert "difference" not in row


def test_csv_and_json_agree(out):
    result = read(out, "high_frequency")
    with open(out / "high_frequency.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 7 * len(result["conditions"]) == 21
    for line in lines:
        row = next(row for row in result["conditions"] if row["filter"] == line["filter"])
        if line["type"] == "average":
            assert float(line["auc_id_mean"]) == row["metrics"]["average"]["auc_id_mean"]
        if line["difference"]:
            gain = row["difference"][line["type"]]
            assert [float(line["low"]), float(line["high"])] == gain["interval"]


def test_scores_are_the_same_embeddings_otherwise(subject):
    rows = {settings["score"]: scores for settings, scores in probes.scored_otherwise(subject)}
    test, training = subject.score(), subject.score("train")
    weight = torch.nn.functional.normalize(subject.trained.model.arcface.weight.detach().double())
    cosine = torch.from_numpy(test.embeddings).double() @ weight.T
    labels = torch.from_numpy(test.labels)
    expected = {
        "cross-entropy with margin (paper)": test.scores,
        "cross-entropy without margin": torch.nn.functional.cross_entropy(
            30 * cosine, labels, reduction="none"
        ),
        "1 - cosine to the class weight": 1 - cosine[range(len(labels)), labels],
    }
    for name, values in expected.items():
        np.testing.assert_allclose([score.score for score in rows[name]], values, rtol=1e-9, atol=1e-9)
    (nearest,) = (scores for name, scores in rows.items() if "nearest" in name)
    own = training.embeddings[training.labels == test.labels[5]].astype(float)
    distances = np.sort(1 - own @ test.embeddings[5].astype(float))[: probes.NEIGHBOURS]
    assert nearest[5].score == pytest.approx(distances.mean(), abs=1e-6)


def test_levels_are_the_machines_means(subject):
    reader = subject.data.train
    machine = reader.clips[5].machine
    chosen = [n for n, clip in enumerate(reader.clips) if clip.machine == machine]
    log_mel = LogMel(AUDIO)(to_wave(reader.read(chosen)))
    level = probes.machine_levels(subject)[subject.trained.classes.index(machine)]
    torch.testing.assert_close(level, log_mel.mean((0, 1, 3)))


def test_a_band_that_matters_costs(out, subject):
    rows = read(out, "bands")["conditions"]
    assert len(rows) == 1 + 2 * probes.BANDS
    assert {row["replaced_by"] for row in rows} == {"nothing", "silence", "training mean"}
    assert any(row["each"] != rows[0]["each"] for row in rows[1:])
    energy = read(out, "bands")["energy"]
    for kind in ("normal", "anomalous"):
        shares = np.array([entry[kind] for entry in energy]).reshape(probes.BANDS, 6)
        np.testing.assert_allclose(shares.sum(0), 1, rtol=1e-6)


def test_energy_shares_of_a_known_sound(subject, monkeypatch):
    time = np.arange(AUDIO.samples) / AUDIO.sample_rate
    tone = (8000 * np.sin(2 * np.pi * 3000 * time)).astype(np.int16)

    def read(positions, out=None):
        out = np.empty((len(positions), len(tone)), np.int16) if out is None else out
        out[:] = tone
        return out

    monkeypatch.setattr(subject.data.test, "read", read)
    for entry in probes.energy_shares(subject):
        expected = float(entry["low_hz"] <= 3000 < entry["high_hz"])
        assert entry["normal"] == pytest.approx(expected, abs=1e-3)


def test_filters_respond_as_they_are_written(subject):
    trained = subject.trained
    kernel = np.zeros(11)
    kernel[4:6] = 0.5, -0.5  # a difference: |2 sin(pi f / rate)| / 2
    with torch.no_grad():
        before = trained.model.tfgram.conv[0].weight.clone()
        trained.model.tfgram.conv[0].weight[0, 0] = torch.from_numpy(kernel)
        gain = probes.frequency_responses(trained)["tfgram"][0]
        trained.model.tfgram.conv[0].weight.copy_(before)
    hertz = np.linspace(0, 8000, 513)[1:]
    np.testing.assert_allclose(gain[1:], 20 * np.log10(np.sin(np.pi * hertz / 16000)), atol=1e-4)


def test_filters_are_compared_with_their_start(out, baseline):
    with np.load(out / "high_frequency_filters.npz") as file:
        assert {name: file[name].shape for name in file} == {
            f"{part}_{when}": (filters, 513)
            for part, filters in (("tgram", 128), ("tfgram", 64))
            for when in ("before", "after")
        }
        start = probes.frequency_responses(checkpoint.load(baseline[0].with_name("initial.pt")))
        np.testing.assert_array_equal(file["tgram_before"], start["tgram"])
        assert (file["tfgram_before"] != file["tfgram_after"]).any()


def gains(low, high):
    entry = {"average": {"interval": {"auc_id_mean": [0.8, 0.9]}}}
    rows = [{"filter": "none", "cutoff_hz": None, "metrics": entry}]
    for kind, (mean, bounds, clear) in (("low-pass", low), ("high-pass", high)):
        gain = {"mean": mean, "interval": bounds, "seeds": [mean], "clear": clear}
        rows.append({"filter": kind, "cutoff_hz": 4000.0, "metrics": entry, "difference": {"average": gain}})
    return rows


def test_the_conclusion_follows_the_intervals():
    rows = gains((-0.01, [-0.03, 0.01], False), (-0.2, [-0.3, -0.1], True))
    text = probe_tables.rely_on_high_frequencies(rows)
    assert "above 4 kHz AUC id-mean changes by -1.0 [-3.0, +1.0] points: no need of it is shown" in text
    assert "a loss of up to 3.0 is possible" in text
    assert "below 4 kHz AUC id-mean changes by -20.0 [-30.0, -10.0] points: it is needed here" in text
    rows = gains((0.1, [0.05, 0.2], True), (0.1, [-0.05, 0.2], False))
    assert "detection is better without it" in probe_tables.rely_on_high_frequencies(rows)
    rows[0]["metrics"] = {"average": {"interval": {"auc_id_mean": [0.45, 0.6]}}}
    assert "cannot be told" in probe_tables.rely_on_high_frequencies(rows)
    assert probe_tables.rely_on_high_frequencies(rows[:1]) == ""


def test_noise_is_compared_within_and_between_detectors(out):
    rows = read(out, "noise")["conditions"]
    assert len(rows) == 2 * (1 + 3 * 4)
    assert {row["variant"] for row in rows} == {"os-scl", "noise in training"}
    for row in rows:
        assert ("gain" in row) == (row["variant"] != "os-scl")
        assert ("difference" in row) == (row["noise"] != "none")
    config = json.loads((out / "runs" / "noise-0.5-seed0" / "config.json").read_text())
    assert config["config"]["train"]["noise"] == 0.5
    logs = [(out / "runs" / f"{name}-seed0" / "log.jsonl").read_text() for name in ("os-scl", "noise-0.5")]
    assert logs[0] != logs[1]


def test_embeddings_of_known_clusters(subject):
    scored = subject.score()
    corner = np.eye(128, dtype=np.float32)
    anomaly = np.array([clip.anomaly for clip in scored.clips])
    apart = replace(scored, embeddings=corner[2 * scored.labels + anomaly])
    figures = embeddings.measure(apart)
    assert figures["silhouette_machines"] == figures["silhouette_anomalies"] == pytest.approx(1)
    assert figures["neighbour_normal"] == figures["neighbour_anomalous"] == figures["neighbour_kind"] == 100
    mixed = replace(scored, embeddings=np.random.default_rng(0).standard_normal((len(anomaly), 128)))
    figures = embeddings.measure(mixed)
    assert abs(figures["silhouette_machines"]) < 0.1 and figures["neighbour_normal"] < 50


def test_a_given_checkpoint_is_examined_and_nothing_is_trained(baseline, data, tmp_path):
    result = experiments.run(
        "high-frequency", data, tmp_path, TINY, checkpoint=baseline[0], cutoffs=(3000.0,), device="cpu"
    )
    assert not (tmp_path / "runs").exists()
    assert [row["variant"] for row in result["conditions"]] == ["given"] * 3
    plain = result["conditions"][0]["metrics"]
    opened = open_data(data, AUDIO, splits=["test"])
    subject = probes.Subject(checkpoint.load(baseline[0]), opened, SCORING)
    assert plain == evaluate_scores(subject.score().rows, SCORING.bootstrap)
    with pytest.raises(UserError, match="trains its own detectors"):
        experiments.run("inputs", data, tmp_path, TINY, checkpoint=baseline[0])


def test_filtered_training_shares_the_baseline_and_has_its_figure(out, data):
    result = experiments.run(
        "high-frequency-training", data, out, TINY, seeds=(0,), only=("low-pass 4 kHz",), device="cpu"
    )
    assert [(row["filter"], row["cutoff_hz"]) for row in result["variants"]] == [
        ("none", None), ("low-pass", 4000.0),
    ]  # fmt: skip
    for suffix in SUFFIXES:
        assert (out / f"high_frequency_training.{suffix}").is_file()
    drawn = experiment_figures.filtered(result).axes[0].lines
    assert [line.get_ydata()[0] / 100 for line in drawn[:2]] == pytest.approx(
        [row["auc_id_mean"] for row in result["variants"]]
    )


def test_a_figure_says_where_it_comes_from(out):
    result = read(out, "noise")
    figure = experiment_figures.noise(result)
    experiment_figures._with_origin(figure, origin(result))
    (text,) = (text for text in figure.texts if "Synthetic" in text.get_text())
    below = text.get_window_extent().ymin
    assert all(ax.get_tightbbox().ymax < below for ax in figure.axes)
    assert "(synthetic data)" in figure.get_suptitle()
