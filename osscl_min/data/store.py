"""The packed store, a folder: every clip decoded once, to be read in batches without decoding.

  index.jsonl              a header, then one line per file: its clip, its hash, its measurements, and what
                           decoding gave (problem, remarks, hash of the samples)
  train.int16, test.int16  samples, little-endian, one row per clip in the order of the data set

While packing, the header has no digest and the lines are those so far, in any order: `pack` resumes there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from osscl_min.config import AudioConfig
from osscl_min.data.audio import decode, measure
from osscl_min.data.clips import Clip, Dataset, scan
from osscl_min.runtime.files import UserError, locked, printable, replacing

INDEX, ARRAY, SPLITS = "index.jsonl", "{}.int16", ("train", "test")
FORMAT = 3  # of the index
# In the header: what the rows are, and what else is known of the data set.
SETTINGS, KEPT = (
    ("sample_rate", "seconds", "channel"),
    ("layout", "channel", "synthetic", "problems", "remarks"),
)
NAMES = ("file", "sha256", "sound", "problem", "remarks", "content")  # of a line
SAMPLE = np.dtype("<i2")
FULL_DISK = 5  # exit status, as of `download`
AGAIN = "run the same `pack` again"
Line = dict[str, Any]  # of the index
Item, Result = TypeVar("Item"), TypeVar("Result")


def on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], title: str, jobs: int | None = None
) -> list[Result]:
    """`function` of every item, with a progress bar. Decoding and hashing release the interpreter's lock."""
    bar = {"desc": title, "unit": "file", "disable": None, "leave": False, "tqdm_class": tqdm}
    return thread_map(function, items, max_workers=jobs or os.cpu_count(), **bar)


def check_space(folder: Path, needed: float) -> None:
    """Whether a disk has room for `needed` bytes; a UserError if not."""
    if needed > (free := shutil.disk_usage(folder).free):
        sizes = f"{needed / 1e9:.3g} GB needed and {free / 1e9:.3g} GB free"
        raise UserError(f"{printable(folder)}: {sizes}; make room", FULL_DISK)


def is_store(path: Path | str) -> bool:
    """Whether a folder holds a store, finished or not."""
    return os.path.isfile(Path(path) / INDEX)


def describe(header: Line) -> str:
    """What the rows are."""
    channel = "the mean of all channels" if header["channel"] is None else f"channel {header['channel']}"
    return f"clips of {header['seconds']:g} s at {header['sample_rate']} Hz, {channel}"


def read_store(store: Path | str) -> tuple[Line, Dataset, list[Line]]:
    """The header of a finished store, its data set as `clips.scan` saw it, and the line of each clip."""
    header, lines, problem = _read_index(Path(store))
    if problem:
        raise UserError(problem)
    root = Path(header["root"])
    clips = [Clip(**line["clip"] | {"path": root / file}) for file, line in lines.items()]
    dataset = Dataset(root, clips, **{name: header[name] for name in KEPT})
    dataset.remarks = Counter(dataset.remarks)
    return header, dataset, list(lines.values())


def pack(
    data: Path | str,
    store: Path | str,
    audio: AudioConfig,
    *,
    channel: int | None = None,
    verify: bool = False,
    jobs: int | None = None,
) -> str:
    """Pack a data folder or manifest into a store, or bring the store up to date; returns what was done.

    A split is packed again if any of its files was added, removed, or changed in size or time. Interrupted
    at any moment, the next call resumes. `verify` also compares every file and every row with its hash, and
    packs again what differs. `jobs` is the number of threads.
    """
    store, name = Path(store), printable(store)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    if is_store(data):
        raise UserError(f"{printable(data)} is a packed store itself; give the folder it was made from")
    dataset = scan(data, channel)
    try:
        if dataset.layout != "manifest" and store.resolve().is_relative_to(dataset.root.resolve()):
            raise UserError(f"{name} lies in the data folder; choose a place outside")
        if store.is_dir() and not is_store(store) and {path.name for path in store.iterdir()} - {".lock"}:
            raise UserError(f"{name} is not empty and no packed store; choose another folder")
        header = {
            "format": FORMAT,
            "sample_rate": audio.sample_rate,
            "seconds": audio.seconds,
            "data": str(Path(data).absolute()),
            "root": str(dataset.root.absolute()),
            **{name: copy(getattr(dataset, name)) for name in KEPT},
            "files": {split: _list_digest(dataset, split) for split in SPLITS},
        }
        with locked(store, "packing"):
            return _pack(dataset, store, header, audio, verify, jobs)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full; free some space" if full else f"cannot be written: {error.strerror or error}"
        raise UserError(f"{name}: {why}; {AGAIN}, it resumes", FULL_DISK if full else 2) from error


def _pack(
    dataset: Dataset, store: Path, header: Line, audio: AudioConfig, verify: bool, jobs: int | None
) -> str:
    size, rows, counts = audio.samples * SAMPLE.itemsize, {}, Counter()  # bytes per row
    for clip in dataset.clips:
        array = store / ARRAY.format(clip.split)
        rows[dataset.name(clip.path)] = clip, array, counts[array] * size
        counts[array] += 1
    old, old_lines, _ = _read_index(store)
    other = "choose another folder or remove it"
    if old and any(old[name] != header[name] for name in SETTINGS):
        raise UserError(f"{printable(store)} holds {describe(old)}, not {describe(header)}; {other}")
    if old_lines and not rows.keys() & old_lines.keys():
        raise UserError(f"{printable(store)} is the store of other data; {other}")
    changed = [split for split in SPLITS if not old or old["files"][split] != header["files"][split]]
    for split in changed:
        (store / ARRAY.format(split)).unlink(missing_ok=True)  # what a reader has open stays as it is
    lines = {
        file: old_lines[file]
        for file, (clip, *_) in rows.items()
        if file in old_lines and clip.split not in changed
    }

    def difference(file: str) -> str:
        clip, array, offset = rows[file]
        if verify and _hash(clip.path) != lines[file]["sha256"]:
            return "other content, though size and time are the same"
        damaged = not lines[file]["problem"] and _hash(array, offset, size) != lines[file]["content"]
        return f"damaged in {array.name}" if damaged else ""

    # rows of an unfinished store may not have reached the disk before the machine stopped
    checks = list(lines) if verify or "digest" not in old else []
    results = zip(checks, on_threads(difference, checks, "checking", jobs), strict=True)
    differences = {file: text for file, text in results if text}
    tasks = [file for file in rows if file not in lines or file in differences]

    check_space(store, len(tasks) * size)
    if tasks:
        _write_index(store, header, (line for file, line in lines.items() if file not in differences))
    for split in SPLITS:
        (store / ARRAY.format(split)).touch()
    lock = threading.Lock()

    def work(file: str) -> Line:
        clip, array, offset = rows[file]
        line = {"file": file, "sha256": _hash(clip.path), "sound": measure(clip.path)}
        line |= {"problem": "", "remarks": [], "content": ""}
        try:
            samples, line["remarks"] = decode(clip.path, audio, dataset.channel)
            row = samples.astype(SAMPLE, copy=False)
            line["content"] = hashlib.sha256(row).hexdigest()
            with open(array, "r+b") as target:  # not mapped: a full disk is then an error and not a signal
                target.seek(offset)
                target.write(row)
        except UserError as error:
            line["problem"] = str(error)
        with lock, open(store / INDEX, "a", encoding="utf-8") as index:
            index.write(json.dumps(line) + "\n")
        return line

    lines |= zip(tasks, on_threads(work, tasks, "packing", jobs), strict=True)
    for split in SPLITS:
        with open(array := store / ARRAY.format(split), "ab") as file:
            file.truncate(counts[array] * size)
            os.fsync(file.fileno())
    final = [lines[file] | {"clip": asdict(clip) | {"path": file}} for file, (clip, *_) in rows.items()]
    _write_index(store, header, final, finished=True)

    dataset.decoded(dataset.clips, [line["problem"] or line["remarks"] for line in final])
    report = [f"{file}: {text}; packed again" for file, text in differences.items() if verify]
    report += filter(None, [dataset.report()])
    report.append(
        f"{printable(store)}: {len(dataset.split('train'))} training and {len(dataset.split('test'))} test "
        f"clips of {audio.seconds:g} s at {audio.sample_rate} Hz, {len(rows) * size / 1e6:.0f} MB; "
        f"files: {len(tasks)} decoded, {len(rows) - len(tasks)} kept, "
        f"{len(old_lines.keys() - rows.keys())} removed"
    )
    return "\n".join(report)


def _write_index(store: Path, header: Line, lines: Iterable[Line], finished: bool = False) -> None:
    content = "".join(json.dumps(line) + "\n" for line in lines)
    if finished:
        header = header | {"digest": _digest(header, content.encode())}
    with replacing(store / INDEX) as file:
        file.write(json.dumps(header) + "\n" + content)


def _read_index(store: Path) -> tuple[Line, dict[str, Line], str]:
    """Header, intact lines by file, and why this is no finished store; ({}, {}, why) where it is damaged."""
    lines: dict[str, Line] = {}
    try:
        first, _, content = (store / INDEX).read_bytes().partition(b"\n")
        header = json.loads(first)
        if header["format"] != FORMAT:
            raise UserError(f"{printable(store)} was packed by another version; remove it and pack again")
        if "digest" in header and header["digest"] != _digest(header, content):
            raise ValueError
        describe(header), header["files"]["train"], header["files"]["test"]
        with suppress(ValueError, LookupError, TypeError):  # the last line may be half there
            for line in map(json.loads, content.splitlines()):
                lines[line["file"]] = line | {name: line[name] for name in NAMES}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}, {}, f"{printable(store / INDEX)} is damaged; {AGAIN}"
    if "digest" not in header:
        return header, lines, f"{printable(store)}: its packing was not finished; {AGAIN}, it resumes"
    counts = Counter(line["clip"]["split"] for line in lines.values())
    for split in SPLITS:
        array, size = store / ARRAY.format(split), round(header["seconds"] * header["sample_rate"]) * 2
        has, expected = array.stat().st_size if array.is_file() else 0, counts[split] * size
        if has != expected:
            return {}, {}, f"{printable(array)} is damaged: {has} bytes, not {expected}; {AGAIN}"
    return header, lines, ""


def _digest(header: Line, content: bytes) -> str:
    """Of everything in an index but this, so that no line needs a check of its own."""
    rest = {name: value for name, value in header.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode() + content).hexdigest()


def _list_digest(dataset: Dataset, split: str) -> str:
    """Stands for the files of a split: their names, sizes and times of change."""
    status = [(dataset.name(clip.path), os.stat(clip.path)) for clip in dataset.split(split)]
    files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in status]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _hash(path: Path, offset: int = 0, size: int = -1) -> str:
    """sha256 of a file, or of a part of it; "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            read = hashlib.sha256(file.read(size)) if size >= 0 else hashlib.file_digest(file, "sha256")
            return read.hexdigest()
    except OSError:
        return ""
