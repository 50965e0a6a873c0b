"""The door to the data: `open_data` gives the clips of a folder, and batches of their samples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from osscl_min.config import AudioConfig
from osscl_min.dataset import Clip, Dataset, decode, scan
from osscl_min.files import UserError


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
        self.channel = dataset.channel
        self.samples: np.ndarray | None = None
        fits = len(clips) * audio.samples * 2 <= keep
        if fits:
            self.samples = np.empty((len(clips), audio.samples), np.int16)

        def check(numbered: tuple[int, Clip]) -> str | list[str]:
            number, clip = numbered
            try:
                samples, remarks = decode(clip.path, audio, dataset.channel)
            except UserError as error:
                return str(error)
            if fits:
                self.samples[number] = samples
            return remarks

        with ThreadPoolExecutor(os.cpu_count()) as pool:
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
                dataset.problems[dataset.name(clip.path)] = result
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
                else decode(self.clips[position].path, self.audio, self.channel)[0]
            )
        return out


@dataclass
class Data:
    """What training and evaluation need of a data folder.

    Attributes
    ----------
    dataset : Dataset
        Every clip found, whatever its split, with `problems` and `remarks`; in a split that was opened,
        only clips that decode.
    train, test : FolderReader or None
        A reader for each split that was asked for. It may be empty (`len(reader) == 0`).
    """

    dataset: Dataset
    train: FolderReader | None = None
    test: FolderReader | None = None

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
    """Open sound files; every clip of the splits is decoded once, to check it.

    Parameters
    ----------
    path : Path or str
        A data folder (any layout that `dataset.scan` knows) or a manifest (.csv).
    audio : AudioConfig
        Rate (Hz) and length (samples) that the model hears.
    splits : sequence of {"train", "test"}
        The splits to make readers for.
    channel : int, optional
        The channel of files with several: a number from 0; left out, the layout's own choice (0 for MIMII,
        else the mean of all).
    strict : bool
        Stop if any file is not usable.

    Raises
    ------
    UserError
        If there is nothing usable, or, when `strict`, anything that is not.

    Examples
    --------
    >>> data = open_data("data", config.model.audio, splits=["train"])  # doctest: +SKIP
    >>> print(data.report())  # doctest: +SKIP
    >>> table = label_table(data.train.clips)  # doctest: +SKIP
    >>> wave = torch.from_numpy(data.train.read([5, 0, 7])).float() / 32768  # doctest: +SKIP
    """
    dataset = scan(path, channel)
    readers = {split: FolderReader(dataset, dataset.split(split), audio) for split in splits}
    dataset.report(strict)
    return Data(dataset, **readers)
