"""Layouts of data sets: what the path of a file says about its clip. No sound file is opened here.

To add a layout, write its class and put an instance into LAYOUTS; nothing else depends on which there are.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from osscl_min.runtime.files import SOUND_SUFFIXES, UserError, printable, read_rows

TRUTH_FILE = "eval_data_list.csv"  # the published ground truth of the evaluation set of DCASE 2020
COLUMNS = ("path", "machine_type", "machine_id", "split", "anomaly")  # of a manifest
ANOMALY_IN_TRAINING = "an anomalous clip in train; training uses normal clips alone"
Truth = dict[tuple[str, str], int]  # (machine type, file stem) -> 1 anomalous, 0 normal
Fields = dict[str, Any]  # of `clips.Clip`, without its path


class Layout:
    """One way to lay out a data set: its paths, its split rule and its reader of truth."""

    name: str
    pattern: re.Pattern  # of paths without suffix; groups: type, id, state [, split, domain, attributes]
    file_pattern: re.Pattern  # of file names that look like this layout, for error messages
    expected: str  # an example
    channel: int | None = None  # to take from files with several; None averages them
    unlabelled = "evaluation"  # subset of test clips whose path does not tell their truth
    distinctive = True  # whether the path of a single file is evidence of the layout

    def match(self, path: PurePath) -> dict[str, str | None] | None:
        """The groups of `pattern`; None where the path does not fit."""
        match = self.pattern.fullmatch(path.with_suffix("").as_posix())
        return match and match.groupdict()

    def split(self, groups: dict[str, str | None], anomaly: int | None) -> str:
        """ "train" or "test"."""
        return groups.get("split") or "train"

    def truth(self, root: Path, files: Iterable[PurePosixPath]) -> Truth:
        """The truth that the data set's own tables give."""
        return read_truth(root / TRUTH_FILE) if os.path.isfile(root / TRUTH_FILE) else {}

    def read(self, names: Iterable[PurePosixPath], truth: Truth) -> dict[PurePosixPath, Fields | str]:
        """For every sound file the fields of its clip, or the reason why it is none."""
        return {name: self._clip(name, truth) for name in names}

    def _clip(self, name: PurePosixPath, truth: Truth) -> Fields | str:
        groups = self.match(name)
        if groups is None:
            return f"does not fit the layout {self.name}: {self.expected}"
        anomaly = None if groups["state"] is None else int(groups["state"] != "normal")
        split, subset = self.split(groups, anomaly), "development"
        if split == "train":
            if anomaly:
                return ANOMALY_IN_TRAINING
            anomaly = 0
        elif anomaly is None:
            anomaly, subset = truth.get((groups["type"], name.stem)), self.unlabelled
        return {
            "machine_type": groups["type"],
            "machine_id": groups["id"],
            "split": split,
            "anomaly": anomaly,
            "subset": subset,
            "domain": groups.get("domain") or "",
            "attributes": groups.get("attributes") or "",
        }


class Dcase2020(Layout):
    name = "DCASE 2020"
    pattern = re.compile(
        r"(?P<type>[^/]+)/(?P<split>train|test)/(?:(?P<state>normal|anomaly)_)?id_(?P<id>\d+)_\d+"
    )
    file_pattern = re.compile(r"(?:(?:normal|anomaly)_)?id_\d+_\d+")
    expected = "TYPE/train/normal_id_00_00000000.wav"


class Dcase2021(Layout):
    """The section is the machine id; the folder decides about training or test."""

    name = "DCASE 2021-2025"
    pattern = re.compile(
        r"(?:.*/)?(?P<type>[^/]+)/(?:source_|target_)?(?P<split>train|test)/section_(?P<id>\d+)"
        r"(?:_(?P<domain>source|target))?(?:_(?:train|test))?(?:_(?P<state>normal|anomaly))?_\d+"
        r"(?:_(?P<attributes>.*))?"
    )
    file_pattern = re.compile(r"section_\d+_.*")
    expected = "TYPE/train/section_00_source_train_normal_0000.wav"

    def truth(self, root: Path, files: Iterable[PurePosixPath]) -> Truth:
        """Also ground_truth_TYPE_section_03_source_test.csv, with rows `file,0 or 1`."""
        truth = super().truth(root, files)
        for name in files:
            if match := re.fullmatch(r"ground_truth_(.+?)_section_.*\.csv", name.name):
                for place, cells in read_rows(root / name):
                    if len(cells) != 2 or cells[1] not in ("0", "1"):
                        raise UserError(f"{place}: expected `file,0 or 1`, got {','.join(cells)!r}")
                    truth[match[1], Path(cells[0]).stem] = int(cells[1])
        return truth


class Mimii(Layout):
    """Has no split of its own. Its authors test with equal numbers of normal and abnormal clips, and so does
    this layout: the test set is every abnormal clip and as many normal ones, but at most half of them: the
    first recordings in the order of their numbers, the same at every signal-to-noise ratio.
    """

    name = "MIMII"
    pattern = re.compile(
        r"(?:.*/)??(?:(?P<domain>-?\d+_?dB)_[^/]+/)?(?P<type>[^/]+)/id_(?P<id>\d+)/"
        r"(?P<state>normal|abnormal)/\d+"
    )
    file_pattern = re.compile(r"\d+")
    expected = "6_dB_fan/fan/id_00/normal/00000000.wav"
    channel = 0  # microphone 0 of 8 is the usual choice

    def split(self, groups: dict[str, str | None], anomaly: int | None) -> str:
        return "test" if anomaly else "train"

    def read(self, names: Iterable[PurePosixPath], truth: Truth) -> dict[PurePosixPath, Fields | str]:
        clips = super().read(names, truth)
        usable = [(name, clip) for name, clip in clips.items() if isinstance(clip, dict)]
        recordings = defaultdict(lambda: (set(), set()))  # machine -> normal, abnormal
        for name, clip in usable:
            recordings[clip["machine_type"], clip["machine_id"]][clip["anomaly"]].add(name.stem)
        held_out = {
            machine: sorted(normal)[: min(len(abnormal), len(normal) // 2)]
            for machine, (normal, abnormal) in recordings.items()
        }
        for name, clip in usable:
            if name.stem in held_out[clip["machine_type"], clip["machine_id"]]:
                clip["split"] = "test"
        return clips


class Plain(Layout):
    """A folder per machine type and machine, with any file names that are not those of another layout."""

    _SPLITS = r"(?:train|test|source_test|target_test|supplemental)"
    name = "plain"
    pattern = re.compile(
        rf"(?:(?P<split>train|test)/)?(?!{_SPLITS}/)(?P<type>[^/]+)/(?!{_SPLITS}/)(?P<id>[^/]+)/"
        r"(?:(?P<inner>train|test)/)?(?:(?P<folder>normal|anomaly|abnormal)/)?"
        r"(?!(?:(?:normal|anomaly)_)?id_\d+_\d+$)(?!section_\d+_)(?:(?P<state>normal|anomaly|abnormal)_)?[^/]+"
    )
    file_pattern = re.compile(r".*")
    expected = "TYPE/ID/any_name.wav, or test/TYPE/ID/anomaly/any_name.wav"
    unlabelled = "development"
    distinctive = False

    def match(self, path: PurePath) -> dict[str, str | None] | None:
        groups = super().match(path)
        if groups:
            groups["split"] = groups["split"] or groups["inner"]
            groups["state"] = groups["folder"] or groups["state"]
        return groups


LAYOUTS = (Dcase2020(), Dcase2021(), Mimii(), Plain())  # where several fit equally often, the first is taken


def recognise(names: Iterable[PurePosixPath]) -> Layout:
    """The layout that fits most of the sound files or, where none fits any, most of the file names."""
    names = list(names)

    def fit(layout: Layout) -> tuple[int, int]:
        resembling = sum(bool(layout.file_pattern.fullmatch(name.stem)) for name in names)
        return sum(layout.match(name) is not None for name in names), resembling

    return max(LAYOUTS, key=fit)


def readings(path: PurePath) -> Iterator[tuple[Layout, dict[str, str | None]]]:
    """What the end of one file's path may mean without its data set: layouts, with the groups of their
    pattern, in the order of LAYOUTS. Which is right depends on whether such a machine exists."""
    for layout in LAYOUTS:
        for depth in range(3, min(len(path.parts), 6) + 1):
            if groups := layout.match(PurePosixPath(*path.parts[-depth:])):
                yield layout, groups


def read_truth(path: Path | str) -> Truth:
    """Read eval_data_list.csv: a row with the machine type, then rows `file,original name,0 or 1`."""
    truth: Truth = {}
    machine_type = ""
    for place, cells in read_rows(path):
        if not any(cells[1:]) and not cells[0].lower().endswith(SOUND_SUFFIXES):
            machine_type = cells[0]
        elif len(cells) == 3 and cells[2] in ("0", "1") and machine_type:
            truth[machine_type, Path(cells[0]).stem] = int(cells[2])
        else:
            raise UserError(f"{place}: expected `file,original name,0 or 1`, got {','.join(cells)!r}")
    if not truth:
        raise UserError(f"{printable(path)}: no row `file,original name,0 or 1` in it")
    return truth


def read_manifest(path: Path) -> dict[Path, Fields | str]:
    """Read a table of clips, a CSV file: for every file the fields of its clip, or the reason why it is none.

    COLUMNS may also be called file, type and id. Paths are absolute or relative to the manifest's folder;
    split is train or test; anomaly is 0, 1 or empty (unknown; training clips are normal). Further columns
    may be subset, domain and attributes.
    """
    rows = read_rows(path)
    aliases = {"type": "machine_type", "id": "machine_id", "file": "path"}
    _, header = next(rows, ("", []))
    header = [name.lower().replace(" ", "_") for name in header]
    header = [aliases.get(name, name) for name in header]
    if missing := [name for name in COLUMNS if name not in header]:
        needed = f"the first line must be {','.join(COLUMNS)}"
        raise UserError(f"{printable(path)}: no column {', '.join(missing)}; {needed}")
    clips: dict[Path, Fields | str] = {}
    for place, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{place}: {len(cells)} cells, but the header has {len(header)}")
        row = dict(zip(header, cells, strict=True))
        if row["split"] not in ("train", "test") or row["anomaly"] not in ("0", "1", ""):
            raise UserError(f"{place}: expected split train or test and anomaly 0, 1 or empty, got {row}")
        if not (row["path"] and row["machine_type"] and row["machine_id"]):
            raise UserError(f"{place}: path, machine_type and machine_id must not be empty")
        file = path.parent / row["path"]
        if file in clips:
            raise UserError(f"{place}: {row['path']} is named a second time")
        training = row["split"] == "train"
        if training and row["anomaly"] == "1":
            clips[file] = ANOMALY_IN_TRAINING
        elif not os.path.isfile(file):
            clips[file] = "no such file"
        else:
            clips[file] = {
                "machine_type": row["machine_type"],
                "machine_id": row["machine_id"],
                "split": row["split"],
                "anomaly": 0 if training else int(row["anomaly"]) if row["anomaly"] else None,
                "subset": row.get("subset") or "development",
                "domain": row.get("domain", ""),
                "attributes": row.get("attributes", ""),
            }
    return clips
