"""Time tiles on this GPU and write the fastest into osscl_kernels/tiles.json.

    python kernels/benchmarks/tune.py [--only supcon_backward]

Each row's tile is varied, one number at a time, for the family of GPUs at hand; what does not compile or
launch drops out. A kernel is timed within its own host functions.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import aot  # noqa: E402
import torch  # noqa: E402
from osscl_kernels import backend  # noqa: E402

CHOICES = {
    "BM": (32, 64, 128), "BN": (32, 64, 128), "BK": (16, 32, 64, 128), "BCI": (32, 64), "P": (16, 32, 64),
    "num_warps": (4, 8), "num_stages": (1, 2, 3),
}  # fmt: skip


def neighbours(tile: dict) -> Iterator[dict]:
    """The tile, then each with one number changed."""
    yield tile
    for key, values in CHOICES.items():
        yield from (tile | {key: value} for value in values if key in tile and value != tile[key])


def milliseconds(kernel: str, precision: str, size: int, tile: dict) -> float:
    """Time of the host function that launches the kernel, with this tile; infinite where it cannot run."""
    part = "supcon" if "supcon" in kernel else "tfgram_train"
    if kernel in ("tfgram_front", "tfgram_layer"):
        part = "tfgram_infer"
    choose = backend.tile

    def chosen(name, *rest):
        return dict(tile) if name == kernel else choose(name, *rest)

    with mock.patch.object(backend, "tile", chosen):
        call = aot.launch(part, precision, size or 64, device="cuda")
        try:
            return backend.triton.testing.do_bench(call, warmup=5, rep=30)
        except Exception as error:
            print(f"    {tile}: {type(error).__name__}")
            return float("inf")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    arguments = parser.parse_args()
    here = backend.FAMILIES.get(backend.capability(torch.empty(0, device="cuda")), 0)
    family = next(sm for sm, family in backend.FAMILIES.items() if family == here)
    rows = {(r["kernel"], r["sm"], r["precision"], r["size"]): r for r in backend.tile_rows()}
    for kernel, precision, size in sorted({(k, p, s) for k, _, p, s in rows if arguments.only in k}):
        tile = backend.tile(kernel, precision, torch.empty(0, device="cuda"), size)
        times = [(milliseconds(kernel, precision, size, each), each) for each in neighbours(tile)]
        best = min(times, key=lambda pair: pair[0])
        print(f"{kernel} {precision} {size}: {times[0][0]:.4f} -> {best[0]:.4f} ms {best[1]}", flush=True)
        row = {"kernel": kernel, "sm": family, "precision": precision, "size": size, "tile": best[1]}
        rows[kernel, family, precision, size] = row
        lines = ",\n".join(" " + json.dumps(rows[key]) for key in sorted(rows))
        backend.TILES.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
