"""The packed store, a folder: every clip decoded once, to be read in batches without decoding.

  index.jsonl              a header, then one line per file: its clip and its `Entry`
  train.int16, test.int16  samples, little-endian, one row per clip in the order of the data set

While packing, the header has no digest and the lines are those so far, in any order: `pack` resumes there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from osscl_min.config import AudioConfig
from osscl_min.data.audio import Sound, decode, measure
from osscl_min.data.clips import Clip, Dataset, scan
from osscl_min.runtime.files import UserError, locked, printable, replacing

INDEX, ARRAY = "index.jsonl", "{}.int16"
SPLITS = ("train", "test")
FORMAT = 2  # of the index
SAMPLE = np.dtype("<i2")
FULL_DISK = 5  # exit status, as of `download`
AGAIN = "run the same `pack` again"
Key = tuple[str, str]  # split, file
Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Entry:
    """One file of the data set as it was packed."""

    split: str
    file: str  # relative to the data folder
    sha256: str  # of the file
    sound: Sound | str  # the whole file, or why it cannot be measured
    problem: str = ""  # why it is not used
    remarks: tuple[str, ...] = ()  # what was done to it
    content: str = ""  # sha256 of the decoded samples


CLIP_FIELDS = [field.name for field in fields(Clip) if field.name != "path"]


def on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], title: str, jobs: int | None = None
) -> list[Result]:
    """`function` of every item, with a progress bar. Decoding and hashing release the interpreter's lock."""
    bar = {"desc": title, "unit": "file", "disable": None, "leave": False, "tqdm_class": tqdm}
    return thread_map(function, items, max_workers=jobs or os.cpu_count(), **bar)


def is_store(path: Path | str) -> bool:
    """Whether a folder holds a store, finished or not."""
    return os.path.isfile(Path(path) / INDEX)


def describe(header: dict[str, Any]) -> str:
    """What the rows are."""
    channel = "the mean of all channels" if header["channel"] is None else f"channel {header['channel']}"
    return f"clips of {header['seconds']:g} s at {header['sample_rate']} Hz, {channel}"


def read_store(store: Path | str) -> tuple[dict[str, Any], Dataset, list[Entry]]:
    """The header of a finished store, its data set as `clips.scan` saw it, and one entry per clip."""
    store = Path(store)
    header, content = _read(store)
    if header.get("format", FORMAT) != FORMAT:
        raise UserError(f"{printable(store)} was packed by another version; remove it and pack again")
    if header and "digest" not in header:
        raise UserError(f"{printable(store)}: its packing was not finished; {AGAIN}, it resumes")
    if header.pop("digest", "") != _digest(header, content):
        raise UserError(f"{printable(store / INDEX)} is damaged; {AGAIN}")
    lines = [json.loads(line) for line in content.splitlines()]
    row_bytes = round(header["seconds"] * header["sample_rate"]) * SAMPLE.itemsize
    for split in SPLITS:
        array, expected = (
            store / ARRAY.format(split),
            row_bytes * sum(line["split"] == split for line in lines),
        )
        if _size(array) != expected:
            raise UserError(f"{printable(array)} is damaged: {_size(array)} bytes, not {expected}; {AGAIN}")
    root = Path(header["root"])
    clips = [Clip(root / line["file"], **{name: line[name] for name in CLIP_FIELDS}) for line in lines]
    kept = {name: header[name] for name in ("problems", "notes", "synthetic", "layout", "channel")}
    return header, Dataset(root, clips, **kept), list(map(_entry, lines))


def write_index(
    store: Path, header: dict[str, Any], clips: dict[Key, Clip], entries: dict[Key, Entry]
) -> None:
    """Finish a store whose arrays are written; `clips` are in the order of the rows."""
    lines = [asdict(clip) | asdict(entries[key]) | {"path": ""} for key, clip in clips.items()]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    with replacing(store / INDEX) as file:
        file.write(json.dumps(header | {"digest": _digest(header, content.encode())}) + "\n" + content)


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
    store = Path(store)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    if is_store(data):
        raise UserError(f"{printable(data)} is a packed store itself; give the folder it was made from")
    dataset = scan(data, channel)
    header = {
        "format": FORMAT,
        "sample_rate": audio.sample_rate,
        "seconds": audio.seconds,
        "channel": dataset.channel,
        "layout": dataset.layout,
        "synthetic": dataset.synthetic,
        "data": str(Path(data).absolute()),
        "root": str(dataset.root.absolute()),
        "problems": dict(dataset.problems),
        "notes": dataset.notes,
        "files": {split: _list_digest(dataset, split) for split in SPLITS},
    }
    try:
        _refuse_others(store, dataset, header)
        with locked(store, "packing"):
            return _pack(dataset, store, header, audio, verify, jobs)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full; free some space" if full else f"cannot be written: {error.strerror or error}"
        raise UserError(
            f"{printable(store)}: {why}; {AGAIN}, it resumes", FULL_DISK if full else 2
        ) from error


def _pack(
    dataset: Dataset, store: Path, header: dict[str, Any], audio: AudioConfig, verify: bool, jobs: int | None
) -> str:
    row_bytes = audio.samples * SAMPLE.itemsize
    clips = {(clip.split, dataset.name(clip.path)): clip for clip in dataset.clips}
    arrays = {split: store / ARRAY.format(split) for split in SPLITS}
    counts = Counter(split for split, _ in clips)
    offsets = {
        key: number * row_bytes
        for split in SPLITS
        for number, key in enumerate(key for key in clips if key[0] == split)
    }
    old_header, known = _known(store)
    if known and not clips.keys() & known.keys():
        raise UserError(f"{printable(store)} is the store of other data; choose another folder or remove it")
    entries = {key: entry for key, entry in known.items() if key in clips}
    for split in SPLITS:
        if old_header.get("files", {}).get(split) != header["files"][split]:
            entries = {key: entry for key, entry in entries.items() if key[0] != split}
            arrays[split].unlink(missing_ok=True)  # a reader keeps the old one, which is never written to
    # rows of an unfinished store may not have reached the disk before the machine stopped
    checks = [key for key in entries if verify or "digest" not in old_header]

    def difference(key: Key) -> str:
        entry, array = entries[key], arrays[key[0]]
        if verify and _file_hash(clips[key].path) != entry.sha256:
            return "other content, though size and time are the same"
        damaged = not entry.problem and _row_hash(array, offsets[key], row_bytes) != entry.content
        return f"damaged in {array.name}" if damaged else ""

    results = on_threads(difference, checks, "checking", jobs)
    differences = {key: text for key, text in zip(checks, results, strict=True) if text}
    entries = {key: entry for key, entry in entries.items() if key not in differences}

    needed = sum(max(0, counts[split] * row_bytes - _size(arrays[split])) for split in SPLITS)
    if needed > (free := shutil.disk_usage(store).free):
        sizes = f"{needed / 1e9:.3g} GB needed, {free / 1e9:.3g} GB free"
        raise UserError(f"{printable(store)}: {sizes}; make room", FULL_DISK)
    tasks = [key for key in clips if key not in entries]
    if tasks:
        with replacing(store / INDEX) as file:
            file.writelines(json.dumps(line) + "\n" for line in (header, *map(asdict, entries.values())))
    lock = threading.Lock()

    def work(key: Key) -> Entry:
        entry, samples = _examine(key, clips[key].path, audio, dataset.channel)
        if not entry.problem:
            _write_row(arrays[key[0]], offsets[key], samples)
        with lock, open(store / INDEX, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
        return entry

    entries |= zip(tasks, on_threads(work, tasks, "packing", jobs), strict=True)
    for split, array in arrays.items():
        with open(array, "ab") as file:
            file.truncate(counts[split] * row_bytes)
            os.fsync(file.fileno())
    write_index(store, header, clips, entries)

    dataset.problems |= {entry.file: entry.problem for entry in entries.values() if entry.problem}
    dataset.remarks.update(remark for entry in entries.values() for remark in entry.remarks)
    lines = [f"{file}: {text}; packed again" for (_, file), text in differences.items() if verify]
    lines += filter(None, [dataset.report()])
    usable = Counter(entry.split for entry in entries.values() if not entry.problem)
    lines.append(
        f"{printable(store)}: {usable['train']} training and {usable['test']} test clips of "
        f"{audio.seconds:g} s at {audio.sample_rate} Hz, {sum(map(_size, arrays.values())) / 1e6:.0f} MB; "
        f"files: {len(tasks)} decoded, {len(entries) - len(tasks)} kept, "
        f"{len(known.keys() - clips.keys())} removed"
    )
    return "\n".join(lines)


def _refuse_others(store: Path, dataset: Dataset, header: dict[str, Any]) -> None:
    """Check that a folder lies outside the data, and is empty or holds a store of such clips."""
    name = printable(store)
    if dataset.layout != "manifest" and store.resolve().is_relative_to(dataset.root.resolve()):
        raise UserError(f"{name} lies in the data folder; choose a place outside")
    if not is_store(store) and store.is_dir() and any(path.name != ".lock" for path in store.iterdir()):
        raise UserError(f"{name} is not empty and no packed store; choose another folder")
    there, _ = _read(store)
    if there.get("format", FORMAT) != FORMAT:
        raise UserError(f"{name} was packed by another version; remove it, or choose another folder")
    with contextlib.suppress(KeyError, ValueError, TypeError):  # damaged: packed again
        if describe(there) != describe(header):
            todo = "choose another folder or remove it"
            raise UserError(f"{name} holds {describe(there)}, not {describe(header)}; {todo}")


def _known(store: Path) -> tuple[dict[str, Any], dict[Key, Entry]]:
    """What a store holds, finished or not; ({}, {}) where it is damaged."""
    try:
        header, _, entries = read_store(store)
        return header | {"digest": ""}, {(entry.split, entry.file): entry for entry in entries}
    except UserError:
        header, content = _read(store)
    entries = {}
    if "digest" not in header:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line may be half there
            for entry in map(_entry, map(json.loads, content.splitlines())):
                entries[entry.split, entry.file] = entry
    return (header, entries) if isinstance(header.get("files"), dict) else ({}, {})


def _read(store: Path) -> tuple[dict[str, Any], bytes]:
    """Header and lines of an index; ({}, b"") where there is none."""
    try:
        with open(store / INDEX, "rb") as file:
            header = json.loads(file.readline())
            return (header, file.read()) if isinstance(header, dict) else ({}, b"")
    except (OSError, ValueError, RecursionError):
        return {}, b""


def _entry(line: dict[str, Any]) -> Entry:
    values = {field.name: line[field.name] for field in fields(Entry)}
    sound = values["sound"] if isinstance(values["sound"], str) else Sound(**values["sound"])
    return Entry(**values | {"sound": sound, "remarks": tuple(values["remarks"])})


def _examine(
    key: Key, path: Path, audio: AudioConfig, channel: int | None
) -> tuple[Entry, np.ndarray | None]:
    """Measure and decode a file; no samples where it has a problem."""
    try:
        sound = measure(path)
    except UserError as error:
        sound = str(error)
    try:
        samples, remarks = decode(path, audio, channel)
    except UserError as error:
        return Entry(*key, _file_hash(path), sound, str(error)), None
    samples = samples.astype(SAMPLE, copy=False)
    content = hashlib.sha256(samples).hexdigest()
    return Entry(*key, _file_hash(path), sound, "", tuple(remarks), content), samples


def _write_row(array: Path, offset: int, samples: np.ndarray) -> None:
    """Written, not mapped: a full disk is then an error and not a signal."""
    with open(os.open(array, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "wb") as file:
        file.seek(offset)
        file.write(samples)


def _row_hash(array: Path, offset: int, size: int) -> str:
    if not array.is_file():
        return ""
    with open(array, "rb") as file:
        file.seek(offset)
        return hashlib.sha256(file.read(size)).hexdigest()


def _file_hash(path: Path) -> str:
    """sha256 of a file; "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _list_digest(dataset: Dataset, split: str) -> str:
    """Stands for the files of a split: their names, sizes and times of change."""
    files = []
    for clip in dataset.split(split):
        status = os.stat(clip.path)
        files.append((dataset.name(clip.path), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _digest(header: dict[str, Any], content: bytes) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + content).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
