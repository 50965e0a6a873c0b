"""Recordings of any length and number: their machines, their windows, and each window's anomaly score.

A file's name gives the machine, windows of the model's length are read while others are scored, and the
highest window is the recording's score. However many files there are, only a few are in memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osscl_min.checkpoint import Checkpoint
from osscl_min.config import AudioConfig
from osscl_min.data.audio import attempt, decode, duration, read_ahead, window_starts
from osscl_min.data.clips import MANIFEST, scan
from osscl_min.data.layouts import readings
from osscl_min.evaluate import embed
from osscl_min.features import FrontEnd
from osscl_min.inference.calibration import Calibration
from osscl_min.losses import anomaly_score
from osscl_min.neighbours import FORMS
from osscl_min.runtime.files import SOUND_SUFFIXES, UserError, printable, walk

COLUMNS = (
    "file", "machine_type", "machine_id", "scored_as", "score", "threshold", "anomaly", "p_value",
    "window_p_value", "calibration", "windows", "windows_not_scored", "at_seconds", "remarks", "problem",
)  # fmt: skip


@dataclass
class Recording:
    """A file and its scores."""

    file: str
    machine: tuple[str, str] = ("", "")  # its type and id; the id may be "" or unknown to the network
    candidates: list[int] = field(default_factory=list)  # classes: its own, or all of its type where unknown
    channel: int | None = None
    starts: list[float] = field(default_factory=lambda: [0.0])  # of windows, in seconds
    scores: np.ndarray | None = None  # (windows,), the highest counts; NaN for a window that is not scored
    label: int | None = None  # the class scored against: the candidate whose highest score is lowest
    reasons: set[str] = field(default_factory=set)  # why windows are not scored
    remarks: set[str] = field(default_factory=set)  # what was done to read and score them
    problem: str = ""  # why no window is scored

    @property
    def highest(self) -> int:
        """Position of the window with the highest score."""
        return int(np.nanargmax(self.scores))

    def row(self, classes: Sequence[tuple[str, str]], calibration: Calibration) -> dict[str, Any]:
        """The result by COLUMNS and, where there are several windows, "timeline"."""
        row = dict.fromkeys(COLUMNS) | {"file": printable(self.file), "problem": self.problem}
        row["machine_type"], row["machine_id"] = map(printable, self.machine)
        remarks = sorted(self.remarks)
        if not self.problem:
            scores, missing = self.scores.tolist(), int(np.isnan(self.scores).sum())
            row |= {
                "scored_as": " id ".join(classes[self.label]),
                "score": scores[self.highest],
                "windows": len(scores),
                "windows_not_scored": missing,
                "at_seconds": self.starts[self.highest],
            }
            if threshold := calibration.threshold(self.machine, len(scores) - missing):
                row |= {"threshold": threshold.value, "calibration": threshold.source}
                row["anomaly"] = int(row["score"] > threshold.value) if threshold.rank else None
                row["p_value"] = threshold.p_value(row["score"])
                # of the highest window alone, not corrected for their number
                row["window_p_value"] = calibration.threshold(self.machine).p_value(row["score"])
            if missing:
                reasons = ", ".join(sorted(self.reasons))
                remarks.append(f"{missing} of {len(scores)} windows not scored: {reasons}")
            if len(scores) > 1:
                pairs = zip(self.starts, scores, strict=True)
                row["timeline"] = [[start, None if np.isnan(score) else score] for start, score in pairs]
        return row | {"remarks": "; ".join(remarks)}


@dataclass
class Scorer:
    """Scores recordings one after the other, in batches of windows."""

    trained: Checkpoint
    machine_type: str | None = None  # of every file; by default, its place and name tell it
    machine_id: str | None = None
    step: float | None = None  # seconds between windows, at most a window's length; by default training's
    batch_size: int | None = None  # windows per batch; by default the checkpoint's
    channel: int | None = None  # of files with several; by default the layout's choice
    form: str = "auto"  # which score, see `EvaluateConfig.score`

    def __post_init__(self):
        self.form = self.trained.form(self.form)
        self.audio: AudioConfig = self.trained.config.model.audio
        self.device = self.trained.device
        self.front = FrontEnd(self.audio).to(self.device)
        self.types = sorted({known for known, _ in self.trained.classes}, key=str.lower)
        seconds = self.audio.seconds
        if self.step is None:  # as the recordings that set the thresholds were cut
            self.step = min(self.audio.clip_step, seconds) or seconds / 2
        if self.batch_size is None:
            self.batch_size = self.trained.config.evaluate.batch_size
        if not 0.01 <= self.step <= seconds:
            longest = f"{seconds:g} s, the length of a window, so that nothing is skipped"
            raise UserError(f"a step of {self.step:g} s between windows: give 0.01 s to {longest}")
        if self.batch_size < 1:
            raise UserError(f"a batch of {self.batch_size} windows: give at least 1")
        if self.channel is not None and self.channel < 0:
            raise UserError(f"channel {self.channel}: channels are counted from 0")
        if self.machine_type is not None and self.machine_type not in self.types:
            raise UserError(self._unknown(self.machine_type))

    def _unknown(self, machine_type: str) -> str:
        known = ", ".join(self.types)
        return f"machine type {printable(machine_type)} is unknown to this checkpoint, which knows {known}"

    def plan(self, recording: Recording) -> None:
        """Set the recording's machine, the classes to score it against, its channel and its windows."""
        if not os.path.exists(recording.file):  # False too for names that are too long
            raise UserError("no such file")
        if printable(recording.file) != recording.file:
            raise UserError("its name is not UTF-8")
        starts = window_starts(duration(recording.file), self.audio, self.step)
        classes, given = self.trained.classes, self.machine_type
        found = [(*recording.machine, None)] if recording.machine[0] else []  # from a manifest
        if not found:
            found += (
                (part["type"], part["id"], layout.channel)
                for layout, part in readings(Path(recording.file).absolute())
                # any folder in a folder fits the plain layout, so there only a known type is evidence
                if layout.distinctive or part["type"] in ([given] if given else self.types)
            )
        if given:
            found.append((given, "", None))
        if not found:
            raise UserError(
                f"its name does not tell the machine; give --machine, one of {', '.join(self.types)}"
            )
        machines = {}  # with the channel to take
        for kind, number, channel in found:
            machine = given or kind, self.machine_id or number
            if machine not in classes:
                machine = machine[0], machine[1].removeprefix("id_")
            machines.setdefault(machine, channel)
        machine = kind, number = min(machines, key=lambda m: (m not in classes, m[0] not in self.types))
        if kind not in self.types:
            raise UserError(self._unknown(kind))
        recording.machine, recording.starts = machine, starts
        recording.channel = machines[machine] if self.channel is None else self.channel
        same = machine if machine in classes else machine[:1]
        recording.candidates = [label for label, known in enumerate(classes) if known[: len(same)] == same]
        if machine not in classes:
            which = f"id {printable(number)} unknown" if number else "id not known"
            recording.remarks.add(f"{which}: scored against every id of {kind}, the lowest score counts")

    def _planned(self, file: str | Recording) -> Recording:
        recording = file if isinstance(file, Recording) else Recording(str(file))
        recording.problem = recording.problem or attempt(self.plan, recording) or ""
        recording.scores = np.full((len(recording.starts), len(recording.candidates)), np.nan)
        return recording

    def _read(self, window: tuple[Recording, int]) -> np.ndarray | None:
        recording, position = window
        if recording.problem:
            return None
        result = attempt(decode, recording.file, self.audio, recording.channel, recording.starts[position])
        if isinstance(result, str):
            recording.reasons.add(result)
            return None
        recording.remarks.update(result[1])
        return result[0]

    def __call__(self, files: Iterable[str | Recording]) -> Iterator[Recording]:
        """Score files, in their order; one that cannot be scored has a `problem`.

        While a batch of windows is scored, the next one is read.
        """
        recordings = map(self._planned, files)
        windows = ((recording, k) for recording in recordings for k in range(len(recording.starts)))
        batches = iter(lambda: list(islice(windows, self.batch_size)), [])
        for batch, decoded in read_ahead(self._read, batches, jobs=2):
            pairs = zip(batch, decoded, strict=True)
            self._score([(*window, samples) for window, samples in pairs if samples is not None])
            for recording, position in batch:
                if position + 1 < len(recording.starts):
                    continue
                if np.isnan(recording.scores).all():
                    recording.problem = recording.problem or ", ".join(sorted(recording.reasons))
                else:
                    lowest = int(np.nanmax(recording.scores, axis=0).argmin())
                    recording.label = recording.candidates[lowest]
                    recording.scores = recording.scores[:, lowest]
                yield recording

    def _score(self, windows: Sequence[tuple[Recording, int, np.ndarray]]) -> None:
        """Score a batch of windows: recording, position and samples of each."""
        if not windows:
            return
        labels = sorted({label for recording, *_ in windows for label in recording.candidates})
        scores = self.scores(np.stack([samples for *_, samples in windows]), labels)
        for (recording, position, _), row in zip(windows, scores, strict=True):
            own = row[np.searchsorted(labels, recording.candidates)]
            if np.isfinite(own).all():
                recording.scores[position] = own
            else:
                recording.reasons.add("its score is not finite")

    @torch.no_grad()
    def scores(
        self, samples: np.ndarray, labels: Sequence[int], transform: Callable | None = None
    ) -> np.ndarray:
        """Anomaly scores (B, labels) float64 of windows (B, samples) int16 against classes.

        `transform` is applied to the waves first, see `FrontEnd`.
        """
        model, precision = self.trained.model, self.trained.config.train.precision
        windows = torch.from_numpy(samples).to(self.device)
        ((embedding, profiles, _),) = embed(model, self.front, [(windows, None)], precision, transform)
        described, columns = (embedding.cpu().numpy(), profiles.cpu().numpy()), []
        for label in labels:
            own = torch.full((len(samples),), label, device=self.device)
            if self.form in FORMS:
                columns.append(self.trained.neighbours.scores(self.form, own.cpu().numpy(), *described))
            else:
                scores = anomaly_score(model.arcface(embedding, own), own, self.form)
                columns.append(scores.cpu().numpy())
        return np.stack(columns, axis=1)


def expand(names: Iterable[str]) -> Iterator[Recording]:
    """The files that are meant, one at a time.

    A name is a file; a folder, of which every visible sound file is taken; a manifest (.csv, or a folder with
    a manifest.csv), which gives the machines too; or "-" for names on standard input, one per line.
    """
    for name in names:
        if name == "-":
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            yield from expand(line for line in lines if line.strip())
        elif name.lower().endswith(".csv") or os.path.isfile(os.path.join(name, MANIFEST)):
            yield from _manifest(name)
        elif os.path.isdir(name):
            yield from _folder(name)
        else:
            yield Recording(name)


def _manifest(name: str) -> Iterator[Recording]:
    try:
        dataset = scan(name)
        yield from (Recording(str(clip.path), clip.machine) for clip in dataset.clips)
        yield from (
            Recording(str(dataset.root / file), problem=why) for file, why in dataset.problems.items()
        )
    except UserError as error:
        yield Recording(name, problem=str(error))


def _folder(name: str) -> Iterator[Recording]:
    others, empty = set(), True
    for path, reason in walk(name):
        if path.suffix.lower() in SOUND_SUFFIXES or (reason and path.is_dir()):
            empty = False
            yield Recording(str(path), problem=reason)
        else:
            others.add(path.suffix.lower())
    if empty:
        hint = f" (it has {' '.join(sorted(others))})" if any(others) else ""
        yield Recording(name, problem=f"no .wav or .flac files in this folder{hint}")
