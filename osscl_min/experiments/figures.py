"""Figures of experiments: each function takes a result, as the experiment's JSON file has it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from osscl_min.config import AudioConfig
from osscl_min.experiments.analyses import CUTOFFS
from osscl_min.experiments.sweep import origin
from osscl_min.features import ZeroPhaseFilter
from osscl_min.runtime.files import read_json
from osscl_min.runtime.plotting import (
    BLACK,
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    VERMILLION,
    legend,
    legend_below,
    panels,
    picture,
    save_all,
)


def write(result: Mapping[str, Any], out: Path | str) -> list[Path]:
    """Draw an experiment's figures into OUT, as PNG and PDF, each with its origin below the title."""
    out, name = Path(out), result["experiment"]
    stem = name.replace("-", "_")
    draw = {"high-frequency": filtered, "high-frequency-training": filtered, "bands": bands, "noise": noise}
    if name == "embeddings":
        drawn = {stem: maps(result, out / "embeddings.npz")}
    else:
        drawn = {stem: draw.get(name, differences)(result)}
    if (out / f"{stem}_filters.npz").is_file():
        drawn[f"{stem}_filters"] = first_filters(result, out / f"{stem}_filters.npz")
    for figure in drawn.values():
        _with_origin(figure, origin(result))
    return save_all(drawn, out)


def _with_origin(figure: Figure, text: str) -> None:
    """Small lines below the title, which make it taller so that the layout leaves room for them."""
    lines = textwrap.wrap(text, int(figure.get_figwidth() * 20))
    title = figure.suptitle(figure.get_suptitle() + "\n" * len(lines), fontsize=13)
    figure.draw_without_rendering()
    low = title.get_window_extent().ymin / figure.bbox.height
    figure.text(0.5, low, "\n".join(lines), fontsize=7, color=GREY, ha="center", va="bottom", linespacing=1.5)


def differences(result: Mapping[str, Any]) -> Figure:
    """AUC of every variant, a dot a seed, and its difference to the first one with its interval."""
    rows = result.get("variants") or result["conditions"]
    names = [row.get("score", row["variant"]) for row in rows]
    each = [row["each"]["auc_id_mean"] if isinstance(row["each"], dict) else row["each"] for row in rows]
    title, size = f"Experiment: {result['experiment']}", (5.5, 0.9 + 0.3 * len(rows))
    titles = ("AUC id-mean (%), a dot a seed", "difference to the first row (points)")
    figure, (left, right) = panels(title, result["synthetic"], titles, 2, size, sharey=True)
    for place, (values, row) in enumerate(zip(each, rows, strict=True)):
        left.plot(100 * np.array(values), [place] * len(values), "o", color=BLUE, alpha=0.5, markersize=4)
        left.plot(100 * np.mean(values), place, "|", color=BLACK, markersize=14, markeredgewidth=2)
        gain = row.get("difference") or {}
        if gain := gain.get("average", gain):
            colour = VERMILLION if gain["clear"] else GREY
            low, high = gain["interval"]
            right.plot([100 * low, 100 * high], [place] * 2, color=colour, linewidth=2)
            seeds = 100 * np.array(gain["seeds"])
            right.plot(seeds, [place] * len(seeds), "o", color=colour, alpha=0.5, markersize=4)
            right.plot(100 * gain["mean"], place, "|", color=colour, markersize=14, markeredgewidth=2)
    right.axvline(0, color=BLACK, linewidth=1)
    right.plot([], [], color=VERMILLION, linewidth=2, label="clear: interval without 0, seeds agree")
    right.plot([], [], color=GREY, linewidth=2, label="inside the noise (95 % interval over clips)")
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    legend_below(figure, [right])
    return figure


def filtered(result: Mapping[str, Any]) -> Figure:
    """AUC against the cut-off, of detectors that never heard filtered clips, or were trained on them."""
    if "conditions" in result:
        return high_frequency(dict(result))
    heard = "detectors trained and tested on filtered clips"
    return high_frequency({**result, "conditions": result["variants"], "heard": heard})


def high_frequency(path: Path | str | dict[str, Any], measure: str = "auc_id_mean") -> Figure:
    """AUC against the cut-off of low-pass and high-pass filters: on average, and of each machine type.

    `path` is high_frequency.json of `probes.examine`, or its content; `measure` is "auc_id_mean" or
    "auc_pooled", drawn with its bootstrap intervals where the file has them.
    """
    content = path if isinstance(path, dict) else read_json(path)
    protocol = {"auc_id_mean": "mean over ids", "auc_pooled": "ids pooled"}[measure]
    points: dict[str, dict[str, list]] = {}  # type -> filter -> [cut-off, AUC, its lower and upper bound]
    for condition in content["conditions"]:
        for entry in (condition["metrics"]["average"], *condition["metrics"]["types"]):
            bounds = entry.get("interval", {}).get(measure) or (None, None)
            filters = points.setdefault(entry.get("type", "average"), {})
            point = [condition["cutoff_hz"] or 0, entry[measure], *bounds]
            filters.setdefault(condition["filter"], []).append(point)
    title = f"AUC ({protocol}) of {content.get('heard', 'filtered test clips')}"
    figure, axes = panels(title, content["synthetic"], list(points), 4, (2.7, 2.5), sharey=True)
    for ax, filters in zip(axes, points.values(), strict=True):
        ((_, value, low, high),) = 100 * np.array(filters["none"], float)
        ax.axhline(value, color=BLACK, linestyle="--", linewidth=1.2, label="unfiltered")
        ax.axhspan(low, high, color=BLACK, alpha=0.08, linewidth=0)
        for kind, stays, colour in (("low-pass", "below", BLUE), ("high-pass", "above", VERMILLION)):
            cutoff, value, low, high = np.array(sorted(filters.get(kind, [])), float).reshape(-1, 4).T
            label = f"{kind}: what is {stays} the cut-off stays"
            ax.plot(cutoff / 1000, 100 * value, color=colour, marker=".", label=label)
            ax.fill_between(cutoff / 1000, 100 * low, 100 * high, color=colour, alpha=0.15, linewidth=0)
            ax.vlines(cutoff / 1000, 100 * low, 100 * high, color=colour, alpha=0.4, linewidth=1)
        ax.set_xlim(left=0)
        ax.axhline(50, color=GREY, linestyle=":", linewidth=1, label="chance")
        ax.set(xlabel="cut-off (kHz)", ylabel="AUC (%)" if ax.get_subplotspec().is_first_col() else "")
    legend_below(figure, axes)
    return figure


def in_two_dimensions(embeddings: np.ndarray, seed: int = 0) -> np.ndarray:
    """t-SNE of cosine distances: (n, D) -> (n, 2)."""
    perplexity = min(30, (len(embeddings) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed)
    return tsne.fit_transform(embeddings)


def _heat(
    ax: Axes, values: np.ndarray, columns: Sequence[str], rows: Sequence[str], form: str, **look: Any
) -> None:
    image = ax.imshow(values, aspect="auto", **look)
    ax.figure.colorbar(image, ax=ax, pad=0.02)
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.grid(False)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = np.dot(image.cmap(image.norm(value))[:3], (0.3, 0.6, 0.1)) < 0.45
            colour = "white" if dark else "black"
            ax.text(column, row, format(value, form), ha="center", va="center", fontsize=7, color=colour)


def bands(result: Mapping[str, Any]) -> Figure:
    """Change of AUC when a band of the log-mel is taken away, and the energy that it has, by machine type."""
    rows = [row for row in result["conditions"] if row["low_hz"] is not None]
    types = [entry["type"] for entry in rows[0]["metrics"]["types"]]
    spans = sorted({(row["low_hz"], row["high_hz"]) for row in rows})
    labels = [f"{low:.0f} to {high:.0f}" for low, high in spans]
    fills = ("silence", "training mean")
    titles = [f"AUC id-mean, band set to {fill} (points)" for fill in fills]
    titles.append("share of the energy, normal clips (%)")
    figure, axes = panels("Bands of the log-mel (Hz)", result["synthetic"], titles, 3, (4.2, 4))
    found = {(row["replaced_by"], row["low_hz"]): row.get("difference", {}) for row in rows}
    tables = []
    for fill in fills:
        cells = [[(found[fill, low].get(name) or {}).get("mean", np.nan) for name in ("average", *types)]
                 for low, _ in spans]  # fmt: skip
        tables.append(100 * np.array(cells, float))
    most = max(1.0, *(float(np.nanmax(np.abs(values), initial=0)) for values in tables))
    for ax, values in zip(axes, tables, strict=False):
        _heat(ax, values, ["average", *types], labels, "+.0f", cmap="PuOr", vmin=-most, vmax=most)
    share = np.array(
        [[entry["normal"] for entry in result["energy"] if entry["type"] == name] for name in types]
    )
    _heat(axes[2], 100 * share.T.astype(float), types, labels, ".0f", cmap="Blues", vmin=0, vmax=100)
    for ax in axes:
        ax.set_ylabel("band (Hz)")
    return figure


def noise(result: Mapping[str, Any]) -> Figure:
    """AUC against the signal-to-noise ratio for each kind of noise, a line a detector."""
    rows = result["conditions"]
    kinds = [kind for kind in dict.fromkeys(row["noise"] for row in rows) if kind != "none"]
    titles = [f"{kind} noise" + " (simulated)" * (kind == "factory") for kind in kinds]
    figure, axes = panels("AUC in noise", result["synthetic"], titles, 3, (3.6, 3.1), sharey=True)
    for number, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        own = [row for row in rows if row["variant"] == variant]
        clean = 100 * own[0]["metrics"]["average"]["auc_id_mean"]
        colour = (BLUE, ORANGE, *COLOURS[2:])[number % 7]
        for ax, kind in zip(axes, kinds, strict=True):
            points = sorted((row["snr_db"], row["metrics"]["average"]) for row in own if row["noise"] == kind)
            snr = [ratio for ratio, _ in points]
            value = [100 * entry["auc_id_mean"] for _, entry in points]
            ax.plot(snr, value, "o-", color=colour, markersize=4, label=variant)
            bounds = [(entry.get("interval") or {}).get("auc_id_mean") for _, entry in points]
            if None not in bounds:
                low, high = 100 * np.array(bounds).T
                ax.fill_between(snr, low, high, color=colour, alpha=0.15, linewidth=0)
            ax.axhline(clean, color=colour, linestyle="--", linewidth=1, label=f"{variant}, no noise added")
    for ax in axes:
        ax.axhline(50, color=GREY, linestyle=":", linewidth=1, label="chance")
        ax.invert_xaxis()
        ax.set(xlabel="signal-to-noise ratio (dB)")
    axes[0].set_ylabel("AUC id-mean (%)")
    legend_below(figure, axes)
    return figure


def first_filters(result: Mapping[str, Any], path: Path | str) -> Figure:
    """Responses of the first convolutions before and after training, and of the zero-phase filters.

    Rows of a picture are filters, ordered by the frequency of their largest gain; each is relative to its own
    largest gain.
    """
    with np.load(path) as file:
        gains = {key: file[key] for key in sorted(file, reverse=True)}
    names = {"tgram": "Tgram, 128 filters of 64 ms", "tfgram": "TFgram, 64 filters of 0.7 ms"}
    keys = [key for part in names for key in (f"{part}_before", f"{part}_after") if key in gains]
    titles = [f"{names[key.split('_')[0]]}, {key.split('_')[1]} training" for key in keys]
    titles += ["mean response of all filters"] * bool(keys) + ["zero-phase filters of the test clips"]
    figure, axes = panels("First convolutions", result["synthetic"], titles, 2, (5, 2.6))
    audio = AudioConfig(sample_rate=result["sample_rate"])
    nyquist = audio.sample_rate / 2000  # kHz
    for ax, key in zip(axes, keys, strict=False):
        gain = gains[key] - gains[key].max(1, keepdims=True)
        gain = gain[np.argsort(gain.argmax(1), kind="stable")]
        image = picture(ax, gain, "viridis", (-40, 0), (0, nyquist, 0, len(gain)))
        ax.set(xlabel="frequency (kHz)", ylabel="filter")
        figure.colorbar(image, ax=ax, label="dB", pad=0.02)
        mean = 10 * np.log10((10 ** (gains[key] / 10)).mean(0))
        part, when = key.split("_")
        look = {"color": BLUE if part == "tgram" else ORANGE, "label": f"{names[part].split(',')[0]}, {when}"}
        kilohertz = np.linspace(0, nyquist, len(mean))
        axes[-2].plot(kilohertz, mean, ":" if when == "before" else "-", linewidth=1, **look)
    if keys:
        axes[-2].set(xlabel="frequency (kHz)", ylabel="power gain (dB)", xlim=(0, nyquist))
        axes[-2].legend(frameon=False, fontsize=8)
    hertz = np.linspace(1, 1000 * nyquist - 1, 1500)
    cutoffs = sorted({row["cutoff_hz"] for row in result["conditions"] if row["cutoff_hz"]} or CUTOFFS)
    for kind, colour in (("low-pass", BLUE), ("high-pass", VERMILLION)):
        for number, cutoff in enumerate(cutoffs):
            gain = 20 * np.log10(ZeroPhaseFilter(kind, cutoff, audio).gain(hertz) + 1e-12)
            axes[-1].plot(hertz / 1000, gain, color=colour, linewidth=0.9, label=None if number else kind)
    axes[-1].set(xlabel="frequency (kHz)", ylabel="gain (dB)", ylim=(-100, 5), xlim=(0, nyquist))
    axes[-1].legend(frameon=False, fontsize=8)
    return figure


def maps(result: Mapping[str, Any], path: Path | str) -> Figure:
    """t-SNE of each variant's test embeddings: colour and shape are the machine, crosses its anomalies."""
    with np.load(path) as file:
        points = {key.rpartition("/")[0]: file[key] for key in file if key.endswith("/embeddings")}
        labels, anomaly = file["labels"], file["anomaly"]
    title = "Test embeddings, t-SNE, first seed"
    figure, axes = panels(title, result["synthetic"], list(points), 2, (5.5, 5.2))
    machines = result["machines"]
    types = list(dict.fromkeys(machine.split()[0] for machine in machines))
    for ax, embeddings in zip(axes, points.values(), strict=True):
        place = in_two_dimensions(embeddings)
        for label in np.unique(labels):
            kind, _, number = machines[label].partition(" ")
            colour = COLOURS[types.index(kind) % 7]
            within = [machine for machine in machines if machine.split()[0] == kind].index(machines[label])
            own = labels == label
            ax.scatter(*place[own & (anomaly == 0)].T, 20, colour, marker="os^Dvph<>*"[within % 10],
                       linewidths=0, label=f"{kind} {number}")  # fmt: skip
            ax.scatter(*place[own & (anomaly == 1)].T, 22, colour, marker="x", linewidths=1)
        ax.set(xticks=[], yticks=[])
    axes[0].scatter([], [], 22, GREY, marker="x", label="anomalous")
    legend(figure, axes[:1], "right center", fontsize=7)
    return figure
