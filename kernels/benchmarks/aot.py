"""Compile every shipped kernel configuration ahead of time, without a GPU, and check what came out.

    python kernels/benchmarks/aot.py [--only NAME] [--capability 80 86 90 100] [--out FILE.csv]

The configurations are recorded from the package's own host functions. One is refused (exit code 1) if it does
not compile, uses the stack or spills registers, needs more shared memory than the architecture has (which
compiling alone does not notice) or lacks tensor-core instructions where they are meant.
"""

from __future__ import annotations

import argparse
import csv
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
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when the kernels are imported; nothing compiles with it
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import triton  # noqa: E402
from osscl_kernels import LAYERS, backend, frames  # noqa: E402
from triton.backends.compiler import BaseBackend, GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

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

    def comparable(self) -> Case:
        """The case without what leaves the machine code alike: the dilation, an unused precision."""
        constants = {key: value for key, value in self.constants.items() if key != "DILATION"}
        return replace(self, precision="", constants=constants, attributes={})


class Recorder:
    """Takes the place of a jitted function: notes how it is launched, and computes nothing."""

    def __init__(self, function, module: str, precision: str, cases: list[Case]):
        self.function, self.module, self.precision, self.cases = function, module, precision, cases

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **keywords):
        """Add this launch to the cases."""
        function = self.function
        bind = create_function_from_signature(function.signature, function.params, BaseBackend)
        values, kinds, options = bind(*arguments, **keywords)
        signature = {name: kind for name, (kind, _) in zip(values, kinds, strict=True)}
        constants = {name: value for name, value in values.items() if signature[name] == "constexpr"}
        attributes = {
            (i,): BaseBackend.parse_attr(known) for i, (_, known) in enumerate(kinds) if known == "D"
        }
        case = Case(self.module, function.__name__, self.precision, signature, constants, attributes, options)
        if case.comparable() not in [other.comparable() for other in self.cases]:
            self.cases.append(case)


def module(part: str):
    """A module of kernels; the package's own name may be a function."""
    return importlib.import_module(f"osscl_kernels.{part}")


def launch(
    part: str, precision: str, size: int = 64, device: str = "cpu", clips: int = 2
) -> Callable[[], Any]:
    """A call of a module's host functions, forward and backward: `size` rows for SupCon, else clips.

    40,000 samples have the pool windows of the paper's clips.
    """
    host = module(part)
    if part == "supcon":
        z = torch.zeros(size, 128, device=device)
        labels = torch.zeros(size, dtype=torch.int64, device=device)
        rest = (0, size, True, 0.02, 0.07, precision)

        def call():
            loss, lse, count = host._forward(z, labels, *rest)
            host._backward(loss, z, labels, lse, count, *rest)

        return call
    wave = torch.zeros(clips, 40_000, device=device)
    weights = [torch.zeros(x.outputs, x.inputs, x.kernel, device=device) for x in LAYERS]
    vectors = [torch.zeros(len(w), device=device) for w in weights]
    if part == "tfgram_train":

        def call():
            out, _, _, saved = host.forward(wave, weights, vectors, vectors, 1e-5, 512, precision)
            host._backward(out, wave, weights, saved, 512, precision)

        return call
    folded = [w.permute(2, 1, 0) for w in weights]
    waves = [wave, wave.to(torch.int16)] if precision == "bf16" else [wave]
    return lambda: [host._infer(x, folded, vectors, frames(x.shape[1]), precision) for x in waves]


def record(capability: int) -> list[Case]:
    """Every configuration that the package launches on an architecture, for the paper's clips."""
    cases: list[Case] = []
    with mock.patch.object(backend, "capability", lambda _: capability), torch.no_grad():
        for part in MODULES:
            host = module(part)
            kernels = {k: v for k, v in vars(host).items() if isinstance(v, triton.JITFunction)}
            sizes = {row["size"] for row in backend.tile_rows() if part in row["kernel"]} or {0}
            for precision, size in itertools.product(host.PRECISIONS[1:], sorted(sizes)):
                recorders = {k: Recorder(v, part, precision, cases) for k, v in kernels.items()}
                with mock.patch.multiple(host, **recorders):
                    launch(part, precision, size or 64)()
    return cases


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


def problems(case: Case, capability: int, row: dict) -> list[str]:
    """What is wrong with a measured configuration, one short phrase each; empty where nothing is."""
    faults = []
    if row["stack"] or row["spills"]:
        faults.append(f"spills (stack {row['stack']}, {row['spills']} instructions)")
    if row["shared_bytes"] > SHARED_LIMIT[capability]:
        faults.append(f"shared memory {row['shared_bytes']} > {SHARED_LIMIT[capability]}")
    if case.constants.get("PRECISION", "ieee") != "ieee" and not row["tensor_core"]:
        faults.append("no tensor-core instructions")
    return faults


def check(job: tuple[Case, int]) -> dict:
    """One row of the table."""
    case, capability = job
    start = time.perf_counter()
    row = {"name": case.name, "capability": capability, "triton": triton.__version__}
    try:
        row |= measure(compile_case(case, capability))
        faults = problems(case, capability, row)
    except Exception as error:  # a kernel that does not compile is a row, and the others still get theirs
        faults = [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
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
