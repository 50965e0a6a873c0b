"""Score recordings and decide about them: thresholds from normal recordings, a table, CSV and JSON."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from osscl_min import checkpoint
from osscl_min.checkpoint import SCORES
from osscl_min.data.clips import MANIFEST
from osscl_min.inference.calibration import Calibration
from osscl_min.inference.recordings import COLUMNS, Recording, Scorer, expand
from osscl_min.runtime.device import choose_device, prepare
from osscl_min.runtime.distributed import Ranks, joined
from osscl_min.runtime.files import UserError, check_output, first_lines, printable, replacing
from osscl_min.runtime.tables import markdown

SHOWN, REMARKS = 40, 10  # rows and remarks on the screen


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


def calibrate(scorer: Scorer, rate: float, recordings: Iterable[Recording] = ()) -> Calibration:
    """Thresholds from the checkpoint's held-out clips and from further normal recordings.

    These must be scored, and never trained on. Each file counts once, however long it is.
    """
    machines, scores = scorer.trained.held_out(scorer.form)
    for recording in {os.path.realpath(recording.file): recording for recording in recordings}.values():
        if recording.problem:
            raise UserError(f"--calibrate: {printable(recording.file)}: {recording.problem}")
        windows = recording.timeline()[1]
        machines.append(recording.machine)
        scores.append(windows[np.isfinite(windows)])
    return Calibration(machines, scores, rate)


@dataclass
class Summary:
    """Counts over all files, and the strangest files."""

    scored: int = 0  # files
    anomalous: int = 0
    skipped: int = 0
    windows: int = 0  # of the files that were scored
    windows_not_scored: int = 0
    remarks: list[str] = field(default_factory=list)  # what was not scored, of the first files
    thresholds: Counter[str] = field(default_factory=Counter)  # and how many files each decided
    entries: list[tuple] = field(default_factory=list)  # (rank, number, Recording, row) of the strangest

    def add(self, recording: Recording, row: dict[str, Any]) -> None:
        """Count a file, and keep it if it is among the strangest."""
        if recording.missing and len(self.remarks) < REMARKS:
            self.remarks.append(f"{row['file']}: {row['problem'] or recording.remarks[-1]}")
        if row["problem"]:
            self.skipped += 1
            return
        self.scored += 1
        self.anomalous += row["anomaly"] or 0
        self.windows += row["windows"]
        self.windows_not_scored += row["windows_not_scored"]
        if row["calibration"]:
            value = "no decision" if row["threshold"] is None else f"{row['threshold']:.4g}"
            self.thresholds[f"{value} from {row['calibration']}"] += 1
        rank = row["p_value"] or 1.0, row["window_p_value"] or 1.0, -row["score"]
        self.entries.append((rank, self.scored, recording, row))
        if len(self.entries) > 2 * SHOWN:
            self.entries = sorted(self.entries, key=lambda entry: entry[:2])[:SHOWN]

    def strangest(self) -> tuple[Recording, dict[str, Any]]:
        """The file with the lowest p-value, among equals that with the highest score, and its row."""
        return min(self.entries, key=lambda entry: entry[:2])[2:]

    def text(self, scorer: Scorer) -> str:
        """A table of all files, or of the strangest of many, and what its columns rest on."""
        many, lines = self.scored > SHOWN, []
        entries = sorted(self.entries, key=lambda entry: entry[:2] if many else entry[1])[:SHOWN]
        if entries:
            lines.append(markdown([_HEADER, *(_cells(row) for *_, row in entries)]))
        lines.append(f"{self.scored} files scored, {self.anomalous} anomalous")
        lines[-1] += f" (above, the {SHOWN} with the lowest p-values)" if many else ""
        lines += [scorer.trained.remark] if scorer.trained.at_chance else []
        lines.append(f"score: {SCORES[scorer.form]}")
        if self.thresholds:
            lines.append("thresholds, from a machine's normal recordings, else its type's, else all:")
            sources = [f"{text} ({files} files)" for text, files in self.thresholds.most_common()]
            lines += first_lines(sources, REMARKS)
        elif self.scored:
            lines.append("no threshold: no clips were held out; give normal recordings, --calibrate")
        if self.windows > self.scored:
            lines.append(
                f"{self.windows} windows of {scorer.audio.seconds:g} s, one every {scorer.step:g} s; a "
                "recording's score is its highest window's, and its p-value accounts for their number"
            )
        if self.remarks:
            lines.append(f"{self.skipped} files and {self.windows_not_scored} windows not scored:")
            lines += [f"  {remark}" for remark in self.remarks]
            lines += ["  ..."] if len(self.remarks) == REMARKS else []
        return "\n".join(lines)


_HEADER = ["file", "machine", "score", "threshold", "anomaly", "p-value", "window's p", "windows", "at"]


def _cells(row: dict[str, Any]) -> list[str]:
    machine = " ".join(filter(None, (row["machine_type"], row["machine_id"])))
    if row["scored_as"] != f"{row['machine_type']} id {row['machine_id']}":
        machine += f" (as {row['scored_as']})"
    names = ("score", "threshold", "anomaly", "p_value", "window_p_value")
    numbers = ["-" if row[name] is None else f"{row[name]:.4g}" for name in names]
    missing = f" ({row['windows_not_scored']} not scored)" if row["windows_not_scored"] else ""
    place = f"{row['at_seconds']:g} s" if row["windows"] > 1 else ""
    return [row["file"], machine, *numbers, f"{row['windows']}{missing}", place]


@contextmanager
def _csv_rows(path: Path) -> Iterator[Callable[[dict[str, Any]], Any]]:
    with replacing(path) as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        yield writer.writerow


@contextmanager
def _json_rows(path: Path) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """An array with one object per line."""
    with replacing(path) as file:
        separators = chain(["[\n"], repeat(",\n"))
        yield lambda row: file.write(next(separators) + json.dumps(row, allow_nan=False))
        file.write("\n]\n" if file.tell() else "[]\n")


def _check_outputs(tables: Sequence[Path | None], pictures: Sequence[Path | None], inputs: list[str]) -> None:
    """Refuse outputs that would replace an input or one another."""
    inputs += [os.path.join(name, MANIFEST) for name in inputs]
    for path in filter(None, tables):
        check_output(path, inputs)
    for path in filter(None, pictures):
        check_output(path, inputs, (".png", ".pdf", ".svg"))
    names = [os.path.realpath(path) for path in (*tables, *pictures) if path]
    if len(set(names)) < len(names):
        raise UserError(f"two outputs have the same name: {', '.join(map(printable, names))}")


def score(
    checkpoint_path: Path | str,
    files: Iterable[str],
    *,
    rate: float = 0.05,
    calibrate_with: Iterable[str] = (),
    csv_path: Path | None = None,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    explain_path: Path | None = None,
    device: str = "auto",
    **options: Any,
) -> tuple[Scorer, Summary]:
    """Score recordings and decide about them; torchrun's processes share them, and the first one writes.

    Parameters
    ----------
    checkpoint_path : Path or str
        A run's best.pt, or the authors' .pth, which has no held-out clips to calibrate with.
    files : iterable of str
        See `expand`.
    rate : float
        Share of normal recordings that may be called anomalous.
    calibrate_with : iterable of str
        Files or folders of further normal recordings, see `expand` and `calibrate`.
    csv_path, json_path : Path, optional
        Get one row per file, COLUMNS; the JSON also the "timeline" of long ones: pairs of seconds and score,
        None for a window that could not be scored.
    plot_path, explain_path : Path, optional
        Pictures (.png, .pdf, .svg) of the strangest recording, see `explain`.
    device : str
    options
        machine_type, machine_id, step, batch_size, channel and form, see `Scorer`.

    Returns
    -------
    scorer : Scorer
    summary : Summary

    Raises
    ------
    UserError
        If an output would replace an input, or no file could be scored.
    """
    Calibration([], [], rate)  # refuses a wrong rate before anything is scored
    files, calibrate_with = list(files), list(calibrate_with)
    inputs = [str(checkpoint_path), *files, *calibrate_with]
    _check_outputs((csv_path, json_path), (plot_path, explain_path), inputs)
    where = choose_device(device)
    trained = checkpoint.load(checkpoint_path, where)
    prepare(where, trained.config.train.precision)
    scorer = Scorer(trained, **options)
    summary = Summary()
    with joined(where) as ranks, ExitStack() as stack:
        normal = list(shared(scorer, expand(calibrate_with), ranks))
        calibration = calibrate(scorer, rate, normal)
        tables = ((_csv_rows, csv_path), (_json_rows, json_path)) if ranks.first else ()
        writers = [stack.enter_context(rows(path)) for rows, path in tables if path is not None]
        scored, hidden = shared(scorer, expand(files), ranks), None if ranks.first else True
        for recording in tqdm(scored, "scoring", unit="file", disable=hidden, leave=False):
            row = recording.row(trained.classes, calibration)
            for write in writers:
                write(row)
            summary.add(recording, row)
    if not summary.scored:
        raise UserError(f"nothing was scored; {next(iter(summary.remarks), 'no files were named')}")
    if (plot_path or explain_path) and ranks.first:
        from osscl_min.inference import explain

        recording, row = summary.strangest()
        explain.write(scorer, recording, row["threshold"], plot_path, explain_path, normal)
    return scorer, summary
