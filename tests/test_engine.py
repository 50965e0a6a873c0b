"""The training engine: runs go on bit for bit from any moment, and nothing bad replaces a checkpoint."""

import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import COMMAND, TINY, environment, kill_when, refused
from test_train import equal, state

from osscl_min import train
from osscl_min import trainer as trainer_module
from osscl_min.config import EngineConfig
from osscl_min.data.batches import load_batches, resident
from osscl_min.data.reader import open_data
from osscl_min.model import OSSCL
from osscl_min.runtime.distributed import Ranks
from osscl_min.runtime.files import locked
from osscl_min.runtime.graph import CaptureError
from osscl_min.train import draw_mixing
from osscl_min.trainer import Trainer

EVERY_STEP = replace(TINY, engine=EngineConfig(checkpoint_seconds=0))
CPU = torch.device("cpu")


@pytest.fixture
def after_step(monkeypatch):
    """Makes a run do something after its `number`-th step; counts the steps."""

    def install(number, action):
        step, calls = Trainer.step, []

        def watched(self, *arguments, **keywords):
            losses = step(self, *arguments, **keywords)
            calls.append(1)
            return (len(calls) == number and action(self, losses)) or losses

        monkeypatch.setattr(Trainer, "step", watched)
        return calls

    return install


def same_run(one, other):
    for name in ("last.pt", "best.pt"):
        assert equal(*(state(run / name) | {"config": None} for run in (one, other)))
    for a, b in zip(train.read_log(one), train.read_log(other), strict=True):
        timed = {"seconds", "clips_per_second", "peak_memory_mb"}
        assert {key: a[key] for key in a.keys() - timed} == {key: b[key] for key in b.keys() - timed}


@pytest.mark.slow
def test_killed_at_a_random_moment_it_ends_with_the_same_weights(data, uninterrupted, tmp_path):
    """The same run as EVERY_STEP, as a process of its own with as many threads: bits depend on it."""
    settings = "--preset quick --model.audio.seconds 1 --model.inputs log_mel --train.epochs 3"
    settings += f" --train.batch-size 5 --engine.checkpoint-seconds 0 --device cpu --out {tmp_path}"
    arguments = [*COMMAND, "train", "--data", str(data), *settings.split()]
    threads = environment(OMP_NUM_THREADS=str(torch.get_num_threads()))
    process = subprocess.Popen(arguments, env=threads, stderr=subprocess.PIPE, start_new_session=True)
    kill_when(process, (tmp_path / "last.pt").is_file, random.uniform(0, 1))
    train.train(data, tmp_path, EVERY_STEP, resume=True)
    same_run(uninterrupted, tmp_path)


def test_says_once_that_other_threads_or_implementations_give_other_bits(
    uninterrupted, data, tmp_path, capfd
):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    train.train(data, out, TINY)
    assert "last bits" not in capfd.readouterr().out
    content = state(out / "last.pt") | {"running": "float32 on cpu, 99 threads", "computed_by": "abacus"}
    torch.save(content, out / "last.pt")
    train.train(data, out, TINY)
    screen = capfd.readouterr().out
    assert screen.count("the last bits will differ") == 1
    assert "instead of float32 on cpu, 99 threads and " in screen and " instead of abacus: " in screen


@contextmanager
def full_disk():
    """No file may grow beyond what an EMA alone takes; last.pt holds four times as much."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("config", "number", "kept"),
    [
        (EVERY_STEP, 2, 1),
        pytest.param(EVERY_STEP, 4, 3, marks=pytest.mark.slow),
        pytest.param(TINY, 6, 3, marks=pytest.mark.slow),
    ],
)
def test_it_goes_on_from_any_step_and_after_a_full_disk(
    data, uninterrupted, tmp_path, after_step, config, number, kept
):
    """Interrupted in step `number` of nine, the steps up to `kept` on the disk: in an epoch, at its end."""

    def stop(trainer, losses):
        raise KeyboardInterrupt

    calls = after_step(number, stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(data, tmp_path, config)
    at = state(tmp_path / "last.pt")["position"]
    assert (at["epoch"], at["step"], len(at["losses"])) == (kept // 3, kept % 3, kept % 3)
    before = (tmp_path / "last.pt").read_bytes()
    with full_disk(), refused(r"cannot write .*last\.pt: File too large"):
        train.train(data, tmp_path, EVERY_STEP)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    train.train(data, tmp_path, TINY)  # how a run is carried out may change
    assert len(calls) == number + 1 + 9 - kept  # what is on the disk is not repeated
    same_run(uninterrupted, tmp_path)
    finished = (tmp_path / "last.pt").stat().st_mtime_ns
    train.train(data, tmp_path, TINY)  # is left alone
    assert (tmp_path / "last.pt").stat().st_mtime_ns == finished


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(data, tmp_path, after_step, number):
    after_step(5, lambda trainer, losses: os.kill(os.getpid(), number))
    stopped = f"stopped by {number.name} at epoch 2, step 2 of 3; saved, the same command resumes"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with refused(stopped, 128 + number):
        train.train(data, tmp_path, TINY)
    at = state(tmp_path / "last.pt")["position"]
    assert (at["epoch"], at["step"]) == (1, 2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_a_folder_that_another_process_trains_in_is_refused(data, tmp_path):
    with locked(tmp_path, "training"), refused("another process is training here"):
        train.train(data, tmp_path, TINY)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_state_that_is_not_finite_replaces_nothing(data, tmp_path, after_step):
    def poison(trainer, losses):  # the loss is still a number
        with torch.no_grad():
            next(iter(trainer.optimizer.state.values()))["exp_avg"].view(-1)[3] = torch.inf

    after_step(5, poison)
    with refused(r"epoch 2, step 2: the state after it is not finite; its clips: norm"):
        train.train(data, tmp_path, EVERY_STEP)
    at, failed = state(tmp_path / "last.pt"), state(tmp_path / "failed.pt")
    assert (at["position"]["epoch"], at["position"]["step"]) == (1, 1)
    assert failed["position"]["step"] == 2 and not equal(failed["optimizer"], at["optimizer"])
    train.train(data, tmp_path, TINY)


def test_a_bad_loss_is_noticed_at_the_next_look(data, tmp_path, after_step):
    calls = after_step(1, lambda trainer, losses: {name: loss * torch.nan for name, loss in losses.items()})
    config = replace(TINY, engine=EngineConfig(log_steps=2))
    with refused(r"epoch 1, step 1: the loss is nan; its clips: normal_id_"):
        train.train(data, tmp_path, config)
    assert len(calls) == 2 and not (tmp_path / "last.pt").exists() and (tmp_path / "failed.pt").is_file()


def test_the_progress_line(data, tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    train.train(data, tmp_path, replace(TINY, train=replace(TINY.train, epochs=1)))
    losses = r"total [\d.]+, cross_entropy [\d.]+, contrastive [\d.]+, lr 2.0e-03"
    assert re.search(rf"16/16 .*(clip/s|s/clip), epoch 1/1, {losses}", screen.getvalue())


def test_batches_arrive_in_order(data):
    reader = open_data(data, TINY.model.audio, splits=["train"]).train
    batches = [np.array(batch) for batch in ([3, 1, 2], [0, 4, 5], [6, 7], [8, 9, 10, 3], [1, 2])]
    labels = np.arange(len(reader)) * 10
    for source in (reader, resident(reader, CPU, chunk=4)):
        loaded = load_batches(source, labels, batches, CPU)
        for batch, (samples, target) in zip(batches, loaded, strict=True):
            np.testing.assert_array_equal(samples, reader.read(batch))
            assert samples.dtype == torch.int16 and target.tolist() == (10 * batch).tolist()
    assert list(load_batches(reader, labels, [], CPU)) == []


def test_blocks_and_partners():
    whole = draw_mixing(7, 2, 3, 0.5, [5])
    lam, partners = draw_mixing(7, 2, 3, 0.5, [3, 2])
    assert lam == whole[0] and [sorted(block) for block in partners] == [[0, 1, 2], [0, 1]]
    assert draw_mixing(7, 2, 4, 0.5, [5])[0] != lam
    blocks = Ranks(1, 3).blocks(np.arange(7))
    assert [len(block) for block in blocks] == [3, 2, 2] and np.concatenate(blocks).tolist() == [*range(7)]


def steps(trainer, lam, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(-9000, 9000, (6, trainer.config.model.audio.samples), generator=generator)
    wave, log_mel = (value.to(dtype) for value in trainer.front(samples.to(torch.int16)))
    batch = torch.arange(6) % 4, lam, torch.randperm(6, generator=generator)
    return torch.stack([trainer.step(wave, log_mel, *batch)["total"] for _ in range(2)])


def test_lambda_and_learning_rate_as_tensors_give_the_same_step():
    """What a CUDA graph needs."""
    torch.manual_seed(0)
    plain, tensors = (Trainer(TINY, CPU, OSSCL(TINY.model).double()) for _ in range(2))
    tensors.load_state_dict(plain.state_dict())
    for group in tensors.optimizer.param_groups:
        group["lr"] = torch.tensor(float("nan"))
    for trainer in (plain, tensors):
        trainer.start_epoch(1)
    ours = steps(plain, 0.3, torch.float64)
    theirs = steps(tensors, torch.tensor(0.3, dtype=torch.float64), torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    student, expected = (trainer.model.state_dict() for trainer in (tensors, plain))
    torch.testing.assert_close(student, expected, rtol=1e-5, atol=1e-6)
    assert plain.is_finite()


def test_steps_run_eagerly_where_a_graph_cannot_be_captured(capsys):
    def refuse(*batch):
        raise CaptureError("operation not permitted when stream is capturing")

    torch.manual_seed(0)
    config = replace(TINY, train=replace(TINY.train, batch_size=6))
    plain, graphed = (Trainer(config, CPU) for _ in range(2))
    graphed.load_state_dict(plain.state_dict())
    graphed.graph, lam = refuse, torch.tensor(0.3)
    assert torch.equal(steps(graphed, lam), steps(plain, lam))
    assert graphed.graph is None
    assert capsys.readouterr().out.count("steps run without a CUDA graph: operation not permitted") == 1


def test_what_computes_the_training_layers_is_recorded(monkeypatch):
    for line, recorded in (("fast layers", "fast layers"), ("", "PyTorch")):
        monkeypatch.setattr(trainer_module, "accelerate", lambda model, line=line: line)
        assert Trainer(TINY, CPU).computed_by == recorded
