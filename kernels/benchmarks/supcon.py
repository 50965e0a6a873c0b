"""Check, then time SupCon against dense and checkpointed PyTorch: one command, one CSV.

    python kernels/benchmarks/supcon.py [--device cuda|cpu] [--rows N ...] [--out FILE.csv]
                                        [--check] [--accuracy]

On a GPU every provider runs in this process: the dense formula eagerly and through torch.compile, an eager
version in checkpointed chunks, and the kernels, with CUDA-graph replays at N = 64; running out of memory is a
row. On the CPU a timing is a fresh process, so that its peak memory is its own; cpu_ms is its processor time,
which says more on a busy machine. One row per (provider, pass, N, precision); a table and a plot lie
beside the CSV.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

from common import ROOT, backend, error, gpu_limits, graphed, provenance, torch, write
from osscl_kernels import supcon_loss, supcon_loss_ref
from torch.utils.checkpoint import checkpoint

WIDTH = 128
CLASSES = 41  # machine ids of the paper's data
GPU_ROWS = (64, 256, 1024, 4096, 16384, 65536, 262144)
CPU_CASES = [(p, n) for n in (1024, 4096, 8192) for p in ("dense", "kernels")] + [("kernels", 65536)]
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
PASSES = ("forward", "backward", "both")
COLUMNS = (
    "kernel provider pass rows width precision median_ms q20_ms q80_ms ns_per_pair cpu_ms extra_mb flop "
    "bytes limit_ms share_of_limit error plain_error device threads load python torch triton commit date note"
).split()


def inputs(n: int, device: torch.device, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors around the directions of their classes, as training makes them, and their labels."""
    g = torch.Generator().manual_seed(n)
    labels = torch.randint(CLASSES, (n,), generator=g)
    z = torch.randn(CLASSES, width, generator=g)[labels] + torch.randn(n, width, generator=g)
    return torch.nn.functional.normalize(z, dim=1).to(device), labels.to(device)


def checkpointed(z: torch.Tensor, labels: torch.Tensor, chunk: int = 2048) -> torch.Tensor:
    """The dense formula over chunks of rows, each computed again in the backward pass."""

    def part(own, z, names, start):
        s = (own @ z.T / 0.02).to(torch.float32)
        itself = torch.arange(len(own), device=z.device)[:, None] + start == torch.arange(
            len(z), device=z.device
        )
        positive = (names[:, None] == labels) & ~itself
        count = positive.sum(1)
        lse = s.masked_fill(itself, -math.inf).logsumexp(1)
        losses = lse - (s * positive).sum(1) / count.clamp(min=1)
        return torch.where(count > 0, losses, 0.0).sum()

    parts = [
        checkpoint(part, z[i : i + chunk], z, labels[i : i + chunk], i, use_reentrant=False)
        for i in range(0, len(z), chunk)
    ]
    return torch.stack(parts).sum() * (0.02 / 0.07 / len(z))


def work(n: int, precision: str, passing: str) -> tuple[float, float]:
    """FLOP of the products, and bytes that must move at least: features in, gradient out."""
    forward, backward = 2.0 * n * n * WIDTH, 4.0 * n * n * WIDTH
    size = n * WIDTH * (2 if precision == "bf16" else 4)
    return {"forward": (forward, size), "backward": (backward, 2 * size)}.get(
        passing, (forward + backward, 3 * size)
    )


def differentiate(function, z, labels, **options):
    """The loss and its gradient for the features."""
    x = z.detach().requires_grad_()
    loss = function(x, labels, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def rounded(z: torch.Tensor, precision: str) -> torch.Tensor:
    """Features as a product in this precision reads them: what a GPU does, on any machine."""
    if precision == "bf16":
        return z.bfloat16().float()
    if precision == "tf32":  # 10 bits of mantissa, to nearest
        return ((z.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)
    return z


def accuracy(device: torch.device) -> str:
    """Markdown: errors against float64 at temperature 0.02, for each precision; N = 1000, D = 128."""
    z, labels = inputs(1000, device)
    truth = differentiate(supcon_loss_ref, z.double(), labels, reduction="none")
    lines = [
        "| arithmetic | loss of a row, largest error | mean loss, relative error | gradient, relative error |"
    ]
    lines.append("|---" * 4 + "|")
    cases = {
        "PyTorch, float32": (supcon_loss_ref, z, {}),
        "chunked, float32": (supcon_loss, z, {"backend": "torch"}),
    }
    if device.type == "cuda":
        cases |= {p: (supcon_loss, z, {"precision": p}) for p in PRECISIONS}
        how = "the kernels"
    else:
        cases |= {
            f"{p} (features rounded)": (supcon_loss_ref, rounded(z, p).double(), {}) for p in PRECISIONS[2:]
        }
        how = "for tf32 and bf16 the rounding of the features alone, the rest in float64"
    for name, (function, x, options) in cases.items():
        losses, gradient = differentiate(function, x, labels, reduction="none", **options)
        worst = (losses.double() - truth[0]).abs().max().item()
        mean = abs(losses.double().mean() / truth[0].mean() - 1).item()
        lines.append(f"| {name} | {worst:.1e} | {mean:.1e} | {error(gradient, truth[1]):.1e} |")
    base = provenance(device)
    lines.append(
        f"\nAgainst float64; {len(z)} rows of {CLASSES} classes, D = {WIDTH}, temperature 0.02, mean loss "
        f"{truth[0].mean():.3f}; {how}. {base['device']}, torch {base['torch']}, {base['date']}, commit "
        f"{base['commit']}."
    )
    return "\n".join(lines) + "\n"


def check(device: torch.device, n: int = 1000) -> dict[str, tuple[float, float]]:
    """Worst error of loss and gradient, of ours and of dense float32, for each precision."""
    z, labels = inputs(n, device)
    truth = differentiate(supcon_loss_ref, z.double(), labels)
    results = {}
    for precision in PRECISIONS if device.type == "cuda" else ("ieee",):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        seen = z.bfloat16() if precision == "bf16" else z
        ours, plain = (
            max(error(a, b) for a, b in zip(differentiate(f, seen, labels, **o), truth, strict=True))
            for f, o in ((supcon_loss, {"precision": precision}), (supcon_loss_ref, {}))
        )
        torch.backends.cuda.matmul.allow_tf32 = False
        results[precision] = ours, plain
        verdict = "" if ours <= 2 * plain + FLOORS[precision] else "  <-- over budget"
        print(f"check {precision:6} error {ours:.1e}, dense {plain:.1e}{verdict}", flush=True)
    return results


FLOORS = {"ieee": 2e-6, "tf32x3": 2e-6, "tf32": 2e-2, "bf16": 2e-2}  # beyond twice the dense formula's error


def call_of(provider: str, precision: str, passing: str, z: torch.Tensor, labels: torch.Tensor):
    """A callable that runs one pass."""
    x = (z.bfloat16() if precision == "bf16" else z.clone()).requires_grad_(passing != "forward")
    torch.compiler.reset()  # past a few recompilations torch.compile goes on eagerly, under its old name
    function = {
        "dense": supcon_loss_ref,
        "dense, torch.compile": torch.compile(supcon_loss_ref, fullgraph=True, dynamic=False),
        "checkpointed": checkpointed,
    }.get(provider, lambda x, labels: supcon_loss(x, labels, precision=precision))
    if passing == "forward":
        return lambda: function(x, labels)
    if passing == "both":
        return lambda: torch.autograd.grad(function(x, labels), x)[0]
    loss = function(x, labels)
    return lambda: torch.autograd.grad(loss, x, retain_graph=True)[0]


def gpu_rows(device: torch.device, sizes: list[int], budget_s: float = 420) -> list[dict]:
    """The kernels first, small sizes first; when the time is spent the rest are rows that say so."""
    end = time.monotonic() + budget_s
    errors, limits, base, rows = check(device), gpu_limits(device), provenance(device), []
    print({key: f"{value:.3g}" for key, value in limits.items()})
    for provider in ("kernels", "dense", "dense, torch.compile", "checkpointed"):
        baseline = provider != "kernels"
        largest = 16384 if provider.endswith("compile") else max(sizes)
        for n, precision in itertools.product(sizes, PRECISIONS):
            if n > largest or (baseline and precision == "tf32x3"):
                continue
            z, labels = inputs(n, device)
            ours, plain = errors[precision]
            for passing, graph in itertools.product(PASSES, (False, True)):
                if graph and (n != 64 or passing == "backward"):
                    continue
                name = f"{provider}, CUDA graph" if graph else provider
                row = {"kernel": "supcon", "provider": name, "pass": passing, "rows": n, "width": WIDTH}
                row |= {"precision": precision, **base}
                row |= {"error": plain if baseline else ours, "plain_error": plain}
                try:
                    if time.monotonic() > end:
                        raise TimeoutError("not run: the benchmark's time was spent")
                    row |= gpu_row(row, provider, graph, z, labels, limits)
                except Exception as failure:  # running out of memory is a result
                    row["note"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:100]}"
                rows.append(row)
                report(row)
                torch.cuda.empty_cache()
    return rows


def gpu_row(row, provider, graph, z, labels, limits) -> dict:
    """Time and extra memory of the case that the row names."""
    torch.backends.cuda.matmul.allow_tf32 = row["precision"] == "tf32"
    call = call_of(provider, row["precision"], row["pass"], z, labels)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    quantiles = backend.triton.testing.do_bench(
        graphed(call) if graph else call, warmup=10, rep=100, quantiles=[0.5, 0.2, 0.8]
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    return finish(row, *quantiles, limits) | {"extra_mb": f"{extra / 1e6:.1f}"}


def finish(row: dict, median: float, low: float, high: float, limits: dict[str, float] | None) -> dict:
    """The row's times (ms), with what the work is and how near the limit they come."""
    flop, moved = work(row["rows"], row["precision"], row["pass"])
    done = {
        "median_ms": f"{median:.4g}", "q20_ms": f"{low:.4g}", "q80_ms": f"{high:.4g}",
        "ns_per_pair": f"{1e6 * median / row['rows'] ** 2:.4g}",
        "flop": f"{flop:.4g}", "bytes": f"{moved:.4g}",
    }  # fmt: skip
    if limits:
        bound = 1e3 * max(flop / limits[row["precision"]], moved / limits["bytes"])
        done |= {"limit_ms": f"{bound:.4g}", "share_of_limit": f"{bound / median:.3f}"}
    return done


def report(row: dict) -> None:
    """Print a row."""
    print(
        f"{row['precision']:6} {row['rows']:6} rows {row['pass']:8} {row['provider']:24}"
        f"{row.get('median_ms', '-'):>9} ms ({row.get('q20_ms', '-')} to {row.get('q80_ms', '-')})  "
        f"{row.get('extra_mb', '-')} MB  {row.get('cpu_ms', '')} {row.get('note', '')}",
        flush=True,
    )


def cpu_worker(provider: str, n: int) -> None:
    """Seconds of wall and of processor time of forward + backward, and peak extra memory, as JSON."""
    z, labels = inputs(n, torch.device("cpu"))
    both = call_of(provider, "ieee", "both", z, labels)
    call_of(provider, "ieee", "both", *inputs(64, torch.device("cpu")))()  # libraries load
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    end = time.perf_counter() + 3
    while not seconds or time.perf_counter() < end:
        start, used = time.perf_counter(), time.process_time()
        both()
        seconds.append((time.perf_counter() - start, time.process_time() - used))
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    print(json.dumps([seconds, extra]))


def cpu_rows(sizes: list[int] | None) -> list[dict]:
    """A row of every case, each in a fresh process."""
    device = torch.device("cpu")
    (ours, plain), base, rows = check(device)["ieee"], provenance(device), []
    cases = [(p, n) for p, n in CPU_CASES if not sizes or n in sizes]
    for provider, n in cases:
        environment = os.environ | {"OMP_NUM_THREADS": str(base["threads"])}
        command = [sys.executable, __file__, "--worker", provider, str(n)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        seconds, extra = json.loads(out)
        walls = sorted(1e3 * wall for wall, _ in seconds)
        row = {"kernel": "supcon", "provider": provider, "pass": "both", "rows": n, "width": WIDTH}
        row |= {"precision": "ieee", "load": f"{os.getloadavg()[0]:.1f}", **base}
        low, high = walls[len(walls) // 5], walls[-1 - len(walls) // 5]
        row |= finish(row, statistics.median(walls), low, high, None)
        row |= {"cpu_ms": f"{1e3 * statistics.median(u for _, u in seconds):.4g}", "extra_mb": f"{extra:.0f}"}
        row |= {"error": plain if provider == "dense" else ours, "plain_error": plain}
        if os.getloadavg()[0] > 1.5 * base["threads"]:
            row["note"] = "busy machine"
        rows.append(row)
        report(row)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: one line for every row."""
    one = rows[0]
    heads = [
        "provider",
        "pass",
        "precision",
        "N",
        "ms",
        "processor ms",
        "ns / N²",
        "extra MB",
        "share of limit",
        "error",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        keys = (
            "provider",
            "pass",
            "precision",
            "rows",
            "median_ms",
            "cpu_ms",
            "ns_per_pair",
            "extra_mb",
            "share_of_limit",
        )
        cells = [str(row.get(key, "")) for key in keys]
        if "median_ms" not in row:
            cells[4] = row.get("note", "").split(":")[0]
        lines.append("| " + " | ".join([*cells, f"{row['error']:.1e}"]) + " |")
    loads = [float(row["load"]) for row in rows if row.get("load")]
    load = f", load {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    if any(row.get("note") == "busy machine" for row in rows):
        load += " (a busy machine: the processor time says more)"
    lines.append(
        f"\nD = {WIDTH}, {CLASSES} classes; {one['device']}, {one['threads']} threads{load}, "
        f"torch {one['torch']}, triton {one['triton']}; {one['date']}, commit {one['commit']}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", help="batch sizes N; default: all")
    parser.add_argument("--out", type=pathlib.Path, help="default: results/supcon_DEVICE.csv")
    parser.add_argument("--check", action="store_true", help="only check the errors")
    parser.add_argument("--accuracy", action="store_true", help="only write results/supcon_accuracy.md")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return cpu_worker(arguments.worker[0], int(arguments.worker[1]))
    device = torch.device(arguments.device)
    if arguments.accuracy:
        (ROOT / "results" / "supcon_accuracy.md").write_text(accuracy(device))
        return None
    if arguments.check:
        sys.exit(any(not ours <= 2 * plain + FLOORS[p] for p, (ours, plain) in check(device).items()))
    if device.type == "cuda":
        rows = gpu_rows(device, arguments.rows or list(GPU_ROWS))
    else:
        rows = cpu_rows(arguments.rows)
    out = arguments.out or ROOT / "results" / f"supcon_{device.type}.csv"
    write(out, rows, COLUMNS, table(rows))
    if any(not row["error"] <= 2 * row["plain_error"] + FLOORS[row["precision"]] for row in rows):
        sys.exit("some errors exceed twice the dense formula's: see the rows")
    return None


if __name__ == "__main__":
    main()
