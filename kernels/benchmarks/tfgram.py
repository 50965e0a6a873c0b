"""Check, then time TFgram inference and training on a GPU against plain PyTorch: one command, one CSV.

    python kernels/benchmarks/tfgram.py [--clips N ...] [--passes ...] [--out FILE.csv] [--check] [--predict]

Every variant runs in this process: the modules eagerly, through torch.compile and as CUDA-graph replays, and
the kernels, beside the device's own limits (copy, matrix products), measured too. One row per (provider,
pass, shape, precision); a table (.md) and a plot (.png) lie beside the CSV. --check runs on the CPU too; how
fast TFgram is there says `python -m osscl_min bench model`.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from common import ROOT, backend, error, gpu_limits, graphed, provenance, torch, write
from osscl_kernels.tfgram_infer import LAYERS, fold_batchnorm, frames, tfgram_infer, tfgram_infer_ref
from osscl_kernels.tfgram_train import tfgram_train, tfgram_train_ref
from torch import nn

SAMPLES = 160_000  # 10 s at 16 kHz
FLOOR = 1e-6  # of the largest entry; an error may be twice the plain path's plus this
COLUMNS = (
    "kernel provider pass clips samples precision median_ms q20_ms q80_ms ms_per_clip extra_mb flop bytes "
    "limit_ms share_of_limit error plain_error device threads python torch triton commit date note"
).split()


class Modules(nn.Module):
    """The plain layers: conv1d, BatchNorm1d, ReLU and the pools."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.ModuleList(
            nn.Conv1d(x.inputs, x.outputs, x.kernel, x.stride, x.padding, dilation=x.dilation, bias=False)
            for x in LAYERS
        )
        self.norm = nn.ModuleList(nn.BatchNorm1d(x.outputs) for x in LAYERS)
        for norm in self.norm:
            nn.init.normal_(norm.weight, 1.0, 0.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2.0)

    def forward(self, wave):
        x, count = wave.unsqueeze(1), frames(wave.shape[1])
        for conv, norm, layer in zip(self.conv, self.norm, LAYERS, strict=True):
            x = nn.functional.relu(norm(conv(x)))
            if layer.pool == "max4":
                x = nn.functional.max_pool1d(x, 4)
            elif layer.pool:
                x = nn.functional.adaptive_max_pool1d(x, 2 * count if layer.pool == "frames2" else count)
        return x

    def lists(self):
        """Weights, gammas and betas, as `tfgram_train` takes them."""
        return (
            [c.weight for c in self.conv],
            [n.weight for n in self.norm],
            [n.bias for n in self.norm],
        )


def lengths(samples: int) -> list[tuple[int, int]]:
    """Frames that each layer's convolution gives and that its pool leaves."""
    first = (samples - 1) // 5 + 1
    count = frames(samples)
    return [
        (first, first), (first, first), (first, first // 4), (first // 4,) * 2, (first // 4, 2 * count),
        (2 * count, 2 * count), (2 * count, count),
    ]  # fmt: skip


def work(clips: int, samples: int, passing: str, precision: str, fused: bool) -> tuple[float, float]:
    """FLOP, and bytes that must move to and from memory; see the README for the formula."""
    size = 2 if precision == "bf16" else 4
    flop = moved = 0.0
    for i, (layer, (out, left)) in enumerate(zip(LAYERS, lengths(samples), strict=True)):
        product = 2.0 * out * layer.kernel * layer.inputs * layer.outputs
        activation, pooled = layer.outputs * out * size, layer.outputs * left * size
        source = samples * 4 if i == 0 else LAYERS[i - 1].outputs * lengths(samples)[i - 1][1] * size
        if passing == "inference":
            flop += product
            if fused:  # layers 0 to 2 in one launch, then a read and a write each
                moved += (source if i in (0, 3, 4, 5, 6) else 0) + (pooled if i >= 2 else 0)
            else:  # convolution, normalisation and ReLU read and write; so does a pool
                moved += source + 5 * activation + (activation + pooled if layer.pool else 0)
        else:
            flop += product * (3 if i else 2)  # no gradient for the wave
            if fused:  # of each raw output after the first: 2 forward, 4 with its gradient backward
                moved += 6 * activation if i else 3 * source
            else:  # convolution 1 + 2, normalisation 3 + 5, ReLU 2 + 3 passes over each activation
                moved += 3 * source + 16 * activation + (3 * (activation + pooled) if layer.pool else 0)
    return clips * flop, clips * moved


def allow_tf32(precision: str):
    """A context in which convolutions may round to TF32 where the precision is coarser than float32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=precision in ("tf32", "bf16"))


def inference_call(provider: str, precision: str, module: Modules, wave: torch.Tensor):
    """A callable that runs one inference."""
    if provider == "kernels":
        folded = fold_batchnorm(module).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        return lambda: tfgram_infer(wave, folded, precision=precision)
    if provider == "kernels, folding":
        return lambda: tfgram_infer(wave, fold_batchnorm(module), precision=precision)
    half = precision == "bf16"
    model = Modules().to(wave.device).eval()
    model.load_state_dict(module.state_dict())
    model, x = (model.bfloat16(), wave.bfloat16()) if half else (model, wave)
    if "compile" in provider:
        model = torch.compile(model)
    return lambda: model(x)


def training_call(provider: str, precision: str, module: Modules, wave: torch.Tensor):
    """A callable that runs one forward and backward pass and returns (output, gradients)."""
    weights, gammas, betas = module.lists()
    parameters = [*weights, *gammas, *betas]
    gradient = torch.randn(
        len(wave), 128, frames(wave.shape[1]), generator=torch.Generator().manual_seed(1)
    ).to(wave.device, wave.dtype)
    if provider.startswith("kernels"):

        def forward():
            return tfgram_train(wave, weights, gammas, betas, precision=precision)[0]
    else:
        model = torch.compile(module) if "compile" in provider else module

        def forward():
            with torch.autocast(wave.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                return model(wave)

    def call():
        out = forward()
        return out, torch.autograd.grad(out, parameters, gradient.to(out.dtype))

    return call


def make(passing: str, provider: str, precision: str, wave: torch.Tensor):
    """A callable that runs one pass of a provider on fresh modules."""
    module = Modules().to(wave.device)
    if passing == "inference":
        return inference_call(provider, precision, module.eval().requires_grad_(False), wave)
    return training_call(provider, precision, module.train(), wave)


def check(device: torch.device) -> dict[tuple[str, str], tuple[float, float]]:
    """Errors of the kernels and of plain PyTorch against float64, two clips."""
    torch.manual_seed(2)
    wave = (torch.randn(2, SAMPLES if device.type == "cuda" else SAMPLES // 4) * 0.1).to(device)
    module = Modules().to(device).requires_grad_(False).eval()
    truth = tfgram_infer_ref(wave.double(), fold_batchnorm(module, torch.float64))
    results = {}
    for precision in PRECISIONS["inference"][device.type]:
        with allow_tf32(precision):
            ours = error(make("inference", "kernels", precision, wave)(), truth)
            plain = error(make("inference", "modules", precision, wave)(), truth)
        results["inference", precision] = ours, plain
    gradient = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)).to(device).double()
    lists = [[p.detach().double().requires_grad_() for p in part] for part in module.lists()]
    output, *_ = tfgram_train_ref(wave.double(), *lists)
    truths = [output.detach(), *torch.autograd.grad(output, [p for part in lists for p in part], gradient)]
    for precision in PRECISIONS["training"][device.type]:
        with allow_tf32(precision):
            for name in ("kernels", "modules"):
                out, gradients = make("training", name, precision, wave)()
                worst = max(error(a.detach(), b) for a, b in zip((out, *gradients), truths, strict=True))
                results["training", precision] = (*results.get(("training", precision), ()), worst)
    for (passing, precision), (ours, plain) in results.items():
        verdict = "" if ours <= 2 * plain + FLOOR else "  <-- more than twice the plain path's"
        print(
            f"check {passing:9} {precision:6} error {ours:.1e}, plain PyTorch {plain:.1e}{verdict}",
            flush=True,
        )
    return results


PRECISIONS = {
    "inference": {"cuda": ("ieee", "tf32", "bf16"), "cpu": ("ieee", "bf16")},
    "training": {"cuda": ("ieee", "tf32x3", "tf32", "bf16"), "cpu": ("ieee", "bf16")},
}


def gpu_rows(device: torch.device, passes: list[str], clip_counts: list[int]) -> list[dict]:
    """A row of every pass, precision, provider and batch size."""
    errors, limits, base, rows = check(device), gpu_limits(device), provenance(device), []
    print({key: f"{value:.3g}" for key, value in limits.items()})
    for clips in clip_counts:
        wave = torch.randn(clips, SAMPLES, device=device) * 0.1
        for passing in passes:
            for precision in PRECISIONS[passing]["cuda"]:
                providers = ["kernels", "kernels, CUDA graph"]
                if passing == "inference":
                    providers.append("kernels, folding")
                if precision != "tf32x3":
                    providers += ["modules", "modules, CUDA graph", "modules, torch.compile"]
                for provider in providers:
                    row = {
                        "kernel": "tfgram", "provider": provider, "pass": passing, "clips": clips,
                        "samples": SAMPLES, "precision": precision, **base,
                    }  # fmt: skip
                    try:
                        row |= gpu_row(row, wave, limits)
                    except (
                        Exception
                    ) as failure:  # a baseline that fails is a row; the others still get theirs
                        row["note"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
                    ours, plain = errors[passing, precision]
                    row |= {"error": ours if "kernels" in provider else plain, "plain_error": plain}
                    rows.append(row)
                    report(row)
                    torch.compiler.reset()
                    torch.cuda.empty_cache()
    return rows


def gpu_row(row: dict, wave: torch.Tensor, limits: dict[str, float]) -> dict:
    """Time and extra memory of the case that the row names."""
    passing, precision, provider = row["pass"], row["precision"], row["provider"]
    with allow_tf32(precision), torch.set_grad_enabled(passing == "training"):
        call = make(passing, provider.removesuffix(", CUDA graph"), precision, wave)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        extra = torch.cuda.max_memory_allocated() - before
        timed = graphed(call) if "CUDA graph" in provider else call
        median, low, high = backend.triton.testing.do_bench(
            timed, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8]
        )
    return finish(row, median, low, high, limits) | {"extra_mb": round(extra / 1e6, 1)}


def finish(row: dict, median: float, low: float, high: float, limits: dict[str, float]) -> dict:
    """The row's times (ms), with what the work is and how near the limit they come."""
    flop, moved = work(
        row["clips"], row["samples"], row["pass"], row["precision"], row["provider"].startswith("kernels")
    )
    done = {
        "median_ms": f"{median:.4g}", "q20_ms": f"{low:.4g}", "q80_ms": f"{high:.4g}",
        "ms_per_clip": f"{median / row['clips']:.4g}", "flop": f"{flop:.4g}", "bytes": f"{moved:.4g}",
    }  # fmt: skip
    bound = 1e3 * max(flop / limits[row["precision"]], moved / limits["bytes"])
    return done | {"limit_ms": f"{bound:.4g}", "share_of_limit": f"{bound / median:.3f}"}


def report(row: dict) -> None:
    """Print a row."""
    print(
        f"{row['pass']:9} {row['precision']:6} {row['clips']:3} clips  {row['provider']:24}"
        f"{row.get('median_ms', '-'):>9} ms ({row.get('q20_ms', '-')} to {row.get('q80_ms', '-')})  "
        f"{row.get('ms_per_clip', '-')} ms a clip  {row.get('note', '')}",
        flush=True,
    )


def table(rows: list[dict]) -> str:
    """Markdown: milliseconds a clip of every provider, and how many times faster the kernels are."""
    one = rows[0]
    parts = [
        f"{one['device']}, torch {one['torch']}, triton {one['triton']}, {SAMPLES} samples a clip; "
        f"{one['date']}, commit {one['commit']}.\n"
    ]
    timed = [row for row in rows if row.get("median_ms")]
    for passing in dict.fromkeys(row["pass"] for row in timed):
        mine = {(r["provider"], r["precision"], r["clips"]): r for r in timed if r["pass"] == passing}
        sizes = sorted({clips for _, _, clips in mine})

        def per_clip(provider, precision, mine=mine, sizes=sizes):
            found = {n: mine[provider, precision, n] for n in sizes if (provider, precision, n) in mine}
            return {n: float(row["ms_per_clip"]) for n, row in found.items()}

        heads = [f"{passing}, ms a clip", "precision", *(f"batch {n}" for n in sizes), "relative error"]
        parts += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        pairs = list(dict.fromkeys((precision, provider) for provider, precision, _ in mine))
        for precision, provider in pairs:
            times = per_clip(provider, precision)
            cells = [f"{times[n]:.3g}" if n in times else "" for n in sizes]
            worst = next(r["error"] for (p, q, _), r in mine.items() if (p, q) == (provider, precision))
            parts.append("| " + " | ".join([provider, precision, *cells, f"{worst:.1e}"]) + " |")
        parts.append("")
        for precision in dict.fromkeys(precision for precision, _ in pairs):
            for against in dict.fromkeys((precision, "ieee")):
                ours, plain = per_clip("kernels", precision), per_clip("modules", against)
                both = [n for n in sizes if n in ours and n in plain]
                if both:
                    ratios = ", ".join(f"{plain[n] / ours[n]:.1f} at batch {n}" for n in both)
                    parts.append(
                        f"- {passing} in {precision}, times as fast as the modules in {against}: {ratios}."
                    )
        parts.append("")
    return "\n".join(parts)


def predictions(clips: int = 64) -> str:
    """Markdown: work and traffic by formula, and the time that an H200's limits allow."""
    limits = {"bytes": 4.3e12, "ieee": 67e12, "tf32": 395e12, "tf32x3": 395e12 / 3, "bf16": 790e12}
    lines = [
        f"{clips} clips of {SAMPLES} samples, limits of an H200: {limits['bytes'] / 1e12} TB/s copied; "
        + ", ".join(f"{limits[p] / 1e12:.0f} TFLOP/s {p}" for p in PRECISIONS["training"]["cuda"])
        + ".\n",
        "| pass | precision | GFLOP | modules, GB | kernels, GB | arithmetic, ms | modules' traffic, ms "
        "| kernels' traffic, ms |",
        "|---" * 8 + "|",
    ]
    for passing, by_device in PRECISIONS.items():
        for precision in by_device["cuda"]:
            flop, eager = work(clips, SAMPLES, passing, precision, fused=False)
            fused = work(clips, SAMPLES, passing, precision, fused=True)[1]
            times = [1e3 * flop / limits[precision], *(1e3 * b / limits["bytes"] for b in (eager, fused))]
            cells = [
                f"{flop / 1e9:.1f}",
                *(f"{b / 1e9:.2f}" for b in (eager, fused)),
                *(f"{t:.2f}" for t in times),
            ]
            lines.append("| " + " | ".join([passing, precision, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, nargs="+", default=[64], help="batch sizes")
    parser.add_argument("--passes", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "tfgram_cuda.csv")
    parser.add_argument("--check", action="store_true", help="only check the errors")
    parser.add_argument("--predict", action="store_true", help="only write results/tfgram_predicted.md")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.predict:
        (ROOT / "results" / "tfgram_predicted.md").write_text(predictions())
    elif arguments.check:
        sys.exit(any(not ours <= 2 * plain + FLOOR for ours, plain in check(device).values()))
    elif device.type != "cuda":
        sys.exit("tfgram.py times a GPU, and there is none; on a CPU: python -m osscl_min bench model")
    else:
        rows = gpu_rows(device, arguments.passes, arguments.clips)
        write(arguments.out, rows, COLUMNS, table(rows))
        if any(not row["error"] <= 2 * row["plain_error"] + FLOOR for row in rows):
            sys.exit("some errors exceed twice the plain path's: see the rows")


if __name__ == "__main__":
    main()
