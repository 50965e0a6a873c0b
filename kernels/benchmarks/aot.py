"""Compile every shipped kernel configuration ahead of time, without a GPU, and check what came out.

    python kernels/benchmarks/aot.py [--only NAME] [--capability 80 86 90 100] [--out FILE.csv]

The configurations are recorded from the package's own host functions. One is refused (exit code 1) if it does
not compile, uses the stack or spills registers, needs more shared memory than the architecture has (which
compiling alone does not notice) or lacks tensor-core instructions where they are meant.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib
import itertools
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported; nothing compiles with it
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402
from osscl_kernels import LAYERS, backend, frames  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import driver  # noqa: E402

MODULES = ("supcon", "tfgram_infer", "tfgram_train")
# Shared memory per program, bytes (CUDA C++ programming guide, table of technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
COLUMNS = "name capability registers stack spills shared_bytes tensor_core seconds triton problems".split()


@dataclass(frozen=True)
class Case:
    """One launch of a kernel, as Triton's own launcher would specialise it."""

    module: str
    kernel: str
    precision: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple, list]  # of arguments that are multiples of 16
    options: dict[str, int]  # num_warps, num_stages

    @property
    def name(self) -> str:
        """What tells it apart from the others: kernel, precision and numbers."""
        shape = " ".join(f"{k}={v}" for k, v in self.constants.items() if isinstance(v, int))
        return f"{self.module} {self.kernel} {self.precision} {shape} warps={self.options['num_warps']}"


def module(part: str):
    """A module of kernels; the package's own name may be a function."""
    return importlib.import_module(f"osscl_kernels.{part}")


def launch(
    part: str, precision: str, rows: int = 64, *, clips: int = 2, samples: int = 40_000, device: str = "cpu"
) -> Callable:
    """A call of a module's host functions, forward and backward.

    40,000 samples have the pool windows of the paper's clips.
    """
    host, zeros = module(part), functools.partial(torch.zeros, device=device)
    wave, weights = zeros(clips, samples), [zeros(x.outputs, x.inputs, x.kernel) for x in LAYERS]
    vectors = [zeros(x.outputs) for x in LAYERS]
    if part == "tfgram_infer":
        folded = [w.permute(2, 1, 0) for w in weights]
        waves = [wave, wave.to(torch.int16)] if precision == "bf16" else [wave]
        return lambda: [host._infer(x, folded, vectors, frames(x.shape[1]), precision) for x in waves]
    z, labels = zeros(rows, 128), zeros(rows, dtype=torch.int64)
    rest = (0, rows, True, 0.02, 0.07, precision)

    def supcon():
        loss, lse, count = host._forward(z, labels, *rest)
        host._backward(loss, z, labels, lse, count, *rest)

    def train():
        out, _, _, saved = host.forward(wave, weights, vectors, vectors, 1e-5, 512, precision)
        host._backward(out, wave, weights, saved, 512, precision)

    return supcon if part == "supcon" else train


def record(capability: int) -> list[Case]:
    """Every configuration that the package launches on an architecture, for the paper's clips."""
    cases: dict[str, Case] = {}

    def note(*, fn, compile, **_) -> bool:
        """Take a launch down; True, so that Triton neither compiles nor runs it."""
        names = [parameter.name for parameter in fn.jit_function.params]
        constants = {names[i]: value for (i,), value in compile["constants"].items()}
        options = {key: compile[key] for key in ("num_warps", "num_stages")}
        case = Case(part, fn.name, precision, compile["signature"], constants, compile["configs"][0], options)
        # The dilation and an unused precision leave the machine code alike.
        alike = {key: value for key, value in constants.items() if key != "DILATION"}
        cases.setdefault(repr((part, fn.name, compile["signature"], alike, options)), case)
        return True

    gpu = SimpleNamespace(
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    with (
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note),
        mock.patch.object(backend, "capability", lambda _: capability),
        torch.no_grad(),
    ):
        for part in MODULES:
            sizes = {row["size"] for row in backend.tile_rows() if part in row["kernel"]} or {0}
            for precision, size in itertools.product(module(part).PRECISIONS[1:], sorted(sizes)):
                launch(part, precision, size or 64)()
    return list(cases.values())


def compile_case(case: Case, capability: int):
    """The compiled kernel of one configuration; needs no GPU and no driver."""
    kernel = getattr(module(case.module), case.kernel)
    source = ASTSource(kernel, case.signature, constexprs=case.constants, attrs=case.attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)


def measure(compiled) -> dict:
    """Registers, memory and instructions of a compiled kernel, read from its machine code."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage.get("LOCAL", 0),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": len(TENSOR_CORE.findall(sass)),
    }


def check(job: tuple[Case, int]) -> dict:
    """One row of the table; its problems are short phrases."""
    case, capability = job
    start, faults = time.perf_counter(), []
    row = {"name": case.name, "capability": capability, "triton": triton.__version__}
    try:
        row |= measure(compile_case(case, capability))
        if row["stack"] or row["spills"]:
            faults.append(f"spills (stack {row['stack']}, {row['spills']} instructions)")
        if row["shared_bytes"] > SHARED_LIMIT[capability]:
            faults.append(f"shared memory {row['shared_bytes']} > {SHARED_LIMIT[capability]}")
        if case.constants.get("PRECISION", "ieee") != "ieee" and not row["tensor_core"]:
            faults.append("no tensor-core instructions")
    except Exception as error:  # a kernel that does not compile is a row, and the others still get theirs
        faults.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return row | {"seconds": round(time.perf_counter() - start, 1), "problems": "; ".join(faults)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    parser.add_argument("--capability", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--out", type=pathlib.Path, help="also write the table to this CSV file")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    arguments = parser.parse_args()
    jobs = [(case, c) for c in arguments.capability for case in record(c) if arguments.only in case.name]
    rows = []
    with tempfile.TemporaryDirectory() as cache:  # nothing stale is read, nothing is left behind
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
            for row in pool.map(check, jobs):
                rows.append(row)
                print("  ".join(f"{key} {row.get(key, '')}" for key in COLUMNS), flush=True)
    if arguments.out:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(rows)
    refused = sum(bool(row["problems"]) for row in rows)
    print(f"{len(rows)} configurations, {refused} refused, triton {triton.__version__}")
    return 1 if refused or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
