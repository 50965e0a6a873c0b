"""Sweeps: training runs that differ in a few settings and a seed, and what their differences are worth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from osscl_min.config import Config, from_dict, to_dict
from osscl_min.evaluate import evaluate
from osscl_min.metrics import NAMES, Resampled, Score, average, interval, measured, resampled
from osscl_min.model import OSSCL
from osscl_min.runtime.files import (
    UserError,
    provenance,
    read_csv,
    read_json,
    write_csv,
    write_json,
    write_text,
)
from osscl_min.runtime.tables import latex, markdown
from osscl_min.train import read_log, train

Changes = Mapping[str, Any]  # "loss.mixup" -> False
BASELINE = "os-scl"
COMPARED = "auc_id_mean"  # the figure whose differences are shown


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
        place = values
        for part in path:
            place = place[part]
        place[last] = value
    return from_dict(values)


def plan(variants: Mapping[str, Changes], seeds: Sequence[int], config: Config, out: Path | str) -> list[Run]:
    """The runs of an experiment; a folder is named after its settings, so experiments share equal runs."""
    runs = []
    for seed in seeds:
        for name, changes in variants.items():
            parts = [f"{key.split('.')[-1]}-{_plain(value)}" for key, value in sorted(changes.items())]
            folder = Path(out) / "runs" / f"{','.join(parts) or BASELINE}-seed{seed}"
            runs.append(Run(name, seed, changed(config, {**changes, "train.seed": seed}), folder))
    return runs


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def run_all(runs: Sequence[Run], data: Path | str, *, device: str = "auto", jobs: int = 1) -> dict[Run, str]:
    """Train and evaluate every run that is not done yet, each in a process of its own.

    Parameters
    ----------
    runs : sequence of Run
    data : Path or str
    device : str
    jobs : int
        Runs at a time; on a CPU they share its threads.

    Returns
    -------
    dict
        Runs that failed -> the last line that they said; their output.txt has the rest. The others are done.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}

    def one(run: Run) -> str:
        if (run.folder / "evaluation" / "metrics.json").is_file():
            return ""
        run.folder.mkdir(parents=True, exist_ok=True)
        task = {"config": to_dict(run.config), "data": str(data), "out": str(run.folder), "device": device}
        with open(run.folder / "output.txt", "w") as output:
            status = subprocess.run(
                [sys.executable, "-m", "osscl_min.experiments.sweep"],
                input=json.dumps(task), text=True, stdout=output, stderr=subprocess.STDOUT, env=environment,
            ).returncode  # fmt: skip
        if not status:
            return ""
        said = (run.folder / "output.txt").read_text().strip().splitlines()
        return said[-1] if said else f"ended with status {status}"

    bar = {"desc": "training runs", "unit": "run", "disable": None, "tqdm_class": tqdm}
    results = thread_map(one, runs, max_workers=jobs, **bar)
    return {run: said for run, said in zip(runs, results, strict=True) if said}


def _work(task: dict[str, Any]) -> None:
    config, out = from_dict(task["config"]), Path(task["out"])
    best = train(task["data"], out, config, device=task["device"])
    scoring = replace(config.evaluate, precision=config.train.precision)
    evaluate(best, task["data"], out / "evaluation", config=scoring, device=task["device"])


def read_clip_scores(evaluation: Path | str) -> list[Score]:
    """The clips of an evaluation's scores.csv."""
    return [
        Score(row["file"], row["machine_type"], row["machine_id"], float(row["score"]),
              int(row["anomaly"]) if row["anomaly"] else None, row["subset"])
        for row in read_csv(Path(evaluation) / "scores.csv")
    ]  # fmt: skip


def difference(
    ours: Sequence[Resampled], base: Sequence[Resampled], machine_type: str = ""
) -> dict[str, Any] | None:
    """What a variant gains over the baseline, with both kinds of noise.

    Parameters
    ----------
    ours, base : sequences of (figures, draws), one a seed
        From `metrics.resampled`, of the same seeds and the same clips in both: the draws are paired.
    machine_type : str
        Of which type; on average without.

    Returns
    -------
    dict or None
        "mean" of COMPARED's difference (fraction), its "interval" over the clips (95 %), "seeds" (the
        difference of each) and "clear": the interval leaves out 0 and all seeds agree in the sign. None where
        the clips give no figure.
    """

    def compared(system: Resampled) -> list[Any]:
        """The figure and its draws."""
        places = [entry["type"] for entry in system[0]["types"]]
        return [
            (part["types"][places.index(machine_type)] if machine_type else part["average"])[COMPARED]
            for part in system
        ]

    (ours_each, ours_drawn), (base_each, base_drawn) = (
        zip(*map(compared, systems), strict=True) for systems in (ours, base)
    )
    if None in ours_each:
        return None
    seeds = [a - b for a, b in zip(ours_each, base_each, strict=True)]
    low, high = interval(np.mean(ours_drawn, axis=0) - np.mean(base_drawn, axis=0))
    agree = all(value > 0 for value in seeds) or all(value < 0 for value in seeds)
    return {
        "mean": float(np.mean(seeds)),
        "interval": [low, high],
        "seeds": seeds,
        "clear": bool(agree and (low > 0 or high < 0)),
    }


def summarise(name: str, runs: Sequence[Run], failed: Mapping[Run, str], times: int = 1000) -> dict[str, Any]:
    """Means and spread over the seeds of every variant, and its difference to the first one.

    Raises
    ------
    UserError
        If no run of the first variant, the baseline, is done.
    """
    done: dict[str, list[Run]] = {run.variant: [] for run in runs}
    for run in runs:
        if run not in failed:
            done[run.variant].append(run)
    first, base = next(iter(done.items()))
    if not base:
        raise UserError(f"{name}: no run of {first} is done, so there is nothing to compare with")
    scores = {run: measured(read_clip_scores(run.folder / "evaluation")) for run in runs if run not in failed}
    resamples = {run: resampled(rows, times) for run, rows in scores.items()}
    rows = []
    for variant, members in done.items():
        if not members:
            continue
        metrics = [read_json(run.folder / "evaluation" / "metrics.json") for run in members]
        said = [read_json(run.folder / "evaluation" / "evaluation.json") for run in members]
        logs = [read_log(run.folder) for run in members]
        model = members[0].config.model
        with torch.device("meta"):
            parameters = list(OSSCL(model).parameters())
        averages = {key: [one["average"][key] for one in metrics] for key in NAMES}
        to_best = [
            sum(entry["seconds"] for entry in log if entry["epoch"] <= one["epoch"])
            for log, one in zip(logs, said, strict=True)
        ]
        row = {
            "variant": variant,
            "seeds": [run.seed for run in members],
            **{key: float(np.mean(values)) for key, values in averages.items()},
            "spread": {key: float(np.std(v, ddof=1)) if len(v) > 1 else None for key, v in averages.items()},
            "each": averages,
            "machine_recognised": float(np.mean([one["identity_accuracy"] for one in said])),
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "seconds_per_epoch": float(np.mean([entry["seconds"] for log in logs for entry in log])),
            "best_epoch": float(np.mean([one["epoch"] for one in said])),
            "seconds_to_best": float(np.mean(to_best)),
            "peak_memory_mb": max(entry["peak_memory_mb"] or 0 for log in logs for entry in log),
            "metrics": average([resamples[run] for run in members]),
            "filter": model.audio.filter,
            "cutoff_hz": None if model.audio.filter == "none" else model.audio.cutoff,
        }
        shared = [(run, other) for run in members for other in base if run.seed == other.seed]
        if variant != first and shared:
            ours, theirs = zip(*((resamples[run], resamples[other]) for run, other in shared), strict=True)
            row["difference"] = difference(ours, theirs)
        rows.append(row)
    about = {run: read_json(run.folder / "config.json") for run in scores}
    data = about[base[0]]["data"]
    return {
        "experiment": name,
        "data": data["folder"],
        "synthetic": data["synthetic"],
        "clips": len(scores[base[0]]),
        "preset": base[0].config.preset,
        "precision": base[0].config.train.precision,
        "epochs": base[0].config.train.epochs,
        "variants": rows,
        "failed": {f"{run.variant}, seed {run.seed}": said for run, said in failed.items()},
        "commits": sorted({one["provenance"]["commit"] for one in about.values()}),
        "provenance": provenance(),
    }


def origin(result: Mapping[str, Any]) -> str:
    """One line: on which data, how many seeds and clips, which commits."""
    synthetic = "Synthetic: simulated machines. " if result["synthetic"] else ""
    seeds = sorted({seed for row in result.get("variants") or result["conditions"] for seed in row["seeds"]})
    return (
        f"{synthetic}Data {result['data']}, {result['clips']} test clips; preset {result['preset']}, "
        f"{result['epochs']} epochs, {result['precision']}; seeds {', '.join(map(str, seeds))}; trained at "
        f"commit {', '.join(result['commits']) or 'unknown'}, {result['provenance']['time'][:10]}."
    )


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """An experiment's table in percent, first row the header."""
    header = ["variant", "AUC id-mean", "AUC pooled", "pAUC id-mean", "pAUC pooled", "mAUC", "difference",
              "seeds", "trained parameters", "s an epoch", "best epoch", "s to it",
              "memory (GB)"]  # fmt: skip
    measures = ("auc_id_mean", "auc_pooled", "pauc_id_mean", "pauc_pooled", "mauc")
    rows = [header]
    for row in result["variants"]:
        rows.append([
            row["variant"],
            *(mean_text(100 * np.array(row["each"][key])) for key in measures),
            gain_text(row.get("difference")),
            str(len(row["seeds"])),
            f"{row['trained_parameters']:,} of {row['parameters']:,}",
            f"{row['seconds_per_epoch']:.0f}",
            f"{row['best_epoch']:.0f}",
            f"{row['seconds_to_best']:.0f}",
            f"{row['peak_memory_mb'] / 1000:.1f}",
        ])  # fmt: skip
    return rows


def mean_text(values: Sequence[float], digits: int = 1) -> str:
    """The mean over the seeds, with the standard deviation where there are several."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


NOTE = (
    "Percent; mean ± standard deviation over the seeds. Difference of AUC id-mean to the first row, with its "
    "95 % bootstrap interval over the clips, the same resamples for both; * where it leaves out 0 and every "
    "seed agrees in the sign. Without a star the order means nothing: the difference lies inside the noise."
)


def gain_text(gain: Mapping[str, Any] | None) -> str:
    """A difference with its interval, starred where it is clear."""
    if gain is None:
        return ""
    mean, low, high = (100 * value for value in (gain["mean"], *gain["interval"]))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" + " *" * gain["clear"]


def gain_cells(gain: Mapping[str, Any] | None) -> list[Any]:
    """The same for GAIN_COLUMNS of a CSV file."""
    return ["", "", "", ""] if gain is None else [gain["mean"], *gain["interval"], gain["clear"]]


GAIN_COLUMNS = ["difference", "low", "high", "clear"]


def write_tables(
    out: Path | str, result: Mapping[str, Any], rows: Sequence[Sequence[str]], lines: Sequence[Sequence[Any]]
) -> None:
    """Write a result as OUT/NAME.json, its table `rows` as .md and .tex (booktabs), and `lines` as .csv.

    The documents end with the result's conclusion where it has one, with NOTE and with `origin`.
    """
    stem = Path(out) / result["experiment"].replace("-", "_")
    write_json(stem.with_suffix(".json"), result)
    write_csv(stem.with_suffix(".csv"), lines[0], lines[1:])
    failed = [f"Failed: {run}: {said}" for run, said in result.get("failed", {}).items()]
    notes = [note for note in (result.get("conclusion"), result.get("note", NOTE), origin(result)) if note]
    write_text(stem.with_suffix(".md"), "\n\n".join([markdown(rows), *notes, *failed]) + "\n")
    write_text(stem.with_suffix(".tex"), latex(rows, " ".join(notes)))


def write(result: Mapping[str, Any], out: Path | str) -> None:
    """Write the tables of `summarise`'s result."""
    keys = [*NAMES, "machine_recognised", "parameters", "trained_parameters", "seconds_per_epoch",
            "best_epoch", "seconds_to_best", "peak_memory_mb"]  # fmt: skip
    lines = [["variant", "seeds", *keys, *(f"{key}_std" for key in NAMES), *GAIN_COLUMNS]]
    lines += [
        [row["variant"], " ".join(map(str, row["seeds"])), *(row[key] for key in keys),
         *(row["spread"][key] for key in NAMES), *gain_cells(row.get("difference"))]
        for row in result["variants"]
    ]  # fmt: skip
    write_tables(out, result, table(result), lines)


if __name__ == "__main__":
    try:
        _work(json.load(sys.stdin))
    except UserError as error:
        sys.exit(f"osscl: {error}")
