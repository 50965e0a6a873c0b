"""Execute every kernel in every precision without a GPU; write errors and counted work per program.

    python tests/kernels/compiled_report.py [--only TEXT] [--out results/kernels_compiled]

Writes OUT.md and OUT.csv. What Triton compiles for sm_80 and sm_90 is executed by the emulator.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time

os.environ["TRITON_INTERPRET"] = "0"
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from compiled import KERNELS, Case, cases  # noqa: E402
from emulator import Launch, emulated  # noqa: E402

from osscl_min.runtime.files import provenance, replacing, write_csv  # noqa: E402
from osscl_min.runtime.tables import markdown  # noqa: E402

ARCHITECTURES = (80, 90)
# Long enough for whole tiles, short enough to execute.
SIZES = {"supcon": (300, 128), "tfgram_infer": (1, 2001, 160), "tfgram_train": (1, 1000, 100)}
COUNTS = (
    "instructions", "tensor FLOP", "FMA", "exponentials", "wavefronts", "least wavefronts",
    "load sector bytes", "load useful bytes", "store sector bytes", "store useful bytes",
)  # fmt: skip
TILES = ("BM", "BN", "BK", "BD", "BCI", "BC", "BP", "P")  # how, not what: not a part of a kernel's name
INTRODUCTION = """# Compiled kernels, executed

Triton {triton} compiles each kernel for the architecture; an emulator of PTX (tests/kernels/emulator)
executes it on a CPU, threads, tensor cores and asynchronous copies included. No GPU was used, and nothing
here is a time. Made by `python tests/kernels/compiled_report.py`, {commit}, {time}.
"""
ERRORS = """## Errors against float64

Of all results of a case, the one that uses most of its error budget. An error is relative to the result's
largest entry or, in training, to its Euclidean norm. The budget is twice the error of plain PyTorch, plus
what the precision's products cost.
"""
WORK = """## Counted work per program

Averages over a launch's programs. A wavefront is 128 bytes of shared memory, about one clock of a
multiprocessor; "least" is their number without bank conflicts. Loads and stores of global memory are counted
in sectors of 32 bytes; "useful" are distinct bytes.
"""


def label(launch: Launch, others: list[Launch]) -> str:
    """The kernel's name and those constants that tell it from the others of the same name."""
    alike = [other.constants for other in others if other.name == launch.name]
    differing = (
        f"{name}={value}"
        for name, value in launch.constants.items()
        if name not in TILES and len({str(constants.get(name)) for constants in alike}) > 1
    )
    return " ".join([launch.name, *differing])


def thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


def kib(launch: dict, kind: str) -> str:
    return f"{launch[f'{kind} sector bytes'] / 1024:.1f} ({launch[f'{kind} useful bytes'] / 1024:.1f})"


def measure(case: Case, architecture: int) -> tuple[dict, list[dict]]:
    """The case's error, and a record of each distinct launch."""
    start = time.perf_counter()
    with emulated(architecture, count=True) as emulation:
        errors = case.errors()
    name, (error, budget) = max(errors.items(), key=lambda item: item[1][0] / item[1][1])
    about = {"architecture": f"sm_{architecture}", "precision": case.precision}
    row = {"case": f"{case.kernel} {'x'.join(map(str, case.size))}", **about, "result": name}
    row |= {"error": error, "budget": budget, "findings": "; ".join(emulation.findings()) or "none"}
    work = {}
    for launch in emulation.launches:
        key = label(launch, emulation.launches)
        notes = {text.split(":")[1].strip() for text in launch.counts.findings if text.startswith("note")}
        record = {"kernel": key, **about, "grid": "x".join(map(str, launch.grid))}
        work[key] = record | dict.fromkeys(COUNTS, 0.0) | launch.work() | {"notes": "; ".join(sorted(notes))}
    seconds = time.perf_counter() - start
    print(f"{case} sm_{architecture}: {error:.1e} of {budget:.1e}, {seconds:.0f} s", flush=True)
    return row, list(work.values())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="only cases that contain this, as 'supcon bf16'")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "kernels_compiled")
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors hold NaN
    errors, work = [], []
    for case in cases(small=True):
        for architecture in ARCHITECTURES if arguments.only in str(case) else ():
            row, launches = measure(Case(case.kernel, case.precision, SIZES[case.kernel]), architecture)
            errors.append(row)
            work += launches
    if not errors:
        parser.error(f"no case contains {arguments.only!r}; kernels: {', '.join(KERNELS)}")
    table = [["case", "architecture", "precision", "worst result", "error", "budget", "findings"]]
    for row in errors:
        *about, error, budget, findings = row.values()
        table.append([*about, f"{error:.1e}", f"{budget:.1e}", findings])
    counts = [
        ["kernel", "architecture", "precision", "MFLOP of tensor cores", "FMA", "exponentials",
         "wavefronts (least)", "loads, KiB (useful)", "stores, KiB (useful)", "notes"]
    ]  # fmt: skip
    for row in work:
        waves = f"{thousands(row['wavefronts'])} ({thousands(row['least wavefronts'])})"
        counts.append(
            [row["kernel"], row["architecture"], row["precision"], f"{row['tensor FLOP'] / 1e6:.2f}",
             thousands(row["FMA"]), thousands(row["exponentials"]), waves, kib(row, "load"),
             kib(row, "store"), row["notes"]]
        )  # fmt: skip
    import triton

    made = provenance() | {"triton": triton.__version__}
    text = [INTRODUCTION.format_map(made), ERRORS, markdown(table), "", WORK, markdown(counts), ""]
    with replacing(arguments.out.with_suffix(".md")) as file:
        file.write("\n".join(text))
    columns = list(work[0])
    write_csv(arguments.out.with_suffix(".csv"), columns, [[row[c] for c in columns] for row in work])
    return int(any(not row["error"] <= row["budget"] or row["findings"] != "none" for row in errors))


if __name__ == "__main__":
    sys.exit(main())
