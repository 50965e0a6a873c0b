"""What a data set holds, before training: counts, formats, levels, duplicates, conflicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from osscl_min.config import AudioConfig
from osscl_min.data.audio import attempt, measure, on_threads
from osscl_min.data.clips import scan, usage, windows
from osscl_min.data.store import is_store, read_store
from osscl_min.runtime.files import UserError, first_lines, printable, write_json
from osscl_min.runtime.tables import write_table

Row = dict[str, Any]  # of the table of files
LABELS = ("machine_type", "machine_id", "split", "anomaly", "domain")  # of a clip, in the table of files
COLUMNS: dict[str, Callable[[list[Row]], Any]] = {  # of the table of machines, from a machine's files
    "train": lambda rows: sum(row["split"] == "train" for row in rows),
    "test_normal": lambda rows: sum((row["split"], row["anomaly"]) == ("test", 0) for row in rows),
    "test_anomaly": lambda rows: sum(row["anomaly"] == 1 for row in rows),
    "test_unlabelled": lambda rows: sum(row["anomaly"] is None for row in rows),
    "seconds": lambda rows: [pick(row["seconds"] for row in rows) for pick in (min, max)],
    "sample_rates": lambda rows: sorted({row["sample_rate"] for row in rows}),
    "channels": lambda rows: sorted({row["channels"] for row in rows}),
    "clipped": lambda rows: sum(row["clipped"] > 0 for row in rows),
    "silent": lambda rows: sum(row["silent"] for row in rows),
}
REMARKS = {  # entry of the result -> what its files have in common
    "duplicates": "sounds that are there more than once",
    "across": "sounds in train and in test, whose scores mean nothing",
    "conflicts": "sounds with two machines or two truths",
    "problems": "files that cannot be used",
}


def inspect(path: Path | str, audio: AudioConfig = AudioConfig()) -> dict[str, Any]:
    """Measure every sound file of a data folder, manifest or packed store (whose index has the results).

    `audio` is how a training would cut the recordings into clips.

    Returns
    -------
    dict
        "data", "layout", "synthetic", "clips"; "machines" (one row each: type, id, COLUMNS); "files" (one row
        each); "duplicates" (lists of files with the same sound), "across" (those with files in train and
        test), "conflicts" (those with different machines or truths) and "problems" (file -> why it cannot be
        used), "usage" (split -> how much of its sound the clips use, where there are longer recordings).
    """
    if is_store(path):
        _, dataset, lines = read_store(path, first=True)
        sounds = [line["sound"] for line in lines]
    else:
        dataset = scan(path)
        sounds = on_threads(partial(attempt, measure), [clip.path for clip in dataset.clips], "inspecting")
    files, clips, machines, contents = [], [], defaultdict(list), defaultdict(list)
    for clip, sound in zip(dataset.clips, sounds, strict=True):
        name = dataset.name(clip.path)
        if isinstance(sound, str):
            dataset.problems[name] = sound
            continue
        row = {"file": name, **{label: getattr(clip, label) for label in LABELS}, **sound}
        files.append(row)
        clips += windows(clip, sound["seconds"], audio)
        machines[clip.machine].append(row)
        contents[sound["content"]].append(row)
    if not files:
        first = next(map(": ".join, dataset.problems.items()))
        raise UserError(f"{printable(path)}: no file can be read; the first, {first}")

    def differing(*labels: str) -> list[list[str]]:
        """The files of equal content that differ in one of these labels, where they have it."""
        return [
            [row["file"] for row in rows]
            for rows in contents.values()
            if any(len({row[label] for row in rows} - {None}) > 1 for label in labels)
        ]

    return {
        "data": printable(dataset.root.name),
        "layout": dataset.layout,
        "synthetic": dataset.synthetic,
        "clips": len(files),
        "machines": [
            {"type": machine[0], "id": machine[1]} | {name: of(rows) for name, of in COLUMNS.items()}
            for machine, rows in sorted(machines.items(), key=lambda item: (item[0][0].lower(), item[0]))
        ],
        "duplicates": differing("file"),
        "across": differing("split"),
        "conflicts": differing("machine_type", "machine_id", "anomaly"),
        "problems": dataset.problems,
        "usage": usage(clips, audio),
        "files": files,
    }


def table(result: dict[str, Any]) -> list[list[str]]:
    """The machines' table, header first and total last."""

    def cell(name: str, value: Any) -> str:
        if not isinstance(value, list):
            return str(value)
        return (" to " if name == "seconds" else ", ").join(f"{item:.6g}" for item in dict.fromkeys(value))

    machines = result["machines"]
    rows = [[cell(*item) for item in machine.items()] for machine in machines]
    values = [[machine[name] for machine in machines] for name in COLUMNS]
    total = [str(sum(column)) if isinstance(column[0], int) else "" for column in values]
    header = ["machine type", "id", *(name.replace("_", " ") for name in COLUMNS)]
    return [header, *rows, ["all", str(len(rows)), *total]]


def remarks(result: dict[str, Any], most: int = 5) -> str:
    """What to know beside the table, as lines; "" if nothing."""
    lines = [f"{split}: {text}" for split, text in result["usage"].items()]
    for name, what in REMARKS.items():
        if entries := result[name]:
            lines.append(f"{what} ({len(entries)}):")
            texts = map(": ".join, entries.items()) if name == "problems" else map(" = ".join, entries)
            lines += first_lines(list(texts), most)
    return "\n".join(lines)


def write(result: dict[str, Any], out: Path | str) -> None:
    """Write OUT/inspect.json (everything), inspect.csv (one row per file), inspect.md and .tex (machines)."""
    write_json(Path(out) / "inspect.json", result)
    write_table(Path(out) / "inspect", table(result), result["files"])
