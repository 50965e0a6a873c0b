"""Draw the time and memory of the supervised contrastive loss over N from the benchmark's rows.

python kernels/benchmarks/plot.py [results/supcon_cpu.csv] [--out FILE.png]
"""

from __future__ import annotations

import argparse
import csv
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "results"


def draw(rows: list[dict[str, str]], path: pathlib.Path) -> None:
    """One line per (provider, precision): milliseconds and extra memory of forward + backward over N."""
    timed = [row for row in rows if row["median_ms"] and row["pass"] == "both"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, column, label in zip(
        axes, ("median_ms", "extra_mb"), ("forward + backward (ms)", "extra memory (MB)"), strict=True
    ):
        for key in dict.fromkeys((row["provider"], row["precision"]) for row in timed):
            mine = [row for row in timed if (row["provider"], row["precision"]) == key]
            x, y = ([float(row[name]) for row in mine] for name in ("rows", column))
            axis.loglog(x, y, marker="o", markersize=3, label=", ".join(key))
        axis.set_xlabel("N")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    one = rows[0]
    figure.suptitle(f"SupCon, D = {one['width']}, {one['device']}, {one['date']}", fontsize=9)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=pathlib.Path, nargs="?", default=RESULTS / "supcon_cpu.csv")
    parser.add_argument("--out", type=pathlib.Path, help="default: the CSV's name with .png")
    arguments = parser.parse_args()
    with arguments.rows.open(newline="") as file:
        draw(list(csv.DictReader(file)), arguments.out or arguments.rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
