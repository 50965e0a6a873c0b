"""A training run: its folder, its epochs, its log, and how it resumes after any interruption."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.augment import training_noise
from osscl_min.config import Config, TrainConfig, from_dict, to_dict, with_classes
from osscl_min.data.batches import batches_of, load_batches, source_of, to_device
from osscl_min.data.clips import BENCHMARK, label_table
from osscl_min.data.reader import Reader, open_data, with_others
from osscl_min.evaluate import score_batches
from osscl_min.model import OSSCL
from osscl_min.neighbours import FORMS, Neighbours, choose
from osscl_min.runtime.device import choose_device, prepare
from osscl_min.runtime.distributed import joined
from osscl_min.runtime.files import (
    UserError,
    locked,
    peak_memory_mb,
    printable,
    provenance,
    read_json,
    write_json,
    write_text,
)
from osscl_min.runtime.settings import flat
from osscl_min.runtime.signals import noting_signals
from osscl_min.trainer import Trainer

RESOLVING = 20  # recordings held out for thresholds at a false-alarm rate of 5 %, where there are enough
POSITION = ("epoch", "step", "losses", "seconds", "best")  # fields of a Run that its checkpoints hold


def split_validation(
    recordings: np.ndarray, labels: np.ndarray, borrowed: Sequence[int], config: TrainConfig
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Positions of the clips to train on, sorted, and those of each recording that is held out.

    `recordings` (clips,) numbers each clip's recording from 0, `labels` (clips,) are classes, and `borrowed`
    are the classes of machines that are not one's own (see `with_others`). At least one recording is held
    out; see `TrainConfig.hold_out`.
    """
    count, fraction, last = recordings.max() + 1, config.validation_fraction, [np.array([], int)]
    own = len(np.unique(recordings[~np.isin(labels, borrowed)]))
    enough = max(fraction, RESOLVING / own) if own >= 2.5 * RESOLVING else fraction  # see hold_out
    for label in np.unique(labels) if config.hold_out == "last" else ():
        of_machine = np.unique(recordings[labels == label])
        number = math.ceil((fraction if label in borrowed else enough) * len(of_machine) - 1e-9)
        last.append(of_machine[len(of_machine) - min(max(2, number), 2 * len(of_machine) // 5) :])
    order = np.random.default_rng([config.seed, 0]).permutation(count)
    held_out = order[np.isin(order, np.concatenate(last))]
    if not len(held_out):
        held_out = order[: min(max(1, round(fraction * count)), count - 2)]
    training = np.flatnonzero(~np.isin(recordings, held_out))
    return training, [np.flatnonzero(recordings == recording) for recording in held_out]


def held_out_roles(
    held_out: Sequence[np.ndarray], labels: np.ndarray, borrowed: Sequence[int], keep: str
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the held-out clips, one recording after the other, choose the epoch, and which set thresholds.

    `labels` are those of all clips; the other settings are as in `split_validation` and `TrainConfig.keep`.
    """
    own = ~np.isin(labels[np.concatenate(held_out)], borrowed)
    if keep == "last":
        return np.ones(len(own), bool), own
    half = len(np.concatenate(held_out[: (len(held_out) + 1) // 2]))
    choosing = np.arange(len(own)) < half
    return choosing, own & ~choosing


def draw_mixing(
    seed: int, epoch: int, step: int, alpha: float, sizes: Sequence[int]
) -> tuple[float, list[np.ndarray]]:
    """A step's lambda ~ Beta(alpha, alpha) and, per rank of `sizes` clips, partners within its own block."""
    random = np.random.default_rng([seed, 2, epoch, step])
    lam = float(random.beta(alpha, alpha))
    return lam, [random.permutation(size) for size in sizes]


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

    An interrupted run resumes from its last checkpoint, within an epoch too; a finished run is left as it is.
    Every random draw follows from (seed, epoch, step), so on a CPU with as many threads a resumed run equals
    an uninterrupted one to the last bit. Under torchrun, processes train together.

    Parameters
    ----------
    data : Path or str
        A data folder, manifest or packed store.
    out : Path or str
        The run's folder: config.json first, then log.jsonl (a line per epoch), initial.pt (the untrained
        network), last.pt (to resume from) and best.pt (the detector, see `TrainConfig.keep`). If a number
        is not finite, failed.pt holds the state for inspection.
    config : Config
        The number of classes is taken from the data.
    others : Path or str, optional
        Other machines to tell one's own from, see `with_others`.
    strict, resume : bool
        Stop if any file cannot be used; stop if there is nothing to resume.

    Returns
    -------
    Path
        best.pt.

    Raises
    ------
    UserError
        If the data cannot be trained on; if the folder is in use or holds another run; if a number is not
        finite; if a signal stopped the run (exit status 128 + signal).
    """
    out, where = Path(out), choose_device(device)
    if resume and not (out / "last.pt").is_file():
        raise UserError(
            f"{printable(out)}: nothing to resume, it has no last.pt; omit --resume to start a run"
        )
    with joined(where) as ranks, ExitStack() as stack:
        say = tqdm.write if ranks.first else lambda _: None
        running = prepare(where, config.train.precision)
        if ranks.world_size > 1:
            running += f", {ranks.world_size} processes"
        opened = open_data(data, config.model.audio, splits=["train"], strict=strict)
        if ranks.first:
            stack.enter_context(locked(out, "training"))
        own = {clip.machine for clip in opened.train.clips}
        if others is not None:
            opened = with_others(opened, others, config.model.audio, out, strict)
        dataset, reader = opened.dataset, opened.train
        if report := dataset.report():
            say(report)
        # None: the data decides
        classes = label_table(reader.clips, benchmark=config.preset == "paper" or None)
        recordings = len(set(reader.recordings.tolist()))
        if recordings < 4 or len(reader) < 4 * ranks.world_size:
            few = f"{recordings} training recordings ({len(reader)} clips) are too few"
            raise UserError(f"{printable(dataset.root)}: {few}; give at least 4, and 4 clips per process")
        if config.train.batch_size < 2 * ranks.world_size:
            raise UserError(f"train.batch_size: {ranks.world_size} processes need at least two clips each")
        if classes == BENCHMARK and config.preset != "paper" and not dataset.synthetic:
            say(f"preset {config.preset} is not the paper's experiment on this data; --preset paper is")
        config = with_classes(config, len(classes))
        labels = np.array([classes.index(clip.machine) for clip in reader.clips])
        borrowed = [label for label, machine in enumerate(classes) if machine not in own]
        training, held_out = split_validation(reader.recordings, labels, borrowed, config.train)
        torch.manual_seed(config.train.seed)
        trainer = Trainer(config, where, ranks=ranks)
        say(f"training in {running}; {trainer.computed_by}")
        about = {
            "config": to_dict(config),
            "data": {
                "folder": printable(dataset.root.name),
                "others": others and printable(Path(others).name),
                "synthetic": dataset.synthetic,
                "clips": _fingerprint(reader.clips),
                "training": len(training),
                "validation": sum(map(len, held_out)),
                "problems": dataset.problems,
                "validation_files": sorted(printable(reader.clips[clips[0]].path.name) for clips in held_out),
            },
            "classes": classes,
            "running": running,
            "provenance": provenance(where) | {"computed_by": trainer.computed_by},
        }
        source = source_of(reader, where, config.engine.resident)
        run = Run(out, about, trainer, source, reader, labels, borrowed, training, held_out)
        run.start_or_resume()
        if run.epoch >= config.train.epochs:
            say(f"{printable(out)}: already trained for {run.epoch} epochs, nothing to do")
        else:
            run.signals = stack.enter_context(noting_signals(ranks.world_size == 1))
            run.bar = stack.enter_context(run.progress_bar())
            while run.epoch < config.train.epochs:
                run.train_epoch()
                run.finish_epoch()
            run.bar.close()
        if ranks.first and (remark := run.complete()):
            say(remark)
    return out / "best.pt"


@dataclass
class Run:
    """A run in progress: its epochs, checkpoints, log and progress bar."""

    out: Path
    about: dict[str, Any]  # the content of config.json
    trainer: Trainer
    source: Any  # a reader, or its samples in GPU memory
    reader: Reader
    labels: np.ndarray  # (clips,) int64
    borrowed: list[int]  # classes of machines that are not one's own
    training: np.ndarray  # positions of the training clips
    held_out: list[np.ndarray]  # positions of the clips of each recording that is held out
    epoch: int = 0  # whole epochs done
    step: int = 0  # steps done of the next one
    losses: list[dict[str, float]] = field(default_factory=list)  # of these steps
    seconds: float = 0.0  # of these steps
    best: float | None = None  # validation loss of best.pt
    signals: list[int] = field(default_factory=list)  # that asked the run to stop
    bar: tqdm | None = None
    saved: float = field(default_factory=time.perf_counter)  # when last.pt was written

    def batches(self) -> list[np.ndarray]:
        """The current epoch's batches, each of all ranks together."""
        train, ranks = self.trainer.config.train, self.trainer.ranks
        order = np.random.default_rng([train.seed, 1, self.epoch]).permutation(self.training)
        return batches_of(order, train.batch_size, 2 * ranks.world_size)

    def train_epoch(self) -> None:
        """Train for the rest of an epoch; write a checkpoint now and then, and when a signal asks to stop."""
        trainer, ranks, engine = self.trainer, self.trainer.ranks, self.trainer.config.engine
        trainer.start_epoch(self.epoch)
        batches = self.batches()
        todo = batches[self.step :]
        blocks = [ranks.blocks(batch)[ranks.rank] for batch in todo]
        began, pending = time.perf_counter() - self.seconds, []
        loaded = load_batches(self.source, self.labels, blocks, trainer.device)
        for batch, (samples, labels) in zip(todo, loaded, strict=True):
            step = self.step + len(pending)  # self.step counts those whose losses were looked at
            pending.append(self.train_step(step, batch, samples, labels))
            self.bar.update(len(batch))
            last = step + 1 == len(batches)
            due = time.perf_counter() - self.saved >= engine.checkpoint_seconds
            # several processes must agree, so they stop only where all of them look
            look = ranks.world_size == 1 and (self.signals or due)
            if not (last or look or len(pending) >= engine.log_steps):
                continue
            # waits for the device
            values = torch.stack([torch.stack(list(losses.values())) for losses in pending]).tolist()
            rows = [dict(zip(pending[0], row, strict=True)) for row in values]
            pending.clear()
            for number, row in enumerate(rows, self.step):
                if not all(map(math.isfinite, row.values())):
                    self.fail(number, f"the loss is {row['total']}")
            self.losses += rows
            self.step, self.seconds = step + 1, time.perf_counter() - began
            self.show()
            stopping = max(ranks.gather(self.signals[-1] if self.signals else 0))
            if stopping or (due and not last):
                self.save()
            if stopping:
                raise UserError(
                    f"stopped by {signal.Signals(stopping).name} at epoch {self.epoch + 1}, step {self.step} "
                    f"of {len(batches)}; saved, the same command resumes",
                    exit_status=128 + stopping,
                )

    def train_step(
        self, step: int, batch: np.ndarray, samples: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Draw a step's lambda, partners and noise, and train on this rank's samples of the batch."""
        trainer, config = self.trainer, self.trainer.config
        ranks, device, seed = trainer.ranks, trainer.device, config.train.seed
        sizes = [len(block) for block in ranks.blocks(batch)]
        lam, partners = draw_mixing(seed, self.epoch, step, config.loss.mixup_alpha, sizes)
        partners, add_noise = to_device(partners[ranks.rank], device), None
        if device.type == "cuda":
            lam = to_device(np.array(lam, np.float32), device)
        if config.train.noise:
            random = np.random.default_rng([seed, 3, self.epoch, step, ranks.rank])
            add_noise = training_noise(config.train.noise, config.model.audio, random)
        wave, log_mel = trainer.front(samples, add_noise)
        return trainer.step(wave, log_mel, labels, lam, partners, share=len(labels) / len(batch))

    def finish_epoch(self) -> None:
        """Validate, log and save; the first rank's work."""
        trainer, train = self.trainer, self.trainer.config.train
        if trainer.ranks.first:
            held_out = np.concatenate(self.held_out)
            labels, scores, predicted, *_ = self.score(trainer.ema, held_out)
            recordings = torch.from_numpy(self.reader.recordings[held_out])
            choosing, calibrating = held_out_roles(self.held_out, self.labels, self.borrowed, train.keep)
            loss = scores[choosing].mean().item()
            if not math.isfinite(loss) or not trainer.is_finite():
                self.fail(self.step - 1, f"the state or the validation loss after it is not finite ({loss})")
            # before the end of pre-training, a network cannot classify
            classifies = self.epoch >= train.pretrain_epochs
            if classifies and (train.keep == "last" or self.best is None or loss < self.best):
                self.best = loss
                values = {"labels": labels, "recordings": recordings, "scores": scores}
                calibration = {name: value[calibrating] for name, value in values.items()}
                self._write("best.pt", self.epoch + 1, calibration=calibration)
            accuracy = (predicted == labels)[choosing].double().mean().item()
            entry = {
                "epoch": self.epoch + 1,
                **{name: float(np.mean([row[name] for row in self.losses])) for name in self.losses[0]},
                "validation_loss": loss,
                "validation_accuracy": accuracy,
                "learning_rate": trainer.learning_rate(self.epoch),
                "seconds": self.seconds,
                "clips_per_second": len(self.training) / self.seconds,
                "peak_memory_mb": peak_memory_mb(),
            }
            _append(self.out / "log.jsonl", entry)
        self.epoch, self.step, self.losses, self.seconds = self.epoch + 1, 0, [], 0.0
        self.save()

    def score(self, model: OSSCL, positions: np.ndarray) -> tuple[torch.Tensor, ...]:
        """`score_batches` of the clips at `positions`."""
        trainer, config = self.trainer, self.trainer.config
        batches = batches_of(positions, config.evaluate.batch_size)
        loaded = load_batches(self.source, self.labels, batches, trainer.device)
        return score_batches(model, trainer.front, loaded, config.train.precision)

    def complete(self) -> str:
        """Add to best.pt the training clips to compare with, and how well it recognises held-out recordings.

        Returns a line on the latter.
        """
        trained = checkpoint.load(self.out / "best.pt", self.trainer.device)
        if trained.neighbours is not None or "recordings" not in (trained.calibration or {}):
            return trained.remark
        recordings, seed = self.reader.recordings, self.trainer.config.train.seed
        kept = self.training[choose(self.labels[self.training], recordings[self.training], seed)]
        *_, embeddings, profiles = (value.numpy() for value in self.score(trained.model, kept))
        neighbours = Neighbours(self.labels[kept], recordings[kept], embeddings, profiles)
        held_out = np.concatenate(self.held_out)
        labels, _, predicted, *described = (value.numpy() for value in self.score(trained.model, held_out))
        calibrating = np.isin(recordings[held_out], trained.calibration["recordings"].numpy())
        forms = {form: neighbours.scores(form, labels, *described)[calibrating] for form in FORMS}
        ends = np.cumsum([len(clips) for clips in self.held_out])
        # a recording counts with its share of recognised clips; the sum is rounded down
        recognised = int(sum(clips.mean() for clips in np.split(predicted == labels, ends[:-1])) + 1e-9)
        # of naming the commonest machine always
        chance = np.bincount(self.labels[self.training]).max() / len(self.training)
        test = binomtest(recognised, len(ends), chance, alternative="greater")
        names = "labels", "recordings", "embeddings", "profiles"
        more = {
            "calibration": trained.calibration | {form: torch.from_numpy(forms[form]) for form in FORMS},
            "neighbours": {name: torch.from_numpy(getattr(neighbours, name)) for name in names},
            "borrowed": self.borrowed,
            "recognition": {
                "recordings": len(ends),
                "recognised": recognised,
                "chance": float(chance),
                "p_value": float(test.pvalue),
            },
        }
        content = checkpoint.read(trained.path) | more
        checkpoint.save(trained.path, content, trained.config, trained.classes, trained.synthetic)
        return checkpoint.load(trained.path).remark

    def save(self) -> None:
        """Write last.pt, unless the state is not finite."""
        if self.trainer.ranks.first:
            if not self.trainer.is_finite():
                self.fail(self.step - 1, "the state after it is not finite")
            self._write_state("last.pt")
        self.saved = time.perf_counter()

    def fail(self, step: int, what: str) -> NoReturn:
        """Write failed.pt and stop at a step of the current epoch."""
        if self.trainer.ranks.first:
            self._write_state("failed.pt")
        names = ", ".join(printable(self.reader.clips[clip].path.name) for clip in self.batches()[step])
        raise UserError(
            f"epoch {self.epoch + 1}, step {step + 1}: {what}; its clips: {names}; "
            f"{printable(self.out / 'failed.pt')} holds the state for inspection, last.pt is unchanged"
        )

    def start_or_resume(self) -> None:
        """Resume from last.pt if it exists; otherwise start the run folder. Refuses another run's folder."""
        settings, last, ranks = self.out / "config.json", self.out / "last.pt", self.trainer.ranks
        resumes, clips, earlier = last.is_file(), self.about["data"]["clips"], []
        folder = printable(self.out)
        if len(set(ranks.gather((resumes, clips)))) > 1:
            raise UserError(f"{folder}: the processes must see the same data and the same run folder")
        if settings.is_file():
            content = read_json(settings)
            with checkpoint.refusing(settings):
                earlier.append((to_dict(from_dict(content["config"])), content["data"]["clips"]))
        if resumes:
            content = checkpoint.read(last)
            with checkpoint.refusing(last):
                earlier.append((to_dict(from_dict(content["config"])), content["clips"]))
        here = flat({"config": self.about["config"] | {"engine": {}}, "clips": clips})
        for config, names in earlier:
            there = flat({"config": config | {"engine": {}}, "clips": names})
            for name in (name for name in here if here[name] != there[name]):
                what = f"{name.removeprefix('config.')}: {there[name]} there, {here[name]} here"
                raise UserError(f"{folder} holds another run ({what}); choose another folder or remove it")
        if not resumes:
            if ranks.first:
                for name in ("best.pt", "initial.pt") if not earlier else ():
                    if (self.out / name).exists():
                        raise UserError(f"{folder} holds {name} of another run; choose another folder")
                write_json(settings, self.about)
                self._write("initial.pt", 0)
            return
        with checkpoint.refusing(last):
            self.trainer.load_state_dict(content)
            for name in POSITION:
                setattr(self, name, content["position"][name])
            names = "total", "cross_entropy", "contrastive"  # of the bare rows that older files have
            self.losses = [
                row if isinstance(row, dict) else dict(zip(names, row, strict=True)) for row in self.losses
            ]
            now = self.about["running"], self.trainer.computed_by
            before = content["running"], content.get("computed_by", now[1])
        if self.best is not None and not (self.out / "best.pt").is_file():
            raise UserError(f"{folder}: best.pt is missing; restore it, or remove the folder to train again")
        if before != now and ranks.first:  # sums are taken in another order
            changes = " and ".join(
                f"{new} instead of {old}" for old, new in zip(before, now, strict=True) if old != new
            )
            tqdm.write(f"resuming with {changes}: the last bits will differ from an uninterrupted run")

    def progress_bar(self) -> tqdm:
        """Progress bar over the training clips of all epochs."""
        epochs, done = self.trainer.config.train.epochs, self.epoch * len(self.training)
        done += sum(map(len, self.batches()[: self.step]))
        hidden = None if self.trainer.ranks.first else True
        total = epochs * len(self.training)
        return tqdm(total=total, initial=done, desc="training", unit="clip", disable=hidden)

    def show(self) -> None:
        """The last step's losses beside the bar."""
        losses = ", ".join(f"{name} {value:.3f}" for name, value in self.losses[-1].items())
        epoch = f"epoch {self.epoch + 1}/{self.trainer.config.train.epochs}"
        self.bar.set_postfix_str(f"{epoch}, {losses}, lr {self.trainer.learning_rate(self.epoch):.1e}")

    def _write_state(self, name: str) -> None:
        content = {
            "position": {key: getattr(self, key) for key in POSITION},
            "clips": self.about["data"]["clips"],
            "running": self.about["running"],
        }
        self._write(name, self.epoch, **content, **self.trainer.state_dict())

    def _write(self, name: str, epoch: int, **content: Any) -> None:
        content = {
            "ema": self.trainer.ema.state_dict(),
            "epoch": epoch,
            "computed_by": self.trainer.computed_by,
        } | content
        classes, synthetic = self.about["classes"], self.about["data"]["synthetic"]
        checkpoint.save(self.out / name, content, self.trainer.config, classes, synthetic)


def read_log(run: Path | str) -> list[dict[str, float]]:
    """The entries of a run's log.jsonl, one per epoch."""
    path = Path(run) / "log.jsonl"
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not entries or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("not one entry per epoch")
        return entries
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)}: not a readable log ({error})") from error


def _append(path: Path, entry: dict[str, float]) -> None:
    """Add the epoch's line; lines of epochs that an interrupted run did not finish are dropped."""
    kept = (
        [] if entry["epoch"] == 1 else [old for old in read_log(path.parent) if old["epoch"] < entry["epoch"]]
    )
    write_text(path, "".join(json.dumps(line) + "\n" for line in [*kept, entry]))


def _fingerprint(clips: Sequence[Any]) -> str:
    """A digest of the clips' names and identities, to notice other data under a run."""
    text = "\n".join(f"{clip.machine_type}/{clip.split}/{clip.path.name}" for clip in clips)
    return f"{len(clips)} clips, {hashlib.sha256(os.fsencode(text)).hexdigest()[:12]}"
