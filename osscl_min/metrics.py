"""AUC, pAUC and mAUC from anomaly scores: the authors' pooled protocol and the challenge's mean over ids.

The authors pool the clips of all ids of a machine type into one ROC; the DCASE 2020 challenge averages the
AUCs of the ids. The same scores give different metrics, so both are always computed and named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from scipy.stats import norm, t
from sklearn.metrics import roc_auc_score

from osscl_min.data.layouts import read_truth
from osscl_min.runtime.files import UserError, read_rows, write_csv, write_json
from osscl_min.runtime.tables import percent

MAX_FPR = 0.1  # pAUC's range of false-positive rates (DCASE 2020 Task 2)
NAMES = {  # of the metrics, with their headings
    "auc_pooled": "AUC pooled", "pauc_pooled": "pAUC pooled", "auc_id_mean": "AUC id-mean",
    "pauc_id_mean": "pAUC id-mean", "mauc": "mAUC", "official": "AUC + pAUC, mean",
}  # fmt: skip
LOWEST_PAUC = (1 - MAX_FPR / (2 - MAX_FPR)) / 2  # McClish-standardised, where every anomaly scores lowest
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
    windows: int = 1  # of the recording


Labelled = TypeVar("Labelled")  # a Score or a data.clips.Clip


def measured(clips: Sequence[Labelled]) -> list[Labelled]:
    """The clips that a metric is made of: development clips of known truth, else evaluation clips.

    The two sets hold different machines and are never pooled.
    """
    known = [clip for clip in clips if clip.anomaly is not None]
    return [clip for clip in known if clip.subset == "development"] or known


def auc(anomaly: np.ndarray, score: np.ndarray, max_fpr: float | None = None) -> float | None:
    """scikit-learn's (McClish-standardised partial) area under the ROC curve; None without both classes."""
    if len(np.unique(anomaly)) < 2:
        return None
    return float(roc_auc_score(anomaly, score, max_fpr=max_fpr))


def weighted_auc(
    anomaly: np.ndarray, score: np.ndarray, weight: np.ndarray, max_fpr: float = 1.0
) -> np.ndarray:
    """The same areas for many weightings of the same clips at once, for the bootstrap.

    `weight` (R, n) is how often each of n clips was drawn in each resample, with both classes in every row;
    `max_fpr` below 1 gives the McClish-standardised pAUC. Returns (R,) float64.
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


@dataclass(frozen=True)
class Resampled:
    """The metrics of some clips and of their resamples.

    `areas` maps ("fan", "00") to "auc" and "pauc", and ("fan",) and (), the average over types, to NAMES;
    each is an array (1 + times,): first the metric, then that of each resample, NaN without both classes.
    `counts` maps the same keys to the numbers of normal and anomalous clips.
    """

    areas: dict[tuple[str, ...], dict[str, np.ndarray]]
    counts: dict[tuple[str, ...], tuple[int, int]]

    def value(self, key: tuple[str, ...], name: str) -> float | None:
        """A metric; None without both classes."""
        value = float(self.areas[key][name][0])
        return None if math.isnan(value) else value


def resampled(scores: Sequence[Score], times: int) -> Resampled:
    """AUC, pAUC and mAUC of the clips with known truth, and the same of `times` resamples of them.

    Each class of each id is resampled with one clip less than it has, which makes the variance of the
    resamples unbiased. The draws follow from the clips' truth alone: the same clips in the same
    order, scored by two systems, are resampled alike, so that systems can be compared draw by draw. Without
    a known truth, or with a score that is not finite, a UserError.
    """
    known = [score for score in scores if score.anomaly is not None]
    if not known:
        raise UserError("no clip has a known truth, so nothing can be measured; give labels with --labels")
    groups: dict[str, dict[str, list[int]]] = {}  # type -> id -> positions
    for position, clip in enumerate(known):
        if not math.isfinite(clip.score):
            raise UserError(
                f"{clip.machine_type} {clip.file}: the score is {clip.score}, not a finite number"
            )
        groups.setdefault(clip.machine_type, {}).setdefault(clip.machine_id, []).append(position)
    truth, value = np.array([clip.anomaly for clip in known]), np.array([clip.score for clip in known])
    weight = np.ones((1 + times, len(known)), np.int32)
    areas: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
    counts: dict[tuple[str, ...], tuple[int, int]] = {}

    def both_areas(key: tuple[str, ...], own: np.ndarray) -> dict[str, np.ndarray]:
        """AUC and pAUC of the clips at `own`, whose counts are noted under `key`."""
        counts[key] = int((truth[own] == 0).sum()), int((truth[own] == 1).sum())
        if not all(counts[key]):
            return dict.fromkeys(("auc", "pauc"), np.full(1 + times, np.nan))
        clips = truth[own], value[own], weight[:, own]
        return {"auc": weighted_auc(*clips), "pauc": weighted_auc(*clips, MAX_FPR)}

    random, types = np.random.default_rng(0), []
    for machine_type, ids in sorted(groups.items(), key=lambda item: item[0].lower()):
        parts = []
        for machine_id, positions in sorted(ids.items(), key=lambda item: item[0].lower()):
            own = np.array(positions)
            for drawn in (own[truth[own] == 0], own[truth[own] == 1]):
                if len(drawn):
                    share = np.full(len(drawn), 1 / len(drawn))
                    weight[1:, drawn] = random.multinomial(max(1, len(drawn) - 1), share, times)
            areas[machine_type, machine_id] = both_areas((machine_type, machine_id), own)
            parts.append(areas[machine_type, machine_id])
        pooled = both_areas((machine_type,), np.concatenate(list(ids.values())))
        means = _over(np.mean, "auc", parts), _over(np.mean, "pauc", parts)
        values = (*pooled.values(), *means, _over(np.min, "auc", parts), sum(means) / 2)
        areas[machine_type,] = dict(zip(NAMES, values, strict=True))
        types.append(areas[machine_type,])
    areas[()] = {name: _over(np.mean, name, types) for name in NAMES}
    counts[()] = int((truth == 0).sum()), int((truth == 1).sum())
    return Resampled(areas, counts)


def _over(function: Callable[..., np.ndarray], name: str, parts: Sequence[dict]) -> np.ndarray:
    """The mean or minimum of a metric (1 + times,) over ids or types, without those that have none."""
    arrays = [part[name] for part in parts]
    return function([a for a in arrays if not np.isnan(a[0])] or arrays, axis=0)  # all NaN: NaN


def average(systems: Sequence[Resampled]) -> dict[str, Any]:
    """The mean metrics of several systems (seeds) scored on the same clips, as from `evaluate_scores`.

    The intervals are those of that mean over other clips; how much other seeds differ is not in them.
    """
    counts = systems[0].counts
    areas = {
        key: {name: np.mean([system.areas[key][name] for system in systems], axis=0) for name in names}
        for key, names in systems[0].areas.items()
    }
    mean = Resampled(areas, counts)
    levels: dict[int, list[dict[str, Any]]] = {2: [], 1: [], 0: []}
    for key, values in areas.items():
        entry: dict[str, Any] = dict(zip(("type", "id"), key, strict=False))
        entry |= {name: mean.value(key, name) for name in values}
        if len(next(iter(values.values()))) > 2:  # two resamples have a variance
            entry["interval"] = {name: _bounds(mean, key, name) for name in values}
        if len(key) == 2:
            entry |= dict(zip(("normal", "anomaly"), counts[key], strict=True))
        levels[len(key)].append(entry)
    return {"ids": levels[2], "types": levels[1], "average": levels[0][0]}


def evaluate_scores(scores: Sequence[Score], bootstrap: int = 0) -> dict[str, Any]:
    """AUC, pAUC and mAUC per machine id, machine type and on average.

    Parameters
    ----------
    scores : sequence of Score
        Clips without truth are left out.
    bootstrap : int
        Resamples of the clips, drawn within each id and class; 0 leaves the intervals out.

    Returns
    -------
    dict
        {"ids": [{"type", "id", "auc", "pauc", "normal", "anomaly"}],
        "types": [{"type", and NAMES}], "average": {NAMES}}, fractions. mauc is the lowest AUC of a type's
        ids; "official" is the mean of AUC and pAUC over ids, as DCASE 2020 averages them. With `bootstrap`,
        every entry also has "interval": {name: [2.5 %, 97.5 %]}. A metric that its clips cannot give (only
        one class) is None, as is its interval, and left out of the means.
    """
    if bootstrap < 0:
        raise UserError(f"--bootstrap {bootstrap}: give 0 or more")
    return average([resampled(scores, bootstrap)])


def _bounds(system: Resampled, key: tuple[str, ...], name: str, level: float = 0.975) -> list[float] | None:
    """A 95 % interval of a metric over other clips (each side at `level`); None without both classes.

    Wilson's interval with as many trials as the variance of the resamples implies, at least the variance of
    a share of an effective number of clips, so that a perfect separation of few clips has a width. pAUC hangs
    on the few normal clips within MAX_FPR: its centre is corrected by the bias of the resamples, which widens
    it too, and its quantile is Student's with that many degrees of freedom. The lowest AUC of the ids lies
    between the lowest of their lower and the lowest of their upper bounds. Measured coverage:
    results/statistics.md.
    """
    area = system.areas[key][name]
    if np.isnan(area[0]):
        return None
    if name == "mauc":
        parts = [part for part in system.areas if part[:-1] == key and part]
        known = [part for part in parts if system.value(part, "auc" if key else name) is not None]
        if not key:
            return np.mean([_bounds(system, part, name) for part in known], axis=0).tolist()
        lower = min(_bounds(system, part, "auc")[0] for part in known)
        return [lower, min(_bounds(system, part, "auc", 1 - 0.025 / len(parts))[1] for part in known)]
    if name == "official":  # the wider case: as if AUC and pAUC rose and fell together
        parts = [_bounds(system, key, part, level) for part in ("auc_id_mean", "pauc_id_mean")]
        return np.mean(parts, axis=0).tolist()
    partial = name.startswith("pauc")
    lowest = LOWEST_PAUC if partial else 0.0
    normal, anomalous = system.counts[key]
    clips = 2 * normal * anomalous / (normal + anomalous)
    share, draws = (area[0] - lowest) / (1 - lowest), (area[1:] - lowest) / (1 - lowest)
    z = t.ppf(level, max(1, MAX_FPR * normal)) if partial else norm.ppf(level)
    bias = draws.mean() - share if partial else 0.0
    centre = min(max(share - bias, 0.0), 1.0)
    inner = (clips * centre + 0.5) / (clips + 1)
    variance = max(draws.var(ddof=1) + 2 * bias**2, inner * (1 - inner) / (2 * clips))
    trials = inner * (1 - inner) / variance
    grow = z**2 / trials
    middle = (centre + grow / 2) / (1 + grow)
    half = z * math.sqrt(centre * (1 - centre) / trials + grow / (4 * trials)) / (1 + grow)
    low, high = min(middle - half, share), max(middle + half, share)
    return [float(lowest + (1 - lowest) * bound) for bound in (low, high)]


def read_scores(folder: Path | str, labels: Path | str | None = None) -> list[Score]:
    """Read a folder of DCASE-format score files.

    Parameters
    ----------
    folder : Path or str
        Files anomaly_score_TYPE_id_XX.csv or TYPE_anomaly_score_id_XX.csv with rows `file name,score`.
    labels : Path or str, optional
        eval_data_list.csv, for files whose names tell no truth.
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
        machine = [group for group in match.groups() if group]
        for place, cells in read_rows(path):
            try:
                name, value = cells
                score = float(value)
            except ValueError as error:
                got = f"got {','.join(cells)!r}"
                raise UserError(f"{place}: expected `file name,score`, {got}") from error
            stem = Path(name).stem
            known = {"normal_": 0, "anomaly_": 1}.get("".join(stem.partition("_")[:2]))
            if known is None:
                known, subset = truth.get((machine[0], stem)), "evaluation"
            else:
                subset = "development"
            scores.append(Score(name, *machine, score, known, subset))
    if not scores:
        raise UserError(f"{folder}: no score file in it; expected anomaly_score_TYPE_id_XX.csv")
    return scores


def unmatched(scores: Sequence[Score], labels: Path | str | None = None) -> str:
    """A line on what is not measured: clips without a truth or of another set than the others (see
    `measured`), and truths in `labels` without a clip; "" without any."""
    clips = {(score.machine_type, Path(score.file).stem) for score in scores}
    unknown = sum(score.anomaly is None for score in scores)
    extra = len(set(read_truth(labels)) - clips) if labels else 0
    other = len(scores) - unknown - len(measured(scores))
    parts = [f"{unknown} of {len(scores)} clips have no known truth and are left out"] * bool(unknown)
    parts += [f"{other} clips of the evaluation set are left out: give it a folder of its own"] * bool(other)
    parts += [f"{extra} rows of {labels} match no clip"] * bool(extra)
    return "; ".join(parts)


def write_metrics(metrics: dict[str, Any], out: Path | str) -> None:
    """Write metrics.json and metrics.csv in `out`."""
    out = Path(out)
    write_json(out / "metrics.json", metrics)
    names = ["type", "id", "normal", "anomaly", "auc", "pauc", *NAMES, "interval"]
    levels = {"id": metrics["ids"], "type": metrics["types"], "average": [metrics["average"]]}
    rows = [[level, *map(entry.get, names)] for level, entries in levels.items() for entry in entries]
    write_csv(out / "metrics.csv", ["level", *names], rows)


def table(metrics: dict[str, Any], more: Mapping[str, dict[str, Any]] = {}) -> list[list[str]]:
    """The types' table in percent, first row the header, for the terminal and the report.

    `metrics` comes from `evaluate_scores`; `more` has the averages of other scores or systems by name.
    """
    rows = [["machine type", *NAMES.values()]]
    types = [(entry["type"], entry) for entry in metrics["types"]]
    others = [(f"average, {name}", entry) for name, entry in more.items()]
    for label, entry in (*types, ("average", metrics["average"]), *others):
        rows.append([label, *(percent(entry, name) for name in NAMES)])
    return rows
