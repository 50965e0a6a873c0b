"""How fast training is, beside the plain way: textbook modules, files decoded and analysed one by one.

Both do the same mathematics on the same synthetic clips. The plain way is the released code's: every clip is
decoded and its log-mel taken when its batch comes, and the EMA walks all 81 M entries of the released
model's state tensor by tensor, the unused ones included.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import soundfile
import torch
from matplotlib.figure import Figure

from osscl_min.bench import fresh, interleaved, write_rows
from osscl_min.config import PRESETS, Config
from osscl_min.data.audio import decode
from osscl_min.data.batches import load_batches
from osscl_min.data.clips import label_table
from osscl_min.data.reader import open_data
from osscl_min.features import LogMel, to_wave
from osscl_min.losses import training_losses
from osscl_min.runtime.device import choose_device, prepare
from osscl_min.runtime.files import peak_memory_mb
from osscl_min.runtime.plotting import COLOURS, STYLE, save
from osscl_min.textbook import TextbookOSSCL
from osscl_min.trainer import Trainer

PAPER_CLIPS, PAPER_EPOCHS = 36_270 - 1_814, 300  # training clips less the validation split; passes over them
MACHINES = [("fan", f"{k:02d}") for k in range(0, 7, 2)] + [("pump", f"{k:02d}") for k in range(0, 7, 2)]
PARTS = ("load", "log_mel", "forward", "backward", "optimizer", "ema")
# Layers of the released model that never run: convolutions of a large audio tagger, then its other entries.
UNUSED = [
    576, 36_864, 73_728, 147_456, 294_912, 589_824, 1_179_648, 2_359_296, 4_718_592,
    9_437_184, 18_874_368, 37_748_736, 4_196_352, 144_978,
]  # fmt: skip


class Clock:
    """Seconds by part of a step; on a GPU a part ends when its kernels have."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.last = device, defaultdict(float), 0.0

    def start(self) -> None:
        """Begin to count."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """What has passed since the last call was `part`."""
        before = self.last
        self.start()
        self.seconds[part] += self.last - before

    def around(self, part: str, call: Callable) -> Callable:
        """`call`, which counts as `part`, and what comes before it as what is being waited for."""

        def timed(*arguments: Any, **named: Any) -> Any:
            self.lap("backward" if part == "optimizer" else "between")
            result = call(*arguments, **named)
            self.lap(part)
            return result

        return timed


def write_clips(folder: Path, count: int, config: Config) -> Path:
    """`count` training clips of noise, 16-bit wav files of the model's length, over MACHINES."""
    random = np.random.default_rng(0)
    for k in range(count):
        machine_type, machine_id = MACHINES[k % len(MACHINES)]
        path = folder / machine_type / "train" / f"normal_id_{machine_id}_{k:08d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = random.normal(0, 1000, config.model.audio.samples).astype(np.int16)
        soundfile.write(path, noise, config.model.audio.sample_rate)
    return folder


def plain(config: Config, data: Path, device: torch.device, steps: int, clock: Clock) -> None:
    """`steps` steps the plain way; the first is not counted."""
    opened = open_data(data, config.model.audio, splits=["train"]).train
    clips, classes = opened.clips, label_table(opened.clips)
    del opened
    model = TextbookOSSCL(config.model).to(device)
    average = copy.deepcopy(model).eval()
    unused = [[torch.zeros(size, device=device) for size in UNUSED] for _ in range(2)]
    entries = [
        [*(v for v in network.state_dict().values() if v.is_floating_point()), *rest]
        for network, rest in zip((model, average), unused, strict=True)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), config.train.learning_rate, foreach=False, fused=False)
    log_mel = LogMel(config.model.audio).to(device)
    random = np.random.default_rng(0)
    for step in range(steps + 1):
        if step == 1:
            clock.seconds.clear()
        clock.start()
        chosen = random.permutation(len(clips))[: config.train.batch_size]
        samples = [decode(clips[k].path, config.model.audio)[0] for k in chosen]
        clock.lap("load")
        with torch.no_grad():
            waves = [to_wave(sound[None], device) for sound in samples]
            levels = torch.cat([log_mel(wave) for wave in waves])
        wave = torch.cat(waves)
        clock.lap("log_mel")
        labels = torch.tensor([classes.index(clips[k].machine) for k in chosen], device=device)
        partners = torch.from_numpy(random.permutation(len(chosen))).to(device)
        losses = training_losses(model, wave, levels, labels, float(random.beta(0.5, 0.5)), partners)
        clock.lap("forward")
        optimizer.zero_grad()
        losses["total"].backward()
        clock.lap("backward")
        optimizer.step()
        clock.lap("optimizer")
        with torch.no_grad():
            for student, mean in zip(*entries, strict=True):
                mean.mul_(config.train.ema_decay).add_(student, alpha=1 - config.train.ema_decay)
                student.mul_(1 - config.train.student_decay)
        losses["total"].item()
        clock.lap("ema")


def engine(config: Config, data: Path, device: torch.device, steps: int, clock: Clock) -> None:
    """`steps` steps of `train.Trainer` fed as in training; the first is not counted."""
    prepare(device, config.train.precision)
    reader = open_data(data, config.model.audio, splits=["train"]).train
    classes = label_table(reader.clips)
    labels = np.array([classes.index(clip.machine) for clip in reader.clips])
    trainer = Trainer(config, device)
    trainer.network = clock.around("forward", trainer.network)
    trainer.optimizer.step = clock.around("optimizer", trainer.optimizer.step)
    random = np.random.default_rng(0)
    batches = [random.permutation(len(reader))[: config.train.batch_size] for _ in range(steps + 1)]
    clock.start()
    for step, (samples, target) in enumerate(load_batches(reader, labels, batches, device)):
        if step == 1:
            clock.seconds.clear()
        clock.lap("load")
        inputs = trainer.front(samples)
        clock.lap("log_mel")
        partners = torch.from_numpy(random.permutation(len(target))).to(device)
        trainer.step(*inputs, target, float(random.beta(0.5, 0.5)), partners)
        clock.lap("ema")
    clock.seconds["forward"] += clock.seconds.pop("between", 0.0)


def case(way: str, precision: str, batch_size: int, device: str, steps: int, data: str) -> dict[str, float]:
    """One case: milliseconds a step by part, clips a second, and the largest memory (MB)."""
    where = choose_device(device)
    config = PRESETS["paper"]
    config = replace(config, train=replace(config.train, precision=precision, batch_size=batch_size))
    torch.manual_seed(0)
    clock = Clock(where)
    {"plain": plain, "engine": engine}[way](config, Path(data), where, steps, clock)
    milliseconds = {part: 1e3 * clock.seconds[part] / steps for part in PARTS}
    total = sum(milliseconds.values())
    if where.type == "cuda":
        memory = torch.cuda.max_memory_allocated(where) / 1e6
    else:
        memory = peak_memory_mb()
    return {
        "clips_per_second": 1e3 * batch_size / total,
        "step_ms": total,
        **{f"{part}_ms": value for part, value in milliseconds.items()},
        "peak_mb": memory,
    }


def picture(rows: Sequence[dict[str, Any]]) -> Figure:
    """Milliseconds a clip of every case, by part of the step."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((9, 0.45 * len(rows) + 1.6), layout="constrained")
        ax = figure.subplots()
    left = np.zeros(len(rows))
    for part, colour in zip(PARTS, COLOURS, strict=False):
        width = np.array([row[f"{part}_ms"] / row["batch"] for row in rows])
        ax.barh(range(len(rows)), width, left=left, color=colour, label=part.replace("_", "-"))
        left = left + width
    for place, (row, end) in enumerate(zip(rows, left, strict=True)):
        ax.text(end, place, f"  {row['times_plain']:.1f} × plain", va="center", fontsize=9)
    names = [f"{row['way']}, {row['precision']}, batch {row['batch']}" for row in rows]
    ax.set_yticks(range(len(rows)), names)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_axisbelow(True)
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="ms a clip", title="training steps on synthetic clips of 10 s, by part")
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False)
    return figure


def bench_train(out: Path, *, device: str = "auto", batches: tuple[int, ...] | None = None) -> Path:
    """Measure training steps, plain and with the engine, and write OUT/train_DEVICE.csv and .md.

    Parameters
    ----------
    out : Path
    device : str
    batches : tuple of int, optional
        Batch sizes; 32 and 64 on a CPU, 64 on a GPU.

    Returns
    -------
    Path
        The table.
    """
    where = choose_device(device)
    gpu = where.type == "cuda"
    sizes = batches or ((64,) if gpu else (32, 64))
    cases = [
        (way, precision, size)
        for size in sizes
        for way, precisions in (("plain", ["fp32"]), ("engine", ["fp32", "tf32", "bf16"]))
        for precision in precisions
        if gpu or precision != "tf32"
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = write_clips(Path(folder), 4 * max(sizes) if gpu else max(sizes), PRESETS["paper"])
        steps = {"plain": 20 if gpu else 2, "engine": 200 if gpu else 3}

        def run(way: str, precision: str, size: int) -> dict[str, float]:
            return fresh(
                "osscl_min.bench_train:case", way, precision, size, str(where), steps[way], str(data)
            )

        measured = interleaved(cases, run, rounds=1)
    rows = []
    for (way, precision, size), figures in measured.items():
        base = measured["plain", "fp32", size]["clips_per_second"]
        hours = PAPER_CLIPS * PAPER_EPOCHS / figures["clips_per_second"] / 3600
        rows.append(
            {"way": way, "precision": precision, "batch": size, **figures,
             "times_plain": figures["clips_per_second"] / base, "paper_hours": hours}
        )  # fmt: skip
    note = (
        f"Synthetic clips of noise, 10 s. plain: textbook modules, each clip decoded and analysed by itself, "
        f"EMA over 81 M entries; {steps['plain']} steps. engine: `python -m osscl_min train`; "
        f"{steps['engine']} steps. paper_hours: {PAPER_EPOCHS} epochs of {PAPER_CLIPS:,} clips at this rate."
    )
    save(picture(rows), Path(out) / f"train_{where.type}.png")
    return write_rows(
        Path(out) / f"train_{where.type}", rows, title="Training steps, ms a step by part.", notes=[note]
    )
