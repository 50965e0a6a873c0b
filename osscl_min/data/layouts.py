"""What a file's place and name say about a clip, for every layout that is understood; no file is opened."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from osscl_min.runtime.files import UserError

_SPLITS = r"(?:train|test|source_test|target_test|supplemental)"


@dataclass(frozen=True)
class Layout:
    """One way to lay out a data set.

    Attributes
    ----------
    name : str
    pattern : re.Pattern
        Matches a path relative to the data folder, without its suffix. Groups: type, id, split, state,
        domain, attributes.
    expected : str
        An example, for error messages.
    channel : int or None
        The channel to take of files with several; None averages them.
    """

    name: str
    pattern: re.Pattern
    expected: str
    channel: int | None = None


# In the order of preference where several match equally often.
LAYOUTS = (
    Layout(
        "DCASE 2020",
        re.compile(
            r"(?P<type>[^/]+)/(?P<split>train|test)/(?:(?P<state>normal|anomaly)_)?id_(?P<id>\d+)_\d+"
        ),
        "TYPE/train/normal_id_00_00000000.wav",
    ),
    Layout(
        "DCASE 2021-2025",  # the section is the machine id; the folder decides about training or test
        re.compile(
            r"(?:.*/)?(?P<type>[^/]+)/(?:source_|target_)?(?P<split>train|test)/section_(?P<id>\d+)"
            r"(?:_(?P<domain>source|target))?(?:_(?:train|test))?(?:_(?P<state>normal|anomaly))?_\d+"
            r"(?:_(?P<attributes>.*))?"
        ),
        "TYPE/train/section_00_source_train_normal_0000.wav",
    ),
    Layout(
        "MIMII",  # microphone 0 of 8 is the one nearest to the first machine, and the usual choice
        re.compile(
            r"(?:.*/)??(?:(?P<domain>-?\d+_?dB)_[^/]+/)?(?P<type>[^/]+)/id_(?P<id>\d+)/"
            r"(?P<state>normal|abnormal)/\d+"
        ),
        "6_dB_fan/fan/id_00/normal/00000000.wav",
        channel=0,
    ),
    Layout(
        "plain",
        re.compile(
            rf"(?:(?P<split>train|test)/)?(?!{_SPLITS}/)(?P<type>[^/]+)/(?!{_SPLITS}/)(?P<id>[^/]+)/"
            r"(?:(?P<inner>train|test)/)?(?:(?P<folder>normal|anomaly|abnormal)/)?"
            r"(?!(?:(?:normal|anomaly)_)?id_\d+_\d+$)(?!section_\d+_)(?:(?P<state>normal|anomaly|abnormal)_)?[^/]+"
        ),
        "TYPE/ID/any_name.wav, or test/TYPE/ID/anomaly/any_name.wav",
    ),
)


def recognise(names: Iterable[PurePosixPath]) -> Layout:
    """The layout that explains most of the sound files; DCASE 2020 where none explains any."""
    stems = [str(name.with_suffix("")) for name in names]
    return max(LAYOUTS, key=lambda layout: sum(bool(layout.pattern.fullmatch(stem)) for stem in stems))


def readings(path: PurePath) -> Iterator[tuple[Layout, dict[str, str | None]]]:
    """What the end of one file's path may mean, in the order of LAYOUTS; without its data set, which is
    right must be told by whether such a machine exists."""
    parts = path.with_suffix("").parts
    for layout in LAYOUTS:
        for depth in range(3, min(len(parts), 6) + 1):
            match = layout.pattern.fullmatch("/".join(parts[-depth:]))
            if match:
                yield layout, match.groupdict()


def interpret(
    layout: Layout, names: Iterable[PurePosixPath], truth: dict[tuple[str, str], int]
) -> dict[PurePosixPath, dict | str]:
    """Read the meaning of file names.

    Parameters
    ----------
    layout : Layout
    names : iterable of PurePosixPath
        Sound files, relative to the data folder.
    truth : dict
        (machine type, file stem) -> 0 or 1, for test clips whose names do not say it.

    Returns
    -------
    dict
        For every file the fields of its `dataset.Clip`, or the reason why it is none.
    """
    found: dict[PurePosixPath, dict | str] = {}
    for name in names:
        match = layout.pattern.fullmatch(str(name.with_suffix("")))
        if not match:
            reason = "no machine id in the name or in an unexpected place; the others are"
            found[name] = f"{reason} {layout.name}: {layout.expected}"
            continue
        part = match.groupdict()
        state = part.get("folder") or part["state"]
        anomaly = None if state is None else int(state != "normal")
        split = part.get("split") or part.get("inner") or "train"
        subset = "development"
        if layout.name == "MIMII":
            split = "test" if anomaly else "train"  # some normal clips follow, below
        elif split == "train":
            if anomaly:
                found[name] = "an anomalous clip in train/; training uses normal clips alone"
                continue
            anomaly = 0
        elif anomaly is None:
            anomaly = truth.get((part["type"], name.stem))
            subset = "evaluation" if layout.name.startswith("DCASE") else subset
        found[name] = {
            "machine_type": part["type"],
            "machine_id": part["id"],
            "split": split,
            "anomaly": anomaly,
            "subset": subset,
            "domain": part.get("domain") or "",
            "attributes": part.get("attributes") or "",
        }
    if layout.name == "MIMII":
        _hold_out(found)
    return found


def _hold_out(found: dict[PurePosixPath, dict | str]) -> None:
    """Give MIMII a test set: every abnormal clip, and as many normal ones, but at most half of them.

    The data set has no split of its own. Its authors test with equal numbers of both, and so does this: the
    first normal recordings in the order of their numbers, the same ones at every signal-to-noise ratio.
    """
    recordings = defaultdict(lambda: (set(), set()))
    clips = {name: clip for name, clip in found.items() if isinstance(clip, dict)}
    for name, clip in clips.items():
        recordings[clip["machine_type"], clip["machine_id"]][clip["anomaly"]].add(name.stem)
    held_out = {
        machine: set(sorted(normal)[: min(len(abnormal), len(normal) // 2)])
        for machine, (normal, abnormal) in recordings.items()
    }
    for name, clip in clips.items():
        if not clip["anomaly"] and name.stem in held_out[clip["machine_type"], clip["machine_id"]]:
            clip["split"] = "test"


def read_manifest(path: Path) -> dict[Path, dict | str]:
    """Read a table of clips: a CSV file with the columns path, machine_type, machine_id, split, anomaly.

    Parameters
    ----------
    path : Path
        `type` and `id` will do as names too. A path is relative to the manifest's folder or absolute; split
        is train or test; anomaly is 0, 1 or empty (unknown; training clips are normal). The further columns
        subset, domain and attributes are optional.

    Returns
    -------
    dict
        For every file the fields of its `dataset.Clip`, or the reason why it is none.

    Raises
    ------
    UserError
        If a column is missing, a value has another form, or a file is named twice.
    """
    found: dict[Path, dict | str] = {}
    columns = ("path", "machine_type", "machine_id", "split", "anomaly")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        names = {"type": "machine_type", "id": "machine_id", "file": "path"}
        given = [name.strip().lower().replace(" ", "_") for name in rows.fieldnames or []]
        rows.fieldnames = [names.get(name, name) for name in given]
        missing = [name for name in columns if name not in rows.fieldnames]
        if missing:
            first = f"the first line must be {','.join(columns)}"
            raise UserError(f"{path}: no column {', '.join(missing)}; {first}")
        for row in rows:
            row = {key: (value or "").strip() for key, value in row.items() if key}
            where = f"{path}, line {rows.line_num}"
            if row["split"] not in ("train", "test") or row["anomaly"] not in ("0", "1", ""):
                raise UserError(f"{where}: expected split train or test and anomaly 0, 1 or empty, got {row}")
            if not (row["path"] and row["machine_type"] and row["machine_id"]):
                raise UserError(f"{where}: path, machine_type and machine_id must not be empty")
            clip = path.parent / row["path"]
            if clip in found:
                raise UserError(f"{where}: {row['path']} is named a second time")
            if row["split"] == "train" and row["anomaly"] == "1":
                found[clip] = "an anomalous clip in train; training uses normal clips alone"
            elif not clip.is_file():
                found[clip] = "no such file"
            else:
                truth = int(row["anomaly"]) if row["anomaly"] else None
                found[clip] = {
                    "machine_type": row["machine_type"],
                    "machine_id": row["machine_id"],
                    "split": row["split"],
                    "anomaly": 0 if row["split"] == "train" else truth,
                    "subset": row.get("subset") or "development",
                    "domain": row.get("domain", ""),
                    "attributes": row.get("attributes", ""),
                }
    return found
