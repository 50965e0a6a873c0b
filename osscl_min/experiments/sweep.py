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
from osscl_min.runtime.files import UserError, locked, read_csv, read_json, safe_name, write_csv
from osscl_min.runtime.settings import flat
from osscl_min.runtime.tables import mean_text
from osscl_min.train import train

Changes = Mapping[str, Any]  # "loss.mixup" -> False
Result = Mapping[str, Any]  # the content of an experiment's NAME.json, see `summarise`
Values = Mapping[str, float | None]  # what is measured beside the metrics, by its heading
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
    score = "exact" if config.evaluate.score == "auto" else config.evaluate.score  # that of the paper
    scoring = replace(config.evaluate, precision=config.train.precision, score=score)
    evaluate(best, task["data"], out / "evaluation", config=scoring, device=task["device"])


def read_clip_scores(evaluation: Path | str, column: str = "score") -> list[Score]:
    """The clips of an evaluation's scores.csv that metrics are made of, with the scores of a column."""
    columns = ("file", "machine_type", "machine_id", "subset", "anomaly", column)
    rows = read_csv(Path(evaluation) / "scores.csv", columns)
    return measured([_score(row, row[column]) for row in rows])


def _score(row: Mapping[str, str], score: str) -> Score:
    anomaly = int(row["anomaly"]) if row["anomaly"] else None
    machine, windows = (row["machine_type"], row["machine_id"]), int(row.get("windows", 1))
    return Score(row["file"], *machine, float(score), anomaly, row["subset"], windows)


def finished(runs: Sequence[Run], failed: Mapping[Run, str]) -> dict[str, list[Path]]:
    """Each variant's best.pt of every seed that is done; a UserError if the first variant has none."""
    done: dict[str, list[Path]] = {}
    for run in runs:
        if run not in failed:
            done.setdefault(run.variant, []).append(run.folder / "best.pt")
    if runs[0].variant not in done:
        why = next(iter(failed.values()))
        raise UserError(f"no run of {runs[0].variant} finished, so there is nothing to compare with: {why}")
    return done


def scores_of_forms(run: Path) -> dict[str, list[Score]]:
    """Every anomaly score that a finished run's evaluation holds, by its name."""
    evaluation = read_json(run / "evaluation" / "evaluation.json")
    columns = {form: "score" if form == evaluation["score"] else form for form in evaluation["forms"]}
    return {form: read_clip_scores(run / "evaluation", column) for form, column in columns.items()}


@dataclass
class Condition:
    """One row of an experiment: a variant, what was done to its test clips, and what came of it."""

    settings: dict[str, Any]  # "variant" and what else sets the row apart
    scores: dict[int, list[Score]] = field(default_factory=dict)  # by seed; the same clips in the same order
    values: dict[str, list[float | None]] = field(default_factory=dict)  # what else is measured, by seed

    def column(self, seed: int) -> str:
        """The name of a seed's scores in the kept file."""
        return " | ".join([*map(str, self.settings.values()), f"seed {seed}"])


def difference(systems: Sequence[Resampled], base: Sequence[Resampled]) -> dict[str, Any] | None:
    """How a variant differs from another in COMPARED, with the noise of both seeds and test clips.

    The paired differences of n seeds vary by training noise s; the test clips, which the seeds share, add c,
    the covariance of their resamples between seeds. Banerjee's interval joins independent parts and covers no
    less than it says: half width^2 = (t s / sqrt(n))^2 + (t' c)^2, t with n - 1 degrees of freedom and t'
    with those of the smaller class of clips; it is never narrower than what the clips alone give. Simulated:
    results/statistics.md.

    `systems` and `base` hold one entry per seed, of the same seeds and clips. Returns "mean" (fraction),
    "interval" (95 %; None for one seed, which cannot tell), "seeds" (each difference) and "clear" (the
    interval leaves out 0); None without both classes.
    """
    pairs = zip(systems, base, strict=True)
    values = np.array([ours.areas[()][COMPARED] - theirs.areas[()][COMPARED] for ours, theirs in pairs])
    seeds, draws, count = values[:, 0], values[:, 1:], len(values)
    if np.isnan(seeds).any():
        return None
    mean = float(seeds.mean())
    result = {"mean": mean, "interval": None, "seeds": seeds.tolist(), "clear": False}
    if count > 1:
        ids = [clips for name, clips in systems[0].counts.items() if len(name) == 2]
        freedom = max(1, np.subtract(ids, 1).sum(axis=0).min())
        t_seeds, t_clips = t.ppf(0.975, [count - 1, freedom])
        covariance = np.cov(draws)
        shared = max(0.0, (covariance.sum() - np.trace(covariance)) / (count * (count - 1)))
        joined = np.hypot(t_seeds * seeds.std(ddof=1) / np.sqrt(count), t_clips * np.sqrt(shared))
        half = float(max(joined, t_clips * draws.mean(axis=0).std(ddof=1)))
        result |= {"interval": [mean - half, mean + half], "clear": abs(mean) > half}
    return result


def summarise(conditions: Sequence[Condition], about: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The result of an experiment, the content of NAME.json.

    Beside `about` it has "conditions", a list of rows: their settings, "seeds", "metrics" (means over the
    seeds, see `metrics.evaluate_scores`), "each" (the averages of each seed), "values" and, with `times`
    resamples, the "difference" (see `difference`) from the first variant's row of the same settings or, for
    the first variant itself, from the first row.
    """
    every = [{seed: resampled(scores, times) for seed, scores in c.scores.items()} for c in conditions]
    alike: dict[tuple, dict] = {}  # settings beside the variant -> the systems of the first row that has them
    rows = []
    for condition, own in zip(conditions, every, strict=True):
        base = alike.setdefault(tuple(condition.settings.values())[1:], own)
        base = every[0] if base is own else base
        row = {
            **condition.settings,
            "seeds": list(own),
            "metrics": average(list(own.values())),
            "each": {name: [system.value((), name) for system in own.values()] for name in NAMES},
            "values": condition.values,
        }
        pairs = [(own[seed], base[seed]) for seed in own if seed in base]
        if times > 1 and pairs and base is not own:
            row["difference"] = difference(*zip(*pairs, strict=True))
        rows.append(row)
    clips = len(next(iter(conditions[0].scores.values())))
    return {**about, "clips": clips, "bootstrap": times, "conditions": rows}


def origin(result: Result) -> str:
    """One line: on which data, how many seeds and clips, which commits."""
    synthetic = "Synthetic: simulated machines. " if result["synthetic"] else ""
    seeds = sorted({seed for row in result["conditions"] for seed in row["seeds"] if seed >= 0})
    return (
        f"{synthetic}Data {result['data']}, {result['clips']} test clips; preset {result['preset']}, "
        f"{result['epochs']} epochs, {result['precision']}; seeds {', '.join(map(str, seeds))}; trained at "
        f"commit {', '.join(result['commits']) or 'unknown'}, {result['provenance']['time'][:10]}."
    )


NOTE = (
    "Percent; mean ± standard deviation over the seeds. Differences are in AUC id-mean: from the first "
    "row or, for another variant, from the first variant under the same settings. Differences are paired "
    "by seed. Their 95 % intervals allow for other training seeds and other test clips: half width² = (t s / "
    "√n)² + (t' c)², where s is the standard deviation of the n paired differences, c² is the covariance of "
    "the seeds over resampled clips, and t and t' are quantiles of Student's distribution (t is 12.7 with "
    "two seeds, 4.3 with three, 2.8 with five). A single seed cannot be compared. A star marks an interval "
    "that leaves out 0; where there is no difference, chance gives at most about one comparison "
    "in twenty a star (measured: results/statistics.md)."
)
BOUND = (
    "A drop is an upper bound on how much the detector relies on what was taken away: changed clips are also "
    "unfamiliar to it. The reliance is at most the largest drop within the interval."
)


def difference_text(change: Mapping[str, Any] | None) -> str:
    """A difference in points with its interval, starred where that leaves out 0."""
    if change is None:
        return ""
    bounds = [f"{100 * bound:+.1f}" for bound in change["interval"] or ()]
    interval = f"[{', '.join(bounds)}]" if bounds else "(one seed: not comparable)"
    return f"{100 * change['mean']:+.1f} {interval}" + " *" * change["clear"]


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
        percent = {name: [value and 100 * value for value in row["each"][name]] for name in NAMES}
        for name, values in (percent | row["values"]).items():
            known = [value for value in values if value is not None]
            line[NAMES.get(name, name)] = mean_text(known, 1 if name in percent else 2) if known else ""
        line["difference"] = difference_text(row.get("difference"))
        lines.append(line | {"seeds": str(len(row["seeds"]))})
    headings = [heading for heading in lines[0] if any(line[heading] for line in lines)]
    return [headings, *([line[heading] for heading in headings] for line in lines)]


def records(result: Result) -> Iterator[dict[str, Any]]:
    """The same in full precision, with a line for the average and one for each machine type."""
    for row in result["conditions"]:
        for entry in (row["metrics"]["average"], *row["metrics"]["types"]):
            change = ("type" not in entry and row.get("difference")) or {}
            yield {
                **settings_of(row),
                "seeds": " ".join(map(str, row["seeds"])),
                "type": entry.get("type", "average"),
                **{measure: entry[measure] for measure in NAMES},
                **{f"difference_{key}": change.get(key) for key in ("mean", "interval", "clear")},
            }


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
