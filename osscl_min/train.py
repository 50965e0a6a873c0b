"""One-stage training: batches of mixed clips, one loss, an EMA that is validated and kept."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from osscl_kernels import keep_freed_memory
from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.config import Config, to_dict, with_classes
from osscl_min.dataset import label_table
from osscl_min.features import FrontEnd
from osscl_min.files import UserError, peak_memory_mb, provenance, replacing, write_json
from osscl_min.joined import with_others
from osscl_min.losses import anomaly_score, stage_loss, training_losses
from osscl_min.model import OSSCL
from osscl_min.reader import open_data
from osscl_min.signals import training_noise


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is the first CUDA device where there is one, the CPU elsewhere."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def prepare(device: torch.device, precision: str = "fp32") -> str:
    """Set the process up for a long computation and say what runs.

    On a CPU, freed memory is kept for the next batch. On a GPU, "tf32" lets float32 products round their
    factors to TensorFloat-32, and "fp32" does not.

    Returns
    -------
    str
        One line for logs.
    """
    if device.type == "cpu":
        keep_freed_memory()
        threads = torch.get_num_threads()
        what = f"cpu, {threads} thread{'' if threads == 1 else 's'}"
        if precision == "tf32":
            return f"float32 on {what}: it has no TensorFloat-32"
        fast = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("bf16")
        if precision == "bf16":
            return f"bfloat16 on {what}" + (
                "" if fast else ", which has no instructions for it: expect less speed"
            )
        return f"float32 on {what}"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    names = {"fp32": "float32", "tf32": "TensorFloat-32", "bf16": "bfloat16"}
    return f"{names[precision]} on {torch.cuda.get_device_name(device)}"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the network runs: bfloat16 activations and products for "bf16", else none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True)
class Validation:
    """What the EMA says of the held-out clips, unmixed and each beside its own machine."""

    loss: float  # mean cross-entropy, margin on
    accuracy: float  # share recognised as their own machine, margin off
    labels: torch.Tensor  # (n,) int64
    scores: torch.Tensor  # (n,) float64, anomaly scores: of normal clips never trained on


class Trainer:
    """The networks, the optimiser and one step.

    Parameters
    ----------
    config : Config
    device : torch.device
    model : OSSCL, optional
        Where training starts; a freshly drawn network without.

    Attributes
    ----------
    model, ema : OSSCL
        The student and its exponential moving average, which start alike. The EMA is what is validated,
        kept and scored with.
    """

    def __init__(self, config: Config, device: torch.device, model: OSSCL | None = None):
        self.config, self.device = config, device
        self.model = (model or OSSCL(config.model)).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.front = FrontEnd(config.model.audio).to(device)
        self.loss = config.loss
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, config.train.learning_rate, fused=True)
        # every float entry of the state, BatchNorm's statistics included, as the authors' code does
        frozen = {name for name, value in self.model.named_parameters() if not value.requires_grad}
        self._student, self._average = (
            [
                value
                for name, value in network.state_dict().items()
                if value.is_floating_point() and name not in frozen
            ]
            for network in (self.model, self.ema)
        )

    def network(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The student in the configured precision."""
        with autocast(self.device, self.config.train.precision):
            return self.model(*inputs)

    def step(
        self,
        wave: torch.Tensor,
        log_mel: torch.Tensor,
        labels: torch.Tensor,
        mix: float,
        permutation: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """One optimisation step on a batch; returns its losses, still on the device.

        Parameters
        ----------
        wave : (B, samples)
        log_mel : (B, 1, mels, frames), dB, of the unmixed waves
        labels : (B,) int64
        mix : float
            lambda.
        permutation : (B,) int64
        """
        self.model.train()
        losses = training_losses(self.network, wave, log_mel, labels, mix, permutation, self.loss)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        self.optimizer.step()
        self.average()
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def average(self) -> None:
        """Move the EMA towards the student, then let the student decay, in the authors' order."""
        torch._foreach_lerp_(self._average, self._student, 1 - self.config.train.ema_decay)
        if self.config.train.student_decay:
            torch._foreach_mul_(self._student, 1 - self.config.train.student_decay)

    def learning_rate(self, epoch: int) -> float:
        """Cosine annealing, stepped once an epoch (counted from 0)."""
        train = self.config.train
        cosine = (1 + math.cos(math.pi * epoch / train.epochs)) / 2
        return train.final_learning_rate + (train.learning_rate - train.final_learning_rate) * cosine

    def start_epoch(self, epoch: int) -> None:
        """Set the epoch's learning rate and loss."""
        self.loss = stage_loss(self.config, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(epoch)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Validation:
        """Score held-out clips, given as batches of samples (B, samples) int16 and labels (B,)."""
        correct, all_labels, scores = [], [], []
        for samples, labels in batches:
            with autocast(self.device, self.config.train.precision):
                _, embedding = self.ema(*self.front(samples))
            scores.append(anomaly_score(self.ema.arcface(embedding, labels), labels).cpu())
            correct.append((self.ema.arcface(embedding).argmax(1) == labels).cpu())
            all_labels.append(labels.cpu())
        scores = torch.cat(scores)
        accuracy = torch.cat(correct).double().mean().item()
        return Validation(scores.mean().item(), accuracy, torch.cat(all_labels), scores)


def batches_of(order: Sequence[int], size: int) -> list[np.ndarray]:
    """Cut an order into batches; a last batch of one joins the one before, since BatchNorm needs two."""
    cuts = list(range(size, len(order), size))
    if cuts and len(order) - cuts[-1] == 1:
        cuts.pop()
    return np.split(np.asarray(order), cuts)


def load_batches(
    reader: Any, labels: np.ndarray, batches: Sequence[np.ndarray], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Samples (B, samples) int16 and labels (B,) batch by batch; the next is read while one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(reader.read, batches[0])
        for number, batch in enumerate(batches):
            samples = ahead.result()
            if number + 1 < len(batches):
                ahead = pool.submit(reader.read, batches[number + 1])
            yield torch.from_numpy(samples).to(device), torch.from_numpy(labels[batch]).to(device)


def split_validation(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to validate on: a random split; at least one clip is held out.

    Returns
    -------
    train, validation : sorted int64 arrays
    """
    order = np.random.default_rng([seed, 0]).permutation(count)
    held_out = min(max(1, round(fraction * count)), count - 2)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def train(
    data: Path | str,
    out: Path | str,
    config: Config,
    *,
    others: Path | str | None = None,
    device: str = "auto",
    strict: bool = False,
) -> Path:
    """Train a detector on the normal clips of a data set.

    A run that was cut short goes on after its last whole epoch; a finished one is left as it is. Every
    random draw follows from (seed, epoch, step), so a continued run equals an uninterrupted one.

    Parameters
    ----------
    data : Path or str
        A data folder.
    out : Path or str
        The run's folder: config.json first, then log.jsonl (a line an epoch), initial.pt (the untrained
        network), last.pt (to go on from) and best.pt (the epoch with the lowest validation loss).
    config : Config
        The number of classes is taken from the data.
    others : Path or str, optional
        Other machines to tell one's own from, see `joined.with_others`.
    device : str
        "auto", "cpu", "cuda", "cuda:1", ...
    strict : bool
        Stop at the first unusable file.

    Returns
    -------
    Path
        best.pt.

    Raises
    ------
    UserError
        If the data cannot be trained on, the folder holds another run, or the loss is not finite.
    """
    out, where = Path(out), choose_device(device)
    running = prepare(where, config.train.precision)
    opened = open_data(data, config.model.audio, splits=["train"], strict=strict)
    if others is not None:
        opened = with_others(opened, others, config.model.audio, out, strict)
    dataset, reader = opened.dataset, opened.train
    if opened.report():
        tqdm.write(opened.report())
    classes = label_table(reader.clips)
    if len(reader) < 4:
        raise UserError(f"{dataset.root}: {len(reader)} training clips are too few")
    config = with_classes(config, len(classes))
    labels = np.array([classes.index(clip.machine) for clip in reader.clips])
    training, held_out = split_validation(len(reader), config.train.validation_fraction, config.train.seed)
    run = {
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
    tqdm.write(f"training in {running}")
    torch.manual_seed(config.train.seed)
    trainer = Trainer(config, where)
    start, best = _continue(out, run, trainer)
    if start >= config.train.epochs:
        tqdm.write(f"{out}: already trained for {start} epochs, nothing to do")
        return out / "best.pt"
    if start == 0:
        write_json(out / "config.json", run)
        _save(out / "initial.pt", trainer, 0, run)
    steps = len(batches_of(training, config.train.batch_size))
    bar = tqdm(
        total=config.train.epochs * steps, initial=start * steps, desc="training", unit="step", disable=None
    )
    for epoch in range(start, config.train.epochs):
        began = time.perf_counter()
        trainer.start_epoch(epoch)
        order = np.random.default_rng([config.train.seed, 1, epoch]).permutation(training)
        batches = batches_of(order, config.train.batch_size)
        history = []
        for step, (samples, target) in enumerate(load_batches(reader, labels, batches, where)):
            random = np.random.default_rng([config.train.seed, 2, epoch, step])
            mix = float(random.beta(config.loss.mixup_alpha, config.loss.mixup_alpha))
            permutation = torch.from_numpy(random.permutation(len(target))).to(where)
            share, audio = config.train.noise, config.model.audio
            noise = training_noise(share, audio, random) if share else None
            history.append(trainer.step(*trainer.front(samples, noise), target, mix, permutation))
            bar.update()
        losses = {name: torch.stack([item[name] for item in history]).tolist() for name in history[0]}
        for step, total in enumerate(losses["total"]):
            if not math.isfinite(total):
                files = ", ".join(reader.clips[position].path.name for position in batches[step])
                raise UserError(
                    f"epoch {epoch + 1}, step {step + 1}: the loss is {total}; its clips: {files}"
                )
        seconds = time.perf_counter() - began
        validation = trainer.validate(
            load_batches(reader, labels, batches_of(held_out, config.evaluate.batch_size), where)
        )
        entry = {
            "epoch": epoch + 1,
            **{name: float(np.mean(values)) for name, values in losses.items()},
            "validation_loss": validation.loss,
            "validation_accuracy": validation.accuracy,
            "learning_rate": trainer.learning_rate(epoch),
            "seconds": seconds,
            "clips_per_second": len(training) / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }
        if not all(math.isfinite(value) for value in entry.values()):
            raise UserError(
                f"epoch {epoch + 1}: the validation loss is {validation.loss}; the last checkpoint stands"
            )
        bar.set_postfix(epoch=epoch + 1, loss=f"{entry['total']:.3f}", validation=f"{validation.loss:.3f}")
        # a pre-trained network cannot classify yet
        if epoch >= config.train.pretrain_epochs and (best is None or validation.loss < best):
            best = validation.loss
            calibration = {"labels": validation.labels, "scores": validation.scores}
            _save(out / "best.pt", trainer, epoch + 1, run, calibration=calibration)
        _append(out / "log.jsonl", entry)
        _save(out / "last.pt", trainer, epoch + 1, run, best)
    bar.close()
    return out / "best.pt"


def read_log(run: Path | str) -> list[dict[str, float]]:
    """The entries of a run's log.jsonl, an epoch each."""
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def _append(path: Path, entry: dict[str, float]) -> None:
    """Add the epoch's line; lines of epochs that a cut-short run did not finish are dropped."""
    kept = []
    if entry["epoch"] > 1:
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["epoch"] < entry["epoch"]]
    with replacing(path) as file:
        file.write("\n".join([*kept, json.dumps(entry)]) + "\n")


def _save(
    path: Path, trainer: Trainer, epoch: int, run: dict, best: float | None = None, calibration: Any = None
) -> None:
    content: dict[str, Any] = {"ema": trainer.ema.state_dict(), "epoch": epoch, "calibration": calibration}
    if best is not None:
        content |= {
            "student": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "best": best,
            "clips": run["data"]["clips"],
        }
    classes = tuple(tuple(machine) for machine in run["classes"])
    checkpoint.save(path, content, trainer.config, classes, run["data"]["synthetic"])


def _continue(out: Path, run: dict, trainer: Trainer) -> tuple[int, float | None]:
    """Take up the run in `out`, if there is one: epochs done and the best validation loss so far."""
    last = out / "last.pt"
    if not last.is_file():
        return 0, None
    content = checkpoint.read(last, trainer.device)
    for name, here, there in (
        ("configuration", run["config"], content["config"]),
        ("data", {"clips": run["data"]["clips"]}, {"clips": content["clips"]}),
    ):
        difference = _first_difference(here, there)
        if difference:
            raise UserError(
                f"{out} holds a run with another {name} ({difference}); choose another folder or remove it"
            )
    trainer.model.load_state_dict(content["student"])
    trainer.ema.load_state_dict(content["ema"])
    trainer.optimizer.load_state_dict(content["optimizer"])
    return content["epoch"], content["best"]


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
