"""Figures of experiments: each function takes a result, as the experiment's JSON file has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from osscl_min.checkpoint import load
from osscl_min.experiments.sweep import Result, settings_of
from osscl_min.runtime import plotting as plot

AXES = {  # experiments whose rows differ in a number: title and axis
    "high-frequency": ("AUC ({}) of filtered test clips", "cut-off (kHz)"),
    "bands": ("AUC ({}) with a band of the log-mel replaced", "middle of the band (kHz)"),
    "noise": ("AUC ({}) in simulated noise", "signal-to-noise ratio (dB)"),
}
LINES = {"none": "unfiltered", "low-pass": "low-pass: what is below the cut-off stays",
         "high-pass": "high-pass: what is above the cut-off stays"}  # fmt: skip
COLOURS = (plot.BLACK, plot.BLUE, plot.VERMILLION, plot.GREEN, plot.PURPLE, plot.ORANGE, plot.SKY, plot.GREY)


def differences(result: Result) -> Figure:
    """AUC of every row, a dot per seed, and its difference from the first one with its interval."""
    rows = result["conditions"]
    title, size = f"Experiment: {result['experiment']}", (5.5, 0.9 + 0.3 * len(rows))
    titles = ("AUC id-mean (%), a dot per seed", "difference from the first row (points)")
    figure, (left, right) = plot.panels(title, result["synthetic"], titles, 2, size, sharey=True)
    for place, row in enumerate(rows):
        parts = [(left, row["each"]["auc_id_mean"], plot.BLUE)]
        if change := row.get("difference"):
            colour = plot.VERMILLION if change["clear"] else plot.GREY
            parts.append((right, change["seeds"], colour))
            if change["interval"]:
                right.plot(100 * np.array(change["interval"]), [place] * 2, color=colour, linewidth=2)
        for ax, values, colour in parts:
            dots = 100 * np.array(values, float)
            ax.plot(dots, [place] * len(dots), "o", color=colour, alpha=0.5, markersize=4)
            ax.plot(dots.mean(), place, "|", color=plot.BLACK, markersize=14, markeredgewidth=2)
    right.axvline(0, color=plot.BLACK, linewidth=1)
    for colour, label in ((plot.VERMILLION, "leaves out 0"), (plot.GREY, "contains 0")):
        right.plot([], [], color=colour, linewidth=2, label=f"95 % interval (seeds and clips) {label}")
    left.set_yticks(range(len(rows)), [row.get("score", row["variant"]) for row in rows])
    left.set_ylim(len(rows) - 0.5, -0.5)
    plot.legend(figure, [right])
    return figure


def curves(result: Result, measure: str = "auc_id_mean") -> Figure:
    """AUC with its intervals over clips against what changes; dashed for clips as they are."""
    lines: dict[str, dict[str, list[tuple]]] = {}  # panel -> line -> place on the axis, AUC, its interval
    several = len({row["variant"] for row in result["conditions"]}) > 1
    for row in result["conditions"]:
        variant, kind, *numbers = settings_of(row).values()
        line = (LINES.get(kind, kind) if "filter" in row else kind) + f", {variant}" * several
        place = None if None in numbers else np.mean(numbers) / (1 if "snr_db" in row else 1000)
        for entry in (row["metrics"]["average"], *row["metrics"]["types"]):
            bounds = (entry.get("interval") or {}).get(measure) or (np.nan, np.nan)
            values = 100 * np.array([entry[measure], *bounds], float)
            panel = lines.setdefault(entry.get("type", "average"), {})
            panel.setdefault(line, []).append((place, *values))
    title, label = AXES[result["experiment"]]
    title = title.format({"auc_id_mean": "mean over ids", "auc_pooled": "ids pooled"}[measure])
    figure, axes = plot.panels(title, result["synthetic"], list(lines), 4, (2.9, 2.6), sharey=True)
    for ax, panel in zip(axes, lines.values(), strict=True):
        for number, (name, rows) in enumerate(panel.items()):
            look = {"color": COLOURS[number % len(COLOURS)], "label": name}
            if rows[0][0] is None:
                _, value, low, high = rows[0]
                ax.axhline(value, linestyle="--", **look)
                ax.axhspan(low, high, color=look["color"], alpha=0.08, linewidth=0)
            else:
                place, value, low, high = np.array(sorted(rows)).T
                ax.plot(place, value, marker=".", **look)
                ax.vlines(place, low, high, color=look["color"], alpha=0.5, linewidth=1)
        ax.axhline(50, color=plot.GREY, linestyle=":", linewidth=1, label="chance")
        ax.set(xlabel=label, ylabel="AUC (%)" if ax.get_subplotspec().is_first_col() else "")
    plot.legend(figure, axes)
    return figure


def first_filters(run: Path, synthetic: bool) -> Figure:
    """Mean response of the first convolutions of Tgram and TFgram over frequency, before and after training.

    It is the root mean square of the filters' gains. The strides, which alias, are not part of it.
    """
    gains: dict[str, dict[str, np.ndarray]] = {}
    for when, name in (("before training", "initial"), ("after training", "best")):
        trained = load(run / f"{name}.pt")
        tgram, tfgram = trained.model.tgram, trained.model.tfgram
        for title, layer in (("Tgram", tgram and tgram.extractor), ("TFgram", tfgram and tfgram.conv[0])):
            if layer is not None:
                power = torch.fft.rfft(layer.weight.detach()[:, 0].double(), 1024).abs().square().mean(0)
                gains.setdefault(title, {})[when] = 10 * power.clamp(min=1e-12).log10().numpy()
    figure, axes = plot.panels("Mean response of the first convolutions", synthetic, list(gains), 2, (5, 2.6))
    nyquist = trained.config.model.audio.sample_rate / 2000  # kHz
    for ax, lines in zip(axes, gains.values(), strict=True):
        for (when, gain), colour in zip(lines.items(), (plot.GREY, plot.BLUE), strict=True):
            ax.plot(np.linspace(0, nyquist, len(gain)), gain, color=colour, label=when)
        ax.set(xlabel="frequency (kHz)", ylabel="gain (dB)")
    plot.legend(figure, axes)
    return figure


def draw_map(
    ax: Axes, embeddings: np.ndarray, names: np.ndarray, anomalous: np.ndarray, seed: int = 0
) -> None:
    """t-SNE by cosine distance of embeddings (n, D): a look for each of `names`, crosses for anomalies."""
    perplexity = min(30, (len(embeddings) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed)
    place = tsne.fit_transform(embeddings)
    for number, name in enumerate(sorted(set(names), key=str.lower)):
        colour, marker = plot.COLOURS[number % 7], "os^Dvph<>*"[number // 7 % 10]
        own = names == name
        ax.scatter(*place[own & ~anomalous].T, 26, colour, marker=marker, linewidths=0, label=name)
        ax.scatter(*place[own & anomalous].T, 28, colour, marker="x", linewidths=1.3)
    ax.scatter([], [], 28, plot.GREY, marker="x", label="anomalous")
    ax.set(xticks=[], yticks=[])
