"""Several processes that train together do what one does; gloo on a CPU."""

import csv
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY, environment
from test_train import equal, state

from osscl_min import checkpoint
from osscl_min.config import EngineConfig, ModelConfig
from osscl_min.data.reader import open_data
from osscl_min.evaluate import evaluate, score_clips
from osscl_min.inference.score import score
from osscl_min.model import OSSCL
from osscl_min.runtime.distributed import Ranks, current
from osscl_min.runtime.files import UserError
from osscl_min.train import read_log, train
from osscl_min.trainer import Trainer

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
ROWS, SIZES, STEPS = 7, (2, 3), 2  # blocks of 4 and 3, and of 3, 2 and 2
FRAME_MAPS = ("log_mel", "tgram")  # TFgram's statistics cannot be frozen in training
SHORT = replace(TINY, train=replace(TINY.train, epochs=2), engine=EngineConfig(checkpoint_seconds=0))


def trainer_of(ranks=Ranks(), loss=TINY.loss):  # noqa: B008
    """In float64, BatchNorm's statistics frozen."""
    torch.manual_seed(3)
    model = ModelConfig(audio=TINY.model.audio, inputs=FRAME_MAPS)
    trainer = Trainer(replace(TINY, model=model, loss=loss), CPU, OSSCL(model).double(), ranks)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return trainer


def partners(size):
    """Each block's own permutation."""
    random = np.random.default_rng(size)
    return [random.permutation(len(block)) for block in Ranks(0, size).blocks(np.arange(ROWS))]


def steps(trainer, permutation):
    """STEPS steps on this rank's rows: losses, the last gradients and the weights after them."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randint(-9000, 9000, (ROWS, TINY.model.audio.samples), generator=generator)
    wave, log_mel = (value.double() for value in trainer.front(samples.to(torch.int16)))
    labels, ranks = torch.tensor([0, 1, 2, 0, 1, 1, 0]), trainer.ranks
    own = torch.from_numpy(ranks.blocks(np.arange(ROWS))[ranks.rank])
    batch = wave[own], log_mel[own], labels[own], 0.3, torch.from_numpy(permutation), len(own) / ROWS
    losses = [trainer.step(*batch) for _ in range(STEPS)]
    return {
        "losses": losses,
        "gradients": {name: value.grad for name, value in trainer.model.named_parameters()},
        "student": trainer.model.state_dict(),
        "ema": trainer.ema.state_dict(),
    }


def together(rank, folder):
    """Three processes: steps of two and of three, then whole runs of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    for size in SIZES:
        group = dist.new_group(range(size))
        if rank < size:
            for kind in ("noise", "clean"):
                loss = replace(TINY.loss, contrastive=kind)
                done = steps(trainer_of(Ranks(rank, size, group), loss), partners(size)[rank])
                torch.save(done, f"{folder}/{kind}-{size}-{rank}.pt")
    dist.destroy_process_group()
    if rank == 2:
        return
    dist.init_process_group("gloo", init_method=f"file://{folder}/pair", rank=rank, world_size=2)
    data, step, calls = Path(folder) / "data", Trainer.step, []
    train(data, f"{folder}/whole", SHORT, device="cpu")

    def asked_to_stop(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **keywords)

    Trainer.step = asked_to_stop
    look = replace(SHORT, engine=EngineConfig(log_steps=1))
    with pytest.raises(UserError, match="stopped by SIGTERM at epoch 2, step 2 of 3") as stopped:
        train(data, f"{folder}/stopped", look, device="cpu")
    assert stopped.value.exit_status == 143
    train(data, f"{folder}/stopped", look, device="cpu")
    trained = checkpoint.load(f"{folder}/whole/best.pt")
    scored = score_clips(trained, open_data(data, trained.config.model.audio, splits=["test"]).test)
    table = Path(folder) / "two.csv"
    summary = score(f"{folder}/whole/best.pt", [str(data)], csv_path=table, batch_size=1)[1]
    if rank == 1:
        assert summary.scored == 30
        torch.save(scored.scores, f"{folder}/scores.pt")
    assert current().world_size == 2
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    (folder / "data").symlink_to(data)
    mp.start_processes(together, (str(folder),), 3, start_method="spawn")
    return folder


@pytest.mark.parametrize("kind", ["noise", "clean"])
@pytest.mark.parametrize("size", SIZES)
def test_ranks_take_the_step_of_one_process(folder, size, kind):
    blocks = Ranks(0, size).blocks(np.arange(ROWS))
    whole = np.concatenate([block[order] for block, order in zip(blocks, partners(size), strict=True)])
    alone = steps(trainer_of(loss=replace(TINY.loss, contrastive=kind)), whole)
    for rank in range(size):
        done = torch.load(folder / f"{kind}-{size}-{rank}.pt")
        for part in ("losses", "gradients", "student", "ema"):
            torch.testing.assert_close(done[part], alone[part], rtol=1e-9, atol=1e-9)
    largest = max(value.abs().max() for value in alone["gradients"].values())
    assert largest > 0.01  # far above the tolerance


def test_runs_of_two_write_once_and_go_on_bit_for_bit(folder):
    whole, stopped = folder / "whole", folder / "stopped"
    assert [entry["epoch"] for entry in read_log(stopped)] == [1, 2]
    for name in ("student", "optimizer"):
        assert equal(state(whole / "last.pt")[name], state(stopped / "last.pt")[name])
    assert equal(state(whole / "best.pt")["ema"], state(stopped / "best.pt")["ema"])
    assert not [path for path in folder.rglob("*") if path.suffix == ".part"]


def test_ranks_share_the_clips_to_score(folder):
    trained = checkpoint.load(folder / "whole" / "best.pt")
    alone = score_clips(trained, open_data(folder / "data", trained.config.model.audio, splits=["test"]).test)
    np.testing.assert_allclose(torch.load(folder / "scores.pt", weights_only=False), alone.scores, rtol=1e-4)


def test_ranks_share_recordings(folder):
    """In rounds of sixteen files, as one process would have them."""
    score(folder / "whole" / "best.pt", [str(folder / "data")], csv_path=folder / "one.csv")
    with open(folder / "one.csv", newline="") as one, open(folder / "two.csv", newline="") as two:
        for alone, both in zip(csv.DictReader(one), csv.DictReader(two), strict=True):
            assert Path(alone["file"]).name == Path(both["file"]).name
            assert alone["threshold"] == both["threshold"]
            assert float(alone["score"]) == pytest.approx(float(both["score"]), rel=1e-4)


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "osscl_min", *map(str, arguments)]
    return subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)


def test_torchrun_trains_and_evaluates(data, tmp_path):
    settings = ["--preset", "quick", "--model.audio.seconds", "1", "--train.epochs", "1", "--device", "cpu"]
    done = torchrun("train", "--data", data, "--out", tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best.pt") == 1
    assert '"running": "float32 on cpu, 1 thread, 2 processes"' in (tmp_path / "config.json").read_text()
    options = ["--bootstrap", "10", "--device", "cpu"]
    done = torchrun(
        "evaluate", "--checkpoint", tmp_path / "best.pt", "--data", data, "--out", tmp_path / "two", *options
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("average") == 1
    evaluate(tmp_path / "best.pt", data, tmp_path / "one", device="cpu")
    one, two = ((tmp_path / name / "scores.csv").read_text().splitlines() for name in ("one", "two"))
    assert [line.split(",")[:5] for line in one] == [line.split(",")[:5] for line in two]


def test_an_error_on_one_rank_ends_all(data, tmp_path):
    (tmp_path / "file").write_text("")
    settings = ["--preset", "quick", "--model.audio.seconds", "1", "--device", "cpu"]
    done = torchrun("train", "--data", data, "--out", tmp_path / "file" / "run", *settings)
    assert done.returncode != 0
    assert "osscl: cannot write" in done.stderr
