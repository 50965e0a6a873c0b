"""AUC, pAUC and mAUC from anomaly scores: the authors' pooled protocol and the challenge's mean over ids.

The authors pool the clips of all ids of a machine type into one ROC; the DCASE 2020 challenge averages the
ids' own AUCs. The same scores give different figures, so both are always computed and named.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from osscl_min.data.clips import read_truth
from osscl_min.runtime.files import UserError, write_csv, write_json

MAX_FPR = 0.1  # pAUC's range of false-positive rates (DCASE 2020 Task 2)
NAMES = ("auc_pooled", "pauc_pooled", "auc_id_mean", "pauc_id_mean", "mauc")
SCORE_FILE = re.compile(r"^(?:anomaly_score_(.+)_id_(.+)|(.+)_anomaly_score_id_(.+))\.csv$")


@dataclass(frozen=True)
class Score:
    """A clip's anomaly score with its truth (None where it is not known)."""

    file: str
    machine_type: str
    machine_id: str
    score: float
    anomaly: int | None
    subset: str = "development"  # or "evaluation": clips whose truth comes from eval_data_list.csv


def measured(scores: Sequence[Score]) -> list[Score]:
    """The clips that a metric is made of: development clips of known truth, else evaluation clips.

    The two sets hold different machines and are never pooled.
    """
    known = [score for score in scores if score.anomaly is not None]
    return [score for score in known if score.subset == "development"] or known


def auc(anomaly: np.ndarray, score: np.ndarray, max_fpr: float | None = None) -> float | None:
    """scikit-learn's area under the ROC curve; with `max_fpr` the McClish-standardised partial one.

    None where one of the two classes is absent.
    """
    if len(np.unique(anomaly)) < 2:
        return None
    return float(roc_auc_score(anomaly, score, max_fpr=max_fpr))


def weighted_auc(
    anomaly: np.ndarray, score: np.ndarray, weight: np.ndarray, max_fpr: float = 1.0
) -> np.ndarray:
    """The same areas for many weightings of the same clips at once, for the bootstrap.

    Parameters
    ----------
    anomaly : (n,) of 0 and 1
    score : (n,)
    weight : (R, n)
        How often each clip was drawn in each resample; every row needs both classes.
    max_fpr : float
        1 gives the AUC, less the McClish-standardised pAUC.

    Returns
    -------
    (R,) float64
    """
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.diff(score[order]) != 0, True)
    drawn = weight[:, order].astype(np.float64)

    def rate(positive: np.ndarray) -> np.ndarray:
        total = np.cumsum(drawn * positive, axis=1)[:, last_of_tie]
        return np.pad(total / total[:, -1:], ((0, 0), (1, 0)))

    true_rate, false_rate = rate(anomaly[order] == 1), rate(anomaly[order] == 0)
    left, width = false_rate[:, :-1], np.diff(false_rate)
    inside = np.clip(max_fpr - left, 0, width)  # how much of a segment lies below max_fpr
    rise = np.diff(true_rate) * np.divide(inside, width, out=np.zeros_like(width), where=width > 0)
    area = (inside * (true_rate[:, :-1] + rise / 2)).sum(axis=1)
    if max_fpr == 1.0:
        return area
    chance = max_fpr**2 / 2
    return (1 + (area - chance) / (max_fpr - chance)) / 2


def evaluate_scores(scores: Sequence[Score], bootstrap: int = 0, seed: int = 0) -> dict[str, Any]:
    """AUC, pAUC and mAUC per machine id, machine type and on average.

    Parameters
    ----------
    scores : sequence of Score
        Clips without truth are left out.
    bootstrap : int
        Resamples of the clips, drawn within each id and class; 0 leaves the intervals out.
    seed : int
        Of the resampling.

    Returns
    -------
    dict
        {"ids": [{"type", "id", "auc", "pauc", "normal", "anomaly"}],
        "types": [{"type", "auc_pooled", "pauc_pooled", "auc_id_mean", "pauc_id_mean", "mauc"}],
        "average": {the same names}}, fractions; mauc is the lowest AUC of a type's ids. With `bootstrap`,
        every entry also has "interval": {name: [2.5 %, 97.5 %]}. A figure that its clips cannot give (only
        one class) is None and left out of the means.

    Raises
    ------
    UserError
        If there is no clip with truth, or a score is not finite.
    """
    return average([resampled(scores, bootstrap, seed)])


Resampled = tuple[dict[str, Any], dict[str, Any]]


def resampled(scores: Sequence[Score], times: int, seed: int = 0) -> Resampled:
    """The figures of `evaluate_scores`, and the same of `times` resamples of the clips.

    The draws follow from the seed and the clips' truth alone: the same clips in the same order, scored by two
    systems, are resampled alike, so that their difference can be taken draw by draw.

    Returns
    -------
    figures : dict
        As `evaluate_scores`, without intervals.
    draws : dict
        The same entries with arrays (times,) for figures; empty where `times` is 0.
    """
    known = [score for score in scores if score.anomaly is not None]
    if not known:
        what = "no clip has a known truth, so there is nothing to measure"
        raise UserError(f"{what}; labels may be given by a file")
    for one in known:
        if not math.isfinite(one.score):
            raise UserError(f"{one.machine_type} {one.file}: the score is {one.score}, not a finite number")
    grouped: dict[str, dict[str, list[Score]]] = {}
    for score in known:
        grouped.setdefault(score.machine_type, {}).setdefault(score.machine_id, []).append(score)
    random = np.random.default_rng(seed)
    figures: dict[str, Any] = {"ids": [], "types": []}
    draws: dict[str, Any] = {"ids": [], "types": []}
    for machine_type in sorted(grouped, key=str.lower):
        ids, drawn, arrays, weights = [], [], [], []
        for machine_id, clips in sorted(grouped[machine_type].items()):
            truth = np.array([clip.anomaly for clip in clips])
            value = np.array([clip.score for clip in clips])
            counts = {"normal": int((truth == 0).sum()), "anomaly": int((truth == 1).sum())}
            ids.append({"type": machine_type, "id": machine_id, **_areas(truth, value), **counts})
            arrays.append((truth, value))
            if times:
                weights.append(_resample(truth, times, random))
                drawn.append(_areas(truth, value, weights[-1]))
        truth, value = (np.concatenate(part) for part in zip(*arrays, strict=True))
        figures["ids"] += ids
        figures["types"].append({"type": machine_type} | _summary(_areas(truth, value), ids))
        if times:
            draws["ids"] += drawn
            draws["types"].append(_summary(_areas(truth, value, np.concatenate(weights, axis=1)), drawn))
    for entries in (figures, draws) if times else (figures,):
        entries["average"] = {name: _mean([entry[name] for entry in entries["types"]]) for name in NAMES}
    return figures, draws


def average(measured: Sequence[Resampled]) -> dict[str, Any]:
    """The mean figures of several systems (seeds) scored on the same clips, with intervals of that mean.

    Parameters
    ----------
    measured : sequence of (figures, draws)
        From `resampled`, with the same clips, seed and times.

    Returns
    -------
    dict
        As `evaluate_scores`.
    """

    def mean(entries: Sequence[dict[str, Any]], drawn: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in ("auc", "pauc", *NAMES) if name in entries[0]]
        means = {name: _mean([entry[name] for entry in entries]) for name in names}
        intervals = {name: interval(_mean([entry[name] for entry in drawn])) for name in names}
        return entries[0] | means | ({"interval": intervals} if drawn else {})

    figures, draws = zip(*measured, strict=True)
    draws = [drawn for drawn in draws if drawn["types"]]
    return {
        key: [
            mean([one[key][n] for one in figures], [one[key][n] for one in draws])
            for n in range(len(figures[0][key]))
        ]
        for key in ("ids", "types")
    } | {"average": mean([one["average"] for one in figures], [one["average"] for one in draws])}


def _areas(truth: np.ndarray, value: np.ndarray, weight: np.ndarray | None = None) -> dict[str, Any]:
    """AUC and pAUC, of each resample where weights (times, n) are given; None without both classes."""
    if weight is None:
        return {"auc": auc(truth, value), "pauc": auc(truth, value, MAX_FPR)}
    if len(np.unique(truth)) < 2:
        return {"auc": None, "pauc": None}
    return {"auc": weighted_auc(truth, value, weight), "pauc": weighted_auc(truth, value, weight, MAX_FPR)}


def _summary(pooled: dict[str, Any], ids: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A type's figures, or their resamples, from those of its ids pooled and of each."""
    lowest = [entry["auc"] for entry in ids if entry["auc"] is not None]
    return {
        "auc_pooled": pooled["auc"],
        "pauc_pooled": pooled["pauc"],
        "auc_id_mean": _mean([entry["auc"] for entry in ids]),
        "pauc_id_mean": _mean([entry["pauc"] for entry in ids]),
        "mauc": np.min(lowest, axis=0) if lowest and np.ndim(lowest[0]) else min(lowest, default=None),
    }


def _mean(values: Sequence[Any]) -> Any:
    values = [value for value in values if value is not None]
    if not values:
        return None
    mean = np.mean(values, axis=0)
    return mean if np.ndim(mean) else float(mean)


def _resample(truth: np.ndarray, times: int, random: np.random.Generator) -> np.ndarray:
    """(times, n): how often each clip is drawn when each class is drawn anew, with replacement."""
    weight = np.zeros((times, len(truth)), np.int64)
    for value in (0, 1):
        members = np.flatnonzero(truth == value)
        if count := len(members):
            weight[:, members] = random.multinomial(count, np.full(count, 1 / count), times)
    return weight


def interval(values: np.ndarray | None) -> list[float] | None:
    """The middle 95 % of the draws."""
    return None if values is None else [float(bound) for bound in np.quantile(values, (0.025, 0.975))]


def read_scores(folder: Path | str, labels: Path | str | None = None) -> list[Score]:
    """Read a folder of DCASE-format score files.

    Parameters
    ----------
    folder : Path or str
        Files anomaly_score_TYPE_id_XX.csv or TYPE_anomaly_score_id_XX.csv with rows `file name,score`.
    labels : Path or str, optional
        eval_data_list.csv, for files whose names tell no truth.

    Raises
    ------
    UserError
        If there is no such file, or a row has another form.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    truth = read_truth(labels) if labels else {}
    scores = []
    for path in sorted(folder.glob("*.csv")):
        match = SCORE_FILE.match(path.name)
        if not match:
            continue
        machine_type, machine_id = (group for group in match.groups() if group)
        with open(path, newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file), 1):
                try:
                    name, value = row[0], float(row[1])
                except (IndexError, ValueError) as error:
                    if not row:
                        continue
                    got = f"got {','.join(row)!r}"
                    raise UserError(f"{path}, line {number}: expected `file name,score`, {got}") from error
                stem = Path(name).stem
                if stem.startswith(("anomaly_", "normal_")):
                    anomaly = int(stem.startswith("anomaly_"))
                else:
                    anomaly = truth.get((machine_type, stem))
                scores.append(Score(name, machine_type, machine_id, value, anomaly))
    if not scores:
        raise UserError(f"{folder}: no score file in it; expected anomaly_score_TYPE_id_XX.csv")
    return scores


def write_metrics(metrics: dict[str, Any], out: Path | str) -> None:
    """Write metrics.json and metrics.csv in `out`."""
    out = Path(out)
    write_json(out / "metrics.json", metrics)
    names = ["type", "id", "normal", "anomaly", "auc", "pauc", *NAMES, "interval"]
    levels = {"id": metrics["ids"], "type": metrics["types"], "average": [metrics["average"]]}
    rows = [
        [level, *(entry.get(name) for name in names)]
        for level, entries in levels.items()
        for entry in entries
    ]
    write_csv(out / "metrics.csv", ["level", *names], rows)


def table(metrics: dict[str, Any], more: Sequence[tuple[str, dict[str, float]]] = ()) -> list[list[str]]:
    """The types' table in percent, first row the header, for the terminal and the report.

    Parameters
    ----------
    metrics : dict
        From `evaluate_scores`.
    more : sequence of (label, {name: fraction})
        Further rows, such as another system's average.
    """
    header = ["machine type", "AUC pooled", "pAUC pooled", "AUC id-mean", "pAUC id-mean", "mAUC"]
    rows = [(entry["type"], entry) for entry in metrics["types"]] + [("average", metrics["average"]), *more]
    return [header, *([label, *(percent(entry, name) for name in NAMES)] for label, entry in rows)]


def percent(entry: dict[str, Any], name: str) -> str:
    """A figure of an entry in percent, with its interval where there is one; "-" where there is none."""
    if entry.get(name) is None:
        return "-"
    low, high = (entry.get("interval") or {}).get(name) or (None, None)
    return f"{100 * entry[name]:.2f}" + ("" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]")
