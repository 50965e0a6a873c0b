"""Sweeps: training runs that differ in a few settings and a seed, and what their differences are worth."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from osscl_min.config import Config, EngineConfig, from_dict, to_dict, with_classes
from osscl_min.data.clips import scan
from osscl_min.evaluate import evaluate
from osscl_min.metrics import NAMES, Resampled, Score, average, measured, resampled
from osscl_min.runtime.files import UserError, locked, read_csv, read_json, safe_name, write_csv, write_json
from osscl_min.runtime.settings import flat
from osscl_min.runtime.tables import mean_text, write_table
from osscl_min.train import read_log, train

Changes = Mapping[str, Any]  # "loss.mixup" -> False
Result = Mapping[str, Any]  # the content of an experiment's NAME.json, see `summarise`
Values = Mapping[str, float | None]  # of MEASURED
BASELINE = "os-scl"
COMPARED = "auc_id_mean"  # the metric whose differences are shown


@dataclass(frozen=True)
class Run:
    """One training run of a sweep, with its evaluation."""

    variant: str
    seed: int
    config: Config
    folder: Path


def changed(config: Config, changes: Changes) -> Config:
    """The configuration with some settings, named with their path ("loss.mixup"), set to other values."""
    values = to_dict(config)
    for name, value in changes.items():
        *path, last = name.split(".")
        reduce(getitem, path, values)[last] = value
    return from_dict(values)


def fingerprint(data: Path | str) -> str:
    """A digest of a data set: its labels, its files' names and sizes, and 4 kB from the middle of each."""
    index = Path(data) / "index.jsonl"
    if index.is_file():  # of a packed store; it holds the files' hashes
        return hashlib.sha256(index.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for clip in scan(data).clips:
        with open(clip.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size // 2 - 2048))
            label = (*clip.machine, clip.split, clip.anomaly, clip.subset, clip.path.name, size)
            digest.update(repr(label).encode() + file.read(4096))
    return digest.hexdigest()


def plan(
    variants: Mapping[str, Changes], seeds: Iterable[int], config: Config, data: Path | str, out: Path | str
) -> list[Run]:
    """The runs of an experiment.

    A folder is named after the settings that differ from `config`, the seed and a digest of the whole
    configuration and the data, so experiments share equal runs and no others.
    """
    content, base, runs = fingerprint(data), flat(to_dict(config)), []
    for seed, (name, changes) in itertools.product(seeds, variants.items()):
        own = changed(config, {**changes, "train.seed": seed})
        identity = json.dumps([flat(to_dict(comparable(own))), content], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        parts = [
            f"{path.rpartition('.')[2]}-{'+'.join(value) if isinstance(value, list | tuple) else value}"
            for path, value in sorted(changes.items())
            if value != base.get(path)
        ]
        folder = safe_name(f"{'_'.join(parts) or BASELINE}-seed{seed}-{digest}")
        runs.append(Run(name, seed, own, Path(out) / "runs" / folder))
    return runs


def comparable(config: Config) -> Config:
    """The configuration without the engine's settings, and without the classes, which the data has."""
    return with_classes(replace(config, engine=EngineConfig()), 1)


def run_all(runs: Sequence[Run], data: Path | str, *, device: str = "auto", jobs: int = 1) -> dict[Run, str]:
    """Train and evaluate the runs of a `plan` that are not done, each in a process, `jobs` at a time.

    Returns each failed run with the last line of its output.txt; the others are done.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs)),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }

    def work(run: Run) -> str:
        written = run.folder / "config.json"
        if written.is_file():
            same = False
            with suppress(UserError):
                same = comparable(from_dict(read_json(written)["config"])) == comparable(run.config)
            if not same:
                return f"{run.folder} holds another run; move it away"
            if (run.folder / "evaluation" / "evaluation.json").is_file():
                return ""
        run.folder.mkdir(parents=True, exist_ok=True)
        task = {"config": to_dict(run.config), "data": str(data), "out": str(run.folder), "device": device}
        with open(run.folder / "output.txt", "w", encoding="utf-8") as output:
            status = subprocess.run(
                [sys.executable, "-m", "osscl_min.experiments.sweep"],
                input=json.dumps(task), text=True, stdout=output, stderr=subprocess.STDOUT, env=environment,
            ).returncode  # fmt: skip
        lines = (run.folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        return (lines[-1] if lines else f"ended with status {status}") if status else ""

    bar = {"desc": "training runs", "unit": "run", "disable": None, "tqdm_class": tqdm}
    with locked(runs[0].folder.parent, "running experiments"):
        results = thread_map(work, runs, max_workers=jobs, **bar)
    return {run: line for run, line in zip(runs, results, strict=True) if line}


def _work(task: Mapping[str, Any]) -> None:
    config, out = from_dict(task["config"]), Path(task["out"])
    best = train(task["data"], out, config, device=task["device"])
    scoring = replace(config.evaluate, precision=config.train.precision)
    evaluate(best, task["data"], out / "evaluation", config=scoring, device=task["device"])


def read_clip_scores(evaluation: Path | str) -> list[Score]:
    """The clips of an evaluation's scores.csv."""
    columns = ("file", "machine_type", "machine_id", "subset", "anomaly", "score")
    return [_score(row, row["score"]) for row in read_csv(Path(evaluation) / "scores.csv", columns)]


def _score(row: Mapping[str, str], score: str) -> Score:
    anomaly = int(row["anomaly"]) if row["anomaly"] else None
    return Score(row["file"], row["machine_type"], row["machine_id"], float(score), anomaly, row["subset"])


def finished(runs: Sequence[Run], failed: Mapping[Run, str]) -> dict[str, list[Path]]:
    """Each variant's best.pt of every seed that is done; a UserError if the first variant has none."""
    done: dict[str, list[Path]] = {}
    for run in runs:
        if run not in failed:
            done.setdefault(run.variant, []).append(run.folder / "best.pt")
    if runs[0].variant not in done:
        why = next(iter(failed.values()))
        raise UserError(f"no run of {runs[0].variant} is done, so there is nothing to compare with: {why}")
    return done


def evaluated(run: Path) -> tuple[list[Score], Values]:
    """The scores of a finished run, and what its training took."""
    evaluation, log = read_json(run / "evaluation" / "evaluation.json"), read_log(run)
    accuracy, kept = evaluation["identity_accuracy"], evaluation["epoch"]
    memory = max(entry["peak_memory_mb"] or 0 for entry in log)
    return measured(read_clip_scores(run / "evaluation")), {
        "machine_recognised": None if accuracy is None else 100 * accuracy,
        "seconds_per_epoch": float(np.mean([entry["seconds"] for entry in log])),
        "kept_epoch": kept,
        "seconds_to_kept": sum(entry["seconds"] for entry in log if entry["epoch"] <= kept),
        "peak_memory_gb": memory / 1000 or None,
    }


@dataclass
class Condition:
    """One row of an experiment: a variant, what was done to its test clips, and what came of it."""

    settings: dict[str, Any]  # "variant" and what else sets the row apart
    scores: dict[int, list[Score]] = field(default_factory=dict)  # by seed; the same clips in the same order
    values: dict[str, list[float | None]] = field(default_factory=dict)  # of MEASURED, one for each seed

    def add(self, seed: int, scores: list[Score], values: Values) -> None:
        """Take in what a seed gave."""
        self.scores[seed] = scores
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def column(self, seed: int) -> str:
        """The name of a seed's scores in the kept file."""
        return " | ".join([*map(str, self.settings.values()), f"seed {seed}"])


def difference(
    systems: Sequence[Resampled], base: Sequence[Resampled], key: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """How a variant differs from another in COMPARED, with the noise of both seeds and test clips.

    The paired differences of n seeds vary by training noise s; the test clips, which the seeds share, add c,
    the covariance of their resamples between seeds. Banerjee's interval joins independent parts and covers no
    less than it says: half width^2 = (t s / sqrt(n))^2 + (t' c)^2, t with n - 1 degrees of freedom and t'
    with those of the smaller class of clips; it is never narrower than what the clips alone give. Simulated:
    results/statistics.md.

    `systems` and `base` hold one entry per seed, of the same seeds and clips; `key` is () for the average or
    (type,). Returns "mean" (fraction), "interval" (95 %; None for one seed, which cannot tell), "seeds" (each
    difference), "seed_sd" (s), "clip_sd" (of the mean) and "clear" (the interval leaves out 0); None without
    both classes.
    """
    pairs = zip(systems, base, strict=True)
    values = np.array([ours.areas[key][COMPARED] - theirs.areas[key][COMPARED] for ours, theirs in pairs])
    seeds, draws, count = values[:, 0], values[:, 1:], len(values)
    if np.isnan(seeds).any():
        return None
    mean, clip_sd, interval, seed_sd = float(seeds.mean()), float(draws.mean(axis=0).std(ddof=1)), None, None
    if count > 1:
        ids = [n for name, n in systems[0].counts.items() if len(name) == 2 and name[: len(key)] == key]
        freedom = max(1, np.subtract(ids, 1).sum(axis=0).min())
        t_seeds, t_clips = t.ppf(0.975, [count - 1, freedom])
        seed_sd, covariance = float(seeds.std(ddof=1)), np.cov(draws)
        shared = max(0.0, (covariance.sum() - np.trace(covariance)) / (count * (count - 1)))
        joined = np.hypot(t_seeds * seed_sd / np.sqrt(count), t_clips * np.sqrt(shared))
        half = float(max(joined, t_clips * clip_sd))
        interval = [mean - half, mean + half]
    return {
        "mean": mean,
        "interval": interval,
        "seeds": seeds.tolist(),
        "seed_sd": seed_sd,
        "clip_sd": clip_sd,
        "clear": bool(interval) and abs(mean) > half,
    }


def summarise(conditions: Sequence[Condition], about: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The result of an experiment, the content of NAME.json.

    Beside `about` it has "conditions", a list of rows: their settings, "seeds", "metrics" (means over the
    seeds, see `metrics.evaluate_scores`), "each" (the averages of each seed), "values" and, with `times`
    resamples, "difference" from the first row of the same variant and "gain" over the first variant's row of
    the same settings: {"average" or a type: see `difference`}.
    """
    every = [{seed: resampled(scores, times) for seed, scores in c.scores.items()} for c in conditions]
    baseline = every[0]
    some = next(iter(baseline.values()))
    first: dict[str, dict] = {}  # variant -> the systems of its first row
    alike: dict[tuple, dict] = {}  # other settings -> the systems of the first row that has them
    rows = []
    for condition, own in zip(conditions, every, strict=True):
        variant, *rest = condition.settings.values()
        within = first.setdefault(variant, own)
        across = baseline if within is own else alike.setdefault(tuple(rest), own)
        row = {
            **condition.settings,
            "seeds": list(own),
            "metrics": average(list(own.values())),
            "each": {name: [system.value((), name) for system in own.values()] for name in NAMES},
            "values": condition.values,
        }
        for kind, other in (("difference", within), ("gain", across)):
            pairs = [(own[seed], other[seed]) for seed in own if seed in other]
            if times > 1 and other is not own:
                row[kind] = {"".join(key) or "average": difference(*zip(*pairs, strict=True), key)
                             for key in some.areas if len(key) < 2 and pairs}  # fmt: skip
        rows.append(row)
    return {**about, "clips": sum(some.counts[()]), "bootstrap": times, "conditions": rows}


def origin(result: Result) -> str:
    """One line: on which data, how many seeds and clips, which commits."""
    synthetic = "Synthetic: simulated machines. " if result["synthetic"] else ""
    seeds = sorted({seed for row in result["conditions"] for seed in row["seeds"]})
    return (
        f"{synthetic}Data {result['data']}, {result['clips']} test clips; preset {result['preset']}, "
        f"{result['epochs']} epochs, {result['precision']}; seeds {', '.join(map(str, seeds))}; trained at "
        f"commit {', '.join(result['commits']) or 'unknown'}, {result['provenance']['time'][:10]}."
    )


NOTE = (
    "Percent; mean ± standard deviation over the seeds. Differences are of AUC id-mean, paired by seed, with "
    "95 % intervals that hold for other training seeds and other test clips: half width² = (t s / √n)² + "
    "(t' c)², with s the standard deviation of the n paired differences, c² the covariance of "
    "seeds over resampled clips, and t, t' from Student's distribution: t is 12.7 with two seeds, 4.3 with "
    "three, 2.8 with five; one seed cannot be compared. * where the interval leaves out 0; about one "
    "comparison in twenty does so by chance."
)
BOUND = (
    "A drop bounds the reliance on what was taken away from above: it also contains how unfamiliar the "
    "changed clips are to the detector. The reliance is at most the largest drop within the interval."
)


def gain_text(gain: Mapping[str, Any] | None) -> str:
    """A difference in points with its interval, starred where that leaves out 0."""
    if gain is None:
        return ""
    bounds = [f"{100 * bound:+.1f}" for bound in gain["interval"] or ()]
    interval = f"[{', '.join(bounds)}]" if bounds else "(one seed: not comparable)"
    return f"{100 * gain['mean']:+.1f} {interval}" + " *" * gain["clear"]


MEASURED = {  # heading and digits of the metrics in percent, and of what is measured beside them
    "auc_id_mean": ("AUC id-mean", 1),
    "auc_pooled": ("AUC pooled", 1),
    "pauc_id_mean": ("pAUC id-mean", 1),
    "pauc_pooled": ("pAUC pooled", 1),
    "mauc": ("mAUC", 1),
    "trained_parameters": ("trained parameters (M)", 2),
    "machine_recognised": ("machine recognised (%)", 1),
    "seconds_per_epoch": ("s per epoch", 0),
    "kept_epoch": ("kept epoch", 0),
    "seconds_to_kept": ("s to it", 0),
    "peak_memory_gb": ("memory (GB)", 1),
    "silhouette_machines": ("silhouette of machines", 3),
    "silhouette_anomalies": ("silhouette of normal and anomalous", 3),
}


def settings_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What sets a row of a result apart: the keys before "seeds"."""
    return dict(itertools.takewhile(lambda item: item[0] != "seeds", row.items()))


def table(result: Result) -> list[list[str]]:
    """An experiment's table in percent, first row the header, without columns that tell nothing."""
    rows, lines = result["conditions"], []
    settings = [key for key in settings_of(rows[0]) if len({row[key] for row in rows}) > 1] or ["variant"]
    for row in rows:
        line = {}
        for key in settings:
            value, heading = row[key], key.replace("_hz", " (Hz)").replace("_db", " (dB)").replace("_", " ")
            line[heading] = f"{value:.0f}" if isinstance(value, float) else value or ""
        for key, (heading, digits) in MEASURED.items():
            scale, values = (100, row["each"][key]) if key in NAMES else (1, row["values"].get(key, ()))
            known = [scale * value for value in values if value is not None]
            line[heading] = mean_text(known, digits) if known else ""
        for kind, other in (("difference", "the first row"), ("gain", rows[0]["variant"])):
            line[f"difference from {other}"] = gain_text(row.get(kind, {}).get("average"))
        lines.append(line | {"seeds": str(len(row["seeds"]))})
    headings = [heading for heading in lines[0] if any(line[heading] for line in lines)]
    return [headings, *([line[heading] for heading in headings] for line in lines)]


def records(result: Result) -> Iterator[dict[str, Any]]:
    """The same in full precision, with a line for the average and one for each machine type."""
    for row in result["conditions"]:
        for entry in (row["metrics"]["average"], *row["metrics"]["types"]):
            name = entry.get("type", "average")
            line = settings_of(row) | {"seeds": " ".join(map(str, row["seeds"])), "type": name}
            line |= {measure: entry[measure] for measure in NAMES}
            for kind in ("difference", "gain"):
                gain = row.get(kind, {}).get(name) or {}
                keys = ("mean", "interval", "seed_sd", "clip_sd", "clear")
                line |= {f"{kind}_{key}": gain.get(key) for key in keys}
            for key, values in row["values"].items():
                known = [value for value in values if value is not None and name == "average"]
                line[key] = float(np.mean(known)) if known else None
            yield line


def write(result: Result, out: Path | str) -> None:
    """Write a result as OUT/NAME.json, .md, .tex and .csv."""
    stem = Path(out) / result["experiment"].replace("-", "_")
    write_json(stem.with_suffix(".json"), result)
    bound = BOUND if result["experiment"] in ("high-frequency", "bands", "noise") else ""
    failed = [f"Failed: {run}: {line}" for run, line in result["failed"].items()]
    write_table(stem, table(result), list(records(result)), [NOTE, bound, origin(result), *failed])


ABOUT = ("file", "machine_type", "machine_id", "subset", "anomaly")


def keep_scores(conditions: Sequence[Condition], path: Path) -> None:
    """Write every seed's score of every clip, a column each, from which `kept_conditions` reads them."""
    columns = {c.column(seed): scores for c in conditions for seed, scores in c.scores.items()}
    rows = [
        [*(getattr(clips[0], name) for name in ABOUT), *(clip.score for clip in clips)]
        for clips in zip(*columns.values(), strict=True)
    ]
    write_csv(path, [*ABOUT, *columns], rows)


def kept_conditions(result: Result, path: Path) -> list[Condition]:
    """The conditions of a result with the scores from the file that `keep_scores` wrote."""
    rows, conditions = read_csv(path), []
    for entry in result["conditions"]:
        condition = Condition(settings_of(entry), values=entry["values"])
        for seed in entry["seeds"]:
            condition.scores[seed] = [_score(row, row[condition.column(seed)]) for row in rows]
        conditions.append(condition)
    return conditions


if __name__ == "__main__":
    try:
        _work(json.load(sys.stdin))
    except UserError as error:
        sys.exit(f"osscl: {error}")
