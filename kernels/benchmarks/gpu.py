"""The first minutes on a GPU: check the compiled kernels, then time them against what they replace.

    python kernels/benchmarks/gpu.py [--dry] [--minutes 8] [--out results/gpu.csv]

Every case appends a row to the CSV file at once, so a run that is cut short keeps what it has; a case that
fails or comes too late is a row that says so. `predicted_ms` comes from counted work (predict.py), never a
clock. --dry takes small sizes through the same code on a CPU, the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import csv
import datetime
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

import predict  # noqa: E402
import torch  # noqa: E402
from osscl_kernels import (  # noqa: E402
    LAYERS,
    Folded,
    backend,
    frames,
    supcon_loss,
    supcon_loss_ref,
    tfgram_infer,
    tfgram_infer_ref,
    tfgram_train,
    tfgram_train_ref,
)
from torch.utils.checkpoint import checkpoint  # noqa: E402

COLUMNS = (
    "kernel provider pass precision size median_ms q20_ms q80_ms predicted_ms extra_mb device torch triton "
    "commit date note"
).split()
ROWS = (64, 256, 1024, 4096, 16384, 65536, 262144)
CLIPS, SAMPLES = 64, 160_000
Case = tuple[str, str, str, str, int, Callable[[], Callable]]  # kernel, provider, pass, precision, size, make


def checkpointed(z: torch.Tensor, labels: torch.Tensor, chunk: int = 2048) -> torch.Tensor:
    """The dense formula over chunks of rows, each computed again in the backward pass."""

    def part(start: int):
        s = z[start : start + chunk] @ z.T / 0.02
        row = torch.arange(start, start + len(s), device=z.device)
        itself = row[:, None] == torch.arange(len(z), device=z.device)
        positive = (labels[row, None] == labels) & ~itself
        count = positive.sum(1)
        losses = s.masked_fill(itself, -torch.inf).logsumexp(1) - (s * positive).sum(1) / count.clamp(min=1)
        return torch.where(count > 0, losses, 0.0).sum()

    parts = [checkpoint(part, start, use_reentrant=False) for start in range(0, len(z), chunk)]
    return torch.stack(parts).sum() * (0.02 / 0.07 / len(z))


def graphed(call: Callable) -> Callable:
    """The same call as a replay of a CUDA graph."""
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


def compiled(function: Callable, dry: bool) -> Callable:
    """`torch.compile`; dry, only its tracing."""
    torch.compiler.reset()  # after a few recompilations torch.compile would run eagerly, under its old name
    return torch.compile(function, dynamic=False, backend="eager" if dry else "inductor")


def supcon_cases(device: str, dry: bool) -> Iterator[Case]:
    """Forward, and forward with backward, at every batch size; ours first."""
    for n, precision in itertools.product((17,) if dry else ROWS, ("tf32x3", "bf16", "ieee")):
        g = torch.Generator().manual_seed(n)
        labels = torch.randint(41, (n,), generator=g).to(device)
        z = torch.nn.functional.normalize(torch.randn(n, 128, generator=g), dim=1).to(device)
        z = z.bfloat16() if precision == "bf16" else z
        ours = {"precision": precision, "backend": "triton"}
        functions = {"kernels": lambda z, y, ours=ours: supcon_loss(z, y, **ours)}
        if precision != "tf32x3":  # one float32 of PyTorch's
            chunked = {"precision": precision, "backend": "torch"}
            functions |= {"chunked": lambda z, y, chunked=chunked: supcon_loss(z, y, **chunked)}
            functions |= {"checkpointed": lambda z, y: checkpointed(z.float(), y)}
            if n <= 65536:
                functions |= {"dense": supcon_loss_ref, "dense, compiled": supcon_loss_ref}
        for (provider, function), backward in itertools.product(functions.items(), (False, True)):

            def make(provider=provider, function=function, backward=backward, z=z, labels=labels):
                function = compiled(function, dry) if "compiled" in provider else function
                x = z.clone().requires_grad_(backward)
                if not backward:
                    return lambda: function(x, labels)
                return lambda: torch.autograd.grad(function(x, labels), x)[0]

            passing = "both" if backward else "forward"
            yield "supcon", provider, passing, precision, n, make
            if n == 64 and provider in ("kernels", "dense") and backward and not dry:
                yield "supcon", f"{provider}, graph", passing, precision, n, lambda make=make: graphed(make())


def tfgram_cases(device: str, dry: bool) -> Iterator[Case]:
    """TFgram of a batch, inference and training: the kernels, and modules eager, compiled, graphed."""
    clips, samples = (1, 60) if dry else (CLIPS, SAMPLES)
    g = torch.Generator().manual_seed(0)
    wave = (torch.randn(clips, samples, generator=g) * 0.1).to(device)
    weights = [
        (torch.randn(x.outputs, x.inputs, x.kernel, generator=g) / (x.inputs * x.kernel) ** 0.5).to(device)
        for x in LAYERS
    ]
    ones, zeros = ([f(len(w), device=device) for w in weights] for f in (torch.ones, torch.zeros))
    folded = Folded(tuple(w.permute(2, 1, 0).contiguous() for w in weights), tuple(zeros))
    leaves = [[t.clone().requires_grad_() for t in group] for group in (weights, ones, zeros)]
    gradient = torch.randn(clips, 128, frames(samples), generator=g).to(device)
    providers = ("kernels", "modules") if dry else ("kernels", "kernels, graph", "modules", "modules, graph")
    for passing, precision, provider in itertools.product(
        ("inference", "training"), ("bf16",) if dry else ("bf16", "tf32"), (*providers, "modules, compiled")
    ):

        def make(passing=passing, precision=precision, provider=provider):
            ours = {"precision": precision, "backend": "triton"}
            half = precision == "bf16"
            if passing == "inference":
                dtype = torch.bfloat16 if half else torch.float32
                x, parameters = wave.to(dtype), folded.to(dtype)

                def call(run=tfgram_infer_ref):
                    return run(x, parameters)

                if "kernels" in provider:
                    return lambda: tfgram_infer(wave, parameters, **ours)
                function = compiled(tfgram_infer_ref, dry) if "compiled" in provider else tfgram_infer_ref
                return lambda: call(function)
            function = compiled(tfgram_train_ref, dry) if "compiled" in provider else tfgram_train_ref

            def train():
                with torch.autocast(device, torch.bfloat16, enabled=half and "kernels" not in provider):
                    out = (
                        tfgram_train(wave, *leaves, **ours)[0]
                        if "kernels" in provider
                        else function(wave, *leaves)[0]
                    )
                return torch.autograd.grad(out, sum(leaves, []), gradient.to(out.dtype))

            return train

        yield (
            "tfgram",
            provider,
            passing,
            precision,
            clips,
            ((lambda make=make: graphed(make())) if "graph" in provider else make),
        )


def measure(make: Callable[[], Callable], device: str) -> dict:
    """Median and quantiles in milliseconds, and the memory that a call takes beyond its inputs."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        call = make()
        start = time.perf_counter()
        call()
        if device == "cpu":
            return {"median_ms": 1e3 * (time.perf_counter() - start)}
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 1e6
        times = backend.triton.testing.do_bench(call, warmup=10, rep=100, quantiles=[0.5, 0.2, 0.8])
    return dict(zip(("median_ms", "q20_ms", "q80_ms"), times, strict=True)) | {"extra_mb": extra}


def run_command(arguments: list[str], seconds: float, **variables: str) -> str:
    """The last line that a command prints; an error where it fails."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"} | variables
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(seconds, 1)
    )
    print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}")
    return (done.stdout.strip().splitlines() or [""])[-1]


def main() -> int:
    """The command line; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="small sizes on the CPU, through the same code")
    parser.add_argument("--minutes", type=float, default=8.0, help="cases after that are not run")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "gpu.csv")
    arguments = parser.parse_args()
    dry, end = arguments.dry, time.monotonic() + 60 * arguments.minutes
    device = "cpu" if dry else "cuda"
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    base = {
        "device": "CPU, dry" if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": backend.triton.__version__,
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }
    tests = (
        ["pytest", "-q", "tests/kernels/test_backend.py", "-k", "auto"]
        if dry
        else ["pytest", "-q", "tests/kernels"]
    )
    step = ["osscl_min", "bench", "train", *(["--help"] if dry else ["--out", str(arguments.out.parent)])]
    commands: list[tuple[str, list[str], float]] = [("tests", tests, 150.0), ("training step", step, 120.0)]
    failures = 0
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()

        def add(row: dict, fill: Callable[[], dict]) -> None:
            nonlocal failures
            try:
                if time.monotonic() > end:
                    raise TimeoutError("not run: the time was spent")
                row |= fill()
            except Exception as error:  # running out of memory is a result, too
                row["note"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
                failures += row["provider"].startswith("kernels") or row["kernel"] in (
                    "tests",
                    "training step",
                )
            row = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(row | base)
            file.flush()
            print("  ".join(str(row.get(column, "")) for column in (*COLUMNS[:10], "note")), flush=True)

        def execute(name: str, command: list[str], seconds: float) -> None:
            limit = min(seconds, end - time.monotonic())
            add({"kernel": name, "provider": ""}, lambda: {"note": run_command(command, limit)})

        execute(*commands[0])  # correctness first
        for kernel, provider, passing, precision, size, make in itertools.chain(
            tfgram_cases(device, dry), supcon_cases(device, dry)
        ):
            row = {
                "kernel": kernel,
                "provider": provider,
                "pass": passing,
                "precision": precision,
                "size": size,
            }
            if provider == "kernels":
                row["predicted_ms"] = predict.milliseconds(kernel, passing, precision, size)
            add(row, lambda make=make: measure(make, device))
            if not dry:
                torch.cuda.empty_cache()
            if (kernel, size, passing) == ("supcon", 4096, "both") and commands[1:]:
                execute(*commands.pop())  # before the long cases
        if commands[1:]:
            execute(*commands.pop())
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
