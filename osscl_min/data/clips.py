"""From a data folder to clips: machine type, machine id, split and truth of every sound file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from osscl_min.data.layouts import LAYOUTS, Dcase2020, Fields, read_manifest, recognise
from osscl_min.runtime.files import SOUND_SUFFIXES, UserError, first_lines, printable, walk

MANIFEST = "manifest.csv"
OTHER_SUFFIXES = (".mp3", ".ogg", ".opus", ".m4a", ".aac", ".wma", ".aif", ".aiff")

# DCASE 2020 Task 2: type -> last digits of the ids of the development set, and of the evaluation set
_IDS = {"fan": ("0246", "135"), "pump": ("0246", "135"), "slider": ("0246", "135"),
        "ToyCar": ("1234", "567"), "ToyConveyor": ("123", "456"), "valve": ("0246", "135")}  # fmt: skip
_DEVELOPMENT = {(name, f"0{digit}") for name, (digits, _) in _IDS.items() for digit in digits}
# The fixed 41 labels, in the authors' order: (machine type, machine id) -> position.
BENCHMARK = tuple((name, f"0{digit}") for name, ids in _IDS.items() for digit in sorted("".join(ids)))


@dataclass(frozen=True)
class Clip:
    """One sound file."""

    path: Path
    machine_type: str
    machine_id: str  # "00"
    split: str  # "train" or "test"
    anomaly: int | None  # 0 normal, 1 anomalous, None unlabelled
    subset: str = "development"  # "evaluation" where the truth comes from, or waits for, a table
    domain: str = ""  # "source" or "target" (DCASE 2021-2025), the signal-to-noise ratio (MIMII)
    attributes: str = ""  # what else the name says: "vel_6_loc_A"

    @property
    def machine(self) -> tuple[str, str]:
        """(machine type, machine id): the identity that the classifier learns."""
        return self.machine_type, self.machine_id


@dataclass
class Dataset:
    """The clips of a folder, and what is wrong with it."""

    root: Path
    clips: list[Clip]
    problems: dict[str, str] = field(default_factory=dict)  # file -> why it is not used
    remarks: Counter = field(default_factory=Counter)  # what was done to usable files, and to how many
    notes: list[str] = field(default_factory=list)  # about the data set as a whole
    synthetic: bool = False  # simulated machines: the folder holds synthetic.json
    layout: str = LAYOUTS[0].name  # or "manifest"
    channel: int | None = None  # taken from files with several; None averages them

    def split(self, name: str) -> list[Clip]:
        """The clips of "train" or "test"."""
        return [clip for clip in self.clips if clip.split == name]

    def name(self, path: Path) -> str:
        """A file's name in messages and tables: relative to the root if it lies inside."""
        return printable(path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path)

    def report(self, strict: bool = False, most: int = 10) -> str:
        """What is not used and why, and what was done to the rest, one line each; if `strict`, the former is
        a UserError."""
        lines = [f"{_count(count)} {remark}" for remark, count in sorted(self.remarks.items())]
        lines += self.notes
        unlabelled = sum(clip.anomaly is None for clip in self.clips)
        if unlabelled:
            lines.append(f"{_count(unlabelled, 'test clip')} without a known truth")
        if self.problems:
            lines.append(f"{_count(len(self.problems))} not used:")
            lines += first_lines([f"{file}: {reason}" for file, reason in self.problems.items()], most)
        if strict and self.problems:
            raise UserError("\n".join([*lines, "stopped because of --strict"]))
        return "\n".join(lines)


def _count(count: int, what: str = "file") -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def is_benchmark(clips: Iterable[Clip]) -> bool:
    """Whether clips are the DCASE 2020 benchmark: their paths are in its layout, their machines are among
    its 41, and every machine type has all machines of its development set."""
    clips = list(clips)
    machines = {clip.machine for clip in clips}
    types = {machine_type for machine_type, _ in machines}
    whole = {machine for machine in _DEVELOPMENT if machine[0] in types}
    in_layout = all(Dcase2020().match(PurePosixPath(*clip.path.parts[-3:])) for clip in clips)
    return in_layout and whole <= machines <= set(BENCHMARK)


def label_table(clips: Iterable[Clip], benchmark: bool | None = None) -> tuple[tuple[str, str], ...]:
    """The classes of a training set: the benchmark's 41 for its data, else the machines that are present.

    The authors number training labels by what is present and test labels by the fixed table, which differ
    for a part of the data; here both come from this one table, and a checkpoint carries it.

    Parameters
    ----------
    clips : iterable of Clip
    benchmark : bool, optional
        Whether to use the fixed table if it has all machines; by default, if `is_benchmark`.

    Raises
    ------
    UserError
        If there are fewer than two machines: the method learns to tell machines apart.
    """
    clips = list(clips)
    machines = sorted({clip.machine for clip in clips})
    if len(machines) < 2:
        have = " ".join(machines[0]) if machines else "none"
        raise UserError(
            f"training needs clips of at least two machines (type and id), but there is {have}; "
            "add others to the folder, or with `train --with DIR`, or `--with simulated`"
        )
    fixed = is_benchmark(clips) if benchmark is None else benchmark and set(machines) <= set(BENCHMARK)
    return BENCHMARK if fixed else tuple(machines)


def scan(root: Path | str, channel: int | None = None) -> Dataset:
    """Find the clips of a data set.

    Parameters
    ----------
    root : Path or str
        A folder of wav or flac files in one of `layouts.LAYOUTS`, recognised by its file names, or with a
        manifest.csv; or a manifest, see `layouts.read_manifest`.
    channel : int, optional
        Channel to take from files with several. By default the layout's own: 0 for MIMII, else their mean.

    Raises
    ------
    UserError
        If the folder is missing or holds no usable clip.
    """
    root = Path(root)
    if channel is not None and channel < 0:
        raise UserError(f"--channel {channel}: channels are counted from 0")
    for manifest in (root, root / MANIFEST):
        if manifest.suffix.lower() == ".csv" and os.path.isfile(manifest):
            dataset = Dataset(manifest.parent, [], layout="manifest", channel=channel)
            return _with_clips(dataset, read_manifest(manifest))
    if not os.path.isdir(root):
        raise UserError(f"no such data folder: {printable(root)}")
    dataset, names = Dataset(root, []), []
    for path, problem in walk(root):
        if problem:
            dataset.problems[dataset.name(path)] = problem
        else:
            names.append(PurePosixPath(path.relative_to(root).as_posix()))
    # a folder's own files come before those of its folders: the order that draws of the training refer to
    names.sort(key=lambda name: (*((1, part) for part in name.parent.parts), (0, name.name)))
    sounds = [name for name in names if name.suffix.lower() in SOUND_SUFFIXES]
    layout = recognise(sounds)
    dataset.synthetic = os.path.isfile(root / "synthetic.json")
    dataset.layout, dataset.channel = layout.name, layout.channel if channel is None else channel
    truth = layout.truth(root, names)
    clips = layout.read(sounds, truth)
    folders = {name.parent for name, clip in clips.items() if isinstance(clip, dict)}
    for name in names:
        if name not in clips and (name.parent in folders or name.parent.name in ("train", "test")):
            clips[name] = "not a .wav or .flac file"
    if not sounds:
        suffixes = Counter(name.suffix.lower() for name in names)
        others = [_count(suffixes[suffix], f"{suffix} file") for suffix in OTHER_SUFFIXES if suffixes[suffix]]
        if others:
            raise UserError(
                f"{printable(root)}: {', '.join(others)}, but no .wav or .flac: convert them, for example "
                "with ffmpeg -i FILE.mp3 FILE.wav"
            )
    _with_clips(dataset, {root / name: clip for name, clip in clips.items()})
    unmatched = truth.keys() - {(clip.machine_type, clip.path.stem) for clip in dataset.split("test")}
    if unmatched:
        dataset.notes.append(f"{_count(len(unmatched), 'row')} of truth without a test clip")
    return dataset


def _with_clips(dataset: Dataset, clips: dict[Path, Fields | str]) -> Dataset:
    for path, clip in clips.items():
        if isinstance(clip, dict):
            dataset.clips.append(Clip(path, **clip))
        else:
            dataset.problems[dataset.name(path)] = clip
    if not dataset.clips:
        root, layouts = printable(dataset.root), " or ".join(layout.expected for layout in LAYOUTS)
        first = next((f"{file}: {reason}" for file, reason in dataset.problems.items()), "")
        why = (
            f"none of {_count(len(dataset.problems))} can be used; {first}"
            if first
            else f"expected {layouts}"
        )
        raise UserError(f"{root}: no usable clips; {why}")
    return dataset
