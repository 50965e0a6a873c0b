"""Training: it learns, it repeats itself, it goes on where it was cut, and it stops in one clear line."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import MACHINES, TINY, refused

from osscl_min import checkpoint, train
from osscl_min.config import PRESETS, ModelConfig, TrainConfig
from osscl_min.data.batches import batches_of
from osscl_min.data.clips import BENCHMARK
from osscl_min.data.reader import open_data
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.evaluate import evaluate, score_clips
from osscl_min.neighbours import FORMS
from osscl_min.train import split_validation


def state(path):
    return checkpoint.read(path)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_the_run_folder(uninterrupted):
    run = json.loads((uninterrupted / "config.json").read_text())
    assert run["data"]["synthetic"] and run["data"]["training"] == 16 and run["data"]["validation"] == 2
    assert run["config"]["model"]["classes"] == len(run["classes"]) == 6
    assert {"commit", "torch", "device", "time", "computed_by"} <= run["provenance"].keys()
    log = train.read_log(uninterrupted)
    assert [entry["epoch"] for entry in log] == [1, 2, 3]
    for entry in log:
        assert entry["total"] == pytest.approx(entry["cross_entropy"] + entry["contrastive"], rel=1e-5)
    best = checkpoint.load(uninterrupted / "best.pt")
    assert best.synthetic and not best.model.training
    assert best.epoch == 3 and state(uninterrupted / "best.pt")["computed_by"]
    held_out = best.calibration["scores"].mean().item()
    assert held_out == pytest.approx(log[-1]["validation_loss"], rel=1e-12)
    assert len(best.calibration["labels"]) == run["data"]["validation"]
    initial = checkpoint.load(uninterrupted / "initial.pt")
    assert initial.epoch == 0 and not equal(initial.model.state_dict(), best.model.state_dict())


def test_another_seed_gives_other_losses(data, uninterrupted, tmp_path):
    train.train(data, tmp_path, replace(TINY, train=replace(TINY.train, epochs=1, seed=1)))
    assert train.read_log(tmp_path)[0]["total"] != train.read_log(uninterrupted)[0]["total"]


def test_a_folder_with_another_run_is_refused(data, uninterrupted, tmp_path):
    other = replace(TINY, train=replace(TINY.train, ema_decay=0.5))
    started = tmp_path / "started"  # a run that was stopped before its first checkpoint
    started.mkdir()
    shutil.copy(uninterrupted / "config.json", started)
    for folder in (uninterrupted, started):
        with refused(r"another run \(train.ema_decay: 0.9 there, 0.5 here\)"):
            train.train(data, folder, other)
    assert set(os.listdir(started)) == {".lock", "config.json"}
    more = write_dataset(tmp_path / "data", replace(MACHINES, train_clips=4))
    with refused(r"another run \(clips: 18 clips"):
        train.train(more, uninterrupted, TINY)


@pytest.mark.slow
def test_the_clips_that_choose_the_epoch_do_not_calibrate(data, tmp_path):
    config = replace(TINY, train=replace(TINY.train, keep="best", validation_fraction=0.4))
    best = checkpoint.load(train.train(data, tmp_path, config))
    losses = [entry["validation_loss"] for entry in train.read_log(tmp_path)]
    assert best.epoch == 1 + int(np.argmin(losses))
    reader = open_data(data, config.model.audio, splits=["train"]).train
    _, held_out = split_validation(reader.recordings, np.zeros(len(reader)), (), config.train)
    scores = score_clips(best, reader, positions=np.concatenate(held_out)).scores
    assert len(scores) == 7 and scores[:4].mean() == pytest.approx(min(losses), rel=1e-4)
    np.testing.assert_allclose(best.calibration["scores"], scores[4:], rtol=1e-4)
    assert all(len(best.calibration[form]) == 3 for form in FORMS)
    one = replace(config, train=replace(config.train, epochs=1, validation_fraction=0.01))
    assert checkpoint.load(train.train(data, tmp_path / "one", one)).held_out() == ([], [])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "best.pt").unlink(), "best.pt is missing; restore it, or remove the folder"),
        (lambda run: shutil.copy(run / "best.pt", run / "last.pt"), "last.pt: .*: it has no entry 'clips'"),
        (lambda run: (run / "config.json").write_text("{"), "config.json: not a readable JSON"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: .* JSON object"),
    ],
)
def test_a_damaged_run_folder_is_named(data, uninterrupted, tmp_path, damage, message):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    damage(run)
    with refused(message):
        train.train(data, run, TINY)


@pytest.mark.slow
def test_the_preset_in_use_is_said_on_the_benchmarks_data(data, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(train, "label_table", lambda clips, benchmark: BENCHMARK)
    monkeypatch.setattr(train, "peak_memory_mb", lambda: None)  # not every system tells
    config = replace(TINY, train=replace(TINY.train, epochs=1))
    line = "preset quick is not the paper's experiment on this data; --preset paper is"
    train.train(data, tmp_path / "simulated", config)
    assert line not in capfd.readouterr().out
    real = shutil.copytree(data, tmp_path / "data")
    (real / "synthetic.json").unlink()
    train.train(real, tmp_path / "real", config)
    assert line in capfd.readouterr().out
    assert train.read_log(tmp_path / "real")[0]["peak_memory_mb"] is None


def test_learning_rate_is_pytorchs_cosine_annealing():
    config = replace(PRESETS["paper"], train=TrainConfig(epochs=7))
    trainer = train.Trainer(replace(config, model=ModelConfig(inputs=("log_mel",))), torch.device("cpu"))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=1e-5)
    for epoch in range(7):
        trainer.start_epoch(epoch)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("count", "sizes"), [(10, [4, 4, 2]), (9, [4, 5]), (8, [4, 4]), (5, [5]), (3, [3]), (1, [1])]
)
def test_a_last_batch_of_one_joins_the_one_before(count, sizes):
    batches = batches_of(np.arange(count)[::-1], 4)
    assert [len(batch) for batch in batches] == sizes
    assert np.concatenate(batches).tolist() == list(range(count))[::-1]


def split(recordings, labels=None, borrowed=(), **settings):
    labels = np.zeros(len(recordings)) if labels is None else labels
    return split_validation(np.asarray(recordings), labels, borrowed, TrainConfig(**settings))


def test_whole_recordings_are_held_out():
    recordings = np.repeat(np.arange(200), np.random.default_rng(0).integers(1, 9, 200))
    training, held_out = split(recordings, seed=3)
    together = np.concatenate(held_out)
    assert len(held_out) == 10 and sorted([*training, *together]) == list(range(len(recordings)))
    assert not set(recordings[training]) & set(recordings[together])
    assert all(len(set(recordings[clips])) == 1 and (np.diff(clips) == 1).all() for clips in held_out)
    assert not np.array_equal(np.concatenate(split(recordings, seed=4)[1]), together)
    assert [len(part) for part in split(np.arange(4), validation_fraction=0.01)] == [3, 1]


@pytest.mark.parametrize(
    ("own", "borrowed", "held_out"),
    [
        ((14, 9, 9), (), (2, 2, 2)),  # at least two
        ((27, 27), (100,), (10, 10, 10)),  # 20 of one's own resolve 5 %
        ((100, 200), (), (10, 20)),
        ((4, 3, 2, 1), (), (1, 1, 0, 0)),  # at most two fifths
    ],
)
def test_the_last_recordings_of_each_machine_are_held_out(own, borrowed, held_out):
    labels = np.repeat(np.arange(len(held_out)), own + borrowed)
    others = range(len(own), len(held_out))
    training, last = split(np.arange(len(labels)), labels, others, hold_out="last", validation_fraction=0.1)
    last = np.concatenate(last)
    assert np.bincount(labels[last], minlength=len(held_out)).tolist() == list(held_out)
    assert all(
        last[labels[last] == label].min() > training[labels[training] == label].max()
        for label in set(labels[last])
    )
    assert len(last) == 2 or not np.array_equal(last, np.sort(last))  # a half of them can choose the epoch
    assert len(split([0, 1, 2, 3], np.arange(4), hold_out="last")[1]) == 1  # where each machine has one


@pytest.mark.slow
def test_training_teaches(tmp_path):
    """A short training on simulated machines beats the untrained network by far; without it this fails."""
    types = SynthConfig(train_clips=14, test_normal=8, test_anomaly=8)
    data = write_dataset(tmp_path / "data", types)
    for machine_type in ("ToyCar", "ToyConveyor", "slider", "valve"):
        (data / machine_type).rename(tmp_path / machine_type)
    config = replace(
        PRESETS["quick"],
        model=replace(PRESETS["quick"].model, inputs=("log_mel", "tgram")),
        train=replace(PRESETS["quick"].train, batch_size=8, epochs=8),
    )
    best = train.train(data, tmp_path / "run", config)
    trained = evaluate(best, data, tmp_path / "trained", config=config.evaluate)
    untrained = evaluate(
        tmp_path / "run" / "initial.pt", data, tmp_path / "untrained", config=config.evaluate
    )
    after, before = (result["metrics"]["average"]["auc_id_mean"] for result in (trained, untrained))
    assert trained["identity_accuracy"] > 0.9 > untrained["identity_accuracy"] + 0.3
    assert after > 0.75 and after > before + 0.1
