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
from osscl_min.experiments import analyses, figures, sweep, variants
from osscl_min.features import LogMel, to_wave

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
    variants.run("scores", data, folder, TINY, seeds=(0, 1), **common)
    for name in ("noise", "embeddings", "bands"):
        variants.run(name, data, folder, TINY, seeds=(0,), **common)
    variants.run("high-frequency", data, folder, TINY, seeds=(0, 1), cutoffs=(2000.0,), **common)
    return folder


@pytest.fixture(scope="module")
def baseline(out):
    return [next((out / "runs").glob(f"os-scl-seed{seed}-*")) / "best.pt" for seed in (0, 1)]


@pytest.fixture(scope="module")
def detector(baseline, data):
    return analyses.Detector(checkpoint.load(baseline[0]), open_data(data, AUDIO), SCORING)


def read(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_every_experiment_leaves_its_files_and_names_the_data(out):
    for name in (name.replace("-", "_") for name in analyses.ANALYSES):
        for suffix in SUFFIXES:
            assert (out / f"{name}.{suffix}").stat().st_size > 200, (name, suffix)
        for suffix in ("md", "tex"):
            text = (out / f"{name}.{suffix}").read_text()
            assert "Synthetic: simulated machines" in text and "commit" in text and "1 epochs" in text
    names = {path.name.rpartition("-")[0] for path in (out / "runs").iterdir() if path.is_dir()}
    assert names == {
        "os-scl-seed0",
        "os-scl-seed1",
        "noise-0.5-seed0",
        "head-none-seed0",
    }  # all else is shared
    config = json.loads(next((out / "runs").glob("noise-0.5*/config.json")).read_text())
    assert config["config"]["train"]["noise"] == 0.5


def test_the_first_condition_is_the_plain_evaluation(out, baseline, data, tmp_path):
    each = [evaluate(path, data, tmp_path, config=SCORING)["metrics"]["average"]["auc_id_mean"]
            for path in baseline]  # fmt: skip
    for name in ("high_frequency", "scores"):
        row = read(out, name)["conditions"][0]
        assert row["each"]["auc_id_mean"] == pytest.approx(each) and row["seeds"] == [0, 1]
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
        if line["difference_mean"]:
            assert json.loads(line["difference_interval"]) == row["difference"][line["type"]]["interval"]


def test_remade_tables_are_the_same(out):
    before = {
        path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".json", ".md", ".csv")
    }
    assert set(variants.remake(out)) == set(analyses.ANALYSES)
    assert {name: (out / name).read_bytes() for name in before} == before


def test_development_and_evaluation_sets_are_never_pooled(detector, monkeypatch):
    clips = [
        replace(clip, subset="evaluation") if clip.machine_id == "02" else clip
        for clip in detector.data.test.clips
    ]
    monkeypatch.setattr(detector.data.test, "clips", clips)
    development = [position for position, clip in enumerate(clips) if clip.machine_id != "02"]
    assert detector.positions("test") == development and 0 < len(development) < len(clips)
    assert {row.subset for row in detector.score().rows} == {"development"}
    seen = [position for _, _, positions in detector.batches("test") for position in positions]
    assert sorted(seen) == development
    unlabelled = [replace(clip, anomaly=None) if clip.machine_id != "02" else clip for clip in clips]
    monkeypatch.setattr(detector.data.test, "clips", unlabelled)
    assert {row.subset for row in detector.score().rows} == {"evaluation"}


def test_scores_are_the_same_embeddings_otherwise(detector):
    rows = {settings["score"]: scored.rows for settings, scored in analyses.scored_otherwise(detector)}
    test, training = detector.plain, detector.score("train")
    weight = torch.nn.functional.normalize(detector.trained.model.arcface.weight.detach().double())
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
    distances = np.sort(1 - own @ test.embeddings[5].astype(float))[: analyses.NEIGHBOURS]
    assert nearest[5].score == pytest.approx(distances.mean(), abs=1e-6)


def test_levels_are_the_machines_means(detector):
    reader = detector.data.train
    machine = reader.clips[5].machine
    chosen = [n for n, clip in enumerate(reader.clips) if clip.machine == machine]
    log_mel = LogMel(AUDIO)(to_wave(reader.read(chosen)))
    level = analyses.machine_levels(detector)[detector.trained.classes.index(machine)]
    torch.testing.assert_close(level, log_mel.mean((0, 1, 3)))


def test_a_band_that_matters_costs(out):
    rows = read(out, "bands")["conditions"]
    assert len(rows) == 1 + 2 * analyses.BANDS
    assert {row["replaced_by"] for row in rows} == {"nothing", "silence", "training mean"}
    assert any(row["each"] != rows[0]["each"] for row in rows[1:])
    energy = read(out, "bands")["energy"]
    for kind in ("normal", "anomalous"):
        shares = np.array([entry[kind] for entry in energy]).reshape(analyses.BANDS, 6)
        np.testing.assert_allclose(shares.sum(0), 1, rtol=1e-6)


def test_energy_shares_of_a_known_sound(detector, monkeypatch):
    time = np.arange(AUDIO.samples) / AUDIO.sample_rate
    tone = (8000 * np.sin(2 * np.pi * 3000 * time)).astype(np.int16)

    def read(positions, out=None):
        out = np.empty((len(positions), len(tone)), np.int16) if out is None else out
        out[:] = tone
        return out

    monkeypatch.setattr(detector.data.test, "read", read)
    for entry in analyses.energy_shares(detector):
        expected = float(entry["low_hz"] <= 3000 < entry["high_hz"])
        assert entry["normal"] == pytest.approx(expected, abs=1e-3)


def test_filters_respond_as_they_are_written(detector):
    trained = detector.trained
    kernel = np.zeros(11)
    kernel[4:6] = 0.5, -0.5  # a difference: |2 sin(pi f / rate)| / 2
    with torch.no_grad():
        before = trained.model.tfgram.conv[0].weight.clone()
        trained.model.tfgram.conv[0].weight[0, 0] = torch.from_numpy(kernel)
        gain = analyses.frequency_responses(trained)["tfgram"][0]
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
        start = analyses.frequency_responses(checkpoint.load(baseline[0].with_name("initial.pt")))
        np.testing.assert_array_equal(file["tgram_before"], start["tgram"])
        assert (file["tfgram_before"] != file["tfgram_after"]).any()


def test_noise_is_compared_within_and_between_detectors(out):
    rows = read(out, "noise")["conditions"]
    assert len(rows) == 2 * (1 + 3 * 4)
    assert {row["variant"] for row in rows} == {"os-scl", "noise in training"}
    for row in rows:
        assert ("gain" in row) == (row["variant"] != "os-scl")
        assert ("difference" in row) == (row["noise"] != "none")
    assert "one seed: not comparable" in (out / "noise.md").read_text()


def test_embeddings_of_known_clusters(detector):
    plain = detector.plain
    corner = np.eye(128, dtype=np.float32)
    anomaly = np.array([clip.anomaly for clip in plain.clips])
    apart = replace(plain, embeddings=corner[2 * plain.labels + anomaly])
    values = analyses.separation(apart)
    assert values["silhouette_machines"] == values["silhouette_anomalies"] == pytest.approx(1)
    assert values["neighbour_normal"] == values["neighbour_anomalous"] == values["neighbour_kind"] == 100
    mixed = replace(plain, embeddings=np.random.default_rng(0).standard_normal((len(anomaly), 128)))
    values = analyses.separation(mixed)
    assert abs(values["silhouette_machines"]) < 0.1 and values["neighbour_normal"] < 50


def test_a_given_checkpoint_is_examined_and_nothing_is_trained(baseline, data, tmp_path):
    result = variants.run(
        "high-frequency", data, tmp_path, TINY, checkpoint=baseline[0], cutoffs=(3000.0,), device="cpu"
    )
    assert not (tmp_path / "runs").exists()
    assert [row["variant"] for row in result["conditions"]] == ["given"] * 3
    plain = evaluate(baseline[0], data, tmp_path / "plain", config=SCORING, device="cpu")["metrics"]
    assert result["conditions"][0]["metrics"] == plain


def test_filtered_training_shares_the_baseline_and_has_its_figure(out, data):
    result = variants.run(
        "high-frequency-training", data, out, TINY, seeds=(0,), cutoffs=(4000.0,), only=("low-pass 4 kHz",),
        device="cpu",
    )  # fmt: skip
    assert [(row["filter"], row["cutoff_hz"]) for row in result["conditions"]] == [
        ("none", None), ("low-pass", 4000.0),
    ]  # fmt: skip
    assert len(list((out / "runs").glob("os-scl-seed0*"))) == 1
    for suffix in SUFFIXES:
        assert (out / f"high_frequency_training.{suffix}").is_file()
    lines = figures.high_frequency(result).axes[0].lines
    assert [line.get_ydata()[0] / 100 for line in lines[:2]] == pytest.approx(
        [row["each"]["auc_id_mean"][0] for row in result["conditions"]]
    )


def test_a_figure_says_where_it_comes_from(out):
    result = read(out, "noise")
    figure = figures.noise(result)
    figures.add_origin(figure, sweep.origin(result))
    figure.draw_without_rendering()
    (text,) = (text for text in figure.texts if "Synthetic" in text.get_text())
    below = text.get_window_extent().ymin
    assert all(ax.get_tightbbox().ymax < below for ax in figure.axes)
    assert "(synthetic data)" in figure.get_suptitle()
