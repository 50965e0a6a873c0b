"""Compile every shipped kernel configuration ahead of time, without a GPU, and check what came out.

    python kernels/benchmarks/aot.py [--only NAME] [--capability 80 86 90 100] [--out FILE.csv|FILE.json]

Each kernel module yields its configurations from `compile_cases(capability)`. One is refused (exit code 1)
if it does not compile, uses the stack or spills registers (STACK, LOCAL, LDL, STL), asks for more shared
memory than the architecture has (which compiling alone does not notice), lacks tensor-core instructions
where they are meant, or if fewer loops or values are carried than the source says: Triton 3.6 to 3.9 drop
loop-carried values that start as aliases of one tensor, and only the compiled code shows it.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

os.environ.pop(
    "TRITON_INTERPRET", None
)  # read when the kernels are imported; there is no code to compile with it
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import triton  # noqa: E402
from osscl_kernels.backend import CompileCase  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

MODULES = ("supcon", "tfgram_infer", "tfgram_train")
# Shared memory one program may use, bytes (CUDA C++ programming guide, table of technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_LIMIT = 512  # columns, sm_100
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
COLUMNS = (
    "module name capability registers stack LDL STL shared_bytes shared_limit tensor_core carrying_loops "
    "carried_values seconds triton problems"
).split()


def compile_case(case: CompileCase, capability: int):
    """The compiled kernel of one configuration; needs no GPU and no driver."""
    kernel = case.kernel
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    signature = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
    source = ASTSource(kernel, signature, constexprs=case.constants, attrs=attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )


def carried(ttir: str) -> tuple[int, int]:
    """How many loops carry values from one turn to the next, and how many values in all."""
    loops = re.findall(r"iter_args\(([^)]*)\)", ttir)
    return len(loops), sum(loop.count("=") for loop in loops)


def measure(compiled) -> dict:
    """Registers, memory and instructions of a compiled kernel, read from its machine code."""
    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def dump(what: str) -> str:
            return subprocess.run(
                [cuobjdump, what, cubin.name], capture_output=True, text=True, check=True
            ).stdout

        usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", dump("--dump-resource-usage"))}
        sass = dump("--dump-sass")
    loops, values = carried(compiled.asm["ttir"])
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage.get("LOCAL", 0),
        "LDL": len(re.findall(r"\bLDL\b", sass)),
        "STL": len(re.findall(r"\bSTL\b", sass)),
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "tensor_core": len(TENSOR_CORE.findall(sass)),
        "carrying_loops": loops,
        "carried_values": values,
    }


def problems(case: CompileCase, capability: int, row: dict) -> list[str]:
    """What is wrong with a measured configuration, one short phrase each; empty where nothing is."""
    found = []
    if row["stack"] or row["LDL"] or row["STL"]:
        found.append(f"spills (stack {row['stack']}, LDL {row['LDL']}, STL {row['STL']})")
    if row["shared_bytes"] > SHARED_LIMIT[capability]:
        found.append(f"shared memory {row['shared_bytes']} > {SHARED_LIMIT[capability]}")
    if row["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        found.append(f"tensor memory {row['tensor_memory']} > {TENSOR_MEMORY_LIMIT}")
    if case.tensor_cores and not row["tensor_core"]:
        found.append("no tensor-core instructions")
    if row["carrying_loops"] < case.loop_carried:
        found.append(f"{row['carrying_loops']} loops carry values, {case.loop_carried} should")
    if row["carried_values"] < case.carried_values:
        found.append(f"{row['carried_values']} values carried, {case.carried_values} should be")
    return found


def check_case(case: CompileCase, capability: int) -> dict:
    """One row of the table."""
    start = time.perf_counter()
    row = {"name": case.name, "capability": capability, "shared_limit": SHARED_LIMIT[capability]}
    try:
        row |= measure(compile_case(case, capability))
        found = problems(case, capability, row)
    except Exception as error:  # a kernel that does not compile is a row, and the others still get theirs
        found = [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    return row | {
        "seconds": round(time.perf_counter() - start, 1),
        "triton": triton.__version__,
        "problems": "; ".join(found),
    }


def module_cases(module: str, capability: int) -> list[CompileCase]:
    """The configurations that one kernel module ships; none for a module without `compile_cases`."""
    name = f"osscl_kernels.{module}"
    if importlib.util.find_spec(name) is None:
        return []
    return list(getattr(importlib.import_module(name), "compile_cases", lambda _: ())(capability))


def _check_nth(job: tuple[str, int, int]) -> dict:
    module, capability, index = job  # jitted functions do not pickle: the worker looks its own up
    return {"module": module} | check_case(module_cases(module, capability)[index], capability)


def check(capabilities=tuple(SHARED_LIMIT), only: str = "", workers: int | None = None) -> list[dict]:
    """Compile and check every shipped configuration whose "module name" contains `only`, on all cores."""
    jobs = [
        (module, capability, index)
        for module in MODULES
        for capability in capabilities
        for index, case in enumerate(module_cases(module, capability))
        if only in f"{module} {case.name}"
    ]
    with tempfile.TemporaryDirectory() as cache:  # nothing stale is read, nothing is left behind
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
            return list(pool.map(_check_nth, jobs))


def write(path: pathlib.Path, rows: list[dict]) -> None:
    """Write the rows as CSV or, for a name ending in .json, as JSON."""
    rows = [{column: row.get(column, "") for column in COLUMNS} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=1)
        else:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    temporary.replace(path)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="only configurations whose 'module name' contains this")
    parser.add_argument("--capability", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--out", type=pathlib.Path, help="also write the table to this .csv or .json file")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    arguments = parser.parse_args()
    rows = check(arguments.capability, arguments.only, arguments.workers)
    print(f"triton {triton.__version__}; loops: how many carry values (and how many values)")
    heads = ("kernel", "sm", "reg", "stack", "LDL", "STL", "shared KB", "MMA")
    print("{:58} {:>4} {:>4} {:>6} {:>5} {:>5} {:>13} {:>5} loops s".format(*heads))
    for row in rows:
        shared = f"{row.get('shared_bytes', 0) / 1024:.1f} / {row['shared_limit'] // 1024}"
        cells = [row.get(key, "-") for key in ("registers", "stack", "LDL", "STL")]
        print(
            f"{row['module'] + ' ' + row['name']:58} {row['capability']:4} {cells[0]:>4} {cells[1]:>6} "
            f"{cells[2]:>5} {cells[3]:>5} {shared:>13} {row.get('tensor_core', '-'):>5} "
            f"{row.get('carrying_loops', '-')}({row.get('carried_values', '-')}) {row['seconds']:.0f}"
            + (f"  <-- {row['problems']}" if row["problems"] else "")
        )
    if arguments.out:
        write(arguments.out, rows)
    bad = sum(bool(row["problems"]) for row in rows)
    print(
        f"{len(rows)} configurations, {bad} refused"
        if rows
        else f"no configuration matches {arguments.only!r}"
    )
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
