"""The door to the data, `open_data`, and the packed store behind it: clips decoded once, read by batches.

A store is a folder:
  store.json               rate, length, channel and source; written first
  train.int16, test.int16  raw little-endian samples, a row of equal length a clip
  index.csv                a line a file (`Entry`); written last, so a store without it is not finished
While packing, new arrays and the lines of index.csv so far are called *.part; an interrupted packing goes on
from them. An existing store stays whole while it is brought up to date: new rows take unused places, and
the new index replaces the old one at the end.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import tyro
from tqdm import tqdm

from osscl_min.config import AudioConfig
from osscl_min.dataset import Clip, Dataset, FolderReader, label_table, listen, scan
from osscl_min.files import UserError, write_csv, write_json

SETTINGS, INDEX, JOURNAL = "store.json", "index.csv", "index.csv.part"
FULL_DISK = 5  # exit status


class Reader(Protocol):
    """Batches of samples of one split; `FolderReader` and `PackedReader` give the same numbers, bit for bit.

    Attributes
    ----------
    clips : list of Clip
        The usable clips; `read` counts positions in this list.
    """

    clips: list[Clip]

    def __len__(self) -> int: ...

    def read(self, positions: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Samples of the clips at `positions`: (len(positions), samples) int16, into `out` where given."""


@dataclass
class Data:
    """What training and evaluation need of a data folder or of a store.

    Attributes
    ----------
    dataset : Dataset
        Every clip found, whatever its split, with `problems` and `remarks`; in a split that was opened,
        only clips that decode.
    train, test : Reader or None
        A reader for each split that was asked for. It may be empty (`len(reader) == 0`).
    note : str
        That a store is older than its source, if it is.
    """

    dataset: Dataset
    train: Reader | None = None
    test: Reader | None = None
    note: str = ""

    def report(self) -> str:
        """What is not used and why, and what was done to the rest, as lines to print; "" if nothing."""
        return "\n".join(filter(None, [self.note, self.dataset.report()]))


def open_data(
    path: Path | str,
    audio: AudioConfig,
    *,
    splits: Sequence[str] = ("train", "test"),
    channel: int | None = None,
    strict: bool = False,
) -> Data:
    """Open sound files or a packed store; both give the same clips in the same order, and the same samples.

    Parameters
    ----------
    path : Path or str
        A data folder (any layout that `dataset.scan` knows), a manifest (.csv), or a store made by `pack`.
    audio : AudioConfig
        Rate (Hz) and length (samples) that the model hears.
    splits : sequence of {"train", "test"}
        The splits to make readers for. Opening a folder decodes every clip of these once, to check it.
    channel : int, optional
        The channel of files with several: a number from 0; left out, the layout's own choice (0 for MIMII,
        else the mean of all). A store has made that choice already.
    strict : bool
        Stop if any file is not usable.

    Returns
    -------
    Data

    Raises
    ------
    UserError
        If there is nothing usable, or, when `strict`, anything that is not; if a store is unfinished or was
        packed at another rate or for shorter clips.

    Examples
    --------
    >>> data = open_data("data", config.model.audio, splits=["train"])  # doctest: +SKIP
    >>> print(data.report())  # doctest: +SKIP
    >>> table = label_table(data.train.clips)  # doctest: +SKIP
    >>> wave = torch.from_numpy(data.train.read([5, 0, 7])).float() / 32768  # doctest: +SKIP
    """
    path = Path(path)
    if (path / SETTINGS).is_file():
        return _open_store(path, audio, splits, channel, strict)
    dataset = scan(path, channel)
    readers = {split: FolderReader(dataset, dataset.split(split), audio) for split in splits}
    dataset.report(strict)
    return Data(dataset, **readers)


class PackedReader:
    """Batches of samples from a store, copied once, from the page cache into the batch.

    Parameters
    ----------
    path : Path
        The array of one split.
    clips : sequence of Clip
    offsets : (len(clips),) int64
        Where each clip begins, in samples.
    samples : int
        How many samples of a clip to read.
    """

    def __init__(self, path: Path, clips: Sequence[Clip], offsets: np.ndarray, samples: int):
        self.clips = list(clips)
        self.offsets = offsets
        self.samples = samples
        # an empty file cannot be mapped
        self.array = np.memmap(path, "<i2", "r") if self.clips else np.empty(0, "<i2")

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, positions: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Samples of the clips at `positions`: (len(positions), samples) int16, into `out` where given."""
        if out is None:
            out = np.empty((len(positions), self.samples), np.int16)
        for row, position in zip(out, positions, strict=True):
            start = self.offsets[position]
            row[:] = self.array[start : start + self.samples]
        return out


def _open_store(
    path: Path, audio: AudioConfig, splits: Sequence[str], channel: int | None, strict: bool
) -> Data:
    settings = read_settings(path)
    if not (path / INDEX).is_file():
        raise UserError(f"{path}: packing was not finished; run `python -m osscl_min pack` on it again")
    if settings["rate"] != audio.sample_rate or settings["samples"] < audio.samples:
        raise UserError(
            f"{path} holds clips of {settings['samples']} samples at {settings['rate']} Hz, but the model "
            f"hears {audio.samples} at {audio.sample_rate} Hz; pack the data anew for it"
        )
    if channel not in (None, settings["channel"]):
        raise UserError(f"{path} was packed with channel {settings['channel']}, not {channel}; pack anew")
    root = Path(settings["root"])
    dataset = Dataset(
        root,
        [],
        synthetic=settings["synthetic"],
        layout=settings["layout"],
        channel=settings["channel"],
    )
    offsets: dict[str, list[int]] = {"train": [], "test": []}
    for entry in read_index(path):
        if entry.split in splits:
            dataset.remarks.update(filter(None, entry.remarks.split("; ")))
        if entry.problem and entry.split in ("", *splits):
            dataset.problems[entry.file] = entry.problem
        elif not entry.problem:
            dataset.clips.append(entry.clip(root))
            offsets[entry.split].append(entry.offset)
    dataset.report(strict)
    readers = {}
    for split in splits:
        array, starts = path / f"{split}.int16", np.array(offsets[split], np.int64)
        size = array.stat().st_size if array.exists() else 0
        if len(starts) and size < (starts.max() + settings["samples"]) * 2:
            raise UserError(f"{array}: missing or cut short; run `python -m osscl_min pack` again")
        readers[split] = PackedReader(array, dataset.split(split), starts, audio.samples)
    return Data(dataset, **readers, note=_changes(path, settings))


@dataclass
class Entry:
    """One line of a store's index: a source file, its place in the array, and what is known of it."""

    file: str  # relative to the data folder
    machine_type: str = ""
    machine_id: str = ""
    label: int | None = None  # position in the label table of the store's training clips
    split: str = ""
    anomaly: int | None = None
    subset: str = ""
    domain: str = ""
    attributes: str = ""
    offset: int | None = None  # samples, in the array of the split
    length: int | None = None  # samples
    clipped: int | None = None  # samples at full scale
    seconds: float | None = None  # of the source, as the next two
    rate: int | None = None  # Hz
    channels: int | None = None
    level: float | None = None  # RMS, dB re full scale
    silence: float | None = None  # seconds of tenths of a second without any change
    bytes: int | None = None  # of the source, as the next two
    mtime_ns: int | None = None
    source_hash: str = ""
    content_hash: str = ""  # of the packed samples
    remarks: str = ""  # what was done to it, separated by "; "
    problem: str = ""  # why it is not used

    def clip(self, root: Path) -> Clip:
        """The clip, its file named relative to `root`."""
        return Clip(
            root / self.file,
            sys.intern(self.machine_type),
            sys.intern(self.machine_id),
            sys.intern(self.split),
            self.anomaly,
            sys.intern(self.subset),
            self.domain,
            self.attributes,
        )

    def describes(self, other: Entry) -> bool:
        """Whether the clip and its file are the same, as far as name, size and time tell."""
        names = ("split", "machine_type", "machine_id", "anomaly", "subset", "domain", "attributes")
        return self.same_source(other) and all(getattr(self, name) == getattr(other, name) for name in names)

    def same_source(self, other: Entry) -> bool:
        """Whether size and time of the source file, and the split, are the same."""
        return (self.split, self.bytes, self.mtime_ns) == (other.split, other.bytes, other.mtime_ns)


COLUMNS = [item.name for item in fields(Entry)]
_TYPES: dict[str, Callable[[str], Any]] = {
    name: next((kind for kind in (int, float) if kind in typing.get_args(hint)), str)
    for name, hint in typing.get_type_hints(Entry).items()
}


def read_settings(store: Path) -> dict[str, Any]:
    """What a store was packed with: rate (Hz), samples, channel, source, root, layout, synthetic.

    Raises
    ------
    UserError
        If store.json cannot be read.
    """
    try:
        return json.loads((store / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{store / SETTINGS}: not readable ({error}); delete the store and pack anew"
        ) from error


def read_index(store: Path, name: str = INDEX) -> Iterator[Entry]:
    """The entries of a store's index, or of the journal of an interrupted packing; whole lines only."""
    with open(store / name, newline="", encoding="utf-8") as file:
        rows = csv.reader(line for line in file if line.endswith("\n"))
        if next(rows, None) != COLUMNS:
            raise UserError(f"{store / name}: made by another version; delete the store and pack anew")
        for row in rows:
            values = (
                _TYPES[column](cell) if cell or _TYPES[column] is str else None
                for column, cell in zip(COLUMNS, row, strict=True)
            )
            yield Entry(*values)


def pack(
    data: Path | str,
    store: Path | str,
    audio: AudioConfig | None = None,
    *,
    channel: int | None = None,
    jobs: int | None = None,
    verify: bool = False,
    strict: bool = False,
) -> dict[str, int]:
    """Decode every clip once into a store, or bring a store up to date.

    Parameters
    ----------
    data : Path or str
        Whatever `dataset.scan` takes.
    store : Path or str
        A new folder, an unfinished store, or a finished one: files that were added, changed (by size and
        time) or removed since are followed, the rest is kept.
    audio : AudioConfig, optional
        Rate and length of the packed clips; left out, 16 kHz and 10 s. A store also serves shorter clips.
    channel : int, optional
        As for `open_data`.
    jobs : int, optional
        Processes; left out, one a processor.
    verify : bool
        Compare source files and packed samples with their hashes too, and pack what differs again.
    strict : bool
        Stop if any file is not usable.

    Returns
    -------
    dict
        Numbers of files: packed, kept, removed, unusable; train and test clips.

    Raises
    ------
    UserError
        If the store belongs to other settings, the disk is too small (exit status 5) or cannot be written, or
        the data is not usable.
    """
    store, audio, jobs = Path(store), audio or AudioConfig(), jobs or os.cpu_count()
    dataset = scan(data, channel)
    _prepare(store, Path(data), dataset, audio)
    arrays = {split: store / f"{split}.int16" for split in ("train", "test")}
    arrays = {split: path if path.exists() else Path(f"{path}.part") for split, path in arrays.items()}
    for path in arrays.values():
        path.touch()

    committed = list(read_index(store)) if (store / INDEX).exists() else []
    journal = list(read_index(store, JOURNAL)) if (store / JOURNAL).exists() else []
    # what a power failure may have left out of the arrays is found by its hash
    journal = _intact(journal, arrays, None, jobs, "checking what was packed before")
    known = {entry.file: entry for entry in [*committed, *journal]}
    current = [_current(dataset, clip) for clip in dataset.clips]
    ends = {split: path.stat().st_size // 2 for split, path in arrays.items()}
    kept = [
        replace(old, **_description(entry))
        for entry in current
        if (old := known.get(entry.file)) and old.same_source(entry) and not old.problem
        if old.offset + old.length <= ends[old.split]
    ]
    if verify:
        kept = _intact(kept, arrays, dataset.root, jobs, "verifying")
    have = {entry.file for entry in kept}
    missing = [entry for entry in current if entry.file not in have]

    room = shutil.disk_usage(store).free
    needed = len(missing) * audio.samples * 2
    if needed > room:
        raise UserError(
            f"{store}: packing needs {needed / 1e9:.1f} GB, but only {room / 1e9:.1f} GB are free", FULL_DISK
        )
    taken = {split: {e.offset for e in [*committed, *journal] if e.split == split} for split in arrays}
    free = {
        split: (n * audio.samples for n in itertools.count() if n * audio.samples not in taken[split])
        for split in arrays
    }
    tasks = [
        (dataset.root / entry.file, audio, dataset.channel, arrays[entry.split], next(free[entry.split]))
        for entry in missing
    ]
    fresh = []
    try:
        with open(store / JOURNAL, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(astuple(entry) for entry in journal)
            for number, facts in in_processes(examine, tasks, jobs, "packing"):
                fresh.append(replace(missing[number], **facts))
                writer.writerow(astuple(fresh[-1]))
                file.flush()
        _commit(store, dataset, arrays, [*kept, *fresh], strict)
    except OSError as error:
        status = FULL_DISK if error.errno == 28 else 2
        raise UserError(f"{store}: cannot write ({error.strerror}); run it again to go on", status) from error
    return {
        "packed": sum(not entry.problem for entry in fresh),
        "kept": len(kept),
        "removed": len({entry.file for entry in committed} - {entry.file for entry in current}),
        "unusable": len(dataset.problems),
        **{split: len(dataset.split(split)) for split in arrays},
    }


def _prepare(store: Path, data: Path, dataset: Dataset, audio: AudioConfig) -> None:
    """Make the store's folder and settings, or check that they are of this data and these settings."""
    places = (store.resolve(), *store.resolve().parents)
    if dataset.layout != "manifest" and dataset.root.resolve() in places:
        raise UserError(f"{store}: lies in the data folder; choose a place beside {dataset.root}")
    settings = {
        "rate": audio.sample_rate,
        "samples": audio.samples,
        "channel": dataset.channel,
        "layout": dataset.layout,
        "synthetic": dataset.synthetic,
        "source": str(data.resolve()),
        "root": str(dataset.root.resolve()),
    }
    if (store / SETTINGS).exists():
        old = read_settings(store)
        differ = [name for name in ("rate", "samples", "channel") if old.get(name) != settings[name]]
        if differ:
            name = differ[0]
            raise UserError(
                f"{store}: packed with {name} {old.get(name)}, not {settings[name]}; choose another folder"
            )
    elif store.exists() and (not store.is_dir() or any(store.iterdir())):
        raise UserError(f"{store}: is not a store and not empty; choose another folder")
    write_json(store / SETTINGS, settings)


def _description(entry: Entry) -> dict[str, Any]:
    """The fields that the name and place of the file tell."""
    names = ("machine_type", "machine_id", "label", "split", "anomaly", "subset", "domain", "attributes")
    return {name: getattr(entry, name) for name in names}


def _current(dataset: Dataset, clip: Clip) -> Entry:
    """A clip's entry as far as its name, size and time tell."""
    try:
        state = clip.path.stat()
    except OSError as error:
        raise UserError(f"{clip.path}: cannot be read ({error.strerror})") from error
    values = asdict(clip)
    del values["path"]
    return Entry(dataset.name(clip.path), **values, bytes=state.st_size, mtime_ns=state.st_mtime_ns)


def _changes(store: Path, settings: dict[str, Any]) -> str:
    """A line that says that the source is no longer what was packed; "" if it is, or is not here."""
    source = Path(settings["source"])
    if not source.exists():
        return ""
    dataset = scan(source, settings["channel"])
    packed = {entry.file: entry for entry in read_index(store)}
    current = [_current(dataset, clip) for clip in dataset.clips]
    changed = [
        entry.file for entry in current if entry.file in packed and not packed[entry.file].describes(entry)
    ]
    added = [entry.file for entry in current if entry.file not in packed]
    removed = set(packed) - {entry.file for entry in current} - set(dataset.problems)
    if not (changed or added or removed):
        return ""
    example = (changed or added or sorted(removed))[0]
    return (
        f"{source} has changed since it was packed into {store} ({len(changed)} changed, {len(added)} new, "
        f"{len(removed)} removed; {example}); run `python -m osscl_min pack` again"
    )


def _commit(
    store: Path, dataset: Dataset, arrays: dict[str, Path], entries: list[Entry], strict: bool
) -> None:
    """Label the entries, add the unusable files, and make all of it the store."""
    entries = {entry.file: entry for entry in entries}
    for entry in entries.values():
        if entry.problem:
            dataset.problems[entry.file] = entry.problem
        dataset.remarks.update(filter(None, entry.remarks.split("; ")))
    dataset.clips = [clip for clip in dataset.clips if dataset.name(clip.path) not in dataset.problems]
    dataset.report(strict)
    try:
        table = label_table(dataset.split("train"))
    except UserError:  # nothing to train on; the store can still be evaluated
        table = ()
    for entry in entries.values():
        machine = entry.machine_type, entry.machine_id
        entry.label = table.index(machine) if machine in table else None
    ordered = [entries[dataset.name(clip.path)] for clip in dataset.clips]
    ordered += [entries.get(file) or Entry(file, problem=why) for file, why in dataset.problems.items()]
    for split, path in arrays.items():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, store / f"{split}.int16")
    write_csv(store / INDEX, COLUMNS, [astuple(entry) for entry in ordered])
    (store / JOURNAL).unlink()


def examine(
    path: Path, audio: AudioConfig, channel: int | None, array: Path | None, offset: int | None
) -> dict[str, Any]:
    """Decode one file, write it into an array where one is given, and measure it.

    Parameters
    ----------
    path : Path
    audio : AudioConfig
    channel : int or None
    array : Path or None
        Raw int16; the clip's row is written at `offset` (samples).
    offset : int or None

    Returns
    -------
    dict
        The fields of `Entry` from `offset` on.
    """
    state = path.stat()
    facts = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "source_hash": _hash_of(path)}
    try:
        sound = listen(path, audio, channel)
    except UserError as error:
        return {**facts, "problem": str(error)}
    samples = sound.samples.astype("<i2", copy=False)
    if array is not None:
        with open(array, "rb+", buffering=0) as file:
            file.seek(offset * 2)
            file.write(samples)
    tenths = samples[: len(samples) // (audio.sample_rate // 10) * (audio.sample_rate // 10)]
    tenths = tenths.reshape(-1, audio.sample_rate // 10)
    scaled = samples.astype(np.float32) / 32768
    return {
        **facts,
        "offset": offset,
        "length": len(samples),
        "clipped": sound.clipped,
        "seconds": sound.seconds,
        "rate": sound.rate,
        "channels": sound.channels,
        "level": round(float(10 * np.log10(np.mean(scaled * scaled))), 3),
        "silence": round(float(np.mean(tenths.max(1) == tenths.min(1))) * tenths.size / audio.sample_rate, 1),
        "content_hash": _digest(samples),
        "remarks": "; ".join(sound.remarks),
    }


def _digest(samples: np.ndarray) -> str:
    return hashlib.blake2b(samples, digest_size=16).hexdigest()


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _is_intact(
    path: Path | None, source_hash: str, array: Path, offset: int, length: int, content: str
) -> bool:
    if path is not None and _hash_of(path) != source_hash:
        return False
    return _digest(np.fromfile(array, "<i2", length, offset=offset * 2)) == content


def _intact(
    entries: list[Entry], arrays: dict[str, Path], root: Path | None, jobs: int, what: str
) -> list[Entry]:
    """The entries whose samples, and, where a root is given, source files have the hashes that they had."""
    tasks = [
        (root and root / e.file, e.source_hash, arrays[e.split], e.offset, e.length, e.content_hash)
        for e in entries
        if not e.problem
    ]
    whole = [entry for entry in entries if not entry.problem]
    return [whole[number] for number, intact in in_processes(_is_intact, tasks, jobs, what) if intact]


def in_processes(
    function: Callable, tasks: Sequence[tuple], jobs: int, what: str
) -> Iterator[tuple[int, Any]]:
    """Call `function(*task)` for every task in `jobs` processes, in order, under a progress bar.

    Yields
    ------
    number, result
        The number of the task and what the function returned.
    """
    bar = tqdm(total=len(tasks), desc=what, unit="clip", disable=None, leave=False, smoothing=0.05)
    with bar:
        if jobs == 1 or len(tasks) < 64:  # starting processes takes longer than that
            for number, task in enumerate(tasks):
                yield number, function(*task)
                bar.update()
            return
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _end_with_parent)
        try:
            for number, result in enumerate(pool.map(function, *zip(*tasks, strict=True), chunksize=8)):
                yield number, result
                bar.update()
        except BrokenProcessPool as error:
            raise UserError(
                f"{what}: a process was killed, perhaps for want of memory; run it again with fewer --jobs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker end when the process that started it is killed."""

    def wait() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def command(
    data: tyro.conf.Positional[Path],
    store: tyro.conf.Positional[Path],
    *,
    rate: int = 16_000,
    seconds: float = 10.0,
    channel: int | None = None,
    jobs: Annotated[int, tyro.conf.arg(metavar="N")] = os.cpu_count() or 1,
    verify: bool = False,
    strict: bool = False,
) -> None:
    """Decode all clips once into a store that training and evaluation read instead of the files.

    Interrupted, it goes on where it was; run again, it follows added, changed and removed files.

    Parameters
    ----------
    data
        A data folder or a manifest (.csv).
    store
        The folder to make or to bring up to date.
    rate
        Sample rate of the model, Hz.
    seconds
        Length of the packed clips; the store also serves models that hear less.
    channel
        Channel of files with several; left out, the mean of all (MIMII: channel 0).
    jobs
        Processes.
    verify
        Compare files and packed samples with their hashes too, and mend what differs.
    strict
        Stop if any file is not usable.
    """
    audio = AudioConfig(sample_rate=rate, seconds=seconds)
    counts = pack(data, store, audio, channel=channel, jobs=jobs, verify=verify, strict=strict)
    print(
        f"{store}: {counts['train']} train and {counts['test']} test clips; {counts['packed']} packed, "
        f"{counts['kept']} kept, {counts['removed']} removed"
    )
    if report := _open_store(store, audio, ("train", "test"), None, False).report():
        print(report)
