"""What a data set holds, before training: counts, formats, levels, duplicates, conflicts."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from osscl_min.data.audio import Sound, measure
from osscl_min.data.clips import Clip, scan
from osscl_min.data.store import is_store, on_threads, read_store
from osscl_min.runtime.files import UserError, first_lines, printable, write_json
from osscl_min.runtime.tables import write_table

LABELS = ("machine_type", "machine_id", "split", "anomaly", "domain")  # of a clip, in the table of files
COUNTS = ("train", "test_normal", "test_anomaly", "test_unlabelled", "clipped", "silent")


def inspect(path: Path | str) -> dict[str, Any]:
    """Measure every sound file of a data folder, manifest or packed store (whose index knows the results).

    Returns
    -------
    dict
        "data", "layout", "synthetic", "clips"; "machines" (one row each: type, id, clips by split and truth,
        seconds, rates, channels, clipped, silent); "files" (one row each); "duplicates" (lists of files with
        the same sound), "across" (those with files in train and test), "conflicts" (those with different
        machines or truths) and "problems" (file -> why it cannot be used).
    """
    if is_store(path):
        _, dataset, lines = read_store(path)
        measured = [line["sound"] for line in lines]
    else:
        dataset = scan(path)
        measured = on_threads(measure, [clip.path for clip in dataset.clips], "inspecting")
    results = list(zip(dataset.clips, measured, strict=True))
    sounds = {clip: sound for clip, sound in results if isinstance(sound, dict)}
    problems = {dataset.name(clip.path): text for clip, text in results if isinstance(text, str)}
    problems = dataset.problems | problems
    if not sounds:
        file, reason = next(iter(problems.items()))
        raise UserError(f"{printable(path)}: no file can be read; the first, {file}: {reason}")
    by_content = defaultdict(list)
    for clip, sound in sounds.items():
        by_content[sound["content"]].append(clip)
    duplicates = [clips for clips in by_content.values() if len(clips) > 1]

    def names(differ: Any) -> list[list[str]]:
        return [[dataset.name(clip.path) for clip in clips] for clips in duplicates if differ(clips)]

    def different(values: Any) -> bool:
        return len({value for value in values if value is not None}) > 1

    return {
        "data": printable(dataset.root.name),
        "layout": dataset.layout,
        "synthetic": dataset.synthetic,
        "clips": len(sounds),
        "machines": _machines(sounds),
        "duplicates": names(lambda clips: True),
        "across": names(lambda clips: different(clip.split for clip in clips)),
        "conflicts": names(
            lambda clips: (
                different(clip.machine for clip in clips) or different(clip.anomaly for clip in clips)
            )
        ),
        "problems": problems,
        "files": [
            {
                "file": dataset.name(clip.path),
                **{name: getattr(clip, name) for name in LABELS},
                **sound,
            }
            for clip, sound in sounds.items()
        ],
    }


def _machines(sounds: dict[Clip, Sound]) -> list[dict[str, Any]]:
    by_machine = defaultdict(list)
    for clip in sounds:
        by_machine[clip.machine].append(clip)
    rows = []
    for machine, clips in sorted(by_machine.items(), key=lambda item: (item[0][0].lower(), item[0])):
        counts = Counter((clip.split, clip.anomaly) for clip in clips)
        own = [sounds[clip] for clip in clips]
        rows.append(
            {
                "type": machine[0],
                "id": machine[1],
                "train": sum(clip.split == "train" for clip in clips),
                "test_normal": counts["test", 0],
                "test_anomaly": counts["test", 1],
                "test_unlabelled": counts["test", None],
                "seconds": [min(sound["seconds"] for sound in own), max(sound["seconds"] for sound in own)],
                "sample_rates": sorted({sound["sample_rate"] for sound in own}),
                "channels": sorted({sound["channels"] for sound in own}),
                "clipped": sum(sound["clipped"] > 0 for sound in own),
                "silent": sum(sound["silent"] for sound in own),
            }
        )
    return rows


def table(result: dict[str, Any]) -> list[list[str]]:
    """The machines' table, header first and total last."""
    header = ["machine type", "id", *(name.replace("_", " ") for name in COUNTS), "seconds", "Hz", "channels"]
    rows = [header]
    for row in result["machines"]:
        low, high = row["seconds"]
        rows.append(
            [row["type"], row["id"], *(str(row[name]) for name in COUNTS),
             f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}",
             ", ".join(map(str, row["sample_rates"])), ", ".join(map(str, row["channels"]))]
        )  # fmt: skip
    total = [str(sum(row[name] for row in result["machines"])) for name in COUNTS]
    return [*rows, ["all", str(len(result["machines"])), *total, "", "", ""]]


def remarks(result: dict[str, Any], most: int = 5) -> str:
    """What to know beside the table, as lines; "" if nothing."""
    lines = []
    for name, what in (
        ("duplicates", "sounds are there more than once"),
        ("across", "sounds are in train and in test: their scores mean nothing"),
        ("conflicts", "sounds have two machines or two truths"),
        ("problems", "files cannot be used"),
    ):
        if entries := result[name]:
            lines.append(f"{len(entries)} {what}:")
            texts = map(": ".join, entries.items()) if name == "problems" else map(" = ".join, entries)
            lines += first_lines(list(texts), most)
    return "\n".join(lines)


def write(result: dict[str, Any], out: Path | str) -> None:
    """Write OUT/inspect.json (everything), inspect.csv (one row per file), inspect.md and .tex (machines)."""
    write_json(Path(out) / "inspect.json", result)
    write_table(Path(out) / "inspect", table(result), result["files"])
