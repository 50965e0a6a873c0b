"""The door to the data, `open_data`, and the packed store behind it: clips decoded once, read by batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from osscl_min.config import AudioConfig
from osscl_min.dataset import Clip, Dataset, FolderReader, scan


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
    dataset = scan(path, channel)
    readers = {split: FolderReader(dataset, dataset.split(split), audio) for split in splits}
    dataset.report(strict)
    return Data(dataset, **readers)
