"""Score recordings and decide about them: thresholds from normal recordings, a table, CSV and JSON."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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

TABLE = (
    "file", "machine_id", "scored_as", "score", "threshold", "anomaly", "p_value", "window_p_value",
    "windows", "windows_not_scored", "at_seconds",
)  # fmt: skip
SHOWN, REMARKS = 40, 10  # rows and remarks on the screen
PICTURES = (".png", ".pdf", ".svg")


def shared(scorer: Scorer, files: Iterable[str | Recording], ranks: Ranks) -> Iterator[Recording]:
    """Score files in several processes: the first one names the files, and all get every recording."""
    if ranks.world_size == 1:
        yield from scorer(files)
        return
    files, turn = iter(files), 8 * scorer.batch_size * ranks.world_size
    while block := ranks.gather(list(islice(files, turn)) if ranks.first else None)[0]:
        own = [block[number] for number in ranks.blocks(np.arange(len(block)))[ranks.rank]]
        for part in ranks.gather(list(scorer(own))):
            yield from part


@dataclass
class Summary:
    """Counts over all files, and the most anomalous files."""

    scored: int = 0  # files
    anomalous: int = 0
    skipped: int = 0
    windows: int = 0  # of the files that were scored
    windows_not_scored: int = 0
    remarks: list[str] = field(default_factory=list)  # what was not scored, of the first files
    thresholds: Counter[str] = field(default_factory=Counter)  # and how many files each decided
    entries: list[tuple] = field(default_factory=list)  # (rank, number, Recording, row), the strangest

    def add(self, recording: Recording, row: dict[str, Any]) -> None:
        """Count a file, and keep it if it is among the most anomalous."""
        if (row["problem"] or row["windows_not_scored"]) and len(self.remarks) < REMARKS:
            self.remarks.append(f"{row['file']}: {row['problem'] or row['remarks']}")
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
        rank = row["p_value"] or 1.0, -row["score"]  # of equal p-values, the highest score first
        self.entries.append((rank, self.scored, recording, row))
        if len(self.entries) > 2 * SHOWN:
            self.entries = sorted(self.entries)[:SHOWN]

    def text(self, scorer: Scorer) -> str:
        """A table of all files, or of the most anomalous of many, and what its columns rest on."""
        entries = self.entries
        count = f"files scored: {self.scored}, anomalous: {self.anomalous}"
        if self.scored > SHOWN:
            entries = sorted(entries)[:SHOWN]
            count += f" (the table shows the {SHOWN} with the lowest p-values)"
        cells = ([_cell(row[name]) for name in TABLE] for *_, row in entries)
        lines = [markdown([TABLE, *cells]), count]
        if scorer.trained.at_chance:
            lines.append(scorer.trained.remark)
        lines.append(f"score: {SCORES[scorer.form]}")
        if self.thresholds:
            lines.append("thresholds from normal recordings of the machine, else of its type, else of all:")
            sources = [f"{text} ({files} files)" for text, files in self.thresholds.most_common()]
            lines += first_lines(sources, REMARKS)
        elif self.scored:
            lines.append("no thresholds: no clips were held out; give normal recordings with --calibrate")
        if self.windows > self.scored:
            lines.append(
                f"{self.windows} windows of {scorer.audio.seconds:g} s, one every {scorer.step:g} s; a "
                "recording has the score of its highest window, and its p-value accounts for their number"
            )
        if self.remarks:
            lines.append(f"files not scored: {self.skipped}; windows not scored: {self.windows_not_scored}")
            lines += [f"  {remark}" for remark in self.remarks]
            lines += ["  ..."] if len(self.remarks) == REMARKS else []
        return "\n".join(lines)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def _tables(*paths: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the CSV and the JSON file that are named; the function adds a row to each.

    The JSON is an array with one object per line.
    """
    with ExitStack() as stack, open(os.devnull, "w", encoding="utf-8") as null:
        table, array = (stack.enter_context(replacing(path)) if path else null for path in paths)
        writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        separators = chain(["[\n"], repeat(",\n"))

        def add(row: dict[str, Any]) -> None:
            writer.writerow(row)
            array.write(next(separators) + json.dumps(row, allow_nan=False))

        yield add
        array.write("[]\n" if next(separators) == "[\n" else "\n]\n")


def _check_outputs(inputs: list[str], outputs: Iterable[tuple[Path | None, tuple[str, ...]]]) -> None:
    """Refuse outputs, with the suffixes they may have, that would replace an input or one another."""
    inputs, names = inputs + [os.path.join(name, MANIFEST) for name in inputs], []
    for path, suffixes in outputs:
        if path:
            check_output(path, inputs, suffixes)
            names.append(os.path.realpath(path))
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

    `files` and `calibrate_with`, further normal recordings, are names as `expand` takes them; `rate` is the
    share of normal recordings that may be called anomalous. The tables get a row of COLUMNS per file, the
    JSON also the "timeline" of long ones: pairs of seconds and score, None for a window without. The pictures
    (.png, .pdf, .svg) show the most anomalous recording. `options` go to `Scorer`: machine_type, machine_id,
    step, batch_size, channel and form. An output that would replace an input is a UserError.
    """
    Calibration([], [], rate)  # refuses a wrong rate before anything is scored
    files, calibrate_with = list(files), list(calibrate_with)
    inputs = [str(checkpoint_path), *files, *calibrate_with]
    outputs = (csv_path, ()), (json_path, ()), (plot_path, PICTURES), (explain_path, PICTURES)
    _check_outputs(inputs, outputs)
    where = choose_device(device)
    trained = checkpoint.load(checkpoint_path, where)
    prepare(where, trained.config.train.precision)
    scorer, summary = Scorer(trained, **options), Summary()
    with joined(where) as ranks:
        normal = list(shared(scorer, expand(calibrate_with), ranks))
        machines, scores = trained.held_out(scorer.form)
        for recording in {os.path.realpath(each.file): each for each in normal}.values():  # each file once
            if recording.problem:
                raise UserError(f"--calibrate: {printable(recording.file)}: {recording.problem}")
            machines.append(recording.machine)
            scores.append(recording.scores[~np.isnan(recording.scores)])
        calibration = Calibration(machines, scores, rate)
        scored, hidden = shared(scorer, expand(files), ranks), None if ranks.first else True
        with _tables(*((csv_path, json_path) if ranks.first else (None, None))) as add:
            for recording in tqdm(scored, "scoring", unit="file", disable=hidden, leave=False):
                row = recording.row(trained.classes, calibration)
                add(row)
                summary.add(recording, row)
    if not summary.scored:
        raise UserError(f"nothing was scored; {next(iter(summary.remarks), 'no files were named')}")
    if (plot_path or explain_path) and ranks.first:
        from osscl_min.inference import explain
        from osscl_min.runtime.plotting import save

        *_, recording, row = min(summary.entries)
        if plot_path:
            save(explain.timeline(scorer, recording, row["threshold"]), plot_path)
        if explain_path:
            own = [other for other in normal if other.machine == recording.machine]
            level = explain.usual_level(scorer, own)
            save(explain.explanation(scorer, recording, level), explain_path)
    return scorer, summary
