"""Is this recording strange? Scores of held-out normal clips turn a score into a decision and a p-value."""

from __future__ import annotations

import csv
import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.inference.calibration import Calibration, Method, Threshold
from osscl_min.inference.recordings import COLUMNS, Recording, Scorer, expand
from osscl_min.runtime.device import choose_device, prepare
from osscl_min.runtime.distributed import Ranks, joined
from osscl_min.runtime.files import UserError, replacing
from osscl_min.runtime.tables import markdown

SHOWN = 40  # rows on the screen


def shared(scorer: Scorer, files: Iterable[str | Recording], ranks: Ranks) -> Iterator[Recording]:
    """As `scorer(files)`, shared by processes: the first names the files, all get every recording."""
    if ranks.world_size == 1:
        yield from scorer(files)
        return
    files, turn = iter(files), 8 * scorer.batch_size * ranks.world_size
    while block := ranks.gather(list(islice(files, turn)) if ranks.first else None)[0]:
        own = [block[number] for number in ranks.blocks(np.arange(len(block)))[ranks.rank]]
        for part in ranks.gather(list(scorer(own))):
            yield from part


def calibrate(scorer: Scorer, rate: float, method: Method, files: Iterable[str] = ()) -> Calibration:
    """Thresholds from the checkpoint's held-out scores, and from further normal recordings.

    Parameters
    ----------
    scorer : Scorer
    rate : float
        The false-alarm rate.
    method : {"empirical", "gamma"}
    files : iterable of str
        Normal recordings that were never trained on, see `expand`. Each window of a long one counts, without
        overlap.

    Raises
    ------
    UserError
        If the rate is none, or such a recording cannot be scored.
    """
    if not 0 < rate < 1:
        raise UserError(f"a false-alarm rate lies between 0 and 1, such as 0.05; got {rate:g}")
    machines, scores = scorer.trained.held_out()
    step, scorer.step = scorer.step, scorer.audio.seconds
    for recording in scorer(expand(files)):
        if recording.problem:
            raise UserError(f"--calibrate: {recording.file}: {recording.problem}")
        timeline = recording.timeline()[1]
        timeline = timeline[np.isfinite(timeline)]
        machines += [recording.machine] * len(timeline)
        scores += timeline.tolist()
    scorer.step = step
    return Calibration(machines, scores, rate, method)


@dataclass
class Summary:
    """What is shown after any number of files.

    Attributes
    ----------
    scored, anomalous, windowed, skipped : int
        Files: scored, called anomalous, of several windows, with a problem.
    strangest : tuple
        How far the most anomalous file is above its threshold (a ratio), the file, and that threshold.
    """

    scored: int = 0
    anomalous: int = 0
    windowed: int = 0
    skipped: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)  # the first ten
    thresholds: dict[str, Threshold] = field(default_factory=dict)  # by their group
    first: list[dict[str, Any]] = field(default_factory=list)
    highest: list[tuple[float, int, dict[str, Any]]] = field(default_factory=list)  # not called normal
    strangest: tuple[float, Recording | None, Threshold | None] = (-1.0, None, None)

    def add(self, recording: Recording, row: dict[str, Any], threshold: Threshold | None) -> None:
        """Take a file into account; only some are kept."""
        if recording.problem:
            self.skipped += 1
            if len(self.problems) < 10:
                self.problems.append((recording.file, recording.problem))
            return
        self.scored += 1
        self.windowed += row["windows"] > 1
        self.anomalous += row["anomaly"] or 0
        excess = row["score"] / (threshold.value if threshold else 1.0)
        if threshold is not None:
            self.thresholds[threshold.group] = threshold
        if excess > self.strangest[0]:
            self.strangest = excess, recording, threshold
        row = {name: row[name] for name in COLUMNS}
        if len(self.first) < SHOWN:
            self.first.append(row)
        if row["anomaly"] != 0:
            heapq.heappush(self.highest, (excess, -self.scored, row))
        if len(self.highest) > SHOWN:
            heapq.heappop(self.highest)

    def text(self, scorer: Scorer) -> str:
        """A table of all files, or of the most anomalous of many, and what the columns rest on."""
        rows, lines = self.first, []
        if self.scored > SHOWN:
            rows = [row for *_, row in sorted(self.highest, reverse=True, key=lambda one: one[:2])]
        if rows:
            lines.append(markdown([_HEADER, *map(_shown, rows)]))
        most = f" (the {len(rows)} highest above)" if self.scored > SHOWN and rows else ""
        lines.append(f"{self.scored} files scored, {self.anomalous} anomalous{most}")
        for threshold in list(self.thresholds.values())[:SHOWN]:
            lines.append(f"threshold at a false-alarm rate of {100 * threshold.rate:g} %, {threshold}")
        if not self.thresholds and self.scored:
            lines.append(
                "no threshold: the checkpoint has no held-out scores; give normal clips, --calibrate"
            )
        if self.windowed:
            lines.append(
                f"{self.windowed} longer than {scorer.audio.seconds:g} s: windows every {scorer.step:g} s; a "
                "file's score is its highest window's, and the false-alarm rate is that of one window"
            )
        if self.skipped:
            lines.append(f"{self.skipped} files skipped:")
            lines += [f"  {file}: {reason}" for file, reason in self.problems]
            lines += [f"  ... and {self.skipped - 10} more"] if self.skipped > 10 else []
        return "\n".join(lines)


_HEADER = ["file", "machine", "score", "threshold", "anomaly", "p-value", "at"]


def _shown(row: dict[str, Any]) -> list[str]:
    def number(name: str) -> str:
        return "-" if row[name] is None else f"{row[name]:.4g}"

    machine = " ".join(filter(None, (row["machine_type"], row["machine_id"])))
    if not row["scored_as"] == f"{row['machine_type']} id {row['machine_id']}":
        machine += f" (as {row['scored_as']})"
    at = f"{row['at_seconds']:g} s" if row["windows"] > 1 else ""
    decision = {None: "-", 0: "0", 1: "1"}[row["anomaly"]]
    return [row["file"], machine, number("score"), number("threshold"), decision, number("p_value"), at]


@contextmanager
def _csv_rows(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    with replacing(path) as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        yield writer.writerow


@contextmanager
def _json_rows(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """An array, an object a line."""
    with replacing(path) as file:
        separator = "[\n"

        def write(row: dict[str, Any]) -> None:
            nonlocal separator
            file.write(separator + json.dumps(row, allow_nan=False))
            separator = ",\n"

        yield write
        file.write("[\n]\n" if separator == "[\n" else "\n]\n")


def score(
    checkpoint_path: Path | str,
    files: Iterable[str],
    *,
    machine_type: str | None = None,
    machine_id: str | None = None,
    rate: float = 0.05,
    method: Method = "empirical",
    calibrate_with: Iterable[str] = (),
    step: float | None = None,
    batch_size: int | None = None,
    channel: int | None = None,
    csv_path: Path | None = None,
    json_path: Path | None = None,
    device: str = "auto",
) -> tuple[Scorer, Summary]:
    """Score recordings and decide about them; torchrun's processes share them, and the first one writes.

    Parameters
    ----------
    checkpoint_path : Path or str
        A run's best.pt, or the authors' .pth, which has no held-out scores to calibrate with.
    files : iterable of str
        See `expand`.
    machine_type, machine_id, step, batch_size, channel
        See `Scorer`.
    rate, method, calibrate_with
        See `calibrate`.
    csv_path, json_path : Path, optional
        Get a row a file, COLUMNS; the JSON also the "timeline" of long ones, as pairs of seconds and score.
    device : str

    Returns
    -------
    scorer : Scorer
    summary : Summary

    Raises
    ------
    UserError
        If no file could be scored.
    """
    where = choose_device(device)
    trained = checkpoint.load(checkpoint_path, where)
    prepare(where, trained.config.train.precision)
    scorer = Scorer(
        trained, machine_type=machine_type, machine_id=machine_id, step=step, batch_size=batch_size,
        channel=channel,
    )  # fmt: skip
    calibration = calibrate(scorer, rate, method, calibrate_with)
    summary = Summary()
    with joined(where) as ranks, ExitStack() as stack:
        wanted = ((_csv_rows, csv_path), (_json_rows, json_path)) if ranks.first else ()
        writers = [stack.enter_context(rows(path)) for rows, path in wanted if path is not None]
        scored, hidden = shared(scorer, expand(files), ranks), None if ranks.first else True
        for recording in tqdm(scored, "scoring", unit="file", disable=hidden, leave=False):
            row = recording.row(trained.classes, calibration)
            for write in writers:
                write(row)
            summary.add(recording, row, calibration.group(recording.machine)[1])
    if not summary.scored:
        raise UserError(summary.text(scorer).replace("0 files scored, 0 anomalous", "nothing was scored"))
    return scorer, summary
