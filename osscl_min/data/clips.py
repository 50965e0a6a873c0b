"""From a folder of sound files to clips: machine type, machine id, label, split and truth, and the samples.

The benchmark's layout (DCASE 2020 Task 2): TYPE/train/normal_id_00_00000000.wav and
TYPE/test/anomaly_id_00_00000000.wav; a test file with neither normal_ nor anomaly_ in its name is unlabelled
unless eval_data_list.csv has it. `layouts` knows the others.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import scipy.signal
import soundfile

from osscl_min.config import AudioConfig
from osscl_min.data.layouts import interpret, read_manifest, recognise
from osscl_min.runtime.files import UserError, first_lines

SUFFIXES = (".wav", ".flac")
TRUTH_FILE = "eval_data_list.csv"  # the published ground truth of the evaluation set
TRUTH_FILES = "ground_truth_*_section_*.csv"  # the same of DCASE 2021-2025, one a machine type and section
MANIFEST = "manifest.csv"

# The fixed 41 labels of the benchmark, in the authors' order: (machine type, machine id) -> position.
BENCHMARK: tuple[tuple[str, str], ...] = tuple(
    (machine_type, f"{number:02d}")
    for machine_type, numbers in (
        ("fan", range(0, 7)),
        ("pump", range(0, 7)),
        ("slider", range(0, 7)),
        ("ToyCar", range(1, 8)),
        ("ToyConveyor", range(1, 7)),
        ("valve", range(0, 7)),
    )
    for number in numbers
)


@dataclass(frozen=True)
class Clip:
    """One sound file."""

    path: Path
    machine_type: str
    machine_id: str  # "00"
    split: str  # "train" or "test"
    anomaly: int | None  # 0 normal, 1 anomalous, None unlabelled
    subset: str = "development"  # "evaluation" where the truth comes from, or waits for, a truth file
    domain: str = ""  # "source" or "target" (DCASE 2021-2025), the signal-to-noise ratio (MIMII)
    attributes: str = ""  # what else the name says: "vel_6_loc_A"

    @property
    def machine(self) -> tuple[str, str]:
        """(machine type, machine id): the identity that the classifier learns."""
        return self.machine_type, self.machine_id


@dataclass
class Dataset:
    """The clips of a folder, and what was wrong with it."""

    root: Path
    clips: list[Clip]
    problems: dict[str, str] = field(default_factory=dict)  # file -> why it is not used
    remarks: Counter = field(default_factory=Counter)  # what was done to usable files, and to how many
    synthetic: bool = False  # simulated machines (the folder holds synthetic.json); a store must keep this
    layout: str = "DCASE 2020"  # or another of `layouts.LAYOUTS`, or "manifest"
    channel: int | None = None  # taken of files with several; None averages them

    def split(self, name: str) -> list[Clip]:
        """The clips of "train" or "test"."""
        return [clip for clip in self.clips if clip.split == name]

    def name(self, path: Path) -> str:
        """A file's name in messages and tables: relative to the root where it lies in it."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def report(self, strict: bool = False, most: int = 10) -> str:
        """What is not used, and why, and what was done to the rest; one line each.

        Raises
        ------
        UserError
            If `strict` and any file is not used.
        """
        lines = [f"{_count(count)} {remark}" for remark, count in sorted(self.remarks.items())]
        if self.problems:
            lines.append(f"{_count(len(self.problems))} not used:")
            lines += first_lines([f"{file}: {reason}" for file, reason in self.problems.items()], most)
        if strict and self.problems:
            raise UserError("\n".join([*lines, "stopped because of --strict"]))
        return "\n".join(lines)


def _count(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def label_table(clips: Iterable[Clip]) -> tuple[tuple[str, str], ...]:
    """The classes of a training set: the benchmark's 41 where they hold every machine, else those present.

    The authors number training labels by what is present and test labels by the fixed table, which differ
    for a part of the data; here both come from this one table, and a checkpoint carries it.

    Raises
    ------
    UserError
        If there is less than two machines: the method tells machines apart, so one alone teaches nothing.
    """
    machines = sorted({clip.machine for clip in clips})
    if len(machines) < 2:
        have = " ".join(machines[0]) if machines else "none"
        raise UserError(
            f"training needs clips of at least two machines (type and id), but there is {have}; "
            "add others to the folder, or with `train --with DIR`, or `--with simulated`"
        )
    return BENCHMARK if set(machines) <= set(BENCHMARK) else tuple(machines)


def scan(root: Path | str, channel: int | None = None) -> Dataset:
    """Find the clips of a data set.

    Parameters
    ----------
    root : Path or str
        A folder of wav or flac files in one of `layouts.LAYOUTS`, recognised by its file names, or with a
        manifest.csv; or a manifest, see `layouts.read_manifest`.
    channel : int, optional
        The channel to take of files with several; left out, the layout's own: 0 for MIMII, else their mean.

    Returns
    -------
    Dataset
        Clips sorted by path. Files that cannot be used are in `problems`.

    Raises
    ------
    UserError
        If the folder is missing or empty, or a machine type has no train/.
    """
    root = Path(root)
    if root.is_file() and root.suffix.lower() == ".csv":
        return _from_manifest(root, channel)
    if not root.is_dir():
        raise UserError(f"no such data folder: {root}")
    if (root / MANIFEST).is_file():
        return _from_manifest(root / MANIFEST, channel)
    names = _files(root)
    sounds = [name for name in names if name.suffix.lower() in SUFFIXES]
    layout = recognise(sounds)
    if layout.name == "DCASE 2020":
        for folder in sorted(root.iterdir()):
            splits = [split for split in ("train", "test") if (folder / split).is_dir()]
            if folder.is_dir() and not folder.name.startswith(".") and not splits:
                raise UserError(
                    f"{folder}: no train/ folder and no test/ folder in it; expected {layout.expected}"
                )
    truth = read_truth(root / TRUTH_FILE) if (root / TRUTH_FILE).is_file() else {}
    for path in sorted(root.rglob(TRUTH_FILES)) if layout.name == "DCASE 2021-2025" else ():
        truth |= _read_section_truth(path)
    dataset = Dataset(
        root,
        [],
        synthetic=(root / "synthetic.json").is_file(),
        layout=layout.name,
        channel=layout.channel if channel is None else channel,
    )
    found = interpret(layout, sounds, truth)
    clip_folders = {name.parent for name, clip in found.items() if isinstance(clip, dict)}
    for name in names:
        if name in found:
            _add(dataset, root / name, found[name])
        elif name.parent in clip_folders or name.parent.name in ("train", "test"):
            dataset.problems[str(name)] = "not a .wav or .flac file"
    return _not_empty(dataset, layout.expected)


def _from_manifest(path: Path, channel: int | None) -> Dataset:
    dataset = Dataset(path.parent, [], layout="manifest", channel=channel)
    for file, clip in read_manifest(path).items():
        _add(dataset, file, clip)
    return _not_empty(dataset, "a row a file")


def _add(dataset: Dataset, path: Path, clip: dict | str) -> None:
    if isinstance(clip, str):
        dataset.problems[dataset.name(path)] = clip
    else:
        dataset.clips.append(Clip(path, **clip))


def _not_empty(dataset: Dataset, expected: str) -> Dataset:
    if not dataset.clips:
        raise UserError(f"{dataset.root}: no usable clips; {dataset.report() or f'expected {expected}'}")
    return dataset


def _files(root: Path) -> list[PurePosixPath]:
    """Every file in the folders of `root` but hidden ones, relative to it and sorted."""
    names = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = PurePosixPath(Path(folder).relative_to(root).as_posix())
        if place.parts:
            names += [place / name for name in sorted(files) if not name.startswith(".")]
    return names


def read_truth(path: Path | str) -> dict[tuple[str, str], int]:
    """Read eval_data_list.csv: a line with the machine type, then rows `file,original name,0 or 1`.

    Returns
    -------
    dict
        (machine type, file stem) -> 1 for anomalous, 0 for normal.

    Raises
    ------
    UserError
        If a row has another form.
    """
    truth, machine_type = {}, None
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if len([cell for cell in row if cell]) == 1:
                machine_type = row[0].strip()
            elif len(row) == 3 and row[2] in ("0", "1") and machine_type:
                truth[machine_type, Path(row[0]).stem] = int(row[2])
            elif row:
                raise UserError(
                    f"{path}, line {number}: expected `file,original name,0 or 1`, got {','.join(row)!r}"
                )
    return truth


def _read_section_truth(path: Path) -> dict[tuple[str, str], int]:
    """Read ground_truth_TYPE_section_03_source_test.csv (rows `file,0 or 1`) of DCASE 2021-2025."""
    machine_type = re.match(r"ground_truth_(.+?)_section_", path.name)[1]
    truth = {}
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if len(row) == 2 and row[1].strip() in ("0", "1"):
                truth[machine_type, Path(row[0]).stem] = int(row[1])
            elif row:
                raise UserError(f"{path}, line {number}: expected `file,0 or 1`, got {','.join(row)!r}")
    return truth


@contextmanager
def open_sound(path: Path | str) -> Iterator[soundfile.SoundFile]:
    """A sound file to read from; what libsndfile cannot do with it is a UserError."""
    try:
        with soundfile.SoundFile(path) as file:
            yield file
    except soundfile.LibsndfileError as error:
        raise UserError(f"not a readable sound file ({error.error_string.rstrip('.')})") from error
    except (RuntimeError, OSError) as error:
        raise UserError(f"not a readable sound file ({error})") from error


def duration(path: Path | str) -> float:
    """Seconds of a sound file, by its header."""
    with open_sound(path) as file:
        return file.frames / file.samplerate


def decode(
    path: Path | str, audio: AudioConfig, channel: int | None = None, start: float | None = None
) -> tuple[np.ndarray, list[str]]:
    """Read a sound file as the model hears it: mono, int16, at the model's rate and length.

    Parameters
    ----------
    path : Path or str
        Anything that libsndfile reads.
    audio : AudioConfig
        Gives the rate (Hz) and the length (samples).
    channel : int, optional
        The channel to take of a file with several; left out, their mean.
    start : float, optional
        Seconds: read only the clip that starts there, as if it were a file of its own.

    Returns
    -------
    samples : (audio.samples,) int16
        Divide by 32768 for [-1, 1). Another rate is resampled (scipy's polyphase filter), a longer clip is
        cropped to its first part and a shorter one repeated.
    remarks : list of str
        What was done, as phrases for `Dataset.remarks`.

    Raises
    ------
    UserError
        If the file cannot be read or is truncated, empty, silent, shorter than one second or holds NaN.
    """
    remarks = []
    with open_sound(path) as file:
        one = file.channels == 1 or channel is not None
        exact = file.subtype == "PCM_16" and file.samplerate == audio.sample_rate and one
        rate, channels, expected = file.samplerate, file.channels, file.frames
        # libsndfile takes the length of a wav that was cut short for what is left of it, and notes that
        declared = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
        if start is not None:
            first = file.seek(min(round(start * rate), file.frames))
            expected = min(math.ceil(audio.seconds * rate), file.frames - first)
        samples = file.read(expected, dtype="int16" if exact else "float64", always_2d=True)
    if declared and int(declared[1]) < 0x7FFFFFFF:  # beyond: a header that was never given its length
        raise UserError(f"truncated: {declared[2]} of {declared[1]} bytes of sound")
    if not len(samples):
        raise UserError("empty")
    if len(samples) < expected:
        raise UserError(f"truncated: {len(samples)} of {expected} samples")
    if len(samples) < rate:
        raise UserError(f"shorter than one second ({len(samples) / rate:.2f} s)")
    if channels > 1 and channel is not None:
        if not 0 <= channel < channels:
            raise UserError(f"has no channel {channel}, only 0 to {channels - 1}")
        remarks.append(f"with several channels, channel {channel} taken")
    elif channels > 1:
        remarks.append("with several channels, averaged")
    if not exact and not np.isfinite(samples).all():
        raise UserError("holds NaN or infinite samples")
    samples = samples[:, 0 if channels == 1 else channel] if one else samples.mean(axis=1)
    if samples.max() == samples.min():
        raise UserError("silent")
    if rate != audio.sample_rate:
        common = math.gcd(rate, audio.sample_rate)
        samples = scipy.signal.resample_poly(samples, audio.sample_rate // common, rate // common)
        remarks.append(f"resampled from {rate} Hz to {audio.sample_rate} Hz")
    if not exact:
        scaled = np.rint(samples * 32768)
        if np.abs(scaled).max() > 32768:
            remarks.append("clipped to 16 bits")
        samples = scaled.clip(-32768, 32767).astype(np.int16)
    if len(samples) > audio.samples:
        remarks.append(f"cropped to {audio.seconds:g} s")
    elif len(samples) < audio.samples:
        remarks.append(f"repeated to {audio.seconds:g} s")
        samples = np.resize(samples, audio.samples)
    return np.ascontiguousarray(samples[: audio.samples]), remarks
