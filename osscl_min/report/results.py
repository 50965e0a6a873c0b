"""What a run measured, as tables, and the published numbers beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from osscl_min import checkpoint
from osscl_min.experiments.sweep import read_clip_scores
from osscl_min.inference.calibration import Calibration, Threshold
from osscl_min.metrics import table
from osscl_min.runtime.files import UserError, printable, read_json
from osscl_min.runtime.tables import latex, percent

Table = list[list[str]]  # the first row is the header

# Clips of the development test set of DCASE 2020 Task 2; only a run on exactly these stands beside PUBLISHED.
BENCHMARK_TEST = {"fan": 1875, "pump": 856, "slider": 1290, "valve": 879, "ToyCar": 2459, "ToyConveyor": 3509}
# System; AUC/pAUC in percent of each type above, then on average (mAUC in brackets); where it was read.
PUBLISHED = [
    ("OS-SCL, TFgram", "98.41/94.50 96.25/88.74 99.63/98.04 99.85/99.23 96.55/91.17 83.56/69.87",
     "95.71/90.23 (91.23)", "average: the paper's abstract; types: second-hand"),
    ("OS-SCL, Log-Mel", "- - - - - -", "94.64/88.42 (89.24)", "the paper's abstract"),
    ("independent rerun of OS-SCL, 1 seed, pooled",
     "97.81/93.73 94.52/86.26 99.62/97.99 99.91/99.53 96.12/91.13 81.69/69.40",
     "94.95/89.67 (89.22)", "github.com/algasami/OS-SCL"),
    ("the same scores, id-mean", "97.29/93.02 95.48/89.01 99.65/98.16 99.91/99.52 96.39/91.37 81.26/68.98",
     "95.00/90.01", "recomputed from its scores"),
    ("Noisy-ArcMix + TASTgram", "98.32/95.34 95.44/85.99 99.53/97.50 99.95/99.74 96.76/90.11 77.90/67.15",
     "94.65/89.31 (89.78)", "its README"),
    ("STgram-MFN, id-mean", "94.04/88.97 91.94/81.75 99.55/97.61 99.64/98.44 94.44/87.68 74.57/63.60",
     "92.36/86.34 (84.86)", "its README"),
    ("autoencoder baseline", "65.16/52.59 72.59/60.00 84.99/66.93 66.46/50.60 80.09/67.22 72.68/60.66",
     "73.66/59.67", "its README"),
]  # fmt: skip
# AUC id-mean of the quick run and of its untrained network, %; processors and seeds move it by a few points.
EXPECTED = {"trained": (88, 99), "untrained": (35, 65)}
QUICK_CLIPS = 360  # test clips of `osscl synth` with its defaults


def check(run: Path | str) -> Path:
    """The folder of a trained and evaluated run; otherwise a UserError that names the missing command."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"no such run: {printable(run)}")
    for name, command in (
        ("best.pt", "train --data DATA --out RUN"),
        ("evaluation/evaluation.json", "evaluate --checkpoint RUN/best.pt --data DATA --out RUN/evaluation"),
    ):
        if not (run / name).is_file():
            raise UserError(f"{printable(run)}: {name} is missing; first run `osscl {command}`")
    return run


def read_metrics(evaluation: Path) -> dict[str, Any]:
    """Metrics of the development set, else of the evaluation set; empty where no clip has a known truth."""
    for path in (evaluation / "metrics.json", evaluation / "evaluation_set" / "metrics.json"):
        if path.is_file():
            return read_json(path)
    return {}


def averages(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The average metrics of a run's detector and of the untrained network; empty where there are none."""
    return tuple(read_metrics(run / name).get("average", {}) for name in ("evaluation", "untrained"))


def results_table(run: Path) -> Table:
    """Percent: machine types and their average; averages of other scores and of the untrained network.

    Empty without known truth.
    """
    trained, (_, before) = read_metrics(run / "evaluation"), averages(run)
    if not trained:
        return []
    recognised, others = {"machine type": "machine recognised"}, {}
    for label, name in (("average", "evaluation"), ("average, untrained", "untrained")):
        if (path := run / name / "evaluation.json").is_file():
            evaluation = read_json(path)
            accuracy = evaluation["identity_accuracy"]
            recognised[label] = "-" if accuracy is None else f"{100 * accuracy:.1f}"
            if name == "evaluation":
                forms = evaluation.get("forms", {})  # older files have none
                others = {form: entry for form, entry in forms.items() if form != evaluation["score"]}
    rows = table(trained, others | ({"untrained": before} if before else {}))
    return [[*row, recognised.get(row[0], "")] for row in rows]


def machines_table(run: Path) -> Table:
    """AUC and pAUC of each machine in percent."""
    rows = [["type", "id", "normal", "anomalous", "AUC", "pAUC"]]
    for entry in read_metrics(run / "evaluation")["ids"]:
        areas = [percent(entry, name) for name in ("auc", "pauc")]
        rows.append([*(str(entry[name]) for name in ("type", "id", "normal", "anomaly")), *areas])
    return rows


def headline(run: Path) -> str:
    """Mean AUC with its interval, trained and untrained, in one sentence."""
    means = [percent(average, "auc_id_mean") for average in averages(run) if average]
    if not means:
        return "No test clip has a known truth: there are scores and nothing to measure."
    what = "Mean AUC in percent (mean over the machines of a type, then over the types)"
    return f"{what}: {'; before training '.join(means)}."


def expectation(run: Path) -> str:
    """Whether the quick run came out as it should, in one line; empty for any other run."""
    evaluation = read_json(run / "evaluation" / "evaluation.json")
    quick = evaluation["synthetic"] and evaluation["config"]["preset"] == "quick"
    if not (quick and evaluation["clips"] == QUICK_CLIPS and all(averages(run))):
        return ""
    parts, verdict = [], "as expected"
    for (name, (low, high)), average in zip(EXPECTED.items(), averages(run), strict=True):
        value = 100 * average["auc_id_mean"]
        parts.append(f"{name} {value:.1f} % (expected {low} to {high} %)")
        if not low <= value <= high:
            verdict = "NOT as expected"
    return f"average AUC: {', '.join(parts)}: {verdict}"


def thresholds_table(run: Path, rates: Sequence[float] = (0.05, 0.1), score: str = "") -> Table:
    """False alarms and detections of each machine type at the false-alarm rates asked for.

    Thresholds come from normal recordings that were held out of training. `score` is by default the
    evaluation's own. Empty without such recordings.
    """
    own = read_json(run / "evaluation" / "evaluation.json").get("score", "exact")
    machines, scores = checkpoint.load(run / "best.pt").held_out(score or own)
    clips = read_clip_scores(run / "evaluation", "score" if score in ("", own) else score)
    if not (machines and clips):
        return []
    types, truth = (np.array([getattr(clip, name) for clip in clips]) for name in ("machine_type", "anomaly"))
    rows = [["rate", "machine type", "threshold from", "false alarms", "expected by chance", "detected"]]
    for rate in rates:
        calibration = Calibration(machines, scores, rate)
        thresholds = np.array(
            [calibration.threshold((clip.machine_type, clip.machine_id), clip.windows) for clip in clips]
        )
        resolved = all(threshold.rank for threshold in thresholds)
        alarms = np.array([resolved and c.score > t.value for c, t in zip(clips, thresholds, strict=True)])
        for name in [*sorted(set(types.tolist()), key=str.lower), "all"]:
            own, chance = (types == name) | (name == "all"), "-"
            sources = {threshold.source for threshold in thresholds[own]}
            source = f"{len(sources)} groups" if len(sources) > 1 else sources.pop()
            normal, anomalous = own & (truth == 0), own & (truth == 1)
            false_alarms, detected = (
                f"{alarms[group].sum() if resolved else '-'} of {group.sum()}"
                for group in (normal, anomalous)
            )
            if resolved and normal.any():
                chance = "{:.0f} to {:.0f} %".format(*(100 * rates_by_chance(thresholds[normal])))
            rows.append([f"{100 * rate:g} %", name, source, false_alarms, chance, detected])
    return rows


def rates_by_chance(thresholds: Sequence[Threshold]) -> np.ndarray:
    """The central 95 % of the share of false alarms among normal recordings, given the threshold of each.

    The share of recordings above the r-th highest of n scores is Beta(r, n + 1 - r), one draw per group;
    given it, the number of alarms is binomial.
    """
    probability = np.ones(1)  # of each number of false alarms
    for threshold, count in Counter(thresholds).items():
        n, rank = len(threshold.maxima), threshold.rank
        alarms = scipy.stats.betabinom(count, rank, n + 1 - rank)
        probability = np.convolve(probability, alarms.pmf(np.arange(count + 1)))
    return np.searchsorted(np.cumsum(probability), (0.025, 0.975)) / len(thresholds)


def published_table(metrics: dict[str, Any], synthetic: bool) -> Table:
    """This run above PUBLISHED; empty unless its clips are the benchmark's whole development test set."""
    counts: Counter[str] = Counter()
    for entry in metrics.get("ids", []):
        counts[entry["type"]] += entry["normal"] + entry["anomaly"]
    if synthetic or counts != BENCHMARK_TEST:
        return []
    types = {entry["type"]: entry for entry in metrics["types"]}
    rows = [["system", *BENCHMARK_TEST, "average", "read from"]]
    for protocol in ("pooled", "id_mean"):
        cells = [
            f"{100 * entry[f'auc_{protocol}']:.2f}/{100 * entry[f'pauc_{protocol}']:.2f}"
            for entry in (*(types[name] for name in BENCHMARK_TEST), metrics["average"])
        ]
        cells[-1] += f" ({100 * metrics['average']['mauc']:.2f})"
        rows.append([f"this run, {protocol.replace('_', '-')}", *cells, ""])
    return rows + [[system, *types.split(), average, source] for system, types, average, source in PUBLISHED]


def origin(run: Path) -> str:
    """One line on where a run's numbers come from: data, configuration, commit, day."""
    evaluation = read_json(run / "evaluation" / "evaluation.json")
    config, source = evaluation["config"], evaluation["provenance"]
    synthetic = "Synthetic: simulated machines. " if evaluation["synthetic"] else ""
    return (
        f"{synthetic}{evaluation['clips']} test clips of {evaluation['machines']} machines; "
        f"preset `{config['preset']}`, seed {config['train']['seed']}, "
        f"{config['train']['epochs']} epochs; commit {source['commit']}, {source['time'][:10]}."
    )


def paper_tables(run: Path) -> dict[str, str]:
    """Name -> LaTeX of the results, the machines, the thresholds and the run's experiments."""
    note = f"AUC and pAUC in percent, 95 % intervals. {origin(run)}"
    tables = {}
    if results := results_table(run):
        tables = {"results": latex(results, note), "machines": latex(machines_table(run), note)}
        if thresholds := thresholds_table(run):
            tables["thresholds"] = latex(thresholds, f"Test clips called anomalous. {origin(run)}")
    for path in sorted((run / "experiments").glob("*.tex")):
        tables[f"experiment_{path.stem}"] = path.read_text(encoding="utf-8")
    return tables
