"""Draw the time and memory of a benchmark's rows, SupCon's or TFgram's.

python kernels/benchmarks/plot.py [results/supcon_cpu.csv] [--out FILE.png]
"""

from __future__ import annotations

import argparse
import csv
import pathlib

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

RESULTS = pathlib.Path(__file__).resolve().parents[2] / "results"
DASHES = ("-", "--", "-.", ":")


def distinct(rows: list[dict[str, str]], column: str) -> list[str]:
    """The values of a column, in the order of the rows."""
    return list(dict.fromkeys(row[column] for row in rows))


def numbers(rows: list[dict[str, str]], *columns: str) -> list[list[float]]:
    """The values of each column."""
    return [[float(row[column]) for row in rows] for column in columns]


def supcon(rows: list[dict[str, str]]) -> Figure:
    """One line per (provider, precision): milliseconds and extra memory of forward + backward over N."""
    timed = [row for row in rows if row["median_ms"] and row["pass"] == "both"]
    colours = {provider: f"C{place}" for place, provider in enumerate(distinct(timed, "provider"))}
    dashes = dict(zip(distinct(timed, "precision"), DASHES, strict=False))
    figure = Figure((9, 3.9), layout="constrained")
    for axis, column, label in zip(
        figure.subplots(1, 2),
        ("median_ms", "extra_mb"),
        ("forward + backward (ms)", "extra memory (MB)"),
        strict=True,
    ):
        for key in dict.fromkeys((row["provider"], row["precision"]) for row in timed):
            mine = [row for row in timed if (row["provider"], row["precision"]) == key]
            look = {"color": colours[key[0]], "linestyle": dashes[key[1]]}
            axis.loglog(*numbers(mine, "rows", column), marker="o", markersize=3, **look)
        axis.set_xlabel("N")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    marks = [Line2D([], [], color=colour, marker="o", label=name) for name, colour in colours.items()]
    marks += [Line2D([], [], color="k", linestyle=dash, label=name) for name, dash in dashes.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    one = rows[0]
    figure.suptitle(f"SupCon, D = {one['width']}, {one['device']}, {one['date']}", fontsize=9)
    return figure


def tfgram(rows: list[dict[str, str]]) -> Figure:
    """A column per pass: milliseconds above their limit, and extra memory, by precision and batch size."""
    passes, providers = distinct(rows, "pass"), distinct(rows, "provider")
    batches = sorted(distinct(rows, "clips"), key=int)
    figure = Figure((max(7.5, 4.7 * len(passes) * max(1, len(batches) / 2)), 5.8), layout="constrained")
    axes = figure.subplots(
        2, len(passes), squeeze=False, sharex="col", sharey="row", subplot_kw={"yscale": "log"}
    )
    for (time, memory), passing in zip(axes.T, passes, strict=True):
        mine = [row for row in rows if row["pass"] == passing]
        cases = [(precision, batch) for precision in distinct(mine, "precision") for batch in batches]
        for place, provider in enumerate(providers):  # side by side, in the legend's order
            timed = [row for row in mine if row["provider"] == provider and row["median_ms"]]
            shift = 0.8 * ((place + 0.5) / len(providers) - 0.5)
            x = [cases.index((row["precision"], row["clips"])) + shift for row in timed]
            y, limit, extra = numbers(timed, "median_ms", "limit_ms", "extra_mb")
            look = {"color": f"C{place}", "markersize": 4, "label": provider}
            time.vlines(x, limit, y, f"C{place}", linewidth=1)
            time.plot(x, limit, "k_", label="roofline limit")
            time.plot(x, y, "o", **look)
            memory.plot(x, extra, "o", **look)
        time.set_title({"training": "training, forward + backward"}.get(passing, passing), fontsize=10)
        names = [precision if len(batches) == 1 else f"{precision}\n{batch}" for precision, batch in cases]
        memory.set_xticks(range(len(cases)), names)
        memory.set_xticks([place + 0.5 for place in range(len(cases) - 1)], minor=True)
        memory.set_xlim(-0.5, len(cases) - 0.5)
        memory.set_xlabel("precision" if len(batches) == 1 else "precision, clips")
    for axis in axes.flat:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", alpha=0.3)
        axis.grid(axis="x", which="minor", alpha=0.5)
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="x", which="both", length=0)
    axes[0, 0].set_ylabel("median (ms)")
    axes[1, 0].set_ylabel("extra memory (MB)")
    figure.align_ylabels()
    marks = {line.get_label(): line for line in axes[0, 0].lines}
    marks["roofline limit"] = marks.pop("roofline limit")  # last
    figure.legend(handles=marks.values(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    one, clips = rows[0], ", ".join(batches)
    figure.suptitle(
        f"TFgram, {clips} clips of {one['samples']} samples, {one['device']}, {one['date']}", fontsize=9
    )
    return figure


def draw(source: pathlib.Path, out: pathlib.Path | None = None) -> pathlib.Path:
    """Draw the rows of a CSV, by its column `kernel`.

    Parameters
    ----------
    source : pathlib.Path
        As `supcon.py` or `tfgram.py` writes it.
    out : pathlib.Path, optional
        The picture; by default the CSV's name with .png.

    Returns
    -------
    pathlib.Path
        The picture.
    """
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kernels = {row.get("kernel") for row in rows}
    if len(kernels) != 1 or not kernels <= FIGURES.keys():
        raise ValueError(f"{source}: column kernel should be one of {', '.join(FIGURES)} in every row")
    out = out or source.with_suffix(".png")
    temporary = out.with_name(out.name + ".part")
    FIGURES[kernels.pop()](rows).savefig(temporary, format="png", dpi=120)
    temporary.replace(out)
    return out


FIGURES = {"supcon": supcon, "tfgram": tfgram}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=pathlib.Path, nargs="?", default=RESULTS / "supcon_cpu.csv")
    parser.add_argument("--out", type=pathlib.Path, help="default: the CSV's name with .png")
    arguments = parser.parse_args()
    draw(arguments.rows, arguments.out)


if __name__ == "__main__":
    main()
