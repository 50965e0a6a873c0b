"""Layouts of data sets: what the path of a file says about its clip. No sound file is opened here.

To add a layout, put it into LAYOUTS; nothing else depends on which there are.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath

from osscl_min.runtime.files import SOUND_SUFFIXES, UserError, printable, read_csv, read_rows

TRUTH_FILE = "eval_data_list.csv"  # the published ground truth of the evaluation set of DCASE 2020
GROUND_TRUTH = re.compile(r"ground_truth_(.+?)_section_.*\.csv")  # of DCASE 2021-2025
COLUMNS = ("path", "machine_type", "machine_id", "split", "anomaly")  # of a manifest
MORE_COLUMNS = ("subset", "domain", "attributes")
Truth = dict[tuple[str, str], int]  # (machine type, file stem) -> 1 anomalous, 0 normal


@dataclass(frozen=True)
class Clip:
    """One clip: a sound file or, of a long recording, a part of it."""

    path: Path
    machine_type: str
    machine_id: str  # "00"
    split: str  # "train" or "test"
    anomaly: int | None  # 0 normal, 1 anomalous, None unlabelled
    subset: str = "development"  # "evaluation" where the truth comes from, or waits for, a table
    domain: str = ""  # "source" or "target" (DCASE 2021-2025), the signal-to-noise ratio (MIMII)
    attributes: str = ""  # what else the name says: "vel_6_loc_A"
    start: float = 0.0  # seconds
    length: float | None = field(default=None, compare=False)  # seconds of the whole file, once it was opened

    @property
    def machine(self) -> tuple[str, str]:
        """(machine type, machine id): the identity that the classifier learns."""
        return self.machine_type, self.machine_id


def _checked(clip: Clip) -> Clip | str:
    """Training clips are normal; an anomalous one is refused."""
    if clip.split == "test":
        return clip
    refusal = "an anomalous clip in train; training uses normal clips alone"
    return refusal if clip.anomaly else replace(clip, anomaly=0)


@dataclass(frozen=True)
class Layout:
    """One way to lay out a data set."""

    name: str
    expected: str  # an example
    file_pattern: str  # of file names that look like this layout, for error messages
    # Of paths without suffix; groups: type, id, state, split, domain, attributes. Where names differ only
    # in a trailing "_", the first that matches counts. A split that is not train is test; none is train.
    pattern: str
    channel: int | None = None  # to take from files with several; None averages them
    unlabelled: str = "evaluation"  # subset of test clips whose path does not tell their truth
    distinctive: bool = True  # whether the path of a single file is evidence of the layout

    def match(self, path: PurePath) -> dict[str, str]:
        """The groups of `pattern`, "" where one is missing; empty where the path does not fit."""
        match = re.fullmatch(self.pattern, path.with_suffix("").as_posix())
        groups = reversed(match.groupdict().items()) if match else ()
        return defaultdict(str, {name.rstrip("_"): value for name, value in groups if value})

    def read(self, root: Path, names: Iterable[PurePath], truth: Truth) -> dict[Path, Clip | str]:
        """For every sound file its clip, or the reason why it is none."""
        return {root / name: self._clip(root, name, truth) for name in names}

    def _clip(self, root: Path, name: PurePath, truth: Truth) -> Clip | str:
        groups = self.match(name)
        if not groups:
            return f"does not fit the layout {self.name}: {self.expected}"
        split = "train" if groups["split"] in ("", "train") else "test"
        anomaly, subset = int(groups["state"] != "normal") if groups["state"] else None, "development"
        if split == "test" and anomaly is None:
            anomaly, subset = truth.get((groups["type"], name.stem)), self.unlabelled
        more = groups["domain"], groups["attributes"]
        return _checked(Clip(root / name, groups["type"], groups["id"], split, anomaly, subset, *more))


class Mimii(Layout):
    """MIMII has no split of its own. Its authors test with equal numbers of normal and abnormal clips, and so
    does this layout. The test set is every abnormal clip and as many normal ones, but at most half of these:
    the first recordings in the order of their numbers, the same at every signal-to-noise ratio.
    """

    def read(self, root: Path, names: Iterable[PurePath], truth: Truth) -> dict[Path, Clip | str]:
        clips = super().read(root, names, truth)
        usable = [clip for clip in clips.values() if isinstance(clip, Clip)]
        for machine in {clip.machine for clip in usable}:
            own = [clip for clip in usable if clip.machine == machine]
            normal, abnormal = ({clip.path.stem for clip in own if clip.anomaly == state} for state in (0, 1))
            held_out = sorted(normal)[: min(len(abnormal), len(normal) // 2)]
            clips |= {clip.path: replace(clip, split="test") for clip in own if clip.path.stem in held_out}
        return clips


_SPLITS = r"(?:train|test|source_test|target_test|supplemental)"
LAYOUTS = (  # where several fit equally often, the first is taken
    Layout(
        "DCASE 2020",
        "TYPE/train/normal_id_00_00000000.wav",
        r"(?:(?:normal|anomaly)_)?id_\d+_\d+",
        r"(?P<type>[^/]+)/(?P<split>train|test)/(?:(?P<state>normal|anomaly)_)?id_(?P<id>\d+)_\d+",
    ),
    Layout(  # the section is the machine id; the folder decides about training or test
        "DCASE 2021-2025",
        "TYPE/train/section_00_source_train_normal_0000.wav",
        r"section_\d+_.*",
        r"(?:.*/)?(?P<type>[^/]+)/(?:source_|target_)?(?P<split>train|test)/section_(?P<id>\d+)"
        r"(?:_(?P<domain>source|target))?(?:_(?:train|test))?(?:_(?P<state>normal|anomaly))?_\d+"
        r"(?:_(?P<attributes>.*))?",
    ),
    Mimii(
        "MIMII",
        "6_dB_fan/fan/id_00/normal/00000000.wav",
        r"\d+",
        r"(?:.*/)??(?:(?P<domain>-?\d+_?dB)_[^/]+/)?(?P<type>[^/]+)/id_(?P<id>\d+)/"
        r"(?P<state>normal|(?P<split>abnormal))/\d+",
        channel=0,  # microphone 0 of 8 is the usual choice
    ),
    Layout(  # a folder per machine type and machine, with any file names that are not those of another layout
        "plain",
        "TYPE/ID/any_name.wav, or test/TYPE/ID/anomaly/any_name.wav",
        r".*",
        rf"(?:(?P<split>train|test)/)?(?!{_SPLITS}/)(?P<type>[^/]+)/(?!{_SPLITS}/)(?P<id>[^/]+)/"
        r"(?:(?P<split_>train|test)/)?(?:(?P<state>normal|anomaly|abnormal)/)?"
        r"(?!(?:(?:normal|anomaly)_)?id_\d+_\d+$)(?!section_\d+_)(?:(?P<state_>normal|anomaly|abnormal)_)?[^/]+",
        unlabelled="development",
        distinctive=False,
    ),
)


def recognise(names: Sequence[PurePosixPath]) -> Layout:
    """The layout that fits most sound files or, where no layout fits any, resembles most file names."""

    def fit(layout: Layout) -> tuple[int, int]:
        resembling = sum(bool(re.fullmatch(layout.file_pattern, name.stem)) for name in names)
        return sum(bool(layout.match(name)) for name in names), resembling

    return max(LAYOUTS, key=fit)


def readings(path: PurePath) -> Iterator[tuple[Layout, dict[str, str]]]:
    """What the end of one file's path may mean without its data set: layouts, with the groups of their
    pattern, in the order of LAYOUTS. Which is right depends on whether such a machine exists."""
    for layout in LAYOUTS:
        for depth in range(3, min(len(path.parts), 6) + 1):
            if groups := layout.match(PurePosixPath(*path.parts[-depth:])):
                yield layout, groups


def read_truth(path: Path | str) -> Truth:
    """Read eval_data_list.csv: a row with the machine type, then rows `file,original name,0 or 1`; or a
    ground_truth_TYPE_section_*.csv: rows `file,0 or 1`."""
    truth: Truth = {}
    named = GROUND_TRUTH.fullmatch(Path(path).name)
    machine_type, row = (named[1], "file,0 or 1") if named else ("", "file,original name,0 or 1")
    for place, cells in read_rows(path):
        if not named and not any(cells[1:]) and not cells[0].lower().endswith(SOUND_SUFFIXES):
            machine_type = cells[0]
        elif len(cells) == row.count(",") + 1 and cells[-1] in ("0", "1") and machine_type:
            truth[machine_type, Path(cells[0]).stem] = int(cells[-1])
        else:
            raise UserError(f"{place}: expected `{row}`, got {','.join(cells)!r}")
    if not truth:
        raise UserError(f"{printable(path)}: no row `{row}` in it")
    return truth


def read_manifest(path: Path) -> dict[Path, Clip | str]:
    """Read a table of clips, a CSV file: for every file its clip, or the reason why it is none.

    The header names COLUMNS and perhaps MORE_COLUMNS. Paths are absolute or relative to the manifest's
    folder; split is train or test; anomaly is 0, 1 or empty (unknown; training clips are normal).
    """
    clips: dict[Path, Clip | str] = {}
    for row in read_csv(path, COLUMNS):
        name, machine_type, machine_id, split, anomaly = (row[column] for column in COLUMNS)
        known = split in ("train", "test") and anomaly in ("0", "1", "")
        if not (known and name and machine_type and machine_id):
            expected = "a path, machine_type, machine_id, split train or test, anomaly 0, 1 or empty"
            raise UserError(f"{printable(path)}: expected {expected}, got {','.join(row.values())}")
        if (file := path.parent / name) in clips:
            raise UserError(f"{printable(path)}: {name} is named a second time")
        more = {column: row[column] for column in MORE_COLUMNS if row.get(column)}
        truth = int(anomaly) if anomaly else None
        clip = _checked(Clip(file, machine_type, machine_id, split, truth, **more))
        clips[file] = clip if os.path.isfile(file) else "no such file"
    return clips
