"""Recordings of any length and number: whose they are, their windows, and each window's anomaly score.

The way of a file: its name gives the machine, windows of the model's length are read from it while others are
scored, and the highest window is the file's score. However many files there are, only a few are in memory.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osscl_min.checkpoint import Checkpoint
from osscl_min.config import AudioConfig
from osscl_min.data.audio import decode, duration
from osscl_min.data.clips import MANIFEST, scan
from osscl_min.data.layouts import readings
from osscl_min.features import FrontEnd
from osscl_min.inference.calibration import Calibration
from osscl_min.losses import anomaly_score
from osscl_min.runtime.device import autocast
from osscl_min.runtime.files import SOUND_SUFFIXES, UserError

COLUMNS = (
    "file", "machine_type", "machine_id", "scored_as", "score", "threshold", "anomaly", "p_value",
    "calibration", "windows", "at_seconds", "remarks", "problem",
)  # fmt: skip


@dataclass
class Recording:
    """A file with what becomes of it.

    Attributes
    ----------
    machine : (machine type, machine id)
        By its name or as given; the id may be unknown to the network, or "".
    candidates : tuple of int
        Classes to score against: the machine's own, or, where its id is unknown, every one of its type.
    starts : list of float or None
        Seconds where its windows begin; [None] for a file of about the model's length, which is one.
    windows : dict
        Position in `starts` -> scores (candidates,) float64.
    problem : str
        Why it is not scored.
    """

    file: str
    machine: tuple[str, str] = ("", "")
    candidates: tuple[int, ...] = ()
    channel: int | None = None
    starts: list[float | None] = field(default_factory=lambda: [None])
    windows: dict[int, np.ndarray] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)  # position in `starts` -> why it is not scored
    remarks: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def label(self) -> int:
        """The class that it resembles most: over all windows, the one with the lowest highest score."""
        return self.candidates[int(np.argmin(np.max(list(self.windows.values()), axis=0)))]

    def timeline(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts (s) and scores of the windows, NaN for one that could not be scored."""
        column = self.candidates.index(self.label)
        scores = [self.windows[k][column] if k in self.windows else np.nan for k in range(len(self.starts))]
        return np.array([start or 0.0 for start in self.starts]), np.array(scores)

    @property
    def highest(self) -> int:
        """Position of the window with the highest score."""
        return int(np.nanargmax(self.timeline()[1]))

    def row(self, classes: Sequence[tuple[str, str]], calibration: Calibration) -> dict[str, Any]:
        """What is written about it, by COLUMNS and, where it has several windows, "timeline"."""
        row = dict.fromkeys(COLUMNS) | {"file": self.file, "problem": self.problem}
        row["machine_type"], row["machine_id"] = self.machine
        row["remarks"] = "; ".join(self.remarks)
        if self.problem:
            return row
        starts, scores = self.timeline()
        highest = self.highest
        score = float(scores[highest])
        threshold, p = calibration(self.machine, score)
        row |= {
            "scored_as": " id ".join(classes[self.label]),
            "score": score,
            "p_value": p,
            "windows": len(self.windows),
            "at_seconds": float(starts[highest]),
        }
        if threshold is not None:
            row |= {"threshold": threshold.value, "anomaly": int(score > threshold.value)}
            row["calibration"] = f"{threshold.method}, {threshold.clips} clips of {threshold.group}"
        if len(starts) > 1:
            pairs = zip(starts.tolist(), scores.tolist(), strict=True)
            row["timeline"] = [[start, None if np.isnan(score) else score] for start, score in pairs]
        return row


class Scorer:
    """Scores recordings one after the other, in batches of windows.

    Parameters
    ----------
    trained : Checkpoint
    machine_type, machine_id : str, optional
        Of every file; left out, each file's place and name say it.
    step : float, optional
        Seconds between windows; half the model's length without.
    batch_size : int, optional
        Windows at once; the checkpoint's own without.
    channel : int, optional
        Of files with several; left out, the layout's own choice.

    Raises
    ------
    UserError
        If the network does not know the type.
    """

    def __init__(
        self,
        trained: Checkpoint,
        *,
        machine_type: str | None = None,
        machine_id: str | None = None,
        step: float | None = None,
        batch_size: int | None = None,
        channel: int | None = None,
    ):
        self.trained, self.channel = trained, channel
        self.audio: AudioConfig = trained.config.model.audio
        self.step = self.audio.seconds / 2 if step is None else step
        if not self.step >= 0.01:
            raise UserError(f"a step of {self.step:g} s between windows is too short; give at least 0.01 s")
        self.batch_size = batch_size or trained.config.evaluate.batch_size
        self.types = sorted({one for one, _ in trained.classes}, key=str.lower)
        if machine_type is not None and machine_type not in self.types:
            raise UserError(self._unknown(machine_type))
        self.machine_type, self.machine_id = machine_type, machine_id
        self.device = trained.device
        self.front = FrontEnd(self.audio).to(self.device)

    def _unknown(self, machine_type: str) -> str:
        return (
            f"machine type {machine_type} is unknown to this checkpoint, which knows {', '.join(self.types)}"
        )

    def identify(self, recording: Recording) -> None:
        """Find the recording's machine and the classes to score it against.

        Raises
        ------
        UserError
            If the type is unknown, or the name says nothing.
        """
        classes = self.trained.classes
        if recording.machine[0]:  # a manifest's
            found = [(recording.machine, None, True)]
        else:
            found = [
                (self._machine(part["type"], part["id"]), layout.channel, layout.distinctive)
                for layout, part in readings(Path(recording.file).absolute())
            ]
        if self.machine_type:
            found = [one for one in found if one[2] or one[0][0] == self.machine_type]
            found = [(self._machine(self.machine_type, one[0][1]), one[1], True) for one in found]
            found.append(((self.machine_type, ""), None, True))
        # a name in the plain layout is no evidence of its own: any folder in a folder has that form
        found = [one for one in found if one[2] or one[0][0] in self.types]
        if not found:
            raise UserError(f"its name tells no machine; give --machine, one of {', '.join(self.types)}")
        machine, channel, _ = min(found, key=lambda one: (one[0] not in classes, one[0][0] not in self.types))
        if self.machine_id is not None:
            machine = self._machine(machine[0], self.machine_id)
        if machine[0] not in self.types:
            raise UserError(self._unknown(machine[0]))
        own = [label for label, one in enumerate(classes) if one == machine]
        same_type = [label for label, one in enumerate(classes) if one[0] == machine[0]]
        recording.machine, recording.candidates = machine, tuple(own or same_type)
        recording.channel = channel if self.channel is None else self.channel
        if not own:
            which = f"id {machine[1]} unknown" if machine[1] else "id not known"
            recording.remarks.append(f"{which}: scored against every id of {machine[0]}, the lowest taken")

    def _machine(self, machine_type: str, machine_id: str) -> tuple[str, str]:
        """The id as the network's classes write it: "id_00" or "00"."""
        given = machine_type, machine_id
        return given if given in self.trained.classes else (machine_type, machine_id.removeprefix("id_"))

    def windows_of(self, file: str) -> list[float | None]:
        """Where a file's windows begin (s): every step, and one that ends with the file."""
        if not Path(file).is_file():
            raise UserError("no such file")
        last = duration(file) - self.audio.seconds
        if last < self.step:
            return [None]
        starts = [number * self.step for number in range(int(last / self.step + 1e-9) + 1)]
        return starts if last - starts[-1] < 0.01 else [*starts, last]

    def _planned(self, files: Iterable[str | Recording]) -> Iterator[Recording]:
        for file in files:
            recording = file if isinstance(file, Recording) else Recording(str(file))
            try:
                if not recording.problem:
                    recording.starts = self.windows_of(recording.file)
                    self.identify(recording)
            except UserError as error:
                recording.problem, recording.starts = str(error), [None]
            yield recording

    def _read(self, recording: Recording, position: int) -> tuple[np.ndarray, list[str]]:
        if recording.problem:
            raise UserError(recording.problem)
        return decode(recording.file, self.audio, recording.channel, recording.starts[position])

    def _windows(self, files: Iterable[str | Recording]) -> Iterator[tuple[Recording, int, Future]]:
        """Every window in order; later ones are read while earlier ones are scored."""
        with ThreadPoolExecutor(2) as pool:
            ahead: deque[tuple[Recording, int, Future]] = deque()
            for recording in self._planned(files):
                for position in range(len(recording.starts)):
                    ahead.append((recording, position, pool.submit(self._read, recording, position)))
                    if len(ahead) > 2 * self.batch_size:
                        yield ahead.popleft()
            yield from ahead

    def __call__(self, files: Iterable[str | Recording]) -> Iterator[Recording]:
        """Score files, in their order; what cannot be scored has a `problem`."""
        waiting: list[tuple[Recording, int, np.ndarray | None]] = []
        for recording, position, future in self._windows(files):
            samples = None
            try:
                samples, remarks = future.result()
                if position == 0:
                    whole = recording.starts == [None]
                    recording.remarks += [one for one in remarks if whole or not one.startswith("cropped")]
            except UserError as error:
                recording.missing[position] = str(error)
            waiting.append((recording, position, samples))
            decoded = sum(one[2] is not None for one in waiting)
            if decoded == self.batch_size or len(waiting) == 16 * self.batch_size:
                yield from self._finish(waiting)
                waiting = []
        yield from self._finish(waiting)

    def _finish(self, waiting: list[tuple[Recording, int, np.ndarray | None]]) -> Iterator[Recording]:
        """Score the windows that wait; give the recordings that are complete with them."""
        decoded = [one for one in waiting if one[2] is not None]
        if decoded:
            counts = [len(recording.candidates) for recording, _, _ in decoded]
            scores = self.scores(
                np.stack([samples for *_, samples in decoded]),
                np.repeat(np.arange(len(decoded)), counts),
                np.concatenate([recording.candidates for recording, _, _ in decoded]),
            )
            parts = np.split(scores, np.cumsum(counts)[:-1])
            for (recording, position, _), part in zip(decoded, parts, strict=True):
                recording.windows[position] = part
        for recording, position, _ in waiting:
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
        self,
        samples: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> np.ndarray:
        """Anomaly scores of windows against classes.

        Parameters
        ----------
        samples : (B, samples) int16
        rows : (n,) int64
            Which window ...
        labels : (n,) int64
            ... against which class.
        transform : callable, optional
            See `FrontEnd`.

        Returns
        -------
        (n,) float64
        """
        model = self.trained.model.eval()
        with autocast(self.device, self.trained.config.train.precision):
            _, embedding = model(*self.front(torch.from_numpy(samples).to(self.device), transform))
        target = torch.from_numpy(labels).to(self.device)
        logits = model.arcface(embedding[torch.from_numpy(rows).to(self.device)], target)
        return anomaly_score(logits, target).cpu().numpy()


def expand(names: Iterable[str]) -> Iterator[str | Recording]:
    """Every file that is meant, one at a time.

    Parameters
    ----------
    names : iterable of str
        Files; folders, of which every sound file is taken, in order; manifests (.csv, or a folder with a
        manifest.csv), which name the machines too; "-" for names on standard input, one a line.
    """
    for name in names:
        if name == "-":
            yield from expand(line.rstrip("\n") for line in sys.stdin if line.strip())
        elif Path(name).suffix.lower() == ".csv" or (Path(name) / MANIFEST).is_file():
            for clip in scan(name).clips:
                yield Recording(str(clip.path), clip.machine)
        elif os.path.isdir(name):
            found = False
            for folder, folders, files in os.walk(name, followlinks=True):
                folders[:] = sorted(one for one in folders if not one.startswith("."))
                for file in sorted(one for one in files if one.lower().endswith(SOUND_SUFFIXES)):
                    found = True
                    yield os.path.join(folder, file)
            if not found:
                yield Recording(name, problem="no .wav or .flac files in this folder")
        else:
            yield name
