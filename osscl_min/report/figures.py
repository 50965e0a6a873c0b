"""A run's figures: each function takes paths or data and returns a matplotlib Figure.

Drawn without pyplot, so that nothing stays open and no display is needed. Colours are Okabe and Ito's and
matplotlib's perceptually uniform maps, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from osscl_min import checkpoint
from osscl_min.data.clips import Clip
from osscl_min.data.reader import Reader, open_data
from osscl_min.experiments.figures import high_frequency, in_two_dimensions
from osscl_min.features import LogMel, mel_ticks, to_wave
from osscl_min.metrics import MAX_FPR, auc
from osscl_min.runtime.files import UserError, read_csv, read_json
from osscl_min.runtime.plotting import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    legend,
    legend_below,
    panels,
    picture,
    save_all,
)
from osscl_min.train import read_log

MOST_POINTS = 3000  # of the embedding map, for t-SNE's time


def _scores(evaluation: Path | str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Machine type -> truth, score and machine id of the clips that metrics.json measures."""
    rows = [row for row in read_csv(Path(evaluation) / "scores.csv") if row["anomaly"]]
    rows = [row for row in rows if row["subset"] == "development"] or rows
    types, ids = (np.array([row[name] for row in rows]) for name in ("machine_type", "machine_id"))
    truth, scores = (np.array([float(row[name]) for row in rows]) for name in ("anomaly", "score"))
    names = sorted(set(types), key=str.lower)
    return {name: tuple(column[types == name] for column in (truth, scores, ids)) for name in names}


def _is_synthetic(evaluation: Path | str) -> bool:
    return read_json(Path(evaluation) / "evaluation.json")["synthetic"]


def normal_and_anomalous(clips: Sequence[Clip], machine_type: str | None = None) -> list[int]:
    """Positions of a normal and an anomalous clip of one machine: the first (of a type) that has both.

    Raises
    ------
    UserError
        If there is no such machine.
    """
    first: dict[tuple, int] = {}
    for position, clip in enumerate(clips):
        if machine_type in (None, clip.machine_type):
            first.setdefault((clip.machine, clip.anomaly), position)
    for machine, _ in first:
        if {(machine, 0), (machine, 1)} <= first.keys():
            return [first[machine, 0], first[machine, 1]]
    raise UserError("no machine has both a normal and an anomalous test clip")


def input_maps(
    trained: checkpoint.Checkpoint, reader: Reader, positions: Sequence[int], synthetic: bool
) -> Figure:
    """What the encoder sees of some of the reader's clips, a column each; `synthetic` says what they are.

    Log-mel in dB over Hz; Tgram and TFgram as the network has learned them, whose channels have no order.
    """
    audio, inputs = trained.config.model.audio, trained.config.model.inputs
    wave = to_wave(reader.read(positions), trained.device)
    with torch.no_grad():
        maps = trained.model.maps(wave, LogMel(audio).to(wave.device)(wave)).cpu().numpy()
    kinds = {0: "normal", 1: "anomalous", None: "unlabelled"}
    clips = [reader.clips[position] for position in positions]
    heads = [f"{clip.machine_type} id {clip.machine_id}, {kinds[clip.anomaly]}" for clip in clips]
    look = {  # colours, title, vertical axis, colour bar
        "log_mel": ("magma", "log-mel", "frequency (Hz)", "dB"),
        "tgram": ("PuOr", "Tgram", "learned channel", "activation"),
        "tfgram": ("viridis", "TFgram", "learned channel", "activation"),
    }
    names = [f"{look[name][1]}: {head}" for name in inputs for head in heads]
    figure, axes = panels("The encoder's input maps", synthetic, names, len(clips), (5, 2.5), sharex=True)
    frame = audio.hop / audio.sample_rate  # s; a frame is centred on its time
    extent = (-frame / 2, (audio.frames - 0.5) * frame, 0, audio.mels)
    for row, name in enumerate(inputs):
        across = axes[row * len(clips) : (row + 1) * len(clips)]
        low, high = np.percentile(maps[:, row], (1, 99.5))
        if name == "tgram":  # of both signs: white is zero
            low, high = -max(-low, high), max(-low, high)
        for ax, one in zip(across, maps[:, row], strict=True):
            image = picture(ax, one, look[name][0], (low, high), extent)
            ax.set(xlim=(0, audio.seconds), ylim=(0, audio.mels))
            if name == "log_mel":
                ax.set_yticks(*mel_ticks(audio))
        across[0].set_ylabel(look[name][2])
        figure.colorbar(image, ax=across, label=look[name][3], pad=0.015, extend="both")
    for ax in across:
        ax.set_xlabel("time (s)")
    return figure


def training_curves(run: Path | str) -> Figure:
    """Loss parts, validation loss, identity accuracy and learning rate over a run's epochs."""
    run, log = Path(run), read_log(run)
    synthetic = read_json(run / "config.json")["data"]["synthetic"]
    best = min(log, key=lambda entry: entry["validation_loss"])["epoch"]
    titles = ("loss on mixed clips", "validation loss of the EMA", "validation accuracy", "learning rate")
    figure, axes = panels("Training", synthetic, titles, 2, (4.8, 2.7), sharex=True)
    for panel, name, label, colour in (
        (0, "total", "total", BLACK),
        (0, "cross_entropy", "cross-entropy", BLUE),
        (0, "contrastive", "SupCon", ORANGE),
        (1, "validation_loss", None, GREEN),
        (2, "validation_accuracy", None, GREEN),
        (3, "learning_rate", None, PURPLE),
    ):
        epochs, values = zip(*((entry["epoch"], entry[name]) for entry in log), strict=True)
        axes[panel].plot(epochs, values, ".-" if len(log) < 40 else "-", color=colour, label=label)
    for ax in axes:
        ax.axvline(best, color=GREY, linestyle=":", linewidth=1.2, label=f"epoch {best}, kept")
        ax.set(xlabel="epoch", ylim=(0, 1.06 * ax.dataLim.ymax or 1))
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[3].ticklabel_format(axis="y", scilimits=(0, 0))
    legend_below(figure, axes)
    return figure


def score_histograms(evaluation: Path | str) -> Figure:
    """Anomaly scores of normal and of anomalous clips, for each machine type."""
    types = _scores(evaluation)
    figure, axes = panels("Anomaly scores", _is_synthetic(evaluation), list(types), sharex=True)
    every = np.concatenate([scores for _, scores, _ in types.values()])
    most = 1.001 * max(every.max(), 1e-9)  # the axis is logarithmic, over two decades at least
    floor = min(most / 100, max(1e-12, every.min()))
    bins = np.geomspace(floor, most, 25)
    for ax, (truth, scores, _) in zip(axes, types.values(), strict=True):
        for value, label, colour in ((0, "normal", BLUE), (1, "anomalous", VERMILLION)):
            ax.hist(np.maximum(scores[truth == value], floor), bins, color=colour, alpha=0.5, label=label)
        ax.set(xscale="log", xlabel="anomaly score", ylabel="clips")
        ax.yaxis.get_major_locator().set_params(integer=True)
    legend_below(figure, axes)
    return figure


def roc_curves(evaluation: Path | str, untrained: Path | str | None = None) -> Figure:
    """ROC curves of each machine type: ids pooled, each id, and the untrained network where given."""
    types, before = _scores(evaluation), _scores(untrained) if untrained else {}
    figure, axes = panels("ROC curves", _is_synthetic(evaluation), list(types), size=(3.6, 3.4))
    for ax, (name, (truth, scores, ids)) in zip(axes, types.items(), strict=True):
        lines = [(truth[ids == one], scores[ids == one], "each id", BLUE, "-", 0.8) for one in set(ids)]
        if name in before:
            lines.append((*before[name][:2], "untrained, pooled", VERMILLION, "--", 1.5))
        lines.append((truth, scores, "ids pooled", BLACK, "-", 2))
        ax.axvspan(0, MAX_FPR, color=SKY, alpha=0.25, linewidth=0, label=f"pAUC's range, to {MAX_FPR:g}")
        for true, score, label, colour, dashes, width in lines:
            area = auc(true, score)
            if area is not None:
                rates = roc_curve(true, score)[:2]
                ax.plot(*rates, dashes, color=colour, linewidth=width, label=label, clip_on=False)
        if area is not None:
            ax.set_title(f"{name}: AUC pooled {100 * area:.1f} %", fontsize=10.5)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="false-positive rate", ylabel="true-positive rate")
    legend_below(figure, axes)
    return figure


def embedding_map(evaluation: Path | str, seed: int = 0) -> Figure:
    """The test clips' embeddings in two dimensions (t-SNE of cosine distances); anomalies are crosses."""
    rows = read_csv(Path(evaluation) / "scores.csv")
    chosen = np.random.default_rng(seed).permutation(len(rows))[:MOST_POINTS]
    with np.load(Path(evaluation) / "embeddings.npz") as file:
        embeddings = file["embeddings"][chosen]
    types = np.array([rows[position]["machine_type"] for position in chosen])
    anomalous = np.array([rows[position]["anomaly"] == "1" for position in chosen])
    place = in_two_dimensions(embeddings, seed)
    title = f"Embeddings of {len(chosen)} test clips, t-SNE"
    figure, (ax,) = panels(title, _is_synthetic(evaluation), [""], size=(8.5, 6))
    for number, name in enumerate(sorted(set(types), key=str.lower)):
        colour, marker = COLOURS[number % 7], "os^Dv"[number // 7 % 5]
        ax.scatter(
            *place[(types == name) & ~anomalous].T, 26, colour, marker=marker, linewidths=0, label=name
        )
        ax.scatter(*place[(types == name) & anomalous].T, 28, colour, marker="x", linewidths=1.3)
    ax.scatter([], [], 28, GREY, marker="x", label="anomalous")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    legend(figure, [ax], "right center", title="machine type")
    return figure


def inventory(result: dict[str, Any]) -> Figure:
    """What `inspection.inspect` found: clips of every machine, their lengths and their levels."""
    machines = result["machines"]
    types = list(dict.fromkeys(row["type"] for row in machines))
    kinds = {
        "train": ("training, normal", SKY),
        "test_normal": ("test, normal", BLUE),
        "test_anomaly": ("test, anomalous", VERMILLION),
        "test_unlabelled": ("test, unlabelled", GREY),
    }
    kinds = {key: value for key, value in kinds.items() if any(row[key] for row in machines)}
    title = f"{result['data']}: {result['clips']} clips"
    titles = ("clips of each machine", "levels and lengths")
    size = (5, max(2.8, 0.19 * len(machines) + 0.6))
    figure, (left, right) = panels(title, result["synthetic"], titles, 2, size, width_ratios=(1.5, 1))
    places, start = np.arange(len(machines)), np.zeros(len(machines))
    for key, (label, colour) in kinds.items():
        count = np.array([row[key] for row in machines])
        left.barh(places, count, 0.75, left=start, color=colour, label=label)
        start = start + count
    left.set_yticks(places, [f"{row['type']} {row['id']}" for row in machines], fontsize=8)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set(xlabel="clips")
    files = [[row for row in result["files"] if row["machine_type"] == name] for name in types]
    levels = [[row["level"] for row in rows if row["level"] is not None] for rows in files]
    boxes = right.boxplot(
        levels, orientation="horizontal", widths=0.6, patch_artist=True, flierprops={"markersize": 2}
    )
    for box, line in zip(boxes["boxes"], boxes["medians"], strict=True):
        box.set(facecolor="#dcebf5", edgecolor=BLUE)
        line.set(color=BLACK)
    labels = []
    for name, rows in zip(types, files, strict=True):
        low, high = (f"{end(row['seconds'] for row in rows):.3g}" for end in (min, max))
        labels.append(f"{name}\n{low} s" if low == high else f"{name}\n{low} to {high} s")
    right.set_yticks(range(1, len(types) + 1), labels, fontsize=8)
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(xlabel="level (dB of full scale)")
    legend_below(figure, [left])
    return figure


def write_all(run: Path | str, data: Path | str | None = None) -> list[Path]:
    """Write every figure that a run has the files for into its figures/, as PNG and PDF.

    Without `data`, its data folder, the clips' input maps are left out.
    """
    run = Path(run)
    evaluation, untrained = run / "evaluation", run / "untrained"
    ablation = run / "high_frequency" / "high_frequency.json"
    figures = {}
    if data is not None and (run / "best.pt").is_file():
        trained = checkpoint.load(run / "best.pt")
        opened = open_data(data, trained.config.model.audio, splits=["test"])
        try:
            chosen = normal_and_anomalous(opened.test.clips)
        except UserError:  # unlabelled, or all alike: any clip
            chosen = [0]
        figures["maps"] = input_maps(trained, opened.test, chosen, opened.dataset.synthetic)
    if (run / "log.jsonl").is_file():
        figures["training"] = training_curves(run)
    if any(evaluation.rglob("metrics.json")):
        figures["scores"] = score_histograms(evaluation)
        figures["roc"] = roc_curves(evaluation, untrained if (untrained / "scores.csv").is_file() else None)
    if (evaluation / "embeddings.npz").is_file():
        figures["embeddings"] = embedding_map(evaluation)
    if ablation.is_file():
        figures["high_frequency"] = high_frequency(ablation)
    return save_all(figures, run / "figures")
