"""Count the work of one program of every kernel at the paper's sizes, for predict.py.

    python tests/kernels/count_work.py        # into kernels/benchmarks/counted.json

What Triton compiles for sm_90 is executed by the emulator, one program per launch.
"""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import sys
from unittest import mock

KERNELS = pathlib.Path(__file__).resolve().parents[2] / "kernels"
sys.path[:0] = [str(KERNELS), str(KERNELS / "benchmarks")]

import aot  # noqa: E402
import predict  # noqa: E402
from emulator import Launch, emulated  # noqa: E402
from osscl_kernels import backend  # noqa: E402

COLUMNS = 1024  # rows of the features that a program of SupCon is run against


def launches(part: str, precision: str) -> list[Launch]:
    """The launches of a forward and a backward pass: SupCon of COLUMNS rows, TFgram of one clip of 10 s."""
    with emulated(90, count=True, one=True) as emulation:
        aot.launch(part, precision, COLUMNS, clips=1, samples=160_000)()
    if (part, precision) == ("tfgram_infer", "bf16"):  # the second half takes int16 waves
        return emulation.launches[: len(emulation.launches) // 2]
    return emulation.launches


def counts(launch: Launch) -> dict[str, int]:
    """The work of a program, by the names that predict.py knows."""
    work = dict.fromkeys(("tensor FLOP", "exponentials", "wavefronts"), 0) | launch.work()
    work["l2_bytes"] = work["load sector bytes"] + work["store sector bytes"]
    work["tensor_flop"] = work["tensor FLOP"]
    names = "tensor_flop", "instructions", "exponentials", "wavefronts", "l2_bytes"
    return {name: round(work[name]) for name in names}


def records(part: str, precision: str) -> list[dict]:
    """The entries of counted.json for a module and a precision."""
    kernel, passes = part.split("_")[0], ["training" if "train" in part else "inference"]
    made = []
    if kernel == "tfgram":
        for launch in launches(part, precision):
            programs = {"programs_per_clip": math.prod(launch.grid)}
            made.append({"part": launch.name, "passes": passes} | programs | {"work": counts(launch)})
    else:
        tile = backend.tile
        rows = (row for row in backend.tile_rows() if row["precision"] == precision)
        sizes = sorted({row["size"] for row in rows if kernel in row["kernel"]})
        for first, below in itertools.pairwise([*sizes, None]):
            with mock.patch.object(backend, "tile", lambda *case, size=first: tile(*case[:3], size)):
                forward, backward = launches(part, precision)
            limits = {"from": first} | ({"below": below} if below else {})
            for launch, passes in ((forward, ["forward", "both"]), (backward, ["both"])):
                size = {"rows": COLUMNS // math.prod(launch.grid), "columns": COLUMNS}
                made.append({"passes": passes} | size | limits | {"work": counts(launch)})
    return [{"kernel": kernel, "precision": precision} | record for record in made]


def main() -> None:
    """The command line."""
    found = []
    for part in aot.MODULES:
        for precision in aot.module(part).PRECISIONS[1:]:
            found += records(part, precision)
            print(part, precision, flush=True)
    lines = ",\n".join(f" {json.dumps(record)}" for record in found)
    predict.COUNTED.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
