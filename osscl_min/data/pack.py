"""Make the packed store of a data set, or bring it up to date.

What is packed so far stands in the store's journal.jsonl, from which an interrupted packing goes on. A
finished store stays readable meanwhile: new rows take places that its index does not use, and the new index
replaces the old one at the end.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from osscl_min.config import AudioConfig
from osscl_min.data.clips import Clip, Dataset, label_table, scan
from osscl_min.data.parallel import in_processes
from osscl_min.data.store import (
    ARRAY,
    FORMAT,
    INDEX,
    JOURNAL,
    NAMES,
    SAMPLE,
    Entry,
    describe,
    examine,
    file_hash,
    is_store,
    size_of,
    stamp,
)
from osscl_min.runtime.files import UserError, replacing

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two packings apart
    fcntl = None

FULL = 5  # exit status, as a download's
AGAIN = "run the same command again, it goes on from here"
Key = tuple[str, str]  # split, file


def pack(
    data: Path | str,
    store: Path | str,
    audio: AudioConfig,
    *,
    channel: int | None = None,
    verify: bool = False,
    jobs: int | None = None,
) -> str:
    """Bring a store up to date with its data; the first time, that is all of it.

    A file that was added, or changed in size or time, is decoded; one that is gone leaves the index.
    Killed at any moment, the next call goes on. Who reads a store may go on while it is brought up to date
    once, not twice: then the rows of removed files are used again.

    Parameters
    ----------
    data : Path or str
        A data folder or manifest, as `dataset.scan` takes it.
    store : Path or str
        A folder of its own.
    audio : AudioConfig
        Rate (Hz) and length (samples) of the rows.
    channel : int, optional
        As for `dataset.scan`.
    verify : bool
        Also compare every file, and every row of the store, by its hash.
    jobs : int, optional
        Processes; the machine's cores without.

    Returns
    -------
    str
        What was done, what differed, and what of the data is not used.

    Raises
    ------
    UserError
        If the store holds something else, cannot be written (exit status 5: the disk is full), or there is
        nothing to pack.
    """
    store = Path(store)
    if is_store(data):
        raise UserError(f"{data} is a packed store itself; `pack` takes the folder that it was made from")
    dataset = scan(data, channel)
    if dataset.layout != "manifest" and store.resolve().is_relative_to(dataset.root.resolve()):
        raise UserError(f"{store} lies in the data folder; choose a place outside")
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
    }
    try:
        with _locked(store):
            return _update(dataset, store, header, audio, verify, jobs)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{store}: the disk is full; free some space, {AGAIN}", FULL) from error
        raise UserError(f"cannot write {store}: {error.strerror or error}; {AGAIN}") from error


def _update(
    dataset: Dataset, store: Path, header: dict, audio: AudioConfig, verify: bool, jobs: int | None
) -> str:
    clips = {(clip.split, dataset.name(clip.path)): clip for clip in dataset.clips}
    arrays = {split: store / ARRAY.format(split) for split in ("train", "test")}
    indexed, noted = _what_is_there(store, header)
    if indexed and not clips.keys() & indexed.keys():
        raise UserError(f"{store} is the store of other data; choose another folder or remove it")
    entries = {
        key: entry
        for key, entry in (indexed | noted).items()
        if key in clips
        and (entry.size, entry.mtime_ns) == stamp(clips[key].path)
        and (entry.problem or _end(entry) <= size_of(arrays[entry.split]))
    }
    # a noted row may not have reached the disk before the machine stopped
    checks = [(clips[key].path, arrays[key[0]], entries[key]) for key in entries if verify or key in noted]
    differences = {}
    results = in_processes(partial(_difference, source=verify), checks, "checking", jobs)
    for (*_, entry), difference in zip(checks, results, strict=True):
        if difference:
            differences[entry.file] = difference
            del entries[entry.split, entry.file]

    free = {}
    for split in arrays:
        taken = {entry.offset for entry in (*indexed.values(), *entries.values()) if entry.split == split}
        free[split] = itertools.filterfalse(taken.__contains__, itertools.count(0, audio.samples))
    tasks = [
        (clip.path, file, split, arrays[split], next(free[split]))
        for (split, file), clip in clips.items()
        if (split, file) not in entries
    ]
    _make_sure_of_room(store, arrays, tasks, audio)
    with open(store / JOURNAL, "a", encoding="utf-8") as journal:
        if not journal.tell():
            journal.write(json.dumps(header) + "\n")
            journal.flush()
        work = partial(_decode_into, audio=audio, channel=dataset.channel)
        for entry in in_processes(work, tasks, "packing", jobs):
            journal.write(json.dumps(asdict(entry)) + "\n")
            journal.flush()
            entries[entry.split, entry.file] = entry
    entries = {key: entries[key] for key in clips}  # in the order of the folder
    write_index(store, header, clips, entries)

    dataset.problems |= {entry.file: entry.problem for entry in entries.values() if entry.problem}
    dataset.remarks.update(remark for entry in entries.values() for remark in entry.remarks)
    lines = [f"{file}: {difference}; packed again" for file, difference in differences.items() if verify]
    lines += filter(None, [dataset.report()])
    usable = Counter(split for (split, _), entry in entries.items() if not entry.problem)
    lines.append(
        f"{store}: {usable['train']} training and {usable['test']} test clips of {audio.seconds:g} s at "
        f"{audio.sample_rate} Hz, {sum(map(size_of, arrays.values())) / 1e6:.0f} MB; "
        f"files: {len(tasks)} decoded, {len(entries) - len(tasks)} kept, "
        f"{len(indexed.keys() - clips.keys())} removed"
    )
    return "\n".join(lines)


def _make_sure_of_room(store: Path, arrays: dict[str, Path], tasks: list[tuple], audio: AudioConfig) -> None:
    needed = 0
    for split, array in arrays.items():
        ends = [(offset + audio.samples) * SAMPLE.itemsize for *_, name, _, offset in tasks if name == split]
        needed += max(0, max(ends, default=0) - size_of(array))
    if needed > (room := shutil.disk_usage(store).free):
        raise UserError(f"{store}: {needed / 1e9:.3g} GB needed, {room / 1e9:.3g} GB free; make room", FULL)


def _what_is_there(store: Path, header: dict) -> tuple[dict[Key, Entry], dict[Key, Entry]]:
    """The entries of the index and those of the journal, whose end may be missing."""
    if not is_store(store) and any(store.iterdir()):
        raise UserError(f"{store} is not empty and no packed store; choose another folder")
    for left in store.glob(f".{INDEX}.*.part"):
        left.unlink()
    indexed, _ = _read_entries(store / INDEX, header)
    noted, whole = _read_entries(store / JOURNAL, header)
    if (store / JOURNAL).is_file():
        os.truncate(store / JOURNAL, whole)
    return indexed, noted


def _read_entries(path: Path, header: dict) -> tuple[dict[Key, Entry], int]:
    """Entries up to the first line that is damaged, and the bytes up to there."""
    entries: dict[Key, Entry] = {}
    whole = 0
    if not path.is_file():
        return entries, whole
    with open(path, "rb") as file:
        for line in file:
            try:
                content = json.loads(line if line.endswith(b"\n") else "")
                if whole:
                    values = {key: content[key] for key in NAMES}
                    entry = Entry(**values | {"remarks": tuple(values["remarks"])})
                    entries[entry.split, entry.file] = entry
                else:
                    there, here = describe(content), describe(header)
            except (ValueError, KeyError, TypeError):
                break
            if not whole and there != here:
                todo = "choose another folder or remove it"
                raise UserError(f"{path.parent} holds {there}, not {here}; {todo}")
            whole += len(line)
    return entries, whole


def write_index(store: Path, header: dict, clips: dict[Key, Clip], entries: dict[Key, Entry]) -> None:
    """Finish a store: its rows must reach the disk, then the index is written.

    Parameters
    ----------
    store : Path
    header : dict
        What `store.read_index` gives, but the number of files.
    clips, entries : dict
        (split, file) -> the clip, and what is known of its file; equal keys in equal order.
    """
    for array in store.glob(ARRAY.format("*")):
        with open(array, "rb") as file:
            os.fsync(file.fileno())
    usable = [clips[key] for key, entry in entries.items() if key[0] == "train" and not entry.problem]
    try:
        classes = label_table(usable)
    except UserError:  # one machine alone
        classes = ()
    numbers = {machine: number for number, machine in enumerate(classes)}
    with replacing(store / INDEX) as file:
        file.write(json.dumps(header | {"files": len(entries)}) + "\n")
        for key, entry in entries.items():
            clip = asdict(clips[key])
            del clip["path"]
            file.write(json.dumps({**clip, "label": numbers.get(clips[key].machine), **asdict(entry)}) + "\n")
    (store / JOURNAL).unlink(missing_ok=True)


def _decode_into(task: tuple[Path, str, str, Path, int], audio: AudioConfig, channel: int | None) -> Entry:
    """Decode a file into its row: written, not mapped, so that a full disk is an error and no signal."""
    *source, array, offset = task
    entry, samples = examine(tuple(source), audio, channel)
    if entry.problem:
        return entry
    with open(os.open(array, os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0) as file:
        file.seek(offset * SAMPLE.itemsize)
        left = memoryview(samples).cast("B")
        while left:
            left = left[file.write(left) :]
    return replace(entry, offset=offset)


def _difference(task: tuple[Path, Path, Entry], source: bool) -> str:
    """How a row, or the file behind it, differs from its entry; "" if it does not."""
    path, array, entry = task
    if source and file_hash(path) != entry.sha256:
        return "other content, though size and time are the same"
    if entry.problem:
        return ""
    with open(array, "rb") as file:
        file.seek(entry.offset * SAMPLE.itemsize)
        row = file.read(entry.length * SAMPLE.itemsize)
    return "" if hashlib.sha256(row).hexdigest() == entry.content else f"damaged in {array.name}"


def _end(entry: Entry) -> int:
    return (entry.offset + entry.length) * SAMPLE.itemsize


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Keep a second packing out of the folder, which is made where missing."""
    store.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(store, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{store}: another `pack` is at work here; let it end first") from error
        yield
    finally:
        os.close(descriptor)
