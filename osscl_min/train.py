"""A training run: its folder, its epochs, its log, and going on after any interruption."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.augment import training_noise
from osscl_min.config import Config, to_dict, with_classes
from osscl_min.data.batches import batches_of, load_batches, resident, to_device
from osscl_min.data.clips import label_table
from osscl_min.data.reader import open_data, with_others
from osscl_min.runtime.device import choose_device, prepare
from osscl_min.runtime.distributed import joined
from osscl_min.runtime.files import UserError, peak_memory_mb, provenance, write_json, write_text
from osscl_min.trainer import LOSSES, Trainer


def split_validation(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to validate on: a random split; at least one clip is held out.

    Returns
    -------
    train, validation : sorted int64 arrays
    """
    order = np.random.default_rng([seed, 0]).permutation(count)
    held_out = min(max(1, round(fraction * count)), count - 2)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def shuffled(positions: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch; it follows from seed and epoch alone."""
    return np.random.default_rng([seed, 1, epoch]).permutation(positions)


def draw_mixing(
    seed: int, epoch: int, step: int, alpha: float, sizes: Sequence[int]
) -> tuple[float, list[np.ndarray]]:
    """A step's lambda, one for all ranks, and for each rank the partners within its own block.

    Parameters
    ----------
    seed, epoch, step : int
        The draws follow from these alone.
    alpha : float
        lambda ~ Beta(alpha, alpha).
    sizes : sequence of int
        Rows of each rank.
    """
    random = np.random.default_rng([seed, 2, epoch, step])
    mix = float(random.beta(alpha, alpha))
    return mix, [random.permutation(size) for size in sizes]


def train(
    data: Path | str,
    out: Path | str,
    config: Config,
    *,
    others: Path | str | None = None,
    device: str = "auto",
    strict: bool = False,
    resume: bool = False,
) -> Path:
    """Train a detector on the normal clips of a data set.

    A run that was cut short goes on where its last checkpoint stands, within an epoch too; a finished one is
    left as it is. Every random draw follows from (seed, epoch, step), so a continued run equals an
    uninterrupted one, on a CPU with as many threads to the last bit. Under torchrun, processes train
    together, each on its block of every batch.

    Parameters
    ----------
    data : Path or str
        A data folder.
    out : Path or str
        The run's folder: config.json first, then log.jsonl (a line an epoch), initial.pt (the untrained
        network), last.pt (to go on from) and best.pt (the epoch with the lowest validation loss). Where a
        number is not finite, failed.pt holds the state for inspection.
    config : Config
        The number of classes is taken from the data.
    others : Path or str, optional
        Other machines to tell one's own from, see `reader.with_others`.
    device : str
        "auto", "cpu", "cuda", "cuda:1", ...
    strict : bool
        Stop at the first unusable file.
    resume : bool
        Stop where there is nothing to go on from.

    Returns
    -------
    Path
        best.pt.

    Raises
    ------
    UserError
        If the data cannot be trained on, the folder holds another run or none to resume, it cannot be
        written, a number is not finite, or a signal asked the run to end (exit status 128 + signal).
    """
    out, where = Path(out), choose_device(device)
    if resume and not (out / "last.pt").is_file():
        raise UserError(f"{out}: nothing to resume, no last.pt is there; leave out --resume to start a run")
    with joined(where) as ranks:
        say = tqdm.write if ranks.first else lambda _: None
        running = prepare(where, config.train.precision)
        if ranks.world_size > 1:
            running += f", {ranks.world_size} processes"
        opened = open_data(data, config.model.audio, splits=["train"], strict=strict)
        if others is not None:
            opened = with_others(opened, others, config.model.audio, out, strict)
        dataset, reader = opened.dataset, opened.train
        if opened.report():
            say(opened.report())
        classes = label_table(reader.clips)
        if len(reader) < 4 * ranks.world_size:
            raise UserError(f"{dataset.root}: {len(reader)} training clips are too few")
        config = with_classes(config, len(classes))
        labels = np.array([classes.index(clip.machine) for clip in reader.clips])
        fraction, seed = config.train.validation_fraction, config.train.seed
        training, held_out = split_validation(len(reader), fraction, seed)
        about = {
            "config": to_dict(config),
            "data": {
                "folder": dataset.root.name,
                "others": others and Path(others).name,
                "synthetic": dataset.synthetic,
                "clips": _fingerprint(reader.clips),
                "training": len(training),
                "validation": len(held_out),
                "problems": dataset.problems,
                "validation_files": [reader.clips[position].path.name for position in held_out],
            },
            "classes": [list(machine) for machine in classes],
            "running": running,
            "provenance": provenance(where),
        }
        say(f"training in {running}")
        torch.manual_seed(seed)
        trainer = Trainer(config, where, ranks=ranks)
        source = resident(reader, config.model.audio.samples, where, config.engine.resident)
        files = [clip.path.name for clip in reader.clips]
        run = Run(out, about, trainer, source, labels, files, training, held_out)
        if run.take_up() and run.position.epoch >= config.train.epochs:
            say(f"{out}: already trained for {run.position.epoch} epochs, nothing to do")
            return out / "best.pt"
        with stop_on_signals(ranks.world_size == 1) as run.stop, run.progress_bar() as run.bar:
            while run.position.epoch < config.train.epochs:
                run.train_epoch()
                run.finish_epoch()
    return out / "best.pt"


@dataclass
class Position:
    """Where a run stands, to the step; a checkpoint holds it beside the networks."""

    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done of the next one
    losses: list[list[float]] = field(default_factory=list)  # LOSSES of these steps
    seconds: float = 0.0  # that these steps took
    best: float | None = None  # the lowest validation loss so far


@dataclass
class Stop:
    """The signal that has asked for the end, 0 for none."""

    signal: int = 0


@dataclass
class Run:
    """A run at work: its epochs, checkpoints, log and progress bar."""

    out: Path
    about: dict[str, Any]  # the content of config.json
    trainer: Trainer
    source: Any  # a reader, or its samples in GPU memory
    labels: np.ndarray  # (clips,) int64
    files: list[str]  # names of the clips' files
    training: np.ndarray  # positions of the clips trained on
    held_out: np.ndarray  # positions of those validated on
    position: Position = field(default_factory=Position)
    stop: Stop = field(default_factory=Stop)
    bar: tqdm | None = None
    saved: float = field(default_factory=time.perf_counter)  # when the last checkpoint was written

    def batches(self) -> list[np.ndarray]:
        """The present epoch's batches, each of all ranks together."""
        train, ranks = self.trainer.config.train, self.trainer.ranks
        order = shuffled(self.training, train.seed, self.position.epoch)
        return batches_of(order, train.batch_size, 2 * ranks.world_size)

    def train_epoch(self) -> None:
        """The rest of an epoch; a checkpoint now and then, and one where a signal asks for the end."""
        trainer, position, config = self.trainer, self.position, self.trainer.config
        ranks, device, seed = trainer.ranks, trainer.device, config.train.seed
        trainer.start_epoch(position.epoch)
        batches = self.batches()
        todo = batches[position.step :]
        own = [ranks.blocks(batch)[ranks.rank] for batch in todo]
        began, pending = time.perf_counter() - position.seconds, []
        loaded = load_batches(self.source, self.labels, own, device)
        for batch, (samples, target) in zip(todo, loaded, strict=True):
            step = position.step + len(pending)
            sizes = [len(block) for block in ranks.blocks(batch)]
            mix, partners = draw_mixing(seed, position.epoch, step, config.loss.mixup_alpha, sizes)
            if device.type == "cuda":
                mix = to_device(np.array(mix, np.float32), device)
            drawn = mix, to_device(partners[ranks.rank], device)
            share, noise = len(target) / len(batch), None
            if config.train.noise:
                random = np.random.default_rng([seed, 3, position.epoch, step, ranks.rank])
                noise = training_noise(config.train.noise, config.model.audio, random)
            pending.append(trainer.batch_step(samples, target, *drawn, share=share, transform=noise))
            self.bar.update()
            last = step + 1 == len(batches)
            due = time.perf_counter() - self.saved >= config.engine.checkpoint_seconds
            # several processes must agree, so they stop only where all look
            asked = ranks.world_size == 1 and (self.stop.signal or due)
            if not (last or asked or len(pending) >= config.engine.log_steps):
                continue
            losses = torch.stack(pending).tolist()  # waits for the device
            pending.clear()
            for number, row in enumerate(losses, position.step):
                if not all(map(math.isfinite, row)):
                    self.fail(number, f"the loss is {row[0]}")
            position.losses += losses
            position.step, position.seconds = step + 1, time.perf_counter() - began
            self.show()
            stopping = max(ranks.gather(self.stop.signal))
            if stopping or (due and not last):
                self.save()
            if stopping:
                name = signal.Signals(stopping).name
                raise UserError(
                    f"stopped by {name} at epoch {position.epoch + 1}, step {position.step} of "
                    f"{len(batches)}; saved, the same command goes on",
                    exit_status=128 + stopping,
                )

    def finish_epoch(self) -> None:
        """Validate, log and save: the first rank's work."""
        trainer, position = self.trainer, self.position
        if trainer.ranks.first:
            batches = batches_of(self.held_out, trainer.config.evaluate.batch_size)
            loaded = load_batches(self.source, self.labels, batches, trainer.device)
            validation = trainer.validate(loaded)
            entry = {
                "epoch": position.epoch + 1,
                **dict(zip(LOSSES, np.mean(position.losses, axis=0).tolist(), strict=True)),
                "validation_loss": validation.loss,
                "validation_accuracy": validation.accuracy,
                "learning_rate": trainer.learning_rate(position.epoch),
                "seconds": position.seconds,
                "clips_per_second": len(self.training) / position.seconds,
                "peak_memory_mb": peak_memory_mb(),
            }
            if not math.isfinite(validation.loss) or not trainer.is_finite():
                self.fail(position.step - 1, f"the validation loss after it is {validation.loss}")
            # a pre-trained network cannot classify yet
            classifies = position.epoch >= trainer.config.train.pretrain_epochs
            if classifies and (position.best is None or validation.loss < position.best):
                position.best = validation.loss
                calibration = {"labels": validation.labels, "scores": validation.scores}
                self._write("best.pt", position.epoch + 1, calibration=calibration)
            _append(self.out / "log.jsonl", entry)
        self.position = Position(position.epoch + 1, best=position.best)
        self.save()

    def save(self) -> None:
        """Write last.pt, unless what would be saved is not finite."""
        if self.trainer.ranks.first:
            if not self.trainer.is_finite():
                self.fail(self.position.step - 1, "the state after it is not finite")
            self._write_last("last.pt")
        self.saved = time.perf_counter()

    def fail(self, step: int, what: str) -> NoReturn:
        """Leave failed.pt and stop at a step of the present epoch."""
        if self.trainer.ranks.first:
            self._write_last("failed.pt")
        names = ", ".join(self.files[clip] for clip in self.batches()[step])
        raise UserError(
            f"epoch {self.position.epoch + 1}, step {step + 1}: {what}; its clips: {names}; "
            f"{self.out / 'failed.pt'} holds the state, last.pt stands as it was"
        )

    def take_up(self) -> bool:
        """Go on from last.pt, where there is one; otherwise begin the folder."""
        last = self.out / "last.pt"
        found, ranks = last.is_file(), self.trainer.ranks
        clips = self.about["data"]["clips"]
        if len(set(ranks.gather((found, clips)))) > 1:
            raise UserError(
                f"{self.out}: the processes see different data or run folders; they must share one"
            )
        if not found:
            if ranks.first:
                write_json(self.out / "config.json", self.about)
                self._write("initial.pt", 0)
            return False
        content = checkpoint.read(last, self.trainer.device)
        configs = [config | {"engine": None} for config in (self.about["config"], content["config"])]
        for name, difference in (
            ("configuration", _first_difference(*configs)),
            ("data", _first_difference(clips, content["clips"], "clips")),
        ):
            if difference:
                todo = "choose another folder or remove it"
                raise UserError(f"{self.out} holds a run with another {name} ({difference}); {todo}")
        self.trainer.load(content)
        self.position = Position(**content["position"])
        before, now = content.get("running"), self.about["running"]
        if before and before != now and ranks.first:
            # sums are taken in another order
            tqdm.write(f"goes on in {now} after {before}: the last bits will differ from one run in one go")
        return True

    def progress_bar(self) -> tqdm:
        """A bar that counts the steps of the whole run."""
        steps, epochs = len(self.batches()), self.trainer.config.train.epochs
        done = self.position.epoch * steps + self.position.step
        hidden = None if self.trainer.ranks.first else True
        return tqdm(total=epochs * steps, initial=done, desc="training", unit="step", disable=hidden)

    def show(self) -> None:
        """Losses of the last step and the pace, beside the bar."""
        if self.bar.disable:
            return
        bar, position, train = self.bar, self.position, self.trainer.config.train
        rate = (bar.n - bar.initial) / max(time.time() - bar.start_t, 1e-9)
        end = datetime.now() + timedelta(seconds=(bar.total - bar.n) / rate)
        total, cross_entropy, contrastive = position.losses[-1]
        bar.set_postfix_str(
            f"epoch {position.epoch + 1}/{train.epochs}, {rate * train.batch_size:.0f} clips/s, loss "
            f"{total:.3f} = {cross_entropy:.3f} + {contrastive:.3f}, lr "
            f"{self.trainer.learning_rate(position.epoch):.1e}, ends {end:%a %H:%M}"
        )

    def _write_last(self, name: str) -> None:
        about = {"clips": self.about["data"]["clips"], "running": self.about["running"]}
        state = {"position": asdict(self.position), **self.trainer.state(), **about}
        self._write(name, self.position.epoch, **state)

    def _write(self, name: str, epoch: int, **content: Any) -> None:
        content = {"ema": self.trainer.ema.state_dict(), "epoch": epoch} | content
        classes = tuple(tuple(machine) for machine in self.about["classes"])
        synthetic = self.about["data"]["synthetic"]
        checkpoint.save(self.out / name, content, self.trainer.config, classes, synthetic)


@contextmanager
def stop_on_signals(hurry: bool = True) -> Iterator[Stop]:
    """Note SIGINT or SIGTERM instead of ending at once.

    With `hurry` a second one acts as ever; torchrun passes on what its processes may have got already.
    """
    stop, before = Stop(), {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: Any) -> None:
        stop.signal = number
        if hurry:
            restore()

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()


def read_log(run: Path | str) -> list[dict[str, float]]:
    """The entries of a run's log.jsonl, an epoch each."""
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def _append(path: Path, entry: dict[str, float]) -> None:
    """Add the epoch's line; lines of epochs that a cut-short run did not finish are dropped."""
    kept = []
    if entry["epoch"] > 1:
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["epoch"] < entry["epoch"]]
    write_text(path, "\n".join([*kept, json.dumps(entry)]) + "\n")


def _first_difference(here: Any, there: Any, name: str = "") -> str:
    if isinstance(here, dict) and isinstance(there, dict):
        for key in {**here, **there}:
            found = _first_difference(here.get(key), there.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return ""
    here, there = (list(value) if isinstance(value, tuple) else value for value in (here, there))
    return "" if here == there else f"{name}: {there} there, {here} here"


def _fingerprint(clips: Sequence[Any]) -> str:
    """A digest of the clips' names and identities, to notice other data under a run."""
    text = "\n".join(f"{clip.machine_type}/{clip.split}/{clip.path.name}" for clip in clips)
    return f"{len(clips)} clips, {hashlib.sha256(text.encode()).hexdigest()[:12]}"
