"""Test the kernels on a GPU, then time them against what they replace, and a training step.

    python kernels/benchmarks/gpu.py [--dry] [--minutes 8] [--out results/gpu.csv]

Every case appends a row to the CSV file at once, so a run that is cut short keeps what it has; a case that
fails or comes too late is a row that says so. `predicted_ms` comes from counted work (predict.py), never a
clock. The training step is that of `osscl bench train`, whose table lies beside the CSV file; it needs the
packages of osscl_min. --dry takes small sizes through the same code on a CPU, with the kernels in Triton's
interpreter, and only lists the tests and the options of bench train.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import itertools
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "kernels" / "benchmarks")]
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import osscl_kernels as kernels  # noqa: E402
import predict  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from triton import testing  # noqa: E402

COLUMNS = (
    "kernel provider pass precision size median_ms q20_ms q80_ms predicted_ms extra_mb device torch triton "
    "commit date note"
).split()
ROWS = (64, 256, 1024, 4096, 16384, 65536, 262144)
Problem = tuple[dict[str, Callable], Callable[[Callable], Callable]]  # providers; a provider's timed call


def supcon(n: int, passing: str, precision: str, device: str) -> Problem:
    """The loss of n rows, forward or with its backward pass."""
    g = torch.Generator().manual_seed(n)
    labels = torch.randint(41, (n,), generator=g).to(device)
    z = torch.nn.functional.normalize(torch.randn(n, 128, generator=g), dim=1).to(device)
    z = z.bfloat16() if precision == "bf16" else z
    reference, backward = kernels.supcon_loss_ref, passing == "both"

    def ours(z, y, backend="triton"):
        return kernels.supcon_loss(z, y, precision=precision, backend=backend)

    def make(function):
        x = z.clone().requires_grad_(backward)
        if not backward:
            return lambda: function(x, labels)
        return lambda: torch.autograd.grad(function(x, labels), x)[0]

    functions = {"kernels": ours}
    if precision != "tf32x3":  # PyTorch has one float32
        functions["chunked"] = lambda z, y: ours(z, y, "torch")
        if n <= 65536:
            again = functools.partial(checkpoint, reference, use_reentrant=False)
            functions |= {"dense": reference, "dense, compiled": reference, "dense, checkpointed": again}
    if n == 64:
        functions |= {"kernels, graph": ours, "dense, graph": reference}
    return functions, make


def tfgram(clips: int, passing: str, precision: str, device: str) -> Problem:
    """TFgram of a batch: the kernels, and modules eager, compiled, graphed."""
    samples = 60 if device == "cpu" else 160_000
    g = torch.Generator().manual_seed(0)

    def normal(*shape, scale):
        return (scale * torch.randn(shape, generator=g)).to(device)

    wave = normal(clips, samples, scale=0.1)
    weights = [
        normal(x.outputs, x.inputs, x.kernel, scale=(x.inputs * x.kernel) ** -0.5) for x in kernels.LAYERS
    ]
    ones, zeros = ([f(len(w), device=device) for w in weights] for f in (torch.ones, torch.zeros))
    half, options = precision == "bf16", {"precision": precision, "backend": "triton"}
    if passing == "inference":
        dtype = torch.bfloat16 if half else torch.float32
        folded = kernels.Folded(tuple(w.permute(2, 1, 0).contiguous() for w in weights), tuple(zeros))
        ours, theirs = functools.partial(kernels.tfgram_infer, **options), kernels.tfgram_infer_ref
        x, parameters = wave.to(dtype), folded.to(dtype)

        def make(function):
            return lambda: function(x, parameters)
    else:
        ours = functools.partial(kernels.tfgram_train, **options)
        theirs = torch.autocast(device, torch.bfloat16, enabled=half)(kernels.tfgram_train_ref)
        leaves = [[t.requires_grad_() for t in group] for group in (weights, ones, zeros)]
        gradient = normal(clips, 128, kernels.frames(samples), scale=1.0)

        def make(function):
            def train():
                out = function(wave, *leaves)[0]
                return torch.autograd.grad(out, sum(leaves, []), gradient.to(out.dtype))

            return train

    functions = {"kernels": ours, "modules": theirs, "modules, compiled": theirs}
    return functions | {"kernels, graph": ours, "modules, graph": theirs}, make


def measure(provider: str, function: Callable, make: Callable, device: str) -> dict:
    """Median and quantiles in milliseconds, and the memory that a call takes beyond its inputs."""
    if "compiled" in provider:  # dry, only traced; without the reset it would soon run eagerly
        torch.compiler.reset()
        compiler = "eager" if device == "cpu" else "inductor"
        function = torch.compile(function, dynamic=False, backend=compiler)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        call = make(function)
        start = time.perf_counter()
        call()
        if device == "cpu":
            return {"median_ms": 1e3 * (time.perf_counter() - start)}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 1e6
        timer = testing.do_bench_cudagraph if "graph" in provider else testing.do_bench
        times = timer(call, rep=100, quantiles=[0.5, 0.2, 0.8])
        torch.cuda.empty_cache()
    return dict(zip(("median_ms", "q20_ms", "q80_ms"), times, strict=True)) | {"extra_mb": extra}


def command(arguments: str, seconds: float) -> dict:
    """Wall time of a run of this interpreter; one that fails is an error with its last line."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": paths}, "capture_output": True, "text": True}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments.split()], timeout=seconds, **options)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return {"median_ms": 1e3 * (time.perf_counter() - start)}


def cases(dry: bool, seconds: float, out: pathlib.Path) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Rows, and the call that measures each."""
    tests = f"-m pytest -q tests/kernels{' --collect-only' * dry}"
    yield {"kernel": "all", "provider": "kernels' tests"}, lambda: command(tests, seconds / 3)
    device, sizes, precisions = ("cpu", (17,), ("bf16",)) if dry else ("cuda", ROWS, ("bf16", "tf32"))
    problems = list(itertools.product([tfgram], [1 if dry else 64], precisions, ("inference", "training")))
    problems += itertools.product([supcon], sizes, ("tf32x3", "bf16", "ieee"), ("forward", "both"))
    for problem, size, precision, passing in problems:
        kernel, (functions, make) = problem.__name__, problem(size, passing, precision, device)
        for provider, function in functions.items():
            if dry and "graph" in provider:
                continue
            row = {"kernel": kernel, "provider": provider, "pass": passing, "precision": precision}
            if provider == "kernels":
                row["predicted_ms"] = predict.milliseconds(kernel, passing, precision, size)
            yield row | {"size": size}, functools.partial(measure, provider, function, make, device)
    training = f"-m osscl_min bench {'--help' if dry else f'train --out {out.parent.resolve()}'}"
    yield {"kernel": "all", "provider": "bench train"}, lambda: command(training, seconds / 3)


def main() -> int:
    """The command line; 1 where a case of the kernels failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="small sizes on the CPU, through the same code")
    parser.add_argument("--minutes", type=float, default=8.0, help="cases after that are not run")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "gpu.csv")
    arguments = parser.parse_args()
    dry, seconds = arguments.dry, 60 * arguments.minutes
    end = time.monotonic() + seconds
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    base = {
        "device": "CPU, dry" if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    failures = 0
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        for row, measured in cases(dry, seconds, arguments.out):
            try:
                if time.monotonic() > end:
                    raise TimeoutError("not run: the time was spent")
                row |= measured()
            except Exception as error:  # running out of memory is a result, too
                row["note"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
                failures += row["provider"].startswith("kernels")
            row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(row | base)
            file.flush()
            print("  ".join(str(row.get(column, "")) for column in (*COLUMNS[:10], "note")), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
