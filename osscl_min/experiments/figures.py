"""Figures of experiments: each function takes a result, as the experiment's JSON file has it."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from osscl_min.experiments.sweep import origin
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
    legend,
    legend_below,
    panels,
    picture,
    save_all,
)

Result = Mapping[str, Any]


def write(result: Result, out: Path | str) -> list[Path]:
    """Draw an experiment's figures into OUT, as PNG and PDF, each with its origin below the title.

    Embeddings and first filters are drawn where OUT has their arrays (NAME.npz, NAME_filters.npz).
    """
    out, stem = Path(out), result["experiment"].replace("-", "_")
    draw = {"bands": bands, "noise": noise, "high_frequency": high_frequency}
    figures = {stem: draw.get(stem.removesuffix("_training"), differences)(result)}
    if (out / f"{stem}.npz").is_file():
        figures[f"{stem}_map"] = maps(result, out / f"{stem}.npz")
    if (out / f"{stem}_filters.npz").is_file():
        figures[f"{stem}_filters"] = first_filters(result, out / f"{stem}_filters.npz")
    for figure in figures.values():
        add_origin(figure, origin(result))
    return save_all(figures, out)


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
        gain = (row.get("difference") or row.get("gain") or {}).get("average")
        parts = [(left, row["each"]["auc_id_mean"], BLUE)]
        if gain:
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


# Panel, line, place on the axis (None for clips as they are) and metrics.
Point = tuple[str, str, float | None, Mapping[str, Any]]


def curves(
    title: str, synthetic: bool, points: Iterable[Point], label: str, measure: str = "auc_id_mean"
) -> Figure:
    """AUC with its intervals over clips against what changes; dashed for clips as they are."""
    lines: dict[str, dict[str, list[tuple]]] = {}
    for panel, line, place, entry in points:
        bounds = (entry.get("interval") or {}).get(measure) or (np.nan, np.nan)
        values = 100 * np.array([entry[measure], *bounds], float)
        lines.setdefault(panel, {}).setdefault(line, []).append((place, *values))
    figure, axes = panels(title, synthetic, list(lines), 4, (2.9, 2.6), sharey=True)
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


def by_type(result: Result, lines: Iterable[tuple[str, float | None]]) -> Iterator[Point]:
    """Points of `curves`, by machine type; `lines` has the line and place of every row."""
    for row, (line, place) in zip(result["conditions"], lines, strict=True):
        for entry in (row["metrics"]["average"], *row["metrics"]["types"]):
            yield entry.get("type", "average"), line, place, entry


def high_frequency(result: Path | str | Result, measure: str = "auc_id_mean") -> Figure:
    """AUC against the cut-off of low-pass and high-pass filters: on average, and of each machine type.

    `result` is high_frequency.json or high_frequency_training.json, or its content; `measure` is
    "auc_id_mean" or "auc_pooled", drawn with its intervals over clips where the file has them.
    """
    content = result if isinstance(result, Mapping) else read_json(result)
    protocol = {"auc_id_mean": "mean over ids", "auc_pooled": "ids pooled"}[measure]
    trained = content["experiment"] == "high-frequency-training"
    what = "detectors trained and tested on filtered clips" if trained else "filtered test clips"
    names = {"none": "unfiltered", "low-pass": "low-pass: what is below the cut-off stays",
             "high-pass": "high-pass: what is above the cut-off stays"}  # fmt: skip
    rows = content["conditions"]
    lines = [(names[row["filter"]], row["cutoff_hz"] and row["cutoff_hz"] / 1000) for row in rows]
    title = f"AUC ({protocol}) of {what}"
    return curves(title, content["synthetic"], by_type(content, lines), "cut-off (kHz)", measure)


def bands(result: Result) -> Figure:
    """AUC without a band of the log-mel, and the energy that it has, on average and of each machine type."""
    lines = []
    for row in result["conditions"]:
        if row["low_hz"] is None:
            lines.append(("all bands", None))
        else:
            lines.append((f"band set to {row['replaced_by']}", (row["low_hz"] + row["high_hz"]) / 2000))
    label = "band (kHz); grey: its share of\nnormal clips' energy (%)"
    figure = curves("AUC id-mean without a band", result["synthetic"], by_type(result, lines), label)
    for ax in figure.axes:
        energy = [entry for entry in result["energy"] if entry["type"] == ax.get_title()]
        if energy:
            edges = [entry["low_hz"] / 1000 for entry in energy] + [energy[-1]["high_hz"] / 1000]
            share = 100 * np.array([entry["normal"] for entry in energy], float)
            ax.stairs(share, edges, fill=True, color=GREY, alpha=0.3)
    return figure


def noise(result: Result) -> Figure:
    """AUC against the signal-to-noise ratio for each kind of noise, a line per detector."""
    rows = result["conditions"]
    kinds = [kind for kind in dict.fromkeys(row["noise"] for row in rows) if kind != "none"]
    points = (
        (f"{kind} noise" + " (simulated)" * (kind == "factory"), row["variant"], row["snr_db"],
         row["metrics"]["average"])
        for kind in kinds
        for row in rows
        if row["noise"] in ("none", kind)
    )  # fmt: skip
    title = "AUC id-mean in noise (dashed: no noise added)"
    figure = curves(title, result["synthetic"], points, "signal-to-noise ratio (dB)")
    for ax in figure.axes:
        ax.invert_xaxis()
    return figure


def first_filters(result: Result, path: Path | str) -> Figure:
    """Responses of the first convolutions before and after training.

    Rows of a picture are filters, ordered by the frequency of their largest gain; each is relative to its own
    largest gain.
    """
    with np.load(path) as file:
        gains = {key: file[key] for key in sorted(file, reverse=True)}
    names = {"tgram": "Tgram, 128 filters of 64 ms", "tfgram": "TFgram, 64 filters of 0.7 ms"}
    titles = [f"{names[key.split('_')[0]]}, {key.split('_')[1]} training" for key in gains]
    every = [*titles, "mean response of all filters"]
    figure, axes = panels("First convolutions", result["synthetic"], every, 2, (5, 2.6))
    nyquist = result["sample_rate"] / 2000  # kHz
    for ax, title, (key, gain) in zip(axes, titles, gains.items(), strict=False):
        relative = gain - gain.max(1, keepdims=True)
        relative = relative[np.argsort(gain.argmax(1), kind="stable")]
        image = picture(ax, relative, "viridis", (-40, 0), (0, nyquist, 0, len(gain)))
        ax.set(xlabel="frequency (kHz)", ylabel="filter")
        figure.colorbar(image, ax=ax, label="dB", pad=0.02)
        mean = 10 * np.log10((10 ** (gain / 10)).mean(0))
        look = {"color": BLUE if key.startswith("tgram") else ORANGE, "linewidth": 1, "label": title}
        axes[-1].plot(np.linspace(0, nyquist, len(mean)), mean, ":" if "before" in key else "-", **look)
    axes[-1].set(xlabel="frequency (kHz)", ylabel="power gain (dB)", xlim=(0, nyquist))
    axes[-1].legend(frameon=False, fontsize=8)
    return figure


def maps(result: Result, path: Path | str) -> Figure:
    """t-SNE of each variant's test embeddings: colour and shape are the machine, crosses its anomalies."""
    with np.load(path) as file:
        points = {key.rpartition("/")[0]: file[key] for key in file if key.endswith("/embeddings")}
        machines, anomalous = np.array(result["machines"])[file["labels"]], file["anomaly"] == 1
    title = "Test embeddings, t-SNE, first seed"
    figure, axes = panels(title, result["synthetic"], list(points), 2, (5.5, 5.2))
    for ax, embeddings in zip(axes, points.values(), strict=True):
        draw_map(ax, embeddings, machines, anomalous)
    legend(figure, axes[:1], "right center", fontsize=7)
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
