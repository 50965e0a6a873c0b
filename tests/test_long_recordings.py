"""Recordings longer than a clip: all their sound trains, their windows stay together, each counts once."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny

from osscl_min import checkpoint
from osscl_min.config import AudioConfig, EvaluateConfig, ModelConfig
from osscl_min.data.reader import open_data
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.evaluate import evaluate, score_clips
from osscl_min.inference.score import score
from osscl_min.report.results import thresholds_table
from osscl_min.train import split_validation, train

AUDIO = AudioConfig(seconds=1.0, clip_step=1.0)
CONFIG = replace(
    tiny({"epochs": 2, "validation_fraction": 0.3}, model=ModelConfig(audio=AUDIO, inputs=("log_mel",))),
    preset="small",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four seconds per recording: six machines with four normal recordings each for training."""
    config = SynthConfig(seconds=4.0, ids_per_type=1, train_clips=4, test_normal=1, test_anomaly=1)
    return write_dataset(tmp_path_factory.mktemp("long") / "data", config)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "run"
    train(folder, out, CONFIG, device="cpu")
    return out


def test_each_recording_calibrates_once(folder, run):
    best = checkpoint.load(run / "best.pt")
    assert best.recognition["recordings"] == 7 and "held-out recordings" in best.remark
    for form in checkpoint.SCORES:
        machines, scores = best.held_out(form)
        assert len(machines) == len(scores) == 7
        assert [len(own) for own in scores] == [4] * len(scores)
    assert len(best.neighbours.labels) == 4 * (24 - 7)
    reader = open_data(folder, AUDIO, splits=["train"]).train
    _, held_out = split_validation(reader.recordings, np.zeros(len(reader)), (), CONFIG.train)
    calibrating = {reader.recordings[clips[0]] for clips in held_out}
    assert set(best.calibration["recordings"].tolist()) == calibrating
    positions = np.flatnonzero(np.isin(reader.recordings, list(calibrating)))
    plain = score_clips(best, reader, positions=positions, config=EvaluateConfig(score="exact"))
    highest = [own.max() for own in best.held_out("exact")[1]]
    assert sorted(plain.scores) == pytest.approx(sorted(highest), rel=1e-3)


def test_evaluation_and_scoring_hear_the_whole_recording(folder, run, tmp_path):
    result = evaluate(run / "best.pt", folder, tmp_path / "evaluation", device="cpu")
    assert result["clips"] == 12 and set(result["forms"]) == {"exact", "nearest", "profile", "gaussian"}
    assert result["score"] in ("nearest", "profile")
    rows = (tmp_path / "evaluation" / "scores.csv").read_text().splitlines()
    columns = rows[0].split(",")
    by_file = {tuple(row.split(",")[:3]): row.split(",")[columns.index("score")] for row in rows[1:]}
    assert len(by_file) == 12 and {row.split(",")[columns.index("windows")] for row in rows[1:]} == {"4"}
    _, summary = score(run / "best.pt", [str(folder / "fan" / "test")], device="cpu")
    for _, _, recording, row in summary.entries:
        assert row["windows"] == 4
        name = recording.file.rsplit("/", 1)[1], row["machine_type"], row["machine_id"]
        assert row["score"] == pytest.approx(float(by_file[name]), rel=1e-4, abs=1e-5)


def test_the_table_of_thresholds_counts_windows(folder, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    evaluate(copy / "best.pt", folder, copy / "evaluation", device="cpu")
    assert thresholds_table(copy, rates=(0.2,))[1][2] == "7 normal recordings of all machines"
    path = copy / "evaluation" / "scores.csv"
    path.write_text(path.read_text().replace(",4,", ",8,"))  # twice as long as those that calibrate
    assert "corrected for 2 blocks of 4 windows" in thresholds_table(copy, rates=(0.3,))[1][2]


def test_the_score_can_be_chosen(folder, run, tmp_path):
    scores = {}
    for form in ("exact", "nearest", "profile"):
        scorer, summary = score(run / "best.pt", [str(folder / "fan" / "test")], form=form, device="cpu")
        scores[form] = [row["score"] for *_, row in summary.entries]
        assert f"score: {checkpoint.SCORES[form]}" in summary.text(scorer)
        assert summary.thresholds
    assert len({tuple(values) for values in scores.values()}) == 3


def test_borrowed_machines_do_not_calibrate(folder, tmp_path):
    own = tmp_path / "own"
    (own / "fan").parent.mkdir()
    (own / "fan").symlink_to(folder / "fan")
    others = tmp_path / "others"
    others.mkdir()
    (others / "pump").symlink_to(folder / "pump")
    half = replace(CONFIG, train=replace(CONFIG.train, validation_fraction=0.5))
    best = checkpoint.load(train(own, tmp_path / "run", half, others=others, device="cpu"))
    assert best.recognition["recordings"] == 4 > len(best.held_out()[0])  # of both machines
    assert [best.classes[label][0] for label in best.borrowed] == ["pump"]
    for form in ("exact", "nearest", "profile"):
        assert {machine[0] for machine in best.held_out(form)[0]} <= {"fan"}
