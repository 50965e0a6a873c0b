"""Figures of experiments: each function takes a result, as the experiment's JSON file has it."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from osscl_min.experiments.sweep import Result, origin
from osscl_min.runtime.files import read_json
from osscl_min.runtime.plotting import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    legend_below,
    panels,
    picture,
    save_all,
)

CURVES = {  # experiments whose rows differ in a number: title and axis
    "high-frequency": ("AUC ({}) of filtered test clips", "cut-off (kHz)"),
    "bands": ("AUC ({}) without a band of the log-mel", "middle of the band (kHz)"),
    "noise": ("AUC ({}) in noise (dashed: no noise added)", "signal-to-noise ratio (dB)"),
}
FILTERS = {"none": "unfiltered", "low-pass": "low-pass: what is below the cut-off stays",
           "high-pass": "high-pass: what is above the cut-off stays"}  # fmt: skip


def write(result: Result, out: Path | str) -> list[Path]:
    """Draw an experiment's figures into OUT, as PNG and PDF, each with its origin below the title.

    First filters are drawn where OUT has their responses (NAME_filters.npz).
    """
    name = result["experiment"]
    stem = Path(out) / name.replace("-", "_")
    figures = {stem.name: curves(result) if name in CURVES else differences(result)}
    filters = stem.with_name(f"{stem.name}_filters.npz")
    if filters.is_file():
        figures[filters.stem] = first_filters(result, filters)
    for figure in figures.values():
        add_origin(figure, origin(result))
    return save_all(figures, Path(out))


def add_origin(figure: Figure, text: str) -> None:
    """Small lines below the title, which gets empty lines so that the layout leaves room for them."""
    lines = textwrap.wrap(text, int(figure.get_figwidth() * 20))
    figure.suptitle(figure.get_suptitle() + "\n" * len(lines), fontsize=13)
    look = {"fontsize": 7, "color": GREY, "ha": "center", "va": "top", "linespacing": 1.5}
    figure.text(0.5, 1 - 0.33 / figure.get_figheight(), "\n".join(lines), **look)


def differences(result: Result) -> Figure:
    """AUC of every row, a dot per seed, and its difference from the first one with its interval."""
    rows = result["conditions"]
    title, size = f"Experiment: {result['experiment']}", (5.5, 0.9 + 0.3 * len(rows))
    titles = ("AUC id-mean (%), a dot per seed", "difference from the first row (points)")
    figure, (left, right) = panels(title, result["synthetic"], titles, 2, size, sharey=True)
    for place, row in enumerate(rows):
        parts = [(left, row["each"]["auc_id_mean"], BLUE)]
        if gain := (row.get("difference") or row.get("gain") or {}).get("average"):
            colour = VERMILLION if gain["clear"] else GREY
            parts.append((right, gain["seeds"], colour))
            bounds = 100 * np.array(gain["interval"] or (np.nan, np.nan))
            right.plot(bounds, [place] * 2, color=colour, linewidth=2)
        for ax, values, colour in parts:
            points = 100 * np.array(values, float)
            ax.plot(points, [place] * len(points), "o", color=colour, alpha=0.5, markersize=4)
            ax.plot(points.mean(), place, "|", color=BLACK, markersize=14, markeredgewidth=2)
    right.axvline(0, color=BLACK, linewidth=1)
    right.plot([], [], color=VERMILLION, linewidth=2, label="95 % interval (seeds and clips) leaves out 0")
    right.plot([], [], color=GREY, linewidth=2, label="95 % interval contains 0")
    left.set_yticks(range(len(rows)), [row.get("score", row["variant"]) for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    legend_below(figure, [right])
    return figure


def points(result: Result) -> Iterator[tuple[str, str, float | None, Mapping[str, Any]]]:
    """Panel, line, place on the axis (None for clips as they are) and metrics of everything in `curves`."""
    kinds = dict.fromkeys(row["noise"] for row in result["conditions"] if row.get("snr_db") is not None)
    for row in result["conditions"]:
        average = row["metrics"]["average"]
        if "noise" in row:
            for kind in kinds if row["noise"] == "none" else [row["noise"]]:
                panel = f"{kind} noise".replace("factory", "simulated factory")
                yield panel, row["variant"], row["snr_db"], average
            continue
        if "filter" in row:
            line, hertz = FILTERS[row["filter"]], row["cutoff_hz"]
        else:
            line, hertz = f"band set to {row['replaced_by']}", row["low_hz"]
            line, hertz = ("all bands", None) if hertz is None else (line, (hertz + row["high_hz"]) / 2)
        for entry in (average, *row["metrics"]["types"]):
            yield entry.get("type", "average"), line, hertz and hertz / 1000, entry


def curves(result: Result, measure: str = "auc_id_mean") -> Figure:
    """AUC with its intervals over clips against what changes; dashed for clips as they are."""
    lines: dict[str, dict[str, list[tuple]]] = {}
    for panel, line, place, entry in points(result):
        bounds = (entry.get("interval") or {}).get(measure) or (np.nan, np.nan)
        values = 100 * np.array([entry[measure], *bounds], float)
        lines.setdefault(panel, {}).setdefault(line, []).append((place, *values))
    title, label = CURVES[result["experiment"]]
    title = title.format({"auc_id_mean": "mean over ids", "auc_pooled": "ids pooled"}[measure])
    figure, axes = panels(title, result["synthetic"], list(lines), 4, (2.9, 2.6), sharey=True)
    for ax, panel in zip(axes, lines.values(), strict=True):
        colours = itertools.cycle((BLACK, BLUE, VERMILLION, GREEN, PURPLE, ORANGE))
        for (name, rows), colour in zip(panel.items(), colours, strict=False):
            for place, value, low, high in rows:
                if place is None:
                    ax.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=name)
                    ax.axhspan(low, high, color=colour, alpha=0.08, linewidth=0)
            if changed := sorted(row for row in rows if row[0] is not None):
                place, value, low, high = np.array(changed).T
                ax.plot(place, value, color=colour, marker=".", label=name)
                ax.vlines(place, low, high, color=colour, alpha=0.5, linewidth=1)
        ax.axhline(50, color=GREY, linestyle=":", linewidth=1, label="chance")
        ax.set(xlabel=label, ylabel="AUC (%)" if ax.get_subplotspec().is_first_col() else "")
    legend_below(figure, axes)
    return figure


def high_frequency(result: Path | str | Result, measure: str = "auc_id_mean") -> Figure:
    """AUC against the cut-off of low-pass and high-pass filters: on average, and of each machine type.

    `result` is high_frequency.json or its content; `measure` is "auc_id_mean" or "auc_pooled".
    """
    return curves(result if isinstance(result, Mapping) else read_json(result), measure)


def first_filters(result: Result, path: Path | str) -> Figure:
    """Responses of the first convolutions before and after training.

    Rows of a picture are filters, ordered by the frequency of their largest gain; each is relative to its own
    largest gain.
    """
    with np.load(path) as file:
        gains = {key: file[key] for key in sorted(file, reverse=True)}
    names = {"tgram": "Tgram, 128 filters of 64 ms", "tfgram": "TFgram, 64 filters of 0.7 ms"}
    titles = [f"{names[key.split('_')[0]]}, {key.split('_')[1]} training" for key in gains]
    figure, axes = panels("First convolutions", result["synthetic"], titles, 2, (5, 2.6))
    for ax, gain in zip(axes, gains.values(), strict=True):
        relative = gain - gain.max(1, keepdims=True)
        relative = relative[np.argsort(gain.argmax(1), kind="stable")]
        extent = (0, result["sample_rate"] / 2000, 0, len(gain))  # kHz
        image = picture(ax, relative, "viridis", (-40, 0), extent)
        ax.set(xlabel="frequency (kHz)", ylabel="filter")
        figure.colorbar(image, ax=ax, label="dB", pad=0.02)
    return figure


def draw_map(
    ax: Axes, embeddings: np.ndarray, names: np.ndarray, anomalous: np.ndarray, seed: int = 0
) -> None:
    """t-SNE by cosine distance of embeddings (n, D): a look for each of `names`, crosses for anomalies."""
    perplexity = min(30, (len(embeddings) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed)
    place = tsne.fit_transform(embeddings)
    for number, name in enumerate(sorted(set(names), key=str.lower)):
        colour, marker = COLOURS[number % 7], "os^Dvph<>*"[number // 7 % 10]
        own = names == name
        ax.scatter(*place[own & ~anomalous].T, 26, colour, marker=marker, linewidths=0, label=name)
        ax.scatter(*place[own & anomalous].T, 28, colour, marker="x", linewidths=1.3)
    ax.scatter([], [], 28, GREY, marker="x", label="anomalous")
    ax.set(xticks=[], yticks=[])
