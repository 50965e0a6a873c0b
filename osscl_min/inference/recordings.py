"""Recordings of any length and number: their machines, their windows, and each window's anomaly score.

A file's name gives the machine, windows of the model's length are read while others are scored, and the
highest window is the recording's score. However many files there are, only a few are in memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osscl_min.checkpoint import Checkpoint
from osscl_min.config import AudioConfig
from osscl_min.data.audio import decode, duration, window_starts
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
    candidates: tuple[int, ...] = ()  # classes to score against: its own, or all of its type where unknown
    channel: int | None = None
    starts: list[float | None] = field(default_factory=lambda: [None])  # of windows, see `window_starts`
    windows: dict[int, np.ndarray] = field(default_factory=dict)  # position in `starts` -> (candidates,)
    missing: dict[int, str] = field(default_factory=dict)  # position in `starts` -> why it is not scored
    remarks: list[str] = field(default_factory=list)
    problem: str = ""  # why the file is not scored

    @property
    def label(self) -> int:
        """The candidate with the lowest score, which is the highest of its windows'."""
        return self.candidates[int(np.argmin(np.max(list(self.windows.values()), axis=0)))]

    def timeline(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts (s) and scores of the windows; NaN for one that could not be scored."""
        column = self.candidates.index(self.label)
        scores = [self.windows[k][column] if k in self.windows else np.nan for k in range(len(self.starts))]
        return np.array([start or 0.0 for start in self.starts]), np.array(scores)

    @property
    def highest(self) -> int:
        """Position of the window with the highest score."""
        return int(np.nanargmax(self.timeline()[1]))

    def row(self, classes: Sequence[tuple[str, str]], calibration: Calibration) -> dict[str, Any]:
        """The result by COLUMNS and, where there are several windows, "timeline"."""
        row = dict.fromkeys(COLUMNS) | {"file": printable(self.file), "problem": self.problem}
        row["machine_type"], row["machine_id"] = map(printable, self.machine)
        row["remarks"] = "; ".join(self.remarks)
        if self.problem:
            return row
        starts, scores = self.timeline()
        score, scored = float(np.nanmax(scores)), len(self.windows)
        row |= {
            "scored_as": " id ".join(classes[self.label]),
            "score": score,
            "windows": len(starts),
            "windows_not_scored": len(starts) - scored,
            "at_seconds": float(starts[self.highest]),
        }
        if threshold := calibration.threshold(self.machine, scored):
            called = None if threshold.value is None else int(score > threshold.value)
            row |= {"threshold": threshold.value, "anomaly": called, "calibration": threshold.source}
            row["p_value"] = threshold.p_value(score)
            row["window_p_value"] = threshold.window_p_value(score)
        if len(starts) > 1:
            pairs = zip(starts.tolist(), scores.tolist(), strict=True)
            row["timeline"] = [[start, None if np.isnan(score) else score] for start, score in pairs]
        return row


@dataclass
class Scorer:
    """Scores recordings one after the other, in batches of windows."""

    trained: Checkpoint
    machine_type: str | None = None  # of every file; left out, each file's place and name give it
    machine_id: str | None = None
    step: float | None = None  # seconds between windows, at most a window's length; training's without
    batch_size: int | None = None  # windows per batch; the checkpoint's own without
    channel: int | None = None  # of files with several; the layout's own choice without
    form: str = "auto"  # which score, see `EvaluateConfig.score`

    def __post_init__(self):
        self.form = self.trained.form(self.form)
        self.audio: AudioConfig = self.trained.config.model.audio
        self.device = self.trained.device
        self.front = FrontEnd(self.audio).to(self.device)
        self.types = sorted({known for known, _ in self.trained.classes}, key=str.lower)
        if self.step is None:  # as the recordings that set the thresholds were cut
            self.step = min(self.audio.clip_step, self.audio.seconds) or self.audio.seconds / 2
        if self.batch_size is None:
            self.batch_size = self.trained.config.evaluate.batch_size
        if not 0.01 <= self.step <= self.audio.seconds:
            longest = f"{self.audio.seconds:g} s, the length of a window, so that nothing is skipped"
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

    def identify(self, recording: Recording) -> None:
        """Set the recording's machine, the classes to score it against and its channel."""
        classes, given = self.trained.classes, self.machine_type
        if recording.machine[0]:  # a manifest's
            possible = [(*recording.machine, None)]
        else:
            possible = [
                (part["type"], part["id"], layout.channel)
                for layout, part in readings(Path(recording.file).absolute())
                # any folder in a folder has the plain form, so only a known type makes it evidence
                if layout.distinctive or part["type"] in ([given] if given else self.types)
            ]
        if given:
            possible = [(given, machine_id, channel) for _, machine_id, channel in possible]
            possible.append((given, "", None))
        if not possible:
            raise UserError(f"its name tells no machine; give --machine, one of {', '.join(self.types)}")
        machines = []
        for machine_type, machine_id, channel in possible:
            machine = machine_type, machine_id if self.machine_id is None else self.machine_id
            if machine not in classes:
                machine = machine_type, machine[1].removeprefix("id_")
            machines.append((machine, channel))
        machine, channel = min(machines, key=lambda m: (m[0] not in classes, m[0][0] not in self.types))
        if machine[0] not in self.types:
            raise UserError(self._unknown(machine[0]))
        own = [label for label, known in enumerate(classes) if known == machine]
        same_type = [label for label, known in enumerate(classes) if known[0] == machine[0]]
        recording.machine, recording.candidates = machine, tuple(own or same_type)
        recording.channel = channel if self.channel is None else self.channel
        if not own:
            which = f"id {printable(machine[1])} unknown" if machine[1] else "id not known"
            recording.remarks.append(f"{which}: scored against every id of {machine[0]}, the lowest taken")

    def _planned(self, files: Iterable[str | Recording]) -> Iterator[Recording]:
        for file in files:
            recording = file if isinstance(file, Recording) else Recording(str(file))
            try:
                if not recording.problem:
                    if not os.path.isfile(recording.file):  # False too for names that are too long
                        exists = os.path.exists(recording.file)
                        raise UserError("not a regular file" if exists else "no such file")
                    if printable(recording.file) != recording.file:
                        raise UserError("its name is not UTF-8")
                    length = duration(recording.file)
                    self.identify(recording)
                    recording.starts = window_starts(length, self.audio, self.step)
            except UserError as error:
                recording.problem = str(error)
            yield recording

    def _read(self, recording: Recording, position: int) -> tuple[np.ndarray, list[str]]:
        if recording.problem:
            raise UserError(recording.problem)
        return decode(recording.file, self.audio, recording.channel, recording.starts[position])

    def __call__(self, files: Iterable[str | Recording]) -> Iterator[Recording]:
        """Score files, in their order; one that cannot be scored has a `problem`.

        While a batch of windows is scored, the next one is read.
        """
        recordings = self._planned(files)
        windows = ((recording, k) for recording in recordings for k in range(len(recording.starts)))
        batches = iter(lambda: list(islice(windows, self.batch_size)), [])
        with ThreadPoolExecutor(2) as pool:
            waiting: list[tuple[Recording, int, Future]] = []
            for batch in batches:
                ready, waiting = waiting, [(*window, pool.submit(self._read, *window)) for window in batch]
                yield from self._finish(ready)
            yield from self._finish(waiting)

    def _finish(self, batch: list[tuple[Recording, int, Future]]) -> Iterator[Recording]:
        """Score a batch of windows; yield the recordings that it completes."""
        decoded = []
        for recording, position, future in batch:
            try:
                samples, remarks = future.result()
                remarks = [remark for remark in remarks if not remark.startswith("cropped")]
                recording.remarks = list(dict.fromkeys(recording.remarks + remarks))
                decoded.append((recording, position, samples))
            except UserError as error:
                recording.missing[position] = str(error)
        if decoded:
            labels = sorted({label for recording, *_ in decoded for label in recording.candidates})
            scores = self.scores(np.stack([samples for *_, samples in decoded]), labels)
            for (recording, position, _), row in zip(decoded, scores, strict=True):
                own = row[np.searchsorted(labels, recording.candidates)]
                if np.isfinite(own).all():
                    recording.windows[position] = own
                else:
                    recording.missing[position] = "its score is not finite"
        for recording, position, _ in batch:
            if position + 1 == len(recording.starts):
                reasons = ", ".join(dict.fromkeys(recording.missing.values()))
                if not recording.windows:
                    recording.problem = reasons
                elif reasons:
                    count = f"{len(recording.missing)} of {len(recording.starts)}"
                    recording.remarks.append(f"{count} windows not scored: {reasons}")
                yield recording

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
            target = torch.full((len(samples),), label, device=self.device)
            if self.form in FORMS:
                scores = self.trained.neighbours.scores(self.form, target.cpu().numpy(), *described)
            else:
                scores = anomaly_score(model.arcface(embedding, target), target, self.form).cpu().numpy()
            columns.append(scores)
        return np.stack(columns, axis=1)


def expand(names: Iterable[str]) -> Iterator[str | Recording]:
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
            yield name


def _manifest(name: str) -> Iterator[Recording]:
    try:
        dataset = scan(name)
    except UserError as error:
        yield Recording(name, problem=str(error))
        return
    for clip in dataset.clips:
        yield Recording(str(clip.path), clip.machine)
    for file, reason in dataset.problems.items():
        yield Recording(str(dataset.root / file), problem=reason)


def _folder(name: str) -> Iterator[str | Recording]:
    others, empty = set(), True
    for path, reason in walk(name):
        if path.suffix.lower() in SOUND_SUFFIXES or (reason and path.is_dir()):
            empty = False
            yield Recording(str(path), problem=reason) if reason else str(path)
        else:
            others.add(path.suffix.lower())
    if empty:
        hint = f" (it has {' '.join(sorted(others))})" if any(others) else ""
        yield Recording(name, problem=f"no .wav or .flac files in this folder{hint}")
