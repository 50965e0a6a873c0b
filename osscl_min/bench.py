"""How fast the network, training, reading and scoring are on this machine.

"plain" is the same mathematics as the authors' code runs it: conv1d, the default memory format, each clip
decoded and its log-mel computed when its batch comes. "pytorch" is this package with PyTorch's own layers,
"compiled" with those of `osscl_cpu`.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from itertools import count, cycle, islice, product
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from osscl_kernels import LAYERS, frames
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.benchmark import Timer
from tqdm import tqdm

from osscl_min.config import PRESETS, AudioConfig, Config
from osscl_min.data.batches import load_batches, source_of, to_device
from osscl_min.data.clips import label_table, scan
from osscl_min.data.reader import FolderReader, Reader, open_data
from osscl_min.data.store import pack
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.features import FrontEnd, to_wave
from osscl_min.inference.score import score
from osscl_min.losses import mixup, os_scl_loss
from osscl_min.model import OSSCL
from osscl_min.runtime.device import autocast, choose_device, prepare
from osscl_min.runtime.files import UserError, peak_memory_mb, provenance
from osscl_min.runtime.tables import write_table
from osscl_min.train import train
from osscl_min.trainer import Trainer

PAPER_CLIPS, PAPER_EPOCHS = 36_270 - 1_814, 300  # training clips less the validation split; passes over them


def measure(calls: Mapping[Hashable, Callable[[], Any]], rounds: int = 2) -> dict[Hashable, float]:
    """Median seconds of each call over rounds that interleave the calls, each after a warm-up."""
    seconds = defaultdict(list)
    for key, call in tqdm([*calls.items()] * rounds, desc="bench", unit="case", disable=None):
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        seconds[key].append(timer.timeit(1).median)
    return {key: statistics.median(values) for key, values in seconds.items()}


def plain(network: OSSCL) -> OSSCL:
    """The network with TFgram and the encoder run as the authors' code runs them."""
    tfgram, encoder = network.tfgram, network.encoder

    def extract(x: torch.Tensor) -> torch.Tensor:
        x, length = x.unsqueeze(1), frames(x.shape[1], tfgram.hop)
        for layer, conv, norm in zip(LAYERS, tfgram.conv, tfgram.norm, strict=True):
            x = F.relu(norm(conv(x)))
            if layer.pool == "max4":
                x = F.max_pool1d(x, 4)
            elif layer.pool:
                x = F.adaptive_max_pool1d(x, 2 * length if layer.pool == "frames2" else length)
        return x

    def encode(maps: torch.Tensor) -> torch.Tensor:
        x = encoder.blocks(encoder.dw_conv1(encoder.conv1(maps)))
        return encoder.linear1(encoder.linear7(encoder.conv2(x))).flatten(1)

    tfgram.forward, encoder.forward = extract, encode
    return network


def network_call(network: OSSCL, part: str, training: bool, precision: str, clips: int) -> Callable:
    """One forward pass of "tfgram", "encoder" or "model", with the backward pass in training."""
    audio, generator = network.config.audio, torch.Generator().manual_seed(1)
    wave = 0.1 * torch.randn(clips, audio.samples, generator=generator)
    maps = torch.randn(clips, 3, audio.mels, audio.frames, generator=generator)
    labels = torch.arange(clips) % network.config.classes
    inputs = {"tfgram": (wave,), "encoder": (maps,), "model": (wave, maps[:, :1], labels)}[part]
    maps.requires_grad_(part == "encoder" and training)  # two of its maps come from trained layers
    module = network if part == "model" else getattr(network, part)

    def call() -> None:
        network.train(training).zero_grad()
        with torch.set_grad_enabled(training), autocast(torch.device("cpu"), precision):
            output = module(*inputs)
        if training:
            (output[0] if part == "model" else output).float().square().mean().backward()

    return call


def bench_model(data: Path | None, seconds: float = 10.0, batch_size: int = 16):
    """Inference and training of TFgram, the encoder and the network, each way."""
    if data is not None:
        raise UserError("bench model reads no data: leave out --data")
    prepare(torch.device("cpu"))
    config = replace(PRESETS["paper"].model, audio=AudioConfig(seconds=seconds))
    trainer = Trainer(replace(PRESETS["paper"], model=config), torch.device("cpu"))
    networks = {"plain": plain(OSSCL(config)), "pytorch": OSSCL(config), "compiled": trainer.model}
    rows = []
    for part, training, precision in product(("tfgram", "encoder", "model"), (False, True), ("fp32", "bf16")):
        ways = networks if training else ("plain", "pytorch")
        times = measure(
            {way: network_call(networks[way], part, training, precision, batch_size) for way in ways}
        )
        for way, time in times.items():
            row = {"part": part, "pass": "training" if training else "inference", "precision": precision}
            row |= {"way": way, "batch": batch_size, "ms_per_clip": 1e3 * time / batch_size}
            rows.append(row | {"times_plain": times["plain"] / time})
    return rows, (
        f"Clips of {seconds:g} s of noise; training is forward and backward. plain: conv1d and the default "
        "memory format, in the same precision. pytorch: PyTorch's own layers, as in inference. compiled: "
        f"{trainer.computed_by}."
    )


def plain_steps(config: Config, reader: Reader, labels: np.ndarray, device: torch.device) -> Callable:
    """Trains on batches of positions as the authors' code does."""
    network = plain(OSSCL(config.model)).to(device).train()
    average = AveragedModel(network, avg_fn=get_ema_avg_fn(config.train.ema_decay), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), config.train.learning_rate, foreach=False)
    front, random = FrontEnd(config.model.audio).to(device), np.random.default_rng(0)

    def run(batches: Iterable[np.ndarray]) -> None:
        for chosen in batches:
            waves = [to_wave(reader.read([k]), device) for k in chosen]
            log_mel = torch.cat([front.log_mel(wave) for wave in waves])
            target = torch.from_numpy(labels[chosen]).to(device)
            partners = torch.from_numpy(random.permutation(len(chosen))).to(device)
            lam = random.beta(0.5, 0.5)
            mixed = mixup(torch.cat(waves), log_mel, lam, partners)
            losses = os_scl_loss(*network(*mixed, target), target, target[partners], lam, config.loss)
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
            average.update_parameters(network)

    return run


def engine_steps(config: Config, reader: Reader, labels: np.ndarray, device: torch.device) -> Callable:
    """Trains on batches of positions as `train` does, reading and a GPU's CUDA graph included."""
    trainer, random = Trainer(config, device), np.random.default_rng(0)
    source = source_of(reader, device, config.engine.resident)

    def run(batches: Iterable[np.ndarray]) -> None:
        for samples, target in load_batches(source, labels, batches, device):
            lam = to_device(np.array(random.beta(0.5, 0.5), np.float32), device)
            partners = to_device(random.permutation(len(target)), device)
            trainer.step(*trainer.front(samples), target, lam, partners)

    return run


def bench_train(data: Path | None, batch_size: int = 32, config: Config = PRESETS["paper"]):
    """Training steps, plain and as `train` makes them."""
    device, audio, calls = choose_device(), config.model.audio, {}
    steps = 20 if device.type == "cuda" else 1
    with tempfile.TemporaryDirectory() as folder:
        data = data or write_dataset(Path(folder, "data"), SynthConfig(seconds=audio.seconds))
        reader = open_data(data, audio, splits=["train"]).train
        files = FolderReader(scan(data), reader.clips, audio, keep=0)
        classes = label_table(reader.clips)
        labels = np.array([classes.index(clip.machine) for clip in reader.clips])
        batches = [np.random.default_rng(k).permutation(len(labels))[:batch_size] for k in range(steps)]

        def add(way: str, make: Callable, source: Reader, precision: str) -> None:
            settings = replace(config.train, precision=precision, batch_size=batch_size)
            run = make(replace(config, train=settings), source, labels, device)
            calls[way, precision] = lambda: (prepare(device, precision), run(batches))

        add("plain", plain_steps, files, "fp32")
        for precision in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"):
            add("engine", engine_steps, reader, precision)
        times = measure(calls)
    rows = []
    for (way, precision), seconds in times.items():
        rate = steps * batch_size / seconds
        row = {"way": way, "precision": precision, "batch": batch_size, "clips_per_second": rate}
        row |= {"step_ms": 1e3 * seconds / steps, "times_plain": times["plain", "fp32"] / seconds}
        rows.append(row | {"paper_hours": PAPER_CLIPS * PAPER_EPOCHS / rate / 3600})
    return rows, (
        f"Clips of {audio.seconds:g} s. plain: plain layers, each clip decoded and analysed alone, optimiser "
        "and EMA tensor by tensor. engine: the steps of `osscl train`, reading included. "
        f"paper_hours: {PAPER_EPOCHS} epochs of {PAPER_CLIPS:,} clips at this rate."
    )


def bench_data(data: Path | None, batch_size: int = 64):
    """Packing, batches from files and from a store, and the log-mel."""
    audio, random = AudioConfig(), np.random.default_rng(0)
    prepare(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        work, numbers, front = Path(name), count(), FrontEnd(audio)
        data = data or write_dataset(work / "data", SynthConfig(seconds=10.0))
        pack(data, work / "store", audio)
        store, dataset = open_data(work / "store", audio, splits=["train"]).train, scan(data)
        files = FolderReader(dataset, dataset.clips, audio, keep=0)
        samples = torch.from_numpy(store.read(np.arange(min(batch_size, len(store)))))

        def read(reader: Reader) -> None:
            order = random.permutation(len(reader))
            for start in range(0, len(order), batch_size):
                reader.read(order[start : start + batch_size])

        calls = {
            ("packing", len(dataset.clips)): lambda: pack(data, work / f"{next(numbers)}", audio),
            ("batches from files, decoded", len(files)): lambda: read(files),
            ("batches from the store", len(store)): lambda: read(store),
            ("log-mel on the fly", len(samples)): lambda: front(samples),
        }
        times = measure(calls)
    rows = [{"what": what, "clips": n, "clips_per_second": n / t} for (what, n), t in times.items()]
    return rows, f"Clips of 10 s, 16 kHz, from the page cache; batches of {batch_size} clips in random order."


def bench_score(data: Path | None, files=(250, 2000), minutes=(3, 20), config: Config = PRESETS["quick"]):
    """Scoring of many files and of long ones, by a detector of preset quick."""
    seconds, rows = config.model.audio.seconds, []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = data or write_dataset(work / "data", SynthConfig())
        best, clips = train(data, work / "run", config), sorted(data.glob("*/test/*.wav"))
        cases = [(f"{n} files", [str(clip) for clip in islice(cycle(clips), n)], n) for n in files]
        sound, rate = soundfile.read(clips[0], dtype="int16")
        for n in minutes:
            path = work / f"{n} minutes" / clips[0].parts[-3] / "test" / clips[0].name
            path.parent.mkdir(parents=True)
            soundfile.write(path, np.resize(sound, int(60 * n * rate)), rate)
            cases.append((f"one of {n} minutes", [str(path)], round(120 * n / seconds) - 1))
        for what, names, windows in cases:
            times = measure({what: lambda names=names: score(best, names, csv_path=work / "scores.csv")}, 1)
            row = {"recordings": what, "windows": windows, "windows_per_second": windows / times[what]}
            rows.append(row | {"peak_mb": peak_memory_mb()})
    return rows, (
        f"`osscl score` with a CSV, windows of {seconds:g} s every {seconds / 2:g} s. peak_mb: largest "
        "memory of this process so far, training of the detector included."
    )


def bench(name: str, out: Path, data: Path | None = None, **options: Any) -> Path:
    """Measure "model", "train", "data" or "score" and write OUT/NAME_DEVICE.csv, .md (returned) and .tex."""
    rows, note = globals()[f"bench_{name}"](data, **options)
    device = torch.device("cpu") if name in ("model", "data") else choose_device()
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    source = provenance(device) | {"threads": torch.get_num_threads(), "load": load}
    machine = "{processor}, {threads} threads, load {load}, torch {torch}; {time}, commit {commit}."
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    stem, notes = Path(out) / f"{name}_{device.type}", [note, machine.format(**source)]
    write_table(stem, [list(rows[0]), *cells], [row | source for row in rows], notes)
    return stem.with_suffix(".md")
