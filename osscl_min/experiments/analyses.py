"""Analyses of trained detectors: test clips filtered, occluded or in noise, other scores, the embeddings."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import silhouette_score

from osscl_min import checkpoint
from osscl_min.augment import NOISES, add_noise, noise
from osscl_min.checkpoint import Checkpoint
from osscl_min.config import AudioConfig, EvaluateConfig
from osscl_min.data.reader import Data, open_data
from osscl_min.evaluate import Scored, known_machines, score_clips
from osscl_min.experiments import figures, sweep
from osscl_min.experiments.sweep import Condition, Result, Values
from osscl_min.features import LogMel, ZeroPhaseFilter, hz_to_mel, mel_to_hz
from osscl_min.metrics import Score, measured
from osscl_min.runtime.device import choose_device, prepare
from osscl_min.runtime.files import UserError, printable, provenance, read_json, write_json
from osscl_min.runtime.plotting import save_all
from osscl_min.runtime.tables import write_table
from osscl_min.train import read_log

CUTOFFS = (500.0, 1000.0, 2000.0, 3000.0, 4000.0, 5000.0, 6000.0, 7000.0)  # Hz
SNRS = (20.0, 10.0, 0.0, -10.0)  # dB
BANDS = 8  # with equally many mel bands each
SCORES = ("seeds", "scores")  # experiments that compare the anomaly scores of the same detectors


def clip_noise(kind: str, snr: float, audio: AudioConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adds noise to waves (B, samples); the noise of a clip follows from its samples alone."""

    def apply(wave: torch.Tensor) -> torch.Tensor:
        seeds = ([zlib.crc32(row.tobytes()), NOISES.index(kind)] for row in wave.cpu().numpy())
        added = [noise(kind, wave.shape[1], audio.sample_rate, np.random.default_rng(seed)) for seed in seeds]
        return add_noise(wave, np.stack(added), snr)

    return apply


def mel_bands(audio: AudioConfig, count: int) -> list[tuple[slice, float, float]]:
    """The rows of the log-mel in `count` bands of equally many: rows, lower and upper edge (Hz).

    Neighbouring triangles overlap; an edge lies where two of them cross.
    """
    low, high = hz_to_mel(audio.f_min), hz_to_mel(audio.f_max)
    cuts = np.linspace(0, audio.mels, count + 1).round().astype(int)
    edges = mel_to_hz(low + (high - low) * (cuts + 0.5) / (audio.mels + 1))
    edges[[0, -1]] = audio.f_min, audio.f_max
    return [
        (slice(first, last), float(below), float(above))
        for first, last, below, above in zip(cuts, cuts[1:], edges, edges[1:], strict=False)
    ]


def replace_band(rows: slice, level: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Sets mel `rows` of log-mels (B, 1, mels, frames) to `level` (classes, mels; dB)."""

    def apply(log_mel: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_mel = log_mel.clone()
        log_mel[:, :, rows] = level.to(log_mel)[labels][:, None, rows, None]
        return log_mel

    return apply


@dataclass(frozen=True)
class Detector:
    """A trained detector and the data that it is examined on."""

    trained: Checkpoint
    data: Data
    config: EvaluateConfig
    cutoffs: Sequence[float] = CUTOFFS

    def score(self, **changes: Any) -> Scored:
        """Score the test clips that metrics are made of; `changes` go to `score_clips`."""
        clips = self.data.test.clips
        known, _ = known_machines(self.trained, self.data.test)
        chosen = set(measured([clips[position] for position in known]))
        if not chosen:
            raise UserError("no test clip has a known truth, so there is nothing to measure")
        positions = [position for position in known if clips[position] in chosen]
        return score_clips(self.trained, self.data.test, config=self.config, positions=positions, **changes)


Examined = Iterator[tuple[dict[str, Any], dict[str, Any]]]  # settings of each condition; changes for `embed`


def filtered(detector: Detector) -> Examined:
    """Test clips low-passed or high-passed; the detector stays as trained."""
    yield {"filter": "none", "cutoff_hz": None}, {}
    for kind, cutoff in itertools.product(("low-pass", "high-pass"), detector.cutoffs):
        change = ZeroPhaseFilter(kind, cutoff, detector.trained.config.model.audio)
        yield {"filter": kind, "cutoff_hz": cutoff}, {"transform": change}


def occluded(detector: Detector) -> Examined:
    """Bands of the test clips' log-mel silenced, or set to their mean over the machine's kept training clips.

    The wave, which Tgram and TFgram take, stays whole.
    """
    yield {"replaced_by": "nothing", "low_hz": None, "high_hz": None}, {}
    audio = detector.trained.config.model.audio
    silence = torch.full((len(detector.trained.classes), audio.mels), 10 * np.log10(LogMel.floor))
    fills = {"silence": silence}
    if (near := detector.trained.neighbours) is not None:
        fills["training mean"] = level = torch.zeros_like(silence)
        for label in np.unique(near.labels):
            level[label] = torch.from_numpy(near.profiles[near.labels == label, 1].mean(0))
    for fill, level in fills.items():
        for rows, low, high in mel_bands(audio, BANDS):
            change = replace_band(rows, level)
            yield {"replaced_by": fill, "low_hz": low, "high_hz": high}, {"occlude": change}


def noisy(detector: Detector) -> Examined:
    """Test clips in white, pink and factory-like noise."""
    yield {"noise": "none", "snr_db": None}, {}
    for kind, snr in itertools.product(NOISES, SNRS):
        change = clip_noise(kind, snr, detector.trained.config.model.audio)
        yield {"noise": kind, "snr_db": snr}, {"transform": change}


ANALYSES: dict[str, Callable[[Detector], Examined]] = {
    "high-frequency": filtered,
    "bands": occluded,
    "noise": noisy,
    "embeddings": lambda _: iter([({}, {})]),  # clips as they are, whose `separation` is measured
}


def separation(scored: Scored) -> Values:
    """Mean silhouettes by cosine distance, from -1 to 1; None where there are too few clips.

    Of the machines, among normal clips; of normal and anomalous clips within a machine, averaged.
    """
    anomaly = np.array([clip.anomaly for clip in scored.clips])

    def silhouette(chosen: np.ndarray, groups: np.ndarray) -> float | None:
        if not 2 <= len(np.unique(groups[chosen])) < chosen.sum():
            return None
        return float(silhouette_score(scored.embeddings[chosen], groups[chosen], metric="cosine"))

    within = [silhouette(scored.labels == label, anomaly) for label in np.unique(scored.labels)]
    known = [value for value in within if value is not None]
    return {
        "silhouette of machines": silhouette(anomaly == 0, scored.labels),
        "silhouette of normal and anomalous": float(np.mean(known)) if known else None,
    }


def rows_of(name: str, detector: Detector) -> Iterator[tuple[dict[str, Any], list[Score], Values]]:
    """The settings, scores and values of a detector's rows: of an analysis, or else of its evaluation."""
    if name in ANALYSES:
        for settings, changes in ANALYSES[name](detector):
            scored = detector.score(**changes)
            yield settings, scored.rows, separation(scored) if name == "embeddings" else {}
        return
    run = detector.trained.path.parent
    if name in SCORES:
        for form, scores in sweep.scores_of_forms(run).items():
            yield {"score": form}, scores, {}
        return
    trained = sum(p.numel() for p in detector.trained.model.parameters() if p.requires_grad)
    evaluation, log = read_json(run / "evaluation" / "evaluation.json"), read_log(run)
    accuracy = evaluation["identity_accuracy"]
    yield (
        {},
        sweep.read_clip_scores(run / "evaluation"),
        {
            "trained parameters (M)": trained / 1e6,
            "machine recognised (%)": None if accuracy is None else 100 * accuracy,
            "s per epoch": float(np.mean([entry["seconds"] for entry in log])),
            "kept epoch": evaluation["epoch"],
        },
    )


def examine(
    name: str,
    checkpoints: Mapping[str, Sequence[Path]],
    data: Path | str,
    out: Path | str,
    config: EvaluateConfig,
    cutoffs: Sequence[float] = CUTOFFS,
    device: str = "auto",
    failed: Mapping[str, str] | None = None,
) -> Result:
    """Compare or analyse trained detectors, variant -> a best.pt for each seed, and write the results.

    Returns the content of NAME.json, see `variants.run`.
    """
    where = choose_device(device)
    prepare(where, config.precision)
    pairs = [(variant, path) for variant, paths in checkpoints.items() for path in paths]
    used = checkpoint.load(pairs[0][1]).config
    opened = open_data(data, used.model.audio, splits=["test"])
    conditions: dict[tuple, Condition] = {}
    commits = set()
    for variant, path in pairs:
        detector = Detector(checkpoint.load(path, where), opened, config, cutoffs)
        for settings, scores, values in rows_of(name, detector):
            settings = {"variant": variant, **settings}
            condition = conditions.setdefault(tuple(settings.values()), Condition(settings))
            condition.scores[detector.trained.config.train.seed] = scores
            for heading, value in values.items():
                condition.values.setdefault(heading, []).append(value)
        if path.with_name("config.json").is_file():
            commits.add(read_json(path.with_name("config.json"))["provenance"]["commit"])
    for settings, condition in list(conditions.items()) if name in SCORES else ():
        if len(condition.scores) > 1 and condition.settings["score"] in ("exact", "nearest"):
            together = Condition(condition.settings | {"score": f"{settings[-1]}, seeds averaged"})
            together.scores[-1] = [  # no seed's own, so paired with none
                replace(clips[0], score=float(np.mean([clip.score for clip in clips])))
                for clips in zip(*condition.scores.values(), strict=True)
            ]
            conditions[tuple(together.settings.values())] = together
    about = {
        "data": printable(opened.dataset.root.name),
        "synthetic": opened.dataset.synthetic,
        "preset": used.preset,
        "precision": used.train.precision,
        "epochs": used.train.epochs,
        "commits": sorted(commits),
        "provenance": provenance(where),
        "failed": dict(failed or {}),
    }
    if name == "high-frequency":
        about["filter"] = "zero-phase Butterworth, run forwards and backwards"
        about["order"] = ZeroPhaseFilter.order
    return finish(name, list(conditions.values()), about, out, config.bootstrap)


def finish(
    name: str, conditions: Sequence[Condition], about: Mapping[str, Any], out: Path | str, times: int
) -> Result:
    """Keep the scores, and write the result as OUT/NAME.json, .md, .tex, .csv, .png and .pdf."""
    stem = Path(out) / name.replace("-", "_")
    sweep.keep_scores(conditions, Path(f"{stem}_scores.csv"))
    result = sweep.summarise(conditions, {"experiment": name, **about}, times)
    write_json(stem.with_suffix(".json"), result)
    bound, draw = (sweep.BOUND, figures.curves) if name in figures.AXES else ("", figures.differences)
    failed = [f"Failed: {run}: {line}" for run, line in result["failed"].items()]
    notes = [sweep.NOTE, bound, sweep.origin(result), *failed]
    write_table(stem, sweep.table(result), list(sweep.records(result)), notes)
    save_all({stem.name: draw(result)}, stem.parent)
    return result


def remake(folder: Path | str) -> list[str]:
    """Make every experiment in a folder again from its kept scores; returns their names."""
    names = []
    for path in sorted(Path(folder).glob("*_scores.csv")):
        old = read_json(path.with_name(path.name.replace("_scores.csv", ".json")))
        names.append(old["experiment"])
        finish(names[-1], sweep.kept_conditions(old, path), old, folder, old["bootstrap"])
    if not names:
        raise UserError(f"{folder}: no kept scores (NAME_scores.csv) in it")
    return names
