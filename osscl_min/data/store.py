"""The packed store, a folder: every clip decoded once, to be read in batches without decoding.

  train.int16, test.int16   samples, little-endian; a row of equal length a clip, in any order
  index.jsonl               a line about the whole, then a line a file: its clip and its `Entry`

`pack` makes it; the index comes last, so a store without one is not finished.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from osscl_min.config import AudioConfig
from osscl_min.data.clips import Clip, Dataset, decode
from osscl_min.runtime.files import UserError

INDEX, JOURNAL, ARRAY = "index.jsonl", "journal.jsonl", "{}.int16"
FORMAT = 1  # of the index
SAMPLE = np.dtype("<i2")


@dataclass(frozen=True)
class Entry:
    """What decoding a file gave."""

    file: str  # relative to the data folder
    split: str
    size: int  # bytes, of the file
    mtime_ns: int  # when it was last changed
    sha256: str  # of the file
    rate: int | None = None  # Hz, of the file; None where it is no sound file
    channels: int | None = None
    frames: int | None = None  # samples of a channel
    encoding: str = ""  # "PCM_16", ...
    problem: str = ""  # why it is not used
    remarks: tuple[str, ...] = ()  # what was done to it
    length: int = 0  # samples of the decoded clip
    clipped: int = 0  # of them, those at either end of 16 bits
    level: float | None = None  # root of the mean square, dB of full scale, -100 at least
    content: str = ""  # sha256 of the decoded samples
    offset: int | None = None  # where they begin in the split's array, in samples


NAMES = [field.name for field in fields(Entry)]
CLIP_NAMES = [field.name for field in fields(Clip) if field.name != "path"]


def examine(task: tuple[Path, str, str], audio: AudioConfig, channel: int | None) -> tuple[Entry, np.ndarray]:
    """Decode a file and describe it.

    Parameters
    ----------
    task : (path, file, split)
        Where it lies and what the entry calls it.
    audio : AudioConfig
    channel : int or None
        As `dataset.decode` takes it.

    Returns
    -------
    Entry
        Without an offset.
    samples : (audio.samples,) int16; empty where the file has a problem
    """
    path, file, split = task
    entry = Entry(file, split, *stamp(path), file_hash(path))
    try:
        info = soundfile.info(path)
        found = {"rate": info.samplerate, "channels": info.channels, "frames": info.frames}
        entry = replace(entry, **found, encoding=info.subtype)
    except RuntimeError:
        pass  # `decode` says why
    try:
        samples, remarks = decode(path, audio, channel)
    except UserError as error:
        return replace(entry, problem=str(error)), np.empty(0, SAMPLE)
    samples = samples.astype(SAMPLE, copy=False)
    wave = samples.astype(np.float32)
    root = np.sqrt(np.dot(wave, wave) / len(wave)) / 32768
    return replace(
        entry,
        remarks=tuple(remarks),
        length=len(samples),
        clipped=int(np.count_nonzero((samples == 32767) | (samples == -32768))),
        level=round(20 * float(np.log10(max(root, 1e-5))), 2),
        content=hashlib.sha256(samples).hexdigest(),
    ), samples


def is_store(path: Path | str) -> bool:
    """Whether a folder holds a store, finished or not."""
    return (Path(path) / INDEX).is_file() or (Path(path) / JOURNAL).is_file()


def describe(header: dict[str, Any]) -> str:
    """What the rows are."""
    channel = "the mean of all channels" if header["channel"] is None else f"channel {header['channel']}"
    return f"clips of {header['seconds']:g} s at {header['sample_rate']} Hz, {channel}"


def read_index(store: Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The line about the whole, and the lines of the files.

    Raises
    ------
    UserError
        If the store is not finished or damaged.
    """
    store = Path(store)
    if not (store / INDEX).is_file():
        raise UserError(f"{store}: its packing was not finished; run the same `pack` again, it goes on")
    again = "run the same `pack` again"
    try:
        with open(store / INDEX, encoding="utf-8") as file:
            header, *lines = map(json.loads, file)
        complete = header["format"] == FORMAT and header["files"] == len(lines)
        complete = complete and all(line.keys() >= {*NAMES, *CLIP_NAMES} for line in lines)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{store / INDEX} is damaged; {again}")
    for split in ("train", "test"):
        array = store / ARRAY.format(split)
        usable = [line for line in lines if line["split"] == split and not line["problem"]]
        needed = max((line["offset"] + line["length"] for line in usable), default=0) * SAMPLE.itemsize
        if size_of(array) < needed:
            raise UserError(f"{array} is damaged: {size_of(array)} bytes, not {needed}; {again}")
    return header, lines


def read_store(store: Path | str) -> tuple[dict[str, Any], Dataset, list[dict[str, Any]]]:
    """The index of a store, with every file's clip, usable or not, as `dataset.scan` found it.

    Returns
    -------
    header : dict
    dataset : Dataset
    lines : list of dict
        One for each of the data set's clips.

    Raises
    ------
    UserError
        If the store is not finished or damaged.
    """
    header, lines = read_index(store)
    root = Path(header["root"])
    clips = [Clip(root / line["file"], **{name: line[name] for name in CLIP_NAMES}) for line in lines]
    kept = {name: header[name] for name in ("problems", "synthetic", "layout", "channel")}
    return header, Dataset(root, clips, **kept), lines


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def stamp(path: Path) -> tuple[int, int]:
    """Size (bytes) and time of the last change (ns)."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def file_hash(path: Path) -> str:
    """sha256 of a file; "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
