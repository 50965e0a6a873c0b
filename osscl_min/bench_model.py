"""How fast the network is on this machine's processor, beside the same layers as PyTorch's own modules.

Both hold the same weights. Ours keeps freed memory, as training and evaluation do; the plain modules run as
anyone would run them, in the batch size that suits them best.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from osscl_min.bench import fresh, interleaved, measure, write_rows
from osscl_min.config import PRESETS, AudioConfig, Config
from osscl_min.losses import training_losses
from osscl_min.model import OSSCL
from osscl_min.runtime.device import autocast, prepare
from osscl_min.textbook import TextbookOSSCL
from osscl_min.trainer import Trainer

CPU = torch.device("cpu")
PASSES = {  # part -> passes; a training pass is forward and backward, a step has optimiser and EMA too
    "tfgram": ("inference", "training"),
    "encoder": ("inference", "training"),
    "model": ("inference", "training", "step"),
}
PRECISIONS = ("fp32", "bf16")
OURS = 16  # clips in a batch
PLAIN = {"inference": (1, 4, 16), "training": (4, 16), "step": (4, 16)}
TARGETS = {"inference": (2, 4), "training": (2, 4), "step": (2, 5)}  # times plain in fp32: ours fp32, bf16


def _config(precision: str, seconds: float) -> Config:
    paper = PRESETS["paper"]
    model = replace(paper.model, audio=AudioConfig(seconds=seconds))
    return replace(paper, model=model, train=replace(paper.train, precision=precision))


def _network(way: str, config: Config) -> nn.Module:
    torch.manual_seed(0)
    ours = OSSCL(config.model)
    if way == "ours":
        return ours
    plain = TextbookOSSCL(config.model)
    plain.load_state_dict(ours.state_dict())
    return plain


def _inputs(part: str, config: Config, clips: int) -> tuple[torch.Tensor, ...]:
    audio, draw = config.model.audio, torch.Generator().manual_seed(1)
    wave = 0.1 * torch.randn(clips, audio.samples, generator=draw)
    if part == "tfgram":
        return (wave,)
    if part == "encoder":
        return (torch.randn(clips, 3, audio.mels, audio.frames, generator=draw),)
    return wave, -30 + 10 * torch.randn(clips, 1, audio.mels, audio.frames, generator=draw)


def _call(part: str, passing: str, way: str, config: Config, clips: int) -> Callable[[], object]:
    """One run of one case."""
    network, inputs = _network(way, config), _inputs(part, config, clips)
    labels, partners = torch.arange(clips) % config.model.classes, torch.arange(clips).flip(0)
    if passing == "step" and way == "ours":
        trainer = Trainer(config, CPU, network)
        return lambda: trainer.step(*inputs, labels, 0.3, partners)
    network.train(passing != "inference")
    piece = network if part == "model" else getattr(network, part)
    precision = config.train.precision
    if passing == "inference":

        def infer():
            with torch.no_grad(), autocast(CPU, precision):
                return piece(*inputs)

        return infer
    if passing == "step":
        average = copy.deepcopy(network)
        pairs = list(zip(network.state_dict().values(), average.state_dict().values(), strict=True))
        optimizer = torch.optim.AdamW(network.parameters(), config.train.learning_rate, foreach=False)

        def step():
            with autocast(CPU, precision):
                losses = training_losses(network, *inputs, labels, 0.3, partners)
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
            with torch.no_grad():
                for student, mean in pairs:
                    if mean.is_floating_point():
                        mean.mul_(config.train.ema_decay).add_(student, alpha=1 - config.train.ema_decay)

        return step
    if part == "encoder":
        inputs[0].requires_grad_()  # two of its maps come from trained layers

    def train():
        network.zero_grad()
        with autocast(CPU, precision):
            output = piece(*inputs, labels)[0] if part == "model" else piece(*inputs)
        loss = F.cross_entropy(output.float(), labels) if part == "model" else output.float().square().mean()
        loss.backward()

    return train


def case(
    part: str, passing: str, precision: str, way: str, clips: int, seconds: float = 10.0
) -> dict[str, float]:
    """Times of one case a clip, and the process's largest memory."""
    if way == "ours":
        prepare(CPU)
    figures = measure(_call(part, passing, way, _config(precision, seconds), clips), seconds=1.0, least=2)
    return {
        "ms_per_clip": figures["wall_ms"] / clips,
        "processor_ms_per_clip": figures["processor_ms"] / clips,
        "peak_mb": figures["peak_mb"],
    }


def errors(part: str, seconds: float = 10.0, clips: int = 4) -> dict[str, float]:
    """Relative error of the outputs, in the Euclidean norm, against plain modules in float64."""
    found = {}
    for training in (False, True):
        outputs = {}
        for way, precision in (("truth", "fp32"), *((w, p) for w in ("ours", "plain") for p in PRECISIONS)):
            config = _config(precision, seconds)
            network = _network(way, config).train(training)
            inputs = _inputs(part, config, clips)
            if way == "truth":
                network, inputs = network.double(), [x.double() for x in inputs]
            piece = network if part == "model" else getattr(network, part)
            with torch.no_grad(), autocast(CPU, precision):
                output = piece(*inputs)
            outputs[way, precision] = (output[1] if part == "model" else output).double()
        truth = outputs.pop(("truth", "fp32"))
        for (way, precision), output in outputs.items():
            name = f"{'training' if training else 'inference'} {precision} {way}"
            found[name] = ((output - truth).norm() / truth.norm()).item()
    return found


def arithmetic(seconds: float = 10.0) -> dict[str, float]:
    """GFLOP of a clip forward, and GFLOP/s of large matrix products in each precision."""
    found, draw = {}, torch.randn(2048, 2048)
    for precision, dtype in zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True):
        one = draw.to(dtype)
        found[precision] = 2 * 2048**3 / 1e6 / measure(lambda one=one: one @ one)["wall_ms"]
    config = _config("fp32", seconds)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _network("plain", config)(*_inputs("model", config, 2))
    return found | {"forward": counter.get_total_flops() / 2e9}


def table(
    measured: dict[tuple, dict[str, float]], error: dict[str, dict[str, float]]
) -> list[dict[str, object]]:
    """A row for the plain modules at their best batch size and one for ours, of every part and pass."""
    best: dict[tuple, tuple[int, dict[str, float]]] = {}
    for (*key, clips), figures in measured.items():
        key = tuple(key)
        if key not in best or figures["ms_per_clip"] < best[key][1]["ms_per_clip"]:
            best[key] = clips, figures
    rows = []
    for (part, passing, precision, way), (clips, figures) in best.items():
        plain, exact = (best[part, passing, p, "plain"][1]["ms_per_clip"] for p in (precision, "fp32"))
        ours = way == "ours"
        kind = "inference" if passing == "inference" else "training"
        rows.append(
            {
                "part": part, "pass": passing, "precision": precision, "way": way, "batch": clips, **figures,
                "relative_error": error[part][f"{kind} {precision} {way}"],
                "times_plain": plain / figures["ms_per_clip"] if ours else None,
                "times_plain_fp32": exact / figures["ms_per_clip"] if ours else None,
                "target": TARGETS[passing][PRECISIONS.index(precision)] if ours else None,
            }
        )  # fmt: skip
    return rows


def bench_model(out: Path, *, rounds: int = 2) -> Path:
    """Measure every part and pass, ours and plain, and write OUT/model_cpu.csv and .md.

    Parameters
    ----------
    out : Path
    rounds : int
        Interleaved rounds; the table has the medians.

    Returns
    -------
    Path
        The table.
    """
    cases = [
        (part, passing, precision, way, clips)
        for part, passes in PASSES.items()
        for passing in passes
        for precision in PRECISIONS
        for way in ("plain", "ours")
        for clips in (PLAIN[passing] if way == "plain" else (OURS,))
    ]
    measured = interleaved(cases, lambda *one: fresh("osscl_min.bench_model:case", *one), rounds)
    error = {part: fresh("osscl_min.bench_model:errors", part) for part in PASSES}
    limits = fresh("osscl_min.bench_model:arithmetic")
    speeds = " and ".join(f"{limits[p]:.0f} GFLOP/s in {p}" for p in PRECISIONS)
    step = 3 * limits["forward"]
    least = " and ".join(f"{1000 * step / limits[p]:.0f} ms" for p in PRECISIONS)
    notes = [
        "training: forward and backward. step: with losses, optimiser and EMA. plain: PyTorch's modules, at "
        f"the best of {', '.join(map(str, PLAIN['inference']))} clips (inference) or "
        f"{', '.join(map(str, PLAIN['training']))}; ours: {OURS} clips. times_plain compares with the plain "
        "modules in the same precision, times_plain_fp32 and target with these in float32.",
        "relative_error: of the outputs of 4 clips against float64; in training mode batch statistics of "
        "so few clips make the last layers ill-conditioned, for the plain modules too.",
        f"Products of 2048 x 2048 matrices reach {speeds} here. A step has {step:.1f} GFLOP a clip, three "
        f"times the forward pass: {least} of arithmetic.",
    ]
    title = "Clips of 10 s of noise; milliseconds a clip, wall time and processor time of all threads."
    return write_rows(Path(out) / "model_cpu", table(measured, error), title=title, notes=notes)
