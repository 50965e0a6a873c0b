"""Other machines' training clips beside one's own, for who has one machine: the method needs several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from osscl_min.config import AudioConfig
from osscl_min.data.reader import Data, Reader, open_data
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.runtime.files import UserError

SIMULATED = "simulated"


class JoinedReader(Reader):
    """Several readers as one: positions count through the clips of the first, then of the second, ...

    Parameters
    ----------
    readers : sequence of Reader
        Of clips of one length.
    """

    def __init__(self, readers: Sequence[Reader]):
        self.readers = list(readers)
        self.clips = [clip for reader in readers for clip in reader.clips]
        self.length = max(reader.length for reader in readers)  # 0 of an empty store
        self._starts = np.cumsum([0, *(len(reader) for reader in readers[:-1])])

    def _fill(self, out: np.ndarray, positions: np.ndarray) -> None:
        owner = np.searchsorted(self._starts, positions, side="right") - 1
        for number, reader in enumerate(self.readers):
            rows = np.flatnonzero(owner == number)
            if len(rows):
                out[rows] = reader.read(positions[rows] - self._starts[number])


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
