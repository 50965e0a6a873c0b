"""From a data folder to clips: machine type, machine id, split and truth of every sound file."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from osscl_min.config import AudioConfig
from osscl_min.data.audio import attempt, duration, on_threads, window_starts
from osscl_min.data.layouts import (
    GROUND_TRUTH,
    LAYOUTS,
    TRUTH_FILE,
    Clip,
    read_manifest,
    read_truth,
    recognise,
)
from osscl_min.runtime.files import SOUND_SUFFIXES, UserError, first_lines, printable, walk

MANIFEST, SPLITS = "manifest.csv", ("train", "test")
OTHER_SUFFIXES = (".mp3", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff")

# DCASE 2020 Task 2: type -> last digits of the ids of the development set, and of the evaluation set
_IDS = {"fan": ("0246", "135"), "pump": ("0246", "135"), "slider": ("0246", "135"),
        "ToyCar": ("1234", "567"), "ToyConveyor": ("123", "456"), "valve": ("0246", "135")}  # fmt: skip
DEVELOPMENT = {name: tuple(f"0{digit}" for digit in digits) for name, (digits, _) in _IDS.items()}
# The fixed 41 labels, in the authors' order: (machine type, machine id) -> position.
BENCHMARK = tuple((name, f"0{digit}") for name, ids in _IDS.items() for digit in sorted("".join(ids)))


@dataclass
class Dataset:
    """The clips of a folder, and what is wrong with it."""

    root: Path
    clips: list[Clip] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)  # file -> why it is not used
    remarks: Counter = field(default_factory=Counter)  # "file repeated to 2 s" -> how many
    synthetic: bool = False  # simulated machines: the folder holds synthetic.json
    layout: str = "manifest"  # or the name of one of LAYOUTS
    channel: int | None = None  # taken from files with several; None averages them
    usage: dict[str, str] = field(default_factory=dict)  # split -> how much of long recordings is used

    def split(self, name: str) -> list[Clip]:
        """The clips of "train" or "test"."""
        return [clip for clip in self.clips if clip.split == name]

    def name(self, path: Path) -> str:
        """A file's name in messages and tables: relative to the root if it lies inside."""
        return printable(path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path)

    def decoded(
        self, clips: Sequence[Clip], results: Iterable[tuple[Any, list[str]] | str], audio: AudioConfig
    ) -> dict[Clip, Any]:
        """Take in what decoding gave: each clip's samples and remarks, or its problem, which removes it;
        returns the samples of usable clips."""
        usable, remarks = {}, set()
        for clip, result in zip(clips, results, strict=True):
            if isinstance(result, str):
                place = f" at {clip.start:g} s" if clip.start else ""
                self.problems[self.name(clip.path) + place] = result
            else:
                usable[clip] = result[0]
                remarks |= {(clip.path, remark) for remark in result[1]}  # of a file, however many its clips
        self.remarks.update(f"file {remark}" for _, remark in remarks)
        unusable = set(clips) - usable.keys()
        self.clips = [clip for clip in self.clips if clip not in unusable]
        self.usage |= usage(usable, audio)
        return usable

    def report(self, strict: bool = False, most: int = 10) -> str:
        """What is not used and why, and what was done to the rest, one line each; if `strict`, the former is
        a UserError."""
        unlabelled = sum(clip.anomaly is None for clip in self.clips)
        remarks = self.remarks + Counter({"clip in test without a known truth": unlabelled})
        lines = [f"{split}: {text}" for split, text in self.usage.items()]
        lines += [_count(number, remark) for remark, number in sorted(remarks.items())]
        if self.problems:
            lines.append(f"{_count(len(self.problems))} not used:")
            lines += first_lines([f"{file}: {reason}" for file, reason in self.problems.items()], most)
        if strict and self.problems:
            raise UserError("\n".join([*lines, "stopped because of --strict"]))
        return "\n".join(lines)


def _count(number: int, what: str = "file") -> str:
    """ "2 files repeated to 2 s" of 2 and "file repeated to 2 s"."""
    noun, _, rest = what.partition(" ")
    return f"{number} {noun}{'' if number == 1 else 's'} {rest}".rstrip()


def windows(clip: Clip, length: float, audio: AudioConfig) -> list[Clip]:
    """The clips of a recording of `length` seconds: for training, all that fit from the start on; for a test,
    enough to cover every sample."""
    test = clip.split == "test"
    step = min(audio.clip_step, audio.seconds) if test else audio.clip_step
    starts = window_starts(length, audio, step, cover=test)
    return [replace(clip, start=start, length=length) for start in starts]


def cut(clips: Sequence[Clip], audio: AudioConfig, splits: Sequence[str] = SPLITS) -> list[Clip]:
    """The clips of the recordings in these splits; the others stay as they are, and so does a file that
    cannot be opened: decoding tells why."""

    def cut_one(clip: Clip) -> list[Clip]:
        length = attempt(duration, clip.path) if clip.split in splits else ""
        return [clip] if isinstance(length, str) else windows(clip, length, audio)

    return list(chain.from_iterable(on_threads(cut_one, clips, "reading headers")))


def usage(clips: Iterable[Clip], audio: AudioConfig) -> dict[str, str]:
    """How much of the recordings their clips use, for each split with a recording longer than a clip."""
    texts = {}
    for split in SPLITS:
        chosen = [clip for clip in clips if clip.split == split and clip.length]
        lengths, ends = {clip.path: clip.length for clip in chosen}, defaultdict(float)
        used = 0.0
        for clip in chosen:
            end = min(clip.start + audio.seconds, clip.length)
            used += end - max(clip.start, ends[clip.path])
            ends[clip.path] = end
        if any(length * audio.sample_rate >= audio.samples + 0.5 for length in lengths.values()):
            texts[split] = (
                f"{_count(len(chosen), f'clip of {audio.seconds:g} s')} from "
                f"{_count(len(lengths), 'recording')}, {used:.0f} of {sum(lengths.values()):.0f} s used"
            )
    return texts


def label_table(clips: Sequence[Clip], benchmark: bool | None = None) -> tuple[tuple[str, str], ...]:
    """The classes of a training set: the benchmark's 41 for its data, else the machines that are present.

    The authors number training labels by what is present and test labels by the fixed table, which differ
    for a part of the data; here both come from this one table, and a checkpoint carries it. `benchmark` says
    whether to use the fixed table if it has all machines; by default, if the paths are in the layout of DCASE
    2020 and every machine type has all machines of its development set. Fewer than two machines are a
    UserError: the method learns to tell machines apart.
    """
    machines = {clip.machine for clip in clips}
    if len(machines) < 2:
        have = next(map("only {0[0]} {0[1]}".format, machines), "none")
        raise UserError(
            f"training needs clips of at least two machines (type and id), but there is {have}; "
            "add others to the folder, or with `train --with DIR`, or `--with simulated`"
        )
    if benchmark is None:
        whole = {(name, number) for name in dict(machines) for number in DEVELOPMENT.get(name, ())}
        in_layout = (LAYOUTS[0].match(PurePosixPath(*clip.path.parts[-3:])) for clip in clips)
        benchmark = whole <= machines and all(in_layout)
    return BENCHMARK if benchmark and machines <= set(BENCHMARK) else tuple(sorted(machines))


def scan(root: Path | str, channel: int | None = None) -> Dataset:
    """Find the clips of a data set; a UserError if there is none.

    `root` is a folder of wav or flac files in one of LAYOUTS, recognised by its file names, or with a
    manifest.csv; or a manifest, see `layouts.read_manifest`. `channel` is taken from files with several; by
    default the layout's own: 0 for MIMII, else their mean.
    """
    root = Path(root)
    if channel is not None and channel < 0:
        raise UserError(f"--channel {channel}: channels are counted from 0")
    manifests = (path for path in (root, root / MANIFEST) if path.suffix.lower() == ".csv")
    if manifest := next(filter(os.path.isfile, manifests), None):
        dataset = Dataset(manifest.parent, channel=channel)
        clips = read_manifest(manifest)
    elif os.path.isdir(root):
        dataset = Dataset(root, synthetic=os.path.isfile(root / "synthetic.json"))
        clips = _read_folder(dataset, channel)
    else:
        raise UserError(f"no such data folder: {printable(root)}")
    for path, clip in clips.items():
        if isinstance(clip, Clip):
            dataset.clips.append(clip)
        else:
            dataset.problems[dataset.name(path)] = clip
    if not dataset.clips:
        first = next(map(": ".join, dataset.problems.items()), "")
        why = f"none of {_count(len(dataset.problems))} can be used ({first}); " if first else ""
        expected = " or ".join(layout.expected for layout in LAYOUTS)
        raise UserError(f"{printable(dataset.root)}: no usable clips; {why}expected {expected}")
    return dataset


def _read_folder(dataset: Dataset, channel: int | None) -> dict[Path, Clip | str]:
    root, files = dataset.root, dict(walk(dataset.root))
    # draws of the training refer to the order of `walk`: a folder's own files, then those of its folders
    names = [PurePosixPath(path.relative_to(root).as_posix()) for path, why in files.items() if not why]
    sounds = [name for name in names if name.suffix.lower() in SOUND_SUFFIXES]
    others = [name for name in names if name.suffix.lower() in OTHER_SUFFIXES]
    if others and not sounds:
        raise UserError(
            f"{printable(root)}: {_count(len(others))} such as {others[0]}, but no .wav or .flac: "
            "convert them, for example with ffmpeg -i FILE.mp3 FILE.wav"
        )
    layout, truth = recognise(sounds), {}
    dataset.layout, dataset.channel = layout.name, layout.channel if channel is None else channel
    for name in names:
        if str(name) == TRUTH_FILE or GROUND_TRUTH.fullmatch(name.name):
            truth |= read_truth(root / name)
    clips = layout.read(root, sounds, truth)
    usable = [clip for clip in clips.values() if isinstance(clip, Clip)]
    tested = {(clip.machine_type, clip.path.stem) for clip in usable if clip.split == "test"}
    dataset.remarks["row of truth without a test clip"] = len(truth.keys() - tested)
    folders = {clip.path.parent for clip in usable}
    for name in names:
        if name.parent.name in ("train", "test") or (root / name).parent in folders:
            clips.setdefault(root / name, "not a .wav or .flac file")
    return {path: why for path, why in files.items() if why} | clips
