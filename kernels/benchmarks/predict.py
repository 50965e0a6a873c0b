"""Milliseconds on an H200, predicted from the counted work of programs; nothing has been timed yet.

    python kernels/benchmarks/predict.py        # the table of kernels/README.md, into results/predicted.md

counted.json, made by tests/kernels/count_work.py, holds per kernel and precision what one program of the
compiled code does on sm_90, counted by executing it. A program takes the largest of its clocks on each unit;
programs share 132 multiprocessors.
"""

from __future__ import annotations

import json
import math
import pathlib

COUNTED = pathlib.Path(__file__).with_name("counted.json")
RESULT = pathlib.Path(__file__).resolve().parents[2] / "results" / "predicted.md"
MULTIPROCESSORS, CLOCK = 132, 1.7e9
# Per clock of a multiprocessor: dense tensor-core FLOP, instructions of a warp issued, exponentials,
# wavefronts of 128 bytes of shared memory, bytes from the L2 cache.
RATES = {"bf16": 4096, "tf32": 2048, "tf32x3": 2048, "instructions": 4, "exponentials": 16, "wavefronts": 1}
RATES |= {"l2_bytes": 24}


def clocks(work: dict[str, float], precision: str) -> float:
    """Clocks of a program: those of the unit that has most to do."""
    parts = [work[k] / RATES[k] for k in ("instructions", "exponentials", "wavefronts", "l2_bytes")]
    if precision != "ieee":
        parts.append(work["tensor_flop"] / RATES[precision])
    return max(parts)


def milliseconds(kernel: str, passing: str, precision: str, size: int) -> float | str:
    """Predicted time of a pass over `size` rows or clips; empty where nothing was counted."""
    clocks_taken = 0.0
    for row in json.loads(COUNTED.read_text()):
        if (row["kernel"], row["precision"]) != (kernel, precision) or passing not in row["passes"]:
            continue
        if kernel == "tfgram":
            programs, share = size * row["programs_per_clip"], 1.0
        elif row.get("from", 0) <= size < row.get("below", math.inf):
            programs, share = math.ceil(size / row["rows"]), size / row["columns"]
        else:
            continue
        clocks_taken += math.ceil(programs / MULTIPROCESSORS) * share * clocks(row["work"], precision)
    return clocks_taken / CLOCK * 1e3 or ""


def table() -> str:
    """The predictions as a Markdown table."""
    lines = ["| kernel | pass | size | precision | predicted ms |", "|---|---|---|---|---|"]
    cases = [("supcon", "both", n) for n in (64, 4096, 16384)]
    cases += [("tfgram", passing, 64) for passing in ("inference", "training")]
    for kernel, passing, size in cases:
        for precision in ("tf32x3", "tf32", "bf16", "ieee"):
            if predicted := milliseconds(kernel, passing, precision, size):
                lines.append(f"| {kernel} | {passing} | {size} | {precision} | {predicted:.3g} |")
    left_out = "launches and what PyTorch computes between the kernels are left out"
    units = "Size: rows of SupCon, clips of 10 s of TFgram. Both: forward and backward."
    note = f"Predicted for an H200, not timed; {left_out}. {units}"
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    RESULT.write_text(table(), encoding="utf-8")
    print(table())
