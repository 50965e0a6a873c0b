"""Other machines' training clips beside one's own, for who has one machine: the method needs several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from osscl_min.config import AudioConfig
from osscl_min.dataset import Clip
from osscl_min.files import UserError
from osscl_min.reader import Data, open_data
from osscl_min.synth import SynthConfig, write_dataset

SIMULATED = "simulated"


class JoinedReader:
    """Several readers as one: positions count through the clips of the first, then of the second, ...

    Parameters
    ----------
    readers : sequence of FolderReader

    Attributes
    ----------
    clips : list of Clip
    """

    def __init__(self, readers: Sequence):
        self.readers = list(readers)
        self.clips: list[Clip] = [clip for reader in readers for clip in reader.clips]
        self._starts = np.cumsum([0, *(len(reader) for reader in readers[:-1])])

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, positions: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Samples of the clips at `positions`: (len(positions), samples) int16, into `out` where given."""
        positions = np.asarray(positions)
        owner = np.searchsorted(self._starts, positions, side="right") - 1
        for number, reader in enumerate(self.readers):
            rows = np.flatnonzero(owner == number)
            if len(rows):
                samples = reader.read(positions[rows] - self._starts[number])
                if out is None:
                    out = np.empty((len(positions), samples.shape[1]), samples.dtype)
                out[rows] = samples
        return out


def with_others(own: Data, others: Path | str, audio: AudioConfig, run: Path, strict: bool = False) -> Data:
    """Add other machines' training clips to one's own, as further classes.

    Parameters
    ----------
    own : Data
        With its training clips open.
    others : Path or str
        A data folder, or "simulated" for the machines of `synth`, written into `run`/simulated at the
        length that the model hears. Their types are called "simulated fan" and so on.
    audio : AudioConfig
    run : Path
    strict : bool
        Stop if any file cannot be used.

    Returns
    -------
    Data
        Its dataset has the root of one's own, and is synthetic only if that is.

    Raises
    ------
    UserError
        If both have a machine of the same type and id.
    """
    if str(others) == SIMULATED:
        rate = max(SynthConfig.sample_rate, audio.sample_rate)
        config = SynthConfig(seconds=audio.seconds, sample_rate=rate, test_normal=1, test_anomaly=1)
        others = write_dataset(run / SIMULATED, config)
        added = open_data(others, audio, splits=["train"], strict=strict)
        for holder in (added.train, added.dataset):
            holder.clips = [
                replace(clip, machine_type=f"{SIMULATED} {clip.machine_type}") for clip in holder.clips
            ]
    else:
        added = open_data(others, audio, splits=["train"], strict=strict)
    same = {clip.machine for clip in own.train.clips} & {clip.machine for clip in added.train.clips}
    if same:
        raise UserError(
            f"{own.dataset.root} and {added.dataset.root} both have a machine {' id '.join(min(same))}; "
            "give one of them another type or id"
        )
    problems = {f"{added.dataset.root.name}/{file}": why for file, why in added.dataset.problems.items()}
    dataset = replace(
        own.dataset,
        clips=own.dataset.clips + added.dataset.clips,
        problems=own.dataset.problems | problems,
        remarks=own.dataset.remarks + added.dataset.remarks,
    )
    return Data(dataset, JoinedReader([own.train, added.train]))
