"""What a data folder holds, before anything is trained on it: counts, formats, levels, doubles, conflicts."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from osscl_min.data.clips import Clip, Dataset, open_sound, scan
from osscl_min.data.store import is_store, read_store
from osscl_min.runtime.files import UserError, first_lines, write_csv, write_json

FULL_SCALE = 32767 / 32768  # a sample this large is taken for clipped


@dataclass(frozen=True)
class Sound:
    """What one file holds, as it lies on the disk."""

    seconds: float
    sample_rate: int  # Hz
    channels: int
    encoding: str  # "PCM_16", ...
    level: float | None  # root mean square of all channels, dB of full scale; None for silence
    clipped: int  # samples at full scale
    silent: bool  # one value throughout
    content: str  # digest of rate and samples: equal sounds have equal ones, whatever the container


def listen(path: Path | str) -> Sound:
    """Read one file.

    Raises
    ------
    UserError
        If it cannot be read or is empty.
    """
    digest, peak_count, square, count, low, high = hashlib.sha256(), 0, 0.0, 0, np.inf, -np.inf
    with open_sound(path) as file:
        digest.update(f"{file.samplerate} {file.channels}".encode())
        for block in file.blocks(blocksize=1 << 18, dtype="float64", always_2d=True):
            digest.update(block.astype("<f4").tobytes())
            peak_count += int((np.abs(block) >= FULL_SCALE).sum())
            square, count = square + float(np.square(block).sum()), count + block.size
            low, high = min(low, block.min(initial=np.inf)), max(high, block.max(initial=-np.inf))
        rate, channels, encoding = file.samplerate, file.channels, file.subtype
    if not count:
        raise UserError("empty")
    power = square / count
    level = round(10 * float(np.log10(power)), 2) if power > 0 else None
    seconds = count / channels / rate
    silent = bool(low == high)
    return Sound(seconds, rate, channels, encoding, level, peak_count, silent, digest.hexdigest()[:16])


def inspect(path: Path | str) -> dict[str, Any]:
    """Look at every sound file of a data set.

    Parameters
    ----------
    path : Path or str
        A data folder in any layout that `dataset.scan` knows, a manifest, or a packed store, of whose files
        the index tells; levels and clipped samples are then those of the packed clips.

    Returns
    -------
    dict
        "data", "layout", "synthetic"; "machines" (a row each: type, id, clips by split and truth, seconds,
        rates, channels, clipped, silent); "files" (a row each); "duplicates" (lists of files with the same
        sound), "across" (those with files in train and test), "conflicts" (those with different machines or
        truths) and "problems" (file -> why it cannot be used).

    Raises
    ------
    UserError
        If there is no usable file.
    """
    if is_store(path):
        _, dataset, lines = read_store(path)
        heard = list(map(_packed, lines))
    else:
        dataset = scan(path)
        bar = {"desc": "inspecting", "unit": "clip", "disable": None, "leave": False, "tqdm_class": tqdm}
        heard = thread_map(_listen_to, dataset.clips, max_workers=os.cpu_count(), **bar)
    sounds, problems = {}, dict(dataset.problems)
    for clip, sound in zip(dataset.clips, heard, strict=True):
        if isinstance(sound, Sound):
            sounds[clip] = sound
        else:
            problems[dataset.name(clip.path)] = sound
    if not sounds:
        raise UserError(f"{path}: no file can be read; the first: {next(iter(problems.items()))}")
    alike = defaultdict(list)
    for clip, sound in sounds.items():
        alike[sound.content].append(clip)
    duplicates = [clips for clips in alike.values() if len(clips) > 1]
    across = [clips for clips in duplicates if len({clip.split for clip in clips}) > 1]
    conflicts = [
        clips for clips in duplicates
        if len({clip.machine for clip in clips}) > 1
        or len({clip.anomaly for clip in clips if clip.anomaly is not None}) > 1
    ]  # fmt: skip

    def named(groups: list[list[Clip]]) -> list[list[str]]:
        return [[dataset.name(clip.path) for clip in clips] for clips in groups]

    return {
        "data": dataset.root.name,
        "layout": dataset.layout,
        "synthetic": dataset.synthetic,
        "clips": len(sounds),
        "machines": _machines(sounds),
        "duplicates": named(duplicates),
        "across": named(across),
        "conflicts": named(conflicts),
        "problems": problems,
        "files": [_file(dataset, clip, sound) for clip, sound in sounds.items()],
    }


def _listen_to(clip: Clip) -> Sound | str:
    try:
        return listen(clip.path)
    except UserError as error:
        return str(error)


def _packed(line: dict[str, Any]) -> Sound | str:
    silent = line["problem"] == "silent"
    if line["problem"] and not silent:
        return line["problem"]
    found = {name: line[name] for name in ("channels", "encoding", "level", "clipped")}
    content = (line["sha256"] if silent else line["content"])[:16]
    return Sound(line["frames"] / line["rate"], line["rate"], **found, silent=silent, content=content)


def _file(dataset: Dataset, clip: Clip, sound: Sound) -> dict[str, Any]:
    names = ("machine_type", "machine_id", "split", "anomaly", "domain")
    said = {name: getattr(clip, name) for name in names}
    return {"file": dataset.name(clip.path), **said, **asdict(sound)}


def _machines(sounds: dict[Clip, Sound]) -> list[dict[str, Any]]:
    grouped = defaultdict(list)
    for clip in sounds:
        grouped[clip.machine].append(clip)
    rows = []
    for machine in sorted(grouped, key=lambda machine: (machine[0].lower(), machine)):
        clips = grouped[machine]
        counts = Counter((clip.split, clip.anomaly) for clip in clips)
        heard = [sounds[clip] for clip in clips]
        rows.append(
            {
                "type": machine[0],
                "id": machine[1],
                "train": sum(clip.split == "train" for clip in clips),
                "test_normal": counts["test", 0],
                "test_anomaly": counts["test", 1],
                "test_unlabelled": counts["test", None],
                "seconds": [min(sound.seconds for sound in heard), max(sound.seconds for sound in heard)],
                "sample_rates": sorted({sound.sample_rate for sound in heard}),
                "channels": sorted({sound.channels for sound in heard}),
                "clipped": sum(sound.clipped > 0 for sound in heard),
                "silent": sum(sound.silent for sound in heard),
            }
        )
    return rows


def table(result: dict[str, Any]) -> list[list[str]]:
    """The machines' table, first row the header, last row the sum."""
    counts = ("train", "test_normal", "test_anomaly", "test_unlabelled", "clipped", "silent")
    header = ["machine type", "id", *(name.replace("_", " ") for name in counts), "seconds", "Hz", "channels"]
    rows = [header]
    for row in result["machines"]:
        low, high = row["seconds"]
        rows.append(
            [row["type"], row["id"], *(str(row[name]) for name in counts),
             f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}",
             ", ".join(map(str, row["sample_rates"])), ", ".join(map(str, row["channels"]))]
        )  # fmt: skip
    total = [str(sum(row[name] for row in result["machines"])) for name in counts]
    return [*rows, ["all", str(len(result["machines"])), *total, "", "", ""]]


def remarks(result: dict[str, Any], most: int = 5) -> str:
    """What a reader should know beside the table, as lines; "" if nothing."""
    lines = []
    for name, what in (
        ("duplicates", "sounds are there more than once"),
        ("across", "sounds are in train and in test: their scores mean nothing"),
        ("conflicts", "sounds have two machines or two truths"),
        ("problems", "files cannot be used"),
    ):
        found = result[name]
        if found:
            lines.append(f"{len(found)} {what}:")
            joined = map(": ".join, found.items()) if name == "problems" else map(" = ".join, found)
            lines += first_lines(list(joined), most)
    return "\n".join(lines)


def write(result: dict[str, Any], out: Path | str) -> None:
    """Write OUT/inspect.json (everything) and OUT/inspect.csv (a row a file)."""
    out = Path(out)
    write_json(out / "inspect.json", result)
    columns = list(result["files"][0])
    write_csv(out / "inspect.csv", columns, [[row[name] for name in columns] for row in result["files"]])
