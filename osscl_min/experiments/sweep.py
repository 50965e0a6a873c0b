"""Sweeps: training runs that differ in a few settings and a seed, and what their differences are worth.

`python -m osscl_min.experiments.sweep remake FOLDER` makes the tables of a folder again from its kept scores.
"""

from __future__ import annotations

import hashlib
import itertools
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
from scipy.stats import t
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from osscl_min.config import Config, from_dict, to_dict
from osscl_min.data.clips import scan
from osscl_min.evaluate import evaluate
from osscl_min.metrics import NAMES, Resampled, Score, average, measured, resampled
from osscl_min.model import OSSCL
from osscl_min.runtime.files import (
    UserError,
    locked,
    provenance,
    read_csv,
    read_json,
    safe_name,
    write_csv,
    write_json,
)
from osscl_min.runtime.tables import mean_text, write_table
from osscl_min.train import read_log, train

Changes = Mapping[str, Any]  # "loss.mixup" -> False
BASELINE = "os-scl"
COMPARED = "auc_id_mean"  # the metric whose differences are shown


@dataclass(frozen=True)
class Run:
    """One training run of a sweep, with its evaluation."""

    variant: str
    seed: int
    config: Config
    folder: Path
    identity: str  # its configuration, engine settings apart, and its data, as JSON


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
    variants: Mapping[str, Changes], seeds: Sequence[int], config: Config, data: Path | str, out: Path | str
) -> list[Run]:
    """The runs of an experiment.

    A folder is named after the settings that differ from `config`, the seed and a digest of the whole
    configuration and the data, so experiments share equal runs and no others.
    """
    content, base, runs = fingerprint(data), to_dict(config), []
    for seed in seeds:
        for name, changes in variants.items():
            own = changed(config, {**changes, "train.seed": seed})
            identity = json.dumps({"config": _comparable(to_dict(own)), "data": content}, sort_keys=True)
            digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
            parts = []
            for path, value in sorted(changes.items()):
                *_, section, last = path.split(".")
                if value != base.get(section, {}).get(last):
                    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
                    parts.append(f"{last}-{text}")
            folder = safe_name(f"{'_'.join(parts) or BASELINE}-seed{seed}-{digest}")
            runs.append(Run(name, seed, own, Path(out) / "runs" / folder, identity))
    return runs


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON without the engine, and without the classes, which follow from the data."""
    model = {name: value for name, value in config["model"].items() if name != "classes"}
    rest = {name: value for name, value in config.items() if name != "engine"}
    return json.loads(json.dumps({**rest, "model": model}))  # tuples as lists


def _is_done(run: Run) -> bool:
    """Whether the run is trained and evaluated; refuses a folder that holds another one."""
    known, trained = run.folder / "identity.json", run.folder / "config.json"
    identity = json.loads(run.identity)
    if not run.folder.exists() or not any(run.folder.iterdir()):
        write_json(known, identity)
    same = known.is_file() and read_json(known) == identity
    if same and trained.is_file():
        same = _comparable(read_json(trained)["config"]) == identity["config"]
    if not same:
        raise UserError(f"{run.folder} holds another run, other settings or other data; move it away")
    return (run.folder / "evaluation" / "evaluation.json").is_file()


def run_all(runs: Sequence[Run], data: Path | str, *, device: str = "auto", jobs: int = 1) -> dict[Run, str]:
    """Train and evaluate the runs of a `plan` that are not done, each in a process, `jobs` at a time.

    Returns each failed run with the last line of its output.txt; the others are done.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs)),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }

    def work(run: Run) -> str:
        try:
            if _is_done(run):
                return ""
        except UserError as error:
            return str(error)
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
    return [_score(row, row["score"]) for row in read_csv(Path(evaluation) / "scores.csv")]


def _score(row: Mapping[str, str], score: str) -> Score:
    anomaly = int(row["anomaly"]) if row["anomaly"] else None
    return Score(row["file"], row["machine_type"], row["machine_id"], float(score), anomaly, row["subset"])


@dataclass
class Condition:
    """One row of an experiment: a variant, what was done to its test clips, and what came of it."""

    settings: dict[str, Any]  # "variant" and what else sets the row apart
    scores: dict[int, list[Score]]  # seed -> scores of the same clips in the same order
    values: dict[str, list[float | None]]  # keys of VALUES -> one for each seed

    def column(self, seed: int) -> str:
        """The name of a seed's scores in the kept file."""
        return " | ".join([*map(str, self.settings.values()), f"seed {seed}"])


VALUES = {  # what is measured beside the AUC: heading and digits
    "trained_parameters": ("trained parameters (M)", 2),
    "machine_recognised": ("machine recognised (%)", 1),
    "seconds_per_epoch": ("s per epoch", 0),
    "kept_epoch": ("kept epoch", 0),
    "seconds_to_kept": ("s to it", 0),
    "peak_memory_gb": ("memory (GB)", 1),
    "silhouette_machines": ("silhouette of machines", 3),
    "silhouette_anomalies": ("silhouette of normal and anomalous", 3),
    "neighbour_normal": ("neighbour of the same machine, normal clips (%)", 1),
    "neighbour_anomalous": ("neighbour of the same machine, anomalous clips (%)", 1),
    "neighbour_kind": ("neighbour within the machine of the same kind (%)", 1),
}


def collect(runs: Sequence[Run], failed: Mapping[Run, str]) -> tuple[list[Condition], dict[str, Any]]:
    """The scores and costs of the runs that are done, and the facts behind them."""
    done = [run for run in runs if run not in failed]
    if not any(run.variant == runs[0].variant for run in done):
        why = next(iter(failed.values()))
        raise UserError(f"no run of {runs[0].variant} is done, so there is nothing to compare with: {why}")
    conditions: dict[str, Condition] = {}
    for run in done:
        evaluation, log = read_json(run.folder / "evaluation" / "evaluation.json"), read_log(run.folder)
        with torch.device("meta"):
            parameters = OSSCL(run.config.model).parameters()
        accuracy = evaluation["identity_accuracy"]
        memory = [entry["peak_memory_mb"] for entry in log if entry["peak_memory_mb"] is not None]
        values = {
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
            "machine_recognised": None if accuracy is None else 100 * accuracy,
            "seconds_per_epoch": float(np.mean([entry["seconds"] for entry in log])),
            "kept_epoch": evaluation["epoch"],
            "seconds_to_kept": sum(e["seconds"] for e in log if e["epoch"] <= evaluation["epoch"]),
            "peak_memory_gb": max(memory) / 1000 if memory else None,
        }
        audio = run.config.model.audio
        cutoff = None if audio.filter == "none" else audio.cutoff
        settings = {"variant": run.variant, "filter": audio.filter, "cutoff_hz": cutoff}
        condition = conditions.setdefault(run.variant, Condition(settings, {}, {}))
        condition.scores[run.seed] = measured(read_clip_scores(run.folder / "evaluation"))
        for name, value in values.items():
            condition.values.setdefault(name, []).append(value)
    if all(condition.settings["filter"] == "none" for condition in conditions.values()):
        for condition in conditions.values():
            del condition.settings["filter"], condition.settings["cutoff_hz"]
    written = [read_json(run.folder / "config.json") for run in done]
    return list(conditions.values()), {
        "data": written[0]["data"]["folder"],
        "synthetic": written[0]["data"]["synthetic"],
        "preset": runs[0].config.preset,
        "precision": runs[0].config.train.precision,
        "epochs": runs[0].config.train.epochs,
        "commits": sorted({content["provenance"]["commit"] for content in written}),
        "provenance": provenance(),
    }


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
    mean, clip_sd = seeds.mean(), draws.mean(axis=0).std(ddof=1)
    result = {"mean": float(mean), "interval": None, "seeds": seeds.tolist(), "seed_sd": None,
              "clip_sd": float(clip_sd), "clear": False}  # fmt: skip
    if count == 1:
        return result
    ids = [n for name, n in systems[0].counts.items() if len(name) == 2 and name[: len(key)] == key]
    freedom = max(1, np.subtract(ids, 1).sum(axis=0).min())
    t_seeds, t_clips = t.ppf(0.975, [count - 1, freedom])
    seed_sd = seeds.std(ddof=1)
    covariance = np.cov(draws)
    shared = max(0.0, (covariance.sum() - np.trace(covariance)) / (count * (count - 1)))
    joined = np.hypot(t_seeds * seed_sd / np.sqrt(count), t_clips * np.sqrt(shared))
    half = max(joined, t_clips * clip_sd)
    interval = [float(mean - half), float(mean + half)]
    return result | {"interval": interval, "seed_sd": float(seed_sd), "clear": bool(abs(mean) > half)}


def summarise(conditions: Sequence[Condition], facts: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The result of an experiment, the content of NAME.json.

    Beside `facts` it has "conditions", a list of rows: their settings, "seeds", "metrics" (means over the
    seeds, see `metrics.evaluate_scores`), "each" (the averages of each seed), "values" and, with `times`
    resamples, "difference" from the first row of the same variant and "gain" over the first variant's row of
    the same settings: {"average" or a type: see `difference`}.
    """
    systems = [{seed: resampled(s, times) for seed, s in c.scores.items()} for c in conditions]
    variants = [condition.settings["variant"] for condition in conditions]
    first = next(iter(systems[0].values()))
    keys = [(), *(key for key in first.areas if len(key) == 1)]

    def compare(ours: int, other: int) -> dict[str, Any]:
        seeds = [seed for seed in systems[ours] if seed in systems[other]]
        pair = [[systems[n][seed] for seed in seeds] for n in (ours, other)]
        return {key[0] if key else "average": difference(*pair, key) for key in keys} if seeds else {}

    rows = []
    for n, condition in enumerate(conditions):
        within = variants.index(variants[n])
        rest = list(condition.settings.values())[1:]
        alike = (k for k, c in enumerate(conditions) if list(c.settings.values())[1:] == rest)
        across = 0 if n == within else next(alike)
        row = {
            **condition.settings,
            "seeds": list(condition.scores),
            "metrics": average(list(systems[n].values())),
            "each": {name: [_number(s.areas[()][name][0]) for s in systems[n].values()] for name in NAMES},
            "values": condition.values,
        }
        if times > 1 and within != n:
            row["difference"] = compare(n, within)
        if times > 1 and variants[across] != variants[n]:
            row["gain"] = compare(n, across)
        rows.append(row)
    clips = sum(first.counts[()])
    return {**facts, "clips": clips, "bootstrap": times, "conditions": rows}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def origin(result: Mapping[str, Any]) -> str:
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
    "seeds over resampled clips, and t, t' from Student's distribution. * where the interval leaves out 0; "
    "about one comparison in twenty does so by chance."
)
FEW = "Too few seeds: t is 12.7 with two, 4.3 with three, 2.8 with five; one seed cannot be compared."
BOUND = (
    "A drop bounds the reliance on what was taken away from above: it also contains how unfamiliar the "
    "changed clips are to the detector. No drop bounds it only as far as the interval does."
)
HALVES = "Reliance at most: the largest drop within the interval, in points; - where it has none. " + BOUND


def gain_text(gain: Mapping[str, Any] | None) -> str:
    """A difference in points with its interval, starred where that leaves out 0."""
    if gain is None:
        return ""
    mean = f"{100 * gain['mean']:+.1f}"
    if gain["interval"] is None:
        return f"{mean} (one seed: not comparable)"
    low, high = (100 * bound for bound in gain["interval"])
    return f"{mean} [{low:+.1f}, {high:+.1f}]" + " *" * gain["clear"]


def _known(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return mean_text(known, digits) if known else "-"


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """An experiment's table in percent, first row the header."""
    rows = result["conditions"]
    settings = list(settings_of(rows[0]))
    if len(settings) > 1 and len({row["variant"] for row in rows}) == 1:
        settings.remove("variant")
    types = [entry["type"] for entry in rows[0]["metrics"]["types"]]
    measures = {"auc_id_mean": "AUC id-mean", "auc_pooled": "AUC pooled", "pauc_id_mean": "pAUC id-mean",
                "pauc_pooled": "pAUC pooled", "mauc": "mAUC"}  # fmt: skip
    changes, gains = (any(name in row for row in rows) for name in ("difference", "gain"))
    header = [key.removesuffix("_hz").removesuffix("_db").replace("_", " ") for key in settings]
    header += measures.values()
    header += ["difference from the first row", *types] * changes
    header += [f"difference from {rows[0]['variant']}"] * gains
    header += [VALUES[key][0] for key in rows[0]["values"]]
    lines = [[*header, "seeds"]]
    for row in rows:
        cells = []
        for key in settings:
            unit = {"hz": " Hz", "db": " dB"}.get(key.rpartition("_")[2], "")
            value = row[key]
            cells.append("" if value is None else f"{value:.0f}{unit}" if unit else str(value))
        for key in measures:
            each = row["each"][key]
            cells.append(_known([None if value is None else 100 * value for value in each], 1))
        if changes:
            change = row.get("difference", {})
            cells.append(gain_text(change.get("average")))
            for name in types:
                own = change.get(name)
                cells.append("" if own is None else f"{100 * own['mean']:+.1f}" + " *" * own["clear"])
        if gains:
            cells.append(gain_text(row.get("gain", {}).get("average")))
        cells += [_known(values, VALUES[key][1]) for key, values in row["values"].items()]
        lines.append([*cells, str(len(row["seeds"]))])
    return lines


def settings_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What sets a row of a result apart: the keys before "seeds"."""
    return dict(itertools.takewhile(lambda item: item[0] != "seeds", row.items()))


def records(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same in full precision, with a line for the average and one for each machine type."""
    lines = []
    for row in result["conditions"]:
        for entry in (row["metrics"]["average"], *row["metrics"]["types"]):
            line = {
                **settings_of(row),
                "seeds": " ".join(map(str, row["seeds"])),
                "type": entry.get("type", "average"),
            }
            line |= {name: entry[name] for name in NAMES}
            for kind in ("difference", "gain"):
                gain = row.get(kind, {}).get(line["type"]) or {}
                low, high = gain.get("interval") or (None, None)
                line |= {kind: gain.get("mean"), f"{kind}_low": low, f"{kind}_high": high,
                         f"{kind}_seed_sd": gain.get("seed_sd"), f"{kind}_clip_sd": gain.get("clip_sd"),
                         f"{kind}_clear": gain.get("clear")}  # fmt: skip
            for key, values in row["values"].items():
                known = [value for value in values if value is not None]
                line[key] = float(np.mean(known)) if known and line["type"] == "average" else None
            lines.append(line)
    return lines


def halves(result: Mapping[str, Any], middle: float = 4000.0) -> list[list[str]]:
    """What taking away either side of the spectrum costs, at the cut-off nearest to `middle` (Hz).

    A table of two rows from a result with filters; empty where no cut-off has both.
    """
    gains = {}
    for row in result["conditions"]:
        gain = row.get("difference") or row.get("gain") or {}
        if row.get("cutoff_hz") is not None and gain.get("average"):
            gains[row["filter"], row["cutoff_hz"]] = gain["average"]
    pairs = [cutoff for kind, cutoff in gains if kind == "low-pass" and ("high-pass", cutoff) in gains]
    if not pairs:
        return []
    cutoff = min(pairs, key=lambda hertz: abs(hertz - middle))
    rows = [["taken away", "change of AUC id-mean (points)", "reliance at most (points)"]]
    for kind, side in (("low-pass", "above"), ("high-pass", "below")):
        gain = gains[kind, cutoff]
        bound = "-" if gain["interval"] is None else f"{100 * max(0.0, -gain['interval'][0]):.1f}"
        rows.append([f"{side} {cutoff / 1000:g} kHz", gain_text(gain), bound])
    return rows


def write(result: Mapping[str, Any], out: Path | str) -> None:
    """Write a result as OUT/NAME.json, .md, .tex and .csv; its halves and band energies beside it."""
    stem = Path(out) / result["experiment"].replace("-", "_")
    write_json(stem.with_suffix(".json"), result)
    rows = result["conditions"]
    notes = [NOTE]
    if min(len(row["seeds"]) for row in rows) < 3:
        notes.append(FEW)
    if result["experiment"] in ("high-frequency", "bands", "noise"):
        notes.append(BOUND)
    failed = [f"Failed: {run}: {line}" for run, line in result["failed"].items()]
    write_table(stem, table(result), records(result), [*notes, origin(result), *failed])
    if both := halves(result):
        write_table(f"{stem}_halves", both, notes=[HALVES, origin(result)])
    if "energy" in result:
        energy = result["energy"]
        write_csv(f"{stem}_energy.csv", list(energy[0]), [list(row.values()) for row in energy])


def keep_scores(conditions: Sequence[Condition], path: Path) -> None:
    """Write every seed's score of every clip, a column each, from which `kept_scores` reads them."""
    columns = {c.column(seed): scores for c in conditions for seed, scores in c.scores.items()}
    rows = []
    for clips in zip(*columns.values(), strict=True):
        clip = clips[0]
        about = [clip.file, clip.machine_type, clip.machine_id, clip.subset, clip.anomaly]
        rows.append(about + [each.score for each in clips])
    write_csv(path, ["file", "machine_type", "machine_id", "subset", "anomaly", *columns], rows)


def kept_scores(conditions: Sequence[Condition], path: Path) -> list[Condition]:
    """The same conditions with the scores of their seeds from the file that `keep_scores` wrote."""
    rows = read_csv(path)
    return [
        replace(c, scores={seed: [_score(row, row[c.column(seed)]) for row in rows] for seed in c.scores})
        for c in conditions
    ]


if __name__ == "__main__":
    try:
        _work(json.load(sys.stdin))
    except UserError as error:
        sys.exit(f"osscl: {error}")
