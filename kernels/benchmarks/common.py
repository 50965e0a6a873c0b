"""What the kernels' benchmarks share: where a row was measured, the device's own limits, and its file."""

from __future__ import annotations

import csv
import datetime
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

import torch  # noqa: E402
from osscl_kernels import backend  # noqa: E402


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


def graphed(call: Callable) -> Callable:
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


def write(path: pathlib.Path, rows: list[dict], columns: Sequence[str], table: str) -> None:
    """The rows as CSV, and beside it the table that the README shows and, with matplotlib, a plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.2e}" if isinstance(v, float) else v for k, v in row.items()})
    temporary.replace(path)
    temporary.write_text(table)
    temporary.replace(path.with_suffix(".md"))
    try:
        import plot
    except ImportError as missing:  # a GPU machine may do without: plot.py draws the CSV anywhere
        print(f"no plot: {missing}")
    else:
        plot.draw(path)
