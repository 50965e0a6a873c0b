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

from osscl_min.config import EngineConfig, ModelConfig
from osscl_min.evaluate import evaluate
from osscl_min.inference.score import score
from osscl_min.model import OSSCL
from osscl_min.runtime.distributed import Ranks, current
from osscl_min.runtime.files import UserError
from osscl_min.train import read_log, train
from osscl_min.trainer import Trainer

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
ROWS, STEPS = 7, 2
CASES = {"noise": 3, "clean": 2}  # kinds of the contrastive loss, processes: blocks of 3, 2 and 2, of 4 and 3
FRAME_MAPS = ("log_mel", "tgram")  # TFgram's statistics cannot be frozen in training
FEW = "--preset quick --model.audio.seconds 1 --model.inputs log_mel --device cpu".split()
SCORING = replace(TINY.evaluate, bootstrap=0)
SHORT = replace(TINY, train=replace(TINY.train, epochs=2), engine=EngineConfig(checkpoint_seconds=0))


def trainer_of(kind, ranks=Ranks()):  # noqa: B008
    """In float64, BatchNorm's statistics frozen."""
    torch.manual_seed(3)
    model = ModelConfig(audio=TINY.model.audio, inputs=FRAME_MAPS)
    config = replace(TINY, model=model, loss=replace(TINY.loss, contrastive=kind))
    trainer = Trainer(config, CPU, OSSCL(model).double(), ranks)
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
    """Three processes: steps of three and of two, then whole runs of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    for kind, size in CASES.items():
        group = dist.new_group(range(size))
        if rank < size:
            done = steps(trainer_of(kind, Ranks(rank, size, group)), partners(size)[rank])
            torch.save(done, f"{folder}/{kind}-{rank}.pt")
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
    best = f"{folder}/whole/best.pt"
    evaluate(best, data, f"{folder}/two", config=SCORING, device="cpu")
    summary = score(best, [str(data)], csv_path=Path(folder) / "two.csv", batch_size=1)[1]
    assert rank == 0 or summary.scored == 42
    assert current().world_size == 2
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    (folder / "data").symlink_to(data)
    mp.start_processes(together, (str(folder),), 3, start_method="spawn")
    return folder


@pytest.mark.parametrize(("kind", "size"), CASES.items())
def test_ranks_take_the_step_of_one_process(folder, kind, size):
    blocks = Ranks(0, size).blocks(np.arange(ROWS))
    whole = np.concatenate([block[order] for block, order in zip(blocks, partners(size), strict=True)])
    alone = steps(trainer_of(kind), whole)
    for rank in range(size):
        done = torch.load(folder / f"{kind}-{rank}.pt")
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


def test_ranks_share_the_clips_and_recordings_to_score(folder):
    """Recordings in rounds of sixteen files, as one process would have them."""
    best, data = folder / "whole" / "best.pt", folder / "data"
    evaluate(best, data, folder / "one", config=SCORING, device="cpu")
    score(best, [str(data)], csv_path=folder / "one.csv")
    for file in ("{}/scores.csv", "{}.csv"):
        with open(folder / file.format("one")) as one, open(folder / file.format("two")) as two:
            for alone, both in zip(csv.DictReader(one), csv.DictReader(two), strict=True):
                assert float(alone.pop("score")) == pytest.approx(float(both.pop("score")), rel=1e-4)
                scores = [name for name in ("nearest", "profile", "gaussian") if name in alone]
                for name in scores:  # in deviations of distances, which are small after two epochs
                    assert float(alone[name]) == pytest.approx(float(both[name]), rel=0.01, abs=0.1)
                same = alone.keys() - {"file", "p_value", "window_p_value", *scores}
                assert {key: alone[key] for key in same} == {key: both[key] for key in same}


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "osscl_min", *map(str, arguments)]
    return subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)


def test_torchrun_trains(data, tmp_path):
    done = torchrun("train", "--data", data, "--out", tmp_path, "--train.epochs", "1", *FEW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best.pt") == 1
    assert '"running": "float32 on cpu, 1 thread, 2 processes"' in (tmp_path / "config.json").read_text()


def test_an_error_on_one_rank_ends_all(data, tmp_path):
    (tmp_path / "file").write_text("")
    done = torchrun("train", "--data", data, "--out", tmp_path / "file" / "run", *FEW)
    assert done.returncode != 0
    assert "osscl: cannot write" in done.stderr
