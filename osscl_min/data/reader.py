"""The door to the data: `open_data` gives the clips of a folder or store, and batches of their samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from osscl_min.config import AudioConfig
from osscl_min.data.clips import Clip, Dataset, decode, scan
from osscl_min.data.store import ARRAY, SAMPLE, describe, is_store, read_store
from osscl_min.runtime.files import UserError


class Reader:
    """Batches of samples of clips, wherever they come from.

    Attributes
    ----------
    clips : list of Clip
        The usable ones; `read` counts positions in this list.
    length : int
        Samples of a clip.
    """

    clips: list[Clip]
    length: int

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, positions: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Samples of the clips at `positions`: (len(positions), length) int16, into `out` where given."""
        if out is None:
            out = np.empty((len(positions), self.length), np.int16)
        self._fill(out, np.asarray(positions, int))
        return out

    def _fill(self, out: np.ndarray, positions: np.ndarray) -> None:
        raise NotImplementedError


class FolderReader(Reader):
    """Samples straight from sound files; what fits is decoded once and kept.

    Parameters
    ----------
    dataset : Dataset
        Files that turn out unusable are moved from its clips to its problems.
    clips : sequence of Clip
        The clips to read, all of `dataset`.
    audio : AudioConfig
    keep : int
        Bytes of decoded samples to hold in memory; a larger set is decoded anew for every batch.
    """

    def __init__(self, dataset: Dataset, clips: Sequence[Clip], audio: AudioConfig, keep: int = 2 << 30):
        self.audio, self.length, self.channel = audio, audio.samples, dataset.channel
        self.samples: np.ndarray | None = None
        fits = len(clips) * audio.samples * 2 <= keep
        if fits:
            self.samples = np.empty((len(clips), audio.samples), np.int16)

        def check(number: int, clip: Clip) -> str | list[str]:
            try:
                samples, remarks = decode(clip.path, audio, dataset.channel)
            except UserError as error:
                return str(error)
            if fits:
                self.samples[number] = samples
            return remarks

        bar = {"desc": "reading clips", "unit": "clip", "disable": None, "leave": False, "tqdm_class": tqdm}
        results = thread_map(check, range(len(clips)), clips, max_workers=os.cpu_count(), **bar)
        usable = _use(dataset, clips, results)
        self.clips = [clip for clip, ok in zip(clips, usable, strict=True) if ok]
        if fits and not all(usable):
            self.samples = self.samples[np.array(usable)]

    def _fill(self, out: np.ndarray, positions: np.ndarray) -> None:
        for row, position in zip(out, positions, strict=True):
            if self.samples is not None:
                row[:] = self.samples[position]
            else:
                row[:], _ = decode(self.clips[position].path, self.audio, self.channel)


class StoreReader(Reader):
    """Samples from a packed store, mapped and not held in memory; the same as `FolderReader` gives.

    Parameters
    ----------
    array : Path
        The split's samples.
    dataset : Dataset
        Unusable files are moved from its clips to its problems.
    clips : sequence of Clip
        The split's files, usable or not.
    lines : sequence of dict
        Their lines of the store's index.
    """

    def __init__(self, array: Path, dataset: Dataset, clips: Sequence[Clip], lines: Sequence[dict]):
        usable = _use(dataset, clips, [line["problem"] or line["remarks"] for line in lines])
        self.clips = [clip for clip, ok in zip(clips, usable, strict=True) if ok]
        self.length = next((line["length"] for line in lines if line["length"]), 0)
        self.offsets = np.array([line["offset"] for line, ok in zip(lines, usable, strict=True) if ok], int)
        self.samples = np.memmap(array, SAMPLE, "r") if self.clips else np.empty(0, SAMPLE)

    def _fill(self, out: np.ndarray, positions: np.ndarray) -> None:
        offsets = self.offsets[positions]
        for place in np.argsort(offsets):  # in the order of the disk
            out[place] = self.samples[offsets[place] : offsets[place] + self.length]


def _use(dataset: Dataset, clips: Sequence[Clip], results: Sequence[str | list[str]]) -> list[bool]:
    """Note each clip's remarks, or its problem (str), in the data set; returns which clips can be used."""
    unusable = set()
    for clip, result in zip(clips, results, strict=True):
        if isinstance(result, list):
            dataset.remarks.update(result)
        else:
            dataset.problems[dataset.name(clip.path)] = result
            unusable.add(clip)
    dataset.clips = [clip for clip in dataset.clips if clip not in unusable]
    return [clip not in unusable for clip in clips]


@dataclass
class Data:
    """What training and evaluation need of a data set.

    Attributes
    ----------
    dataset : Dataset
        Every clip found, whatever its split, with `problems` and `remarks`; in a split that was opened,
        only clips that decode.
    train, test : Reader or None
        A reader for each split that was asked for. It may be empty (`len(reader) == 0`).
    """

    dataset: Dataset
    train: Reader | None = None
    test: Reader | None = None

    def report(self) -> str:
        """What is not used and why, and what was done to the rest, as lines to print; "" if nothing."""
        return self.dataset.report()


def open_data(
    path: Path | str,
    audio: AudioConfig,
    *,
    splits: Sequence[str] = ("train", "test"),
    channel: int | None = None,
    strict: bool = False,
) -> Data:
    """Open a data set: sound files, each of which is decoded once to check it, or their packed store.

    Both give the same clips, in the same order, and the same samples.

    Parameters
    ----------
    path : Path or str
        A data folder (any layout that `dataset.scan` knows), a manifest (.csv) or a packed store.
    audio : AudioConfig
        Rate (Hz) and length (samples) that the model hears.
    splits : sequence of {"train", "test"}
        The splits to make readers for.
    channel : int, optional
        The channel of files with several: a number from 0; left out, the layout's own choice (0 for MIMII,
        else the mean of all). A store has one already.
    strict : bool
        Stop if any file is not usable.

    Raises
    ------
    UserError
        If there is nothing usable, or, when `strict`, anything that is not; if a store is not finished, is
        damaged or holds clips of another rate, length or channel.

    Examples
    --------
    >>> data = open_data("data", config.model.audio, splits=["train"])  # doctest: +SKIP
    >>> print(data.report())  # doctest: +SKIP
    >>> table = label_table(data.train.clips)  # doctest: +SKIP
    >>> wave = torch.from_numpy(data.train.read([5, 0, 7])).float() / 32768  # doctest: +SKIP
    """
    if is_store(path):
        dataset, readers = _open_store(Path(path), audio, splits, channel)
    else:
        dataset = scan(path, channel)
        readers = {split: FolderReader(dataset, dataset.split(split), audio) for split in splits}
    dataset.report(strict)
    return Data(dataset, **readers)


def _open_store(
    path: Path, audio: AudioConfig, splits: Sequence[str], channel: int | None
) -> tuple[Dataset, dict[str, StoreReader]]:
    header, dataset, lines = read_store(path)
    wanted = {"sample_rate": audio.sample_rate, "seconds": audio.seconds}
    wanted |= {} if channel is None else {"channel": channel}
    if any(header[name] != value for name, value in wanted.items()):
        raise UserError(
            f"{path} holds {describe(header)}; make another store: python -m osscl_min pack {header['data']} "
            "OTHER " + " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in wanted.items())
        )
    clips = list(dataset.clips)
    readers = {}
    for split in splits:
        chosen = [k for k, clip in enumerate(clips) if clip.split == split]
        readers[split] = StoreReader(
            path / ARRAY.format(split), dataset, [clips[k] for k in chosen], [lines[k] for k in chosen]
        )
    return dataset, readers
