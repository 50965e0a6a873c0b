"""A run's figures: each function takes paths or data and returns a matplotlib Figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from osscl_min import checkpoint
from osscl_min.config import AudioConfig
from osscl_min.data.clips import Clip
from osscl_min.data.reader import Reader, open_data
from osscl_min.experiments.figures import curves, draw_map
from osscl_min.experiments.sweep import read_clip_scores
from osscl_min.features import LogMel, mel_ticks, to_wave
from osscl_min.metrics import MAX_FPR, auc
from osscl_min.report.results import read_metrics
from osscl_min.runtime import plotting as plot
from osscl_min.runtime.files import UserError, read_csv, read_json
from osscl_min.train import read_log

MOST_POINTS = 3000  # of the embedding map, for t-SNE's time
LOOK = {  # of an input map: title, colours, vertical axis, colour bar
    "log_mel": ("log-mel", "magma", "frequency (Hz)", "dB"),
    "tgram": ("Tgram", "PuOr", "learned channel", "activation"),
    "tfgram": ("TFgram", "viridis", "learned channel", "activation"),
}
TRUTH = {0: ("normal", plot.BLUE), 1: ("anomalous", plot.VERMILLION)}


def _scores(evaluation: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Machine type -> truth, score and machine id of the clips that metrics.json measures."""
    types = defaultdict(list)
    for clip in read_clip_scores(evaluation):
        types[clip.machine_type].append((clip.anomaly, clip.score, clip.machine_id))
    return {
        name: tuple(map(np.array, zip(*types[name], strict=True))) for name in sorted(types, key=str.lower)
    }


def _is_synthetic(evaluation: Path) -> bool:
    return read_json(evaluation / "evaluation.json")["synthetic"]


def normal_and_anomalous(clips: Sequence[Clip], machine_type: str | None = None) -> list[int]:
    """Positions of a normal and an anomalous clip of the first machine (of a type) that has both."""
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
    """The encoder's input maps of some of the reader's clips, one column per clip.

    Log-mel in dB over Hz; Tgram and TFgram as the network has learned them, whose channels have no order.
    """
    audio, inputs = trained.config.model.audio, trained.config.model.inputs
    wave = to_wave(reader.read(positions), trained.device)
    with torch.no_grad():
        maps = trained.model.maps(wave, LogMel(audio).to(wave.device)(wave)).cpu().numpy()
    clips = [reader.clips[position] for position in positions]
    truths = [TRUTH.get(clip.anomaly, ("unlabelled",))[0] for clip in clips]
    titles = [
        f"{LOOK[name][0]}: {clip.machine_type} id {clip.machine_id}, {truth}"
        for name in inputs
        for clip, truth in zip(clips, truths, strict=True)
    ]
    size = (5, 2.5)
    figure, axes = plot.panels(
        "The encoder's input maps", synthetic, titles, len(clips), size, sharex=True, sharey="row"
    )
    frame = audio.hop / audio.sample_rate  # s; a frame is centred on its time
    extent = (-frame / 2, (audio.frames - 0.5) * frame, 0, audio.mels)
    grid = np.reshape(axes, (len(inputs), len(clips)))
    for row, (name, across) in enumerate(zip(inputs, grid, strict=True)):
        _, colours, vertical, unit = LOOK[name]
        low, high = np.percentile(maps[:, row], (1, 99.5))
        if name == "tgram":  # of both signs: white is zero
            low, high = -max(-low, high), max(-low, high)
        for ax, values in zip(across, maps[:, row], strict=True):
            image = plot.picture(ax, values, colours, (low, high), extent)
        if name == "log_mel":
            ax.set_yticks(*mel_ticks(audio))
        across[0].set(ylabel=vertical, xlim=(0, audio.seconds), ylim=(0, audio.mels))
        figure.colorbar(image, ax=list(across), label=unit, pad=0.015, extend="both")
    for ax in across:
        ax.set_xlabel("time (s)")
    return figure


def spectrograms(
    reader: Reader, positions: Sequence[int], audio: AudioConfig, titles: Sequence[str], heading: str = ""
) -> Figure:
    """Log-mels of some of the reader's clips in dB over Hz, two in a row, which share their colours."""
    log_mels = LogMel(audio)(to_wave(reader.read(positions), torch.device("cpu")))[:, 0].numpy()
    figure, axes = plot.panels(heading, False, titles, 2, (4.8, 2.1), sharex=True, sharey=True)
    for first in range(0, len(axes), 2):
        row, limits = axes[first : first + 2], np.percentile(log_mels[first : first + 2], (1, 99.5))
        for ax, log_mel in zip(row, log_mels[first:], strict=False):
            image = plot.picture(ax, log_mel, "magma", limits, (0, audio.seconds, 0, audio.mels))
        figure.colorbar(image, ax=row, label="dB", pad=0.015, extend="both")
        row[0].set_ylabel("frequency (Hz)")
    axes[0].set_yticks(*mel_ticks(audio))
    for ax in axes[-2:]:
        ax.set_xlabel("time (s)")
    return figure


def overview(run: Path, reader: Reader, positions: Sequence[int]) -> Figure:
    """A machine's normal and anomalous clip, what is unusual about the latter, and the scores of its type."""
    trained, clip = checkpoint.load(run / "best.pt"), reader.clips[positions[1]]
    audio = trained.config.model.audio
    machine, machine_type = " id ".join(clip.machine), clip.machine_type
    log_mels = LogMel(audio)(to_wave(reader.read(positions), torch.device("cpu")))[:, 0].numpy()
    names = [f"{machine}, normal", f"{machine}, anomalous", "deviation from its training clips"]
    names.append(f"scores of the test clips of {machine_type}")
    title, synthetic = "Two clips of a machine, and its type's scores", _is_synthetic(run / "evaluation")
    figure, axes = plot.panels(title, synthetic, names, 2, (5, 2.5))
    extent = (0, audio.seconds, 0, audio.mels)
    for ax, log_mel in zip(axes, log_mels, strict=False):
        image = plot.picture(ax, log_mel, "magma", np.percentile(log_mels, (1, 99.5)), extent)
        figure.colorbar(image, ax=ax, pad=0.02, label="dB", extend="both")
    (label,) = trained.labels_of([clip])
    plot.signed(axes[2], trained.neighbours.deviation(log_mels[1], label), extent, "standard deviations", 5)
    for ax in axes[:3]:
        ax.set_yticks(*mel_ticks(audio))
        ax.set(xlabel="time (s)", ylabel="frequency (Hz)")
    _histogram(axes[3], *_scores(run / "evaluation")[machine_type][:2])
    axes[3].legend(frameon=False)
    return figure


def training_curves(run: Path) -> Figure:
    """Loss terms, validation loss, machine accuracy and learning rate over a run's epochs."""
    log = read_log(run)
    synthetic = read_json(run / "config.json")["data"]["synthetic"]
    kept = checkpoint.load(run / "best.pt").epoch
    panels = {
        "loss on mixed clips": {"total": plot.BLACK, "cross_entropy": plot.BLUE, "contrastive": plot.ORANGE},
        "validation loss of the EMA": {"validation_loss": plot.GREEN},
        "validation accuracy": {"validation_accuracy": plot.GREEN},
        "learning rate": {"learning_rate": plot.PURPLE},
    }
    figure, axes = plot.panels("Training", synthetic, list(panels), 2, (4.8, 2.7), sharex=True)
    for ax, drawn in zip(axes, panels.values(), strict=True):
        for name, colour in drawn.items():
            label = name.replace("_", "-") if len(drawn) > 1 else None
            epochs, values = zip(*((entry["epoch"], entry[name]) for entry in log), strict=True)
            ax.plot(epochs, values, ".-" if len(log) < 40 else "-", color=colour, label=label)
        ax.axvline(kept, color=plot.GREY, linestyle=":", linewidth=1.2, label=f"epoch {kept}, kept")
        ax.set(xlabel="epoch", ylim=(0, 1.06 * ax.dataLim.ymax or 1))
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[3].ticklabel_format(axis="y", scilimits=(0, 0))
    plot.legend(figure, axes)
    return figure


def score_histograms(evaluation: Path) -> Figure:
    """Anomaly scores of normal and anomalous clips, one panel per machine type."""
    types = _scores(evaluation)
    figure, axes = plot.panels("Anomaly scores", _is_synthetic(evaluation), list(types), sharex=True)
    scores = np.concatenate([values for _, values, _ in types.values()])
    for ax, (truth, values, _) in zip(axes, types.values(), strict=True):
        _histogram(ax, truth, values, scores)
    plot.legend(figure, axes)
    return figure


def _histogram(ax: Axes, truth: np.ndarray, values: np.ndarray, scores: np.ndarray | None = None) -> None:
    """Histograms of the values of both kinds, in bins over the range of all `scores`."""
    scores = values if scores is None else scores
    low, high, scale = scores.min(), scores.max(), "linear"
    bins = np.linspace(low, high + 1e-9, 25)
    if low >= 0:  # cross-entropies span decades, two at least
        high, scale = 1.001 * max(high, 1e-9), "log"
        low = min(high / 100, max(1e-12, low))
        bins = np.geomspace(low, high, 25)
    for anomaly, (label, colour) in TRUTH.items():
        ax.hist(np.maximum(values[truth == anomaly], low), bins, color=colour, alpha=0.5, label=label)
    ax.set(xscale=scale, xlabel="anomaly score", ylabel="clips")
    ax.yaxis.get_major_locator().set_params(integer=True)


def machine_intervals(evaluation: Path) -> Figure:
    """AUC of each machine with its 95 % interval."""
    entries = [entry for entry in read_metrics(evaluation)["ids"] if entry["auc"] is not None]
    size = (6.5, 0.8 + 0.2 * len(entries))
    figure, (ax,) = plot.panels("AUC of each machine", _is_synthetic(evaluation), [""], 1, size)
    types = list(dict.fromkeys(entry["type"] for entry in entries))
    for place, entry in enumerate(entries):
        colour = plot.COLOURS[types.index(entry["type"]) % 7]
        bounds = entry.get("interval", {}).get("auc") or [np.nan] * 2
        ax.plot(100 * np.array(bounds), [place] * 2, color=colour, linewidth=2, alpha=0.5)
        ax.plot(100 * entry["auc"], place, "o", color=colour, markersize=5)
    ax.axvline(50, color=plot.GREY, linestyle=":", label="chance")
    ax.set_yticks(range(len(entries)), [f"{entry['type']} {entry['id']}" for entry in entries], fontsize=8)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="AUC (%), 95 % interval", xlim=(min(45, ax.get_xlim()[0]), 101))
    plot.legend(figure, [ax])
    return figure


def roc_curves(evaluation: Path, untrained: Path | None = None) -> Figure:
    """ROC curves of each machine type: ids pooled, each id, and the untrained network where given."""
    types, before = _scores(evaluation), _scores(untrained) if untrained else {}
    figure, axes = plot.panels("ROC curves", _is_synthetic(evaluation), list(types), size=(3.6, 3.4))
    for ax, (name, (truth, scores, ids)) in zip(axes, types.items(), strict=True):
        ax.axvspan(0, MAX_FPR, color=plot.SKY, alpha=0.25, linewidth=0, label=f"pAUC's range, to {MAX_FPR:g}")
        for machine in np.unique(ids):
            own = ids == machine
            _roc(ax, truth[own], scores[own], color=plot.BLUE, linewidth=0.8, label="each id")
        if name in before:
            _roc(ax, *before[name][:2], color=plot.VERMILLION, dashes=(4, 2), label="untrained, pooled")
        _roc(ax, truth, scores, color=plot.BLACK, linewidth=2, label="ids pooled")
        if (area := auc(truth, scores)) is not None:
            ax.set_title(f"{name}: AUC pooled {100 * area:.1f} %", fontsize=10.5)
        ax.plot([0, 1], [0, 1], color=plot.GREY, linestyle=":", linewidth=1, label="chance")
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="false-positive rate", ylabel="true-positive rate")
    plot.legend(figure, axes)
    return figure


def _roc(ax: Axes, truth: np.ndarray, scores: np.ndarray, **look: Any) -> None:
    if len(set(truth)) == 2:
        ax.plot(*roc_curve(truth, scores)[:2], clip_on=False, **look)


def embedding_map(evaluation: Path, seed: int = 0) -> Figure:
    """The test clips' embeddings in two dimensions (t-SNE of cosine distances); anomalies are crosses."""
    rows = read_csv(evaluation / "scores.csv")
    chosen = np.random.default_rng(seed).permutation(len(rows))[:MOST_POINTS]
    with np.load(evaluation / "embeddings.npz") as file:
        embeddings = file["embeddings"][chosen]
    types, truths = np.array([(row["machine_type"], row["anomaly"]) for row in rows])[chosen].T
    title = f"Embeddings of {len(chosen)} test clips, t-SNE"
    figure, (ax,) = plot.panels(title, _is_synthetic(evaluation), [""], size=(8.5, 6))
    draw_map(ax, embeddings, types, truths == "1", seed)
    ax.spines[:].set_visible(False)
    plot.legend(figure, [ax], "right center", title="machine type", ncols=1)
    return figure


def draw(run: Path, data: Path | str | None = None) -> dict[str, Figure]:
    """Every figure of an evaluated run by name; without `data`, its data folder, no input maps."""
    evaluation, untrained = run / "evaluation", run / "untrained"
    figures, trained = {}, checkpoint.load(run / "best.pt")
    if data is not None:
        opened = open_data(data, trained.config.model.audio, splits=["test"])
        try:
            chosen = normal_and_anomalous(opened.test.clips)
            if trained.neighbours is not None:
                figures["overview"] = overview(run, opened.test, chosen)
        except UserError:  # unlabelled, or all alike: any clip
            chosen = [0]
        figures["maps"] = input_maps(trained, opened.test, chosen, opened.dataset.synthetic)
    if (run / "log.jsonl").is_file():
        figures["training"] = training_curves(run)
    if read_metrics(evaluation):
        figures["scores"] = score_histograms(evaluation)
        figures["machines"] = machine_intervals(evaluation)
        figures["roc"] = roc_curves(evaluation, untrained if (untrained / "scores.csv").is_file() else None)
    if (evaluation / "embeddings.npz").is_file():
        figures["embeddings"] = embedding_map(evaluation)
    if (ablation := run / "high_frequency" / "high_frequency.json").is_file():
        figures["high_frequency"] = curves(read_json(ablation))
    return figures
