"""From a folder of sound files to clips: machine type, machine id, label, split and truth, and the samples.

Layout (DCASE 2020 Task 2): TYPE/train/normal_id_00_00000000.wav, TYPE/test/anomaly_id_00_00000000.wav; a
test file with neither normal_ nor anomaly_ in its name is unlabelled unless eval_data_list.csv has it.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.signal
import soundfile
from tqdm import tqdm

from osscl_min.config import AudioConfig
from osscl_min.files import UserError

SUFFIXES = (".wav", ".flac")
TRUTH_FILE = "eval_data_list.csv"  # the published ground truth of the evaluation set
FILE_NAME = re.compile(r"^(?:(normal|anomaly)_)?id_(\d+)_\d+$")

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
    subset: str = "development"  # "evaluation" where the truth comes from, or waits for, eval_data_list.csv

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

    def split(self, name: str) -> list[Clip]:
        """The clips of "train" or "test"."""
        return [clip for clip in self.clips if clip.split == name]

    def report(self, strict: bool = False, most: int = 10) -> str:
        """What is not used, and why, and what was done to the rest; one line each.

        Raises
        ------
        UserError
            If `strict` and any file is not used.
        """
        lines = [f"{count} files {remark}" for remark, count in sorted(self.remarks.items())]
        if self.problems:
            lines.append(f"{len(self.problems)} files are not used:")
            lines += [f"  {file}: {reason}" for file, reason in list(self.problems.items())[:most]]
            lines += [f"  ... and {len(self.problems) - most} more"] if len(self.problems) > most else []
        if strict and self.problems:
            raise UserError("\n".join([*lines, "stopped because of --strict"]))
        return "\n".join(lines)


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
            f"training needs clips of at least two machines (type and id), but there is {have}; add others"
        )
    return BENCHMARK if set(machines) <= set(BENCHMARK) else tuple(machines)


def scan(root: Path | str) -> Dataset:
    """Find the clips of a folder in the DCASE 2020 layout.

    Parameters
    ----------
    root : Path or str
        Holds one folder a machine type, each with train/ and, for evaluation, test/; wav or flac.

    Returns
    -------
    Dataset
        Clips sorted by type, split and name. Files that cannot be used are in `problems`.

    Raises
    ------
    UserError
        If the folder is missing or empty, or a machine type has no train/ and no test/.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no such data folder: {root}")
    truth = read_truth(root / TRUTH_FILE) if (root / TRUTH_FILE).is_file() else {}
    dataset = Dataset(root, [], synthetic=(root / "synthetic.json").is_file())
    types = [
        folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")
    ]
    for folder in types:
        if not (folder / "train").is_dir():
            raise UserError(
                f"{folder}: no train/ folder in it; expected {folder.name}/train/normal_id_00_00000000.wav"
            )
        for split in ("train", "test"):
            for path in sorted((folder / split).glob("*")):
                name = str(path.relative_to(root))
                if path.name.startswith(".") or not path.is_file():
                    continue
                if path.suffix.lower() not in SUFFIXES:
                    dataset.problems[name] = "not a .wav or .flac file"
                    continue
                clip = _clip(path, folder.name, split, truth)
                if isinstance(clip, str):
                    dataset.problems[name] = clip
                else:
                    dataset.clips.append(clip)
    if not dataset.clips:
        why = dataset.report() or "expected TYPE/train/normal_id_00_00000000.wav"
        raise UserError(f"{root}: no usable clips; {why}")
    return dataset


def _clip(path: Path, machine_type: str, split: str, truth: dict[tuple[str, str], int]) -> Clip | str:
    """The clip behind a file name, or the reason why there is none."""
    match = FILE_NAME.match(path.stem)
    if not match:
        return "no machine id in the name; expected normal_id_00_00000000 or the like"
    state, number = match.groups()
    if split == "train":
        if state == "anomaly":
            return "an anomalous clip in train/; training uses normal clips alone"
        return Clip(path, machine_type, number, split, 0)
    if state:
        return Clip(path, machine_type, number, split, int(state == "anomaly"))
    return Clip(path, machine_type, number, split, truth.get((machine_type, path.stem)), "evaluation")


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


def decode(path: Path | str, audio: AudioConfig) -> tuple[np.ndarray, list[str]]:
    """Read a sound file as the model hears it: mono, int16, at the model's rate and length.

    Parameters
    ----------
    path : Path or str
        Anything that libsndfile reads.
    audio : AudioConfig
        Gives the rate (Hz) and the length (samples).

    Returns
    -------
    samples : (audio.samples,) int16
        Divide by 32768 for [-1, 1). Channels are averaged, another rate is resampled (scipy's polyphase
        filter), a longer clip is cropped to its first part and a shorter one repeated.
    remarks : list of str
        What was done, as phrases for `Dataset.remarks`.

    Raises
    ------
    UserError
        If the file cannot be read or is truncated, empty, silent, shorter than one second or holds NaN.
    """
    remarks = []
    try:
        with soundfile.SoundFile(path) as file:
            exact = file.subtype == "PCM_16" and file.channels == 1 and file.samplerate == audio.sample_rate
            rate, channels, expected = file.samplerate, file.channels, file.frames
            samples = file.read(dtype="int16" if exact else "float64", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise UserError(f"not a readable sound file ({error})") from error
    if not len(samples):
        raise UserError("empty")
    if len(samples) < expected:
        raise UserError(f"truncated: {len(samples)} of {expected} samples")
    if len(samples) < rate:
        raise UserError(f"shorter than one second ({len(samples) / rate:.2f} s)")
    if not exact and not np.isfinite(samples).all():
        raise UserError("holds NaN or infinite samples")
    if samples.max() == samples.min():
        raise UserError("silent")
    if channels > 1:
        remarks.append("with several channels, averaged")
    samples = samples[:, 0] if channels == 1 else samples.mean(axis=1)
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
    return samples[: audio.samples], remarks


class FolderReader:
    """Batches of samples straight from sound files; what fits is decoded once and kept.

    Parameters
    ----------
    dataset : Dataset
        Files that turn out unusable are moved from its clips to its problems.
    clips : sequence of Clip
        The clips to read, all of `dataset`.
    audio : AudioConfig
    keep : int
        Bytes of decoded samples to hold in memory; a larger set is decoded anew for every batch.

    Attributes
    ----------
    clips : list of Clip
        The usable ones; `read` counts positions in this list.
    """

    def __init__(self, dataset: Dataset, clips: Sequence[Clip], audio: AudioConfig, keep: int = 2 << 30):
        self.audio = audio
        self.samples: np.ndarray | None = None
        fits = len(clips) * audio.samples * 2 <= keep
        if fits:
            self.samples = np.empty((len(clips), audio.samples), np.int16)

        def check(numbered: tuple[int, Clip]) -> str | list[str]:
            number, clip = numbered
            try:
                samples, remarks = decode(clip.path, audio)
            except UserError as error:
                return str(error)
            if fits:
                self.samples[number] = samples
            return remarks

        with ThreadPoolExecutor(2) as pool:
            results = list(
                tqdm(
                    pool.map(check, enumerate(clips)),
                    "reading clips",
                    len(clips),
                    unit="clip",
                    disable=None,
                    leave=False,
                )
            )
        usable = [isinstance(result, list) for result in results]
        for clip, result in zip(clips, results, strict=True):
            if isinstance(result, list):
                dataset.remarks.update(result)
            else:
                dataset.problems[str(clip.path.relative_to(dataset.root))] = result
        self.clips = [clip for clip, ok in zip(clips, usable, strict=True) if ok]
        unusable = {clip for clip, ok in zip(clips, usable, strict=True) if not ok}
        dataset.clips = [clip for clip in dataset.clips if clip not in unusable]
        if fits and not all(usable):
            self.samples = self.samples[np.array(usable)]

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, positions: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Samples of the clips at `positions`: (len(positions), samples) int16, into `out` where given."""
        if out is None:
            out = np.empty((len(positions), self.audio.samples), np.int16)
        for row, position in zip(out, positions, strict=True):
            row[:] = (
                self.samples[position]
                if self.samples is not None
                else decode(self.clips[position].path, self.audio)[0]
            )
        return out
