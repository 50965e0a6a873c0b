"""Check, then time TFgram inference and training against plain PyTorch: one command, one CSV.

    python kernels/benchmarks/tfgram.py [--device cuda|cpu] [--clips N ...] [--passes ...] [--threads N]
                                        [--out FILE.csv] [--check] [--predict]

On a GPU every variant runs in this process: the modules eagerly, through torch.compile and as CUDA-graph
replays, and the kernels, beside the device's own limits (copy, matrix products), measured too. On the CPU a
timing is a fresh process, in interleaved rounds, for what a process allocated before decides how many page
faults a convolution pays; cpu_ms is its processor time, which says more on a busy machine (with --threads 1).
One row per (kernel, provider, pass, shape, precision), and a table of them in a .md file beside the CSV.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

import torch  # noqa: E402
from osscl_kernels import backend  # noqa: E402
from osscl_kernels.tfgram_infer import (  # noqa: E402
    LAYERS,
    fold_batchnorm,
    frames,
    tfgram_infer,
    tfgram_infer_ref,
)
from osscl_kernels.tfgram_train import tfgram_train, tfgram_train_ref  # noqa: E402
from torch import nn  # noqa: E402

SAMPLES = 160_000  # 10 s at 16 kHz
FLOOR = 1e-6  # of the largest entry; an error may be twice the plain path's plus this
COLUMNS = (
    "kernel provider pass clips samples precision median_ms q20_ms q80_ms ms_per_clip cpu_ms extra_mb flop "
    "bytes limit_ms share_of_limit error plain_error device threads load python torch triton commit date note"
).split()
CPU_ROUNDS = 3


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


def provenance(device: torch.device) -> dict:
    """Where and with what a row was measured."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        words = pathlib.Path("/proc/cpuinfo")
        lines = words.read_text().splitlines() if words.exists() else []
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
        flags = next((x for x in lines if x.startswith("flags")), "")
        half = "AVX512-BF16" if "avx512_bf16" in flags else "AMX" if "amx_bf16" in flags else "no bf16 unit"
        name = f"{model or platform.processor() or platform.machine()} ({half})"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": backend.triton.__version__ if backend.triton else "",
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest deviation, relative to the largest entry; infinite where the result is not finite."""
    if not out.isfinite().all():
        return float("inf")
    return ((out.double() - truth).abs().max() / truth.abs().max()).item()


def allow_tf32(precision: str):
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


def gpu_limits(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy and FLOP a second of square products, measured here."""
    source = torch.empty(1 << 28, device=device)
    copy = backend.triton.testing.do_bench(lambda: source.clone())
    limits = {"bytes": 2 * source.numel() * 4 / copy * 1e3}
    for precision in ("ieee", "tf32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16 if precision == "bf16" else None)
        limits[precision] = 2 * 8192**3 / backend.triton.testing.do_bench(lambda a=a: a @ a) * 1e3
    torch.backends.cuda.matmul.allow_tf32 = False
    limits["tf32x3"] = limits["tf32"] / 3
    return limits


def graphed(call):
    """The same call as a CUDA-graph replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def gpu_rows(device: torch.device, passes: list[str], clip_counts: list[int]) -> list[dict]:
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


def finish(row: dict, median: float, low: float, high: float, limits: dict[str, float] | None) -> dict:
    """The row's times (ms), with what the work is and how near the limit they come."""
    flop, moved = work(
        row["clips"], row["samples"], row["pass"], row["precision"], row["provider"].startswith("kernels")
    )
    done = {
        "median_ms": f"{median:.4g}", "q20_ms": f"{low:.4g}", "q80_ms": f"{high:.4g}",
        "ms_per_clip": f"{median / row['clips']:.4g}", "flop": f"{flop:.4g}", "bytes": f"{moved:.4g}",
    }  # fmt: skip
    if limits:
        bound = 1e3 * max(flop / limits[row["precision"]], moved / limits["bytes"])
        done |= {"limit_ms": f"{bound:.4g}", "share_of_limit": f"{bound / median:.3f}"}
    return done


def report(row: dict) -> None:
    print(
        f"{row['pass']:9} {row['precision']:6} {row['clips']:3} clips  {row['provider']:24}"
        f"{row.get('median_ms', '-'):>9} ms ({row.get('q20_ms', '-')} to {row.get('q80_ms', '-')})  "
        f"{row.get('ms_per_clip', '-')} ms a clip  {row.get('cpu_ms', '')} {row.get('note', '')}",
        flush=True,
    )


def cpu_cases(passes: list[str], clip_counts: list[int]) -> list[tuple[str, str, str, int]]:
    """(pass, provider, precision, clips): the modules at each batch size, the kernels at each too."""
    return [
        (passing, provider, precision, clips)
        for passing in passes
        for precision in PRECISIONS[passing]["cpu"]
        for clips in clip_counts
        for provider in ("modules", "modules, memory kept", "kernels")
    ]


def cpu_worker(passing: str, provider: str, precision: str, clips: int) -> None:
    """Seconds of wall and of processor time of each run of one case, printed as JSON."""
    if provider != "modules":  # as training and evaluation do
        backend.keep_freed_memory()
    torch.manual_seed(1)
    wave = torch.randn(clips, SAMPLES) * 0.1
    seconds = []
    with torch.set_grad_enabled(passing == "training"):
        call = make(passing, provider.removesuffix(", memory kept"), precision, wave)
        call()
        end = time.perf_counter() + 1.5
        while len(seconds) < 3 or time.perf_counter() < end:
            start, used = time.perf_counter(), time.process_time()
            call()
            seconds.append((time.perf_counter() - start, time.process_time() - used))
    print(json.dumps(seconds))


def cpu_rows(passes: list[str], clip_counts: list[int], rounds: int) -> list[dict]:
    device = torch.device("cpu")
    errors, base, cases = check(device), provenance(device), cpu_cases(passes, clip_counts)
    seconds, loads = {case: [] for case in cases}, []
    for _ in range(rounds):  # interleaved: whatever else the machine does hits all alike
        for case in cases:
            command = [sys.executable, __file__, "--worker", *map(str, case)]
            environment = os.environ | {"OMP_NUM_THREADS": str(base["threads"])}
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            seconds[case].append([statistics.median(column) for column in zip(*json.loads(out), strict=True)])
            loads.append(os.getloadavg()[0])
    rows = []
    for case, times in seconds.items():
        passing, provider, precision, clips = case
        row = {
            "kernel": "tfgram", "provider": provider, "pass": passing, "clips": clips, "samples": SAMPLES,
            "precision": precision, "load": f"{statistics.median(loads):.1f}", **base,
        }  # fmt: skip
        row["cpu_ms"] = f"{1e3 * statistics.median(used for _, used in times):.4g}"
        times = sorted(1e3 * wall for wall, _ in times)
        low, high = times[len(times) // 5], times[-1 - len(times) // 5]
        row |= finish(row, statistics.median(times), low, high, None)
        ours, plain = errors[passing, precision]
        rows.append(row | {"error": ours if "kernels" in provider else plain, "plain_error": plain})
        report(rows[-1])
    return rows


def write(path: pathlib.Path, rows: list[dict]) -> None:
    """The rows as CSV, and beside it the table that the README shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.2e}" if isinstance(v, float) else v for k, v in row.items()})
    temporary.replace(path)
    temporary.write_text(table(rows))
    temporary.replace(path.with_suffix(".md"))


def table(rows: list[dict]) -> str:
    """Markdown: milliseconds a clip of every provider, and how many times faster the kernels are."""
    one = rows[0]
    parts = [
        f"{one['device']}, {one['threads']} threads, torch {one['torch']}, triton {one['triton']}, "
        f"{SAMPLES} samples a clip, load {one.get('load') or 'not taken'}; {one['date']}, commit "
        f"{one['commit']}.\n"
    ]
    timed = [row for row in rows if row.get("median_ms")]
    for passing in dict.fromkeys(row["pass"] for row in timed):
        mine = {(r["provider"], r["precision"], r["clips"]): r for r in timed if r["pass"] == passing}
        sizes = sorted({clips for _, _, clips in mine})
        for unit in ("ms_per_clip", "cpu_ms") if one.get("cpu_ms") else ("ms_per_clip",):

            def per_clip(provider, precision, mine=mine, sizes=sizes, unit=unit):
                found = {n: mine[provider, precision, n] for n in sizes if (provider, precision, n) in mine}
                return {n: float(r[unit]) / (n if unit == "cpu_ms" else 1) for n, r in found.items()}

            name = "ms a clip" if unit == "ms_per_clip" else "ms of processor time a clip"
            heads = [f"{passing}, {name}", "precision", *(f"batch {n}" for n in sizes)]
            parts.append("| " + " | ".join([*heads, "relative error"]) + " |")
            parts.append("|---" * (len(heads) + 1) + "|")
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
                    if ours and plain:
                        ratios = ", ".join(f"{plain[n] / ours[n]:.1f} at batch {n}" for n in sizes)
                        best = min(plain.values()) / min(ours.values())
                        parts.append(
                            f"- {passing} in {precision}, times as fast as the modules in {against}: "
                            f"{ratios}, {best:.1f} where each takes its best batch."
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, nargs="+", help="batch sizes; default: 64 on a GPU, 1 16 else")
    parser.add_argument("--passes", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--threads", type=int, help="on the CPU; default: PyTorch's own choice")
    parser.add_argument("--rounds", type=int, default=CPU_ROUNDS, help="interleaved rounds on the CPU")
    parser.add_argument("--out", type=pathlib.Path, help="default: results/tfgram_DEVICE.csv")
    parser.add_argument("--check", action="store_true", help="only check the errors")
    parser.add_argument("--predict", action="store_true", help="only write results/tfgram_predicted.md")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        passing, provider, precision, clips = arguments.worker
        return cpu_worker(passing, provider, precision, int(clips))
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.predict:
        (ROOT / "results" / "tfgram_predicted.md").write_text(predictions())
        return None
    if arguments.check:
        errors = check(device).values()
        sys.exit(any(not ours <= 2 * plain + FLOOR for ours, plain in errors))
    if device.type == "cuda":
        rows = gpu_rows(device, arguments.passes, arguments.clips or [64])
    else:
        rows = cpu_rows(arguments.passes, arguments.clips or [1, 16], arguments.rounds)
    write(arguments.out or ROOT / "results" / f"tfgram_{device.type}.csv", rows)
    if any(not row["error"] <= 2 * row["plain_error"] + FLOOR for row in rows):
        sys.exit("some errors exceed twice the plain path's: see the rows")
    return None


if __name__ == "__main__":
    main()
