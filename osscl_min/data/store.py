"""The packed store, a folder: every clip decoded once, to be read in batches without decoding.

  index.jsonl              a header, then one line per clip: what it is, what decoding gave (problem, remarks,
                           hash of the samples) and, with a file's first clip, the measures of the file
  train.int16, test.int16  samples, little-endian, one row per clip in the order of the data set

While packing, the digest is of the header alone, and the files hold the clips packed so far: `pack` resumes
there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from osscl_min.config import AudioConfig
from osscl_min.data.audio import attempt, decode, measure, on_threads
from osscl_min.data.clips import SPLITS, Clip, Dataset, cut, scan
from osscl_min.runtime.files import UserError, locked, printable, replacing

INDEX, ARRAY = "index.jsonl", "{}.int16"
FORMAT = 3  # of the index
KEPT = ("layout", "channel", "synthetic", "problems", "remarks")  # of the data set, in the header
SAMPLE = np.dtype("<i2")
FULL_DISK = 5  # exit status, as of `download`
AGAIN = "run the same `pack` again"
Line = dict[str, Any]  # of the index


def check_space(folder: Path, needed: float) -> None:
    """Whether a disk has room for `needed` bytes; a UserError if not."""
    if needed > (free := shutil.disk_usage(folder).free):
        sizes = f"{needed / 1e9:.3g} GB needed and {free / 1e9:.3g} GB free"
        raise UserError(f"{printable(folder)}: {sizes}; make room", FULL_DISK)


def is_store(path: Path | str) -> bool:
    """Whether a folder holds a store, finished or not."""
    return os.path.isfile(Path(path) / INDEX)


def settings(audio: AudioConfig, channel: int | None) -> Line:
    """What tells the rows of one store from another's, in the header."""
    shape = {"sample_rate": audio.sample_rate, "seconds": audio.seconds}
    return shape | {"step": audio.clip_step, "channel": channel}


def describe(header: Line) -> str:
    """What the rows are."""
    channel = "the mean of all channels" if header["channel"] is None else f"channel {header['channel']}"
    step = f"one every {header['step']:g} s" if header["step"] else "one per recording"
    return f"clips of {header['seconds']:g} s at {header['sample_rate']} Hz, {step}, {channel}"


def read_store(store: Path | str, first: bool = False) -> tuple[Line, Dataset, list[Line]]:
    """The header of a finished store, its data set as it was cut, and the line of each clip, with its "row".

    `first` takes the first clip of each recording alone.
    """
    header, lines, problem = _read_index(Path(store))
    if problem:
        raise UserError(problem)
    rows = {split: count() for split in SPLITS}
    lines = [line | {"row": next(rows[line["clip"]["split"]])} for line in lines]
    lines = [line for line in lines if not (first and line["clip"].get("start"))]
    root = Path(header["root"])
    clips = [Clip(**line["clip"] | {"path": root / line["file"]}) for line in lines]
    dataset = Dataset(root, clips, **{name: header[name] for name in KEPT})
    dataset.remarks = Counter(dataset.remarks)
    return header, dataset, lines


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
    at any moment, the next call resumes. `verify` also compares every file and every row with its hash.
    `jobs` is the number of threads.
    """
    store, name = Path(store), printable(store)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    if is_store(data):
        raise UserError(f"{printable(data)} is a packed store itself; give the folder it was made from")
    dataset = scan(data, channel)
    dataset.clips = cut(dataset.clips, audio)
    try:
        if dataset.layout != "manifest" and store.resolve().is_relative_to(dataset.root.resolve()):
            raise UserError(f"{name} lies in the data folder; choose a place outside")
        if store.is_dir() and not is_store(store) and {path.name for path in store.iterdir()} - {".lock"}:
            raise UserError(f"{name} is neither empty nor a packed store; choose another folder")
        header = {
            "format": FORMAT,
            "data": str(Path(data).absolute()),
            "root": str(dataset.root.absolute()),
            **settings(audio, dataset.channel),
            **{name: getattr(dataset, name) for name in KEPT},
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
    old, old_lines, why = _read_index(store)
    finished = not why
    known = {line["file"] for line in old_lines}
    other = "choose another folder or remove it"
    if old and old | settings(audio, dataset.channel) != old:
        raise UserError(f"{printable(store)} holds {describe(old)}, not {describe(header)}; {other}")
    if known and known.isdisjoint(dataset.name(clip.path) for clip in dataset.clips):
        raise UserError(f"{printable(store)} is the store of other data; {other}")
    size, report = audio.samples * SAMPLE.itemsize, []  # bytes per row
    lines: dict[str, list[Line]] = {}  # of each split

    def difference(held: tuple[int, Clip, Line]) -> str:
        row, clip, line = held
        if verify and line["sound"] and line["sound"] != attempt(measure, clip.path):
            return "other content, though size and time are the same"
        array = store / ARRAY.format(clip.split)
        content = ""
        with suppress(OSError), open(array, "rb") as file:
            file.seek(row * size)
            content = hashlib.sha256(file.read(size)).hexdigest()
        return "" if line["problem"] or line["content"] == content else f"damaged in {array.name}"

    for split in SPLITS:  # its first rows stay as long as nothing is wrong
        same = old and old["files"][split] == header["files"][split]
        held = [line for line in old_lines if same and line["clip"]["split"] == split]
        clips, intact = dataset.split(split), len(held)
        # rows of an unfinished store may not have reached the disk before the machine stopped
        checks = list(zip(count(), clips, held)) if verify or not finished else []
        for row, text in enumerate(on_threads(difference, checks, "checking", jobs)):
            if text:
                intact = row
                report += [f"{held[row]['file']}: {text}; {split} packed again"] if verify else []
                break
        if finished and intact < len(clips):
            intact = 0
            (store / ARRAY.format(split)).unlink(missing_ok=True)  # what a reader has open stays as it is
        lines[split] = held[:intact]

    decoded = len(dataset.clips) - sum(map(len, lines.values()))
    check_space(store, decoded * size)
    if decoded:
        _write_index(store, header, chain(*lines.values()))

    def named(clip: Clip) -> Line:
        file = dataset.name(clip.path)
        return {"file": file, "clip": asdict(clip) | {"path": file}}

    def work(clip: Clip) -> tuple[Line, np.ndarray]:
        line, row = named(clip) | {"problem": "", "remarks": []}, np.zeros(audio.samples, SAMPLE)
        line["sound"] = attempt(measure, clip.path) if clip.start == 0 else None
        try:
            row[:], line["remarks"] = decode(clip.path, audio, dataset.channel, clip.start)
        except UserError as error:
            line["problem"] = str(error)
        return line | {"content": hashlib.sha256(row).hexdigest()}, row

    for split, own in lines.items():
        with open(store / ARRAY.format(split), "ab") as array, open(store / INDEX, "a", 1, "utf-8") as index:
            array.truncate(len(own) * size)
            for line, row in on_threads(work, dataset.split(split)[len(own) :], f"packing {split}", jobs):
                array.write(row)
                index.write(json.dumps(line) + "\n")
                own.append(line)
            array.flush()
            os.fsync(array.fileno())
    # the truth of a clip may be newer than its line
    in_order = {split: iter(own) for split, own in lines.items()}
    final = [next(in_order[clip.split]) | named(clip) for clip in dataset.clips]
    _write_index(store, header, final, finished=True)

    results = (line["problem"] or (None, line["remarks"]) for line in final)
    dataset.decoded(dataset.clips, results, audio)
    report += filter(None, [dataset.report()])
    report.append(
        f"{printable(store)}: {len(dataset.split('train'))} training and {len(dataset.split('test'))} test "
        f"clips of {audio.seconds:g} s at {audio.sample_rate} Hz, {len(final) * size / 1e6:.0f} MB; "
        f"clips: {decoded} decoded, {len(final) - decoded} kept"
    )
    return "\n".join(report)


def _write_index(store: Path, header: Line, lines: Iterable[Line], finished: bool = False) -> None:
    content = "".join(json.dumps(line) + "\n" for line in lines)
    digest = _digest(header, content.encode() if finished else b"")
    with replacing(store / INDEX) as file:
        file.write(json.dumps(header | {"digest": digest}) + "\n" + content)


def _read_index(store: Path) -> tuple[Line, list[Line], str]:
    """Header, intact lines, and why this is no finished store; ({}, [], why) where it is damaged."""
    lines: list[Line] = []
    try:
        first, _, content = (store / INDEX).read_bytes().partition(b"\n")
        header = json.loads(first)
        if header["format"] != FORMAT:
            raise UserError(f"{printable(store)} was packed by another version; remove it and pack again")
        digest = header.pop("digest")
        finished = digest == _digest(header, content)
        if not finished and digest != _digest(header, b""):
            raise ValueError
        header.setdefault("step", 0.0)  # before there were several clips of a recording
        with suppress(ValueError, LookupError, TypeError):  # the last line may be half there
            for line in map(json.loads, content.splitlines()):
                line["clip"]["split"], [line[name] for name in ("file", "sound", "problem", "content")]
                lines.append(line)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}, [], f"{printable(store / INDEX)} is damaged; {AGAIN}"
    if not finished:
        return header, lines, f"{printable(store)}: its packing was not finished; {AGAIN}, it resumes"
    counts = Counter(line["clip"]["split"] for line in lines)
    for split in SPLITS:
        array, size = store / ARRAY.format(split), round(header["seconds"] * header["sample_rate"]) * 2
        has, expected = array.stat().st_size if array.is_file() else 0, counts[split] * size
        if has != expected:
            return {}, [], f"{printable(array)} is damaged: {has} bytes, not {expected}; {AGAIN}"
    return header, lines, ""


def _digest(header: Line, content: bytes) -> str:
    """Of everything in a finished index, so that no line needs a check of its own; else of the header."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode() + content).hexdigest()


def _list_digest(dataset: Dataset, split: str) -> str:
    """Stands for the files of a split: their names, sizes and times of change."""
    paths = [clip.path for clip in dataset.split(split) if not clip.start]
    files = [(dataset.name(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
