"""Clips of a folder or store, and batches of their samples: `open_data`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from osscl_min.config import AudioConfig
from osscl_min.data.audio import attempt, decode, on_threads
from osscl_min.data.clips import Clip, Dataset, cut, scan
from osscl_min.data.store import ARRAY, SAMPLE, Line, describe, is_store, read_store, settings
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.runtime.files import UserError, printable

SIMULATED = "simulated"


class Reader:
    """Batches of samples of usable clips, wherever they come from; `read` counts positions in `clips`."""

    def __init__(self, rows: Mapping[Clip, np.ndarray | Callable[[], np.ndarray]], length: int):
        self.clips, self.rows, self.length = list(rows), list(rows.values()), length  # samples per clip
        numbers = {path: number for number, path in enumerate(dict.fromkeys(clip.path for clip in rows))}
        # (clips,) the number of each clip's recording, in order of first appearance
        self.recordings = np.array([numbers[clip.path] for clip in rows], np.int64)

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, positions: Sequence[int]) -> np.ndarray:
        """Samples of the clips at `positions`: (len(positions), length) int16."""
        out = np.empty((len(positions), self.length), np.int16)
        for place in np.argsort(positions):  # in the order of the disk
            row = self.rows[positions[place]]
            out[place] = row() if callable(row) else row
        return out


class FolderReader(Reader):
    """Samples straight from sound files, each of which is decoded once to check it; unusable ones are moved
    from the data set's clips to its problems. Of more than `keep` bytes, clips are decoded when read."""

    def __init__(self, dataset: Dataset, clips: Sequence[Clip], audio: AudioConfig, keep: int = 2 << 30):
        channel, fits = dataset.channel, len(clips) * audio.samples * SAMPLE.itemsize <= keep

        def check(clip: Clip) -> tuple[np.ndarray | Callable[[], np.ndarray], list[str]]:
            samples, remarks = decode(clip.path, audio, channel, clip.start)
            return samples if fits else lambda: decode(clip.path, audio, channel, clip.start)[0], remarks

        results = on_threads(partial(attempt, check), clips, "reading clips")
        super().__init__(dataset.decoded(clips, results, audio), audio.samples)


class StoreReader(Reader):
    """Samples from one split of a packed store, mapped into memory: the same as `FolderReader` reads."""

    def __init__(self, store: Path, split: str, dataset: Dataset, lines: Sequence[Line], audio: AudioConfig):
        lines = [line for line in lines if line["clip"]["split"] == split]
        array = store / ARRAY.format(split)
        samples = np.memmap(array, SAMPLE, "r").reshape(-1, audio.samples) if lines else None
        results = [line["problem"] or (samples[line["row"]], line["remarks"]) for line in lines]
        super().__init__(dataset.decoded(dataset.split(split), results, audio), audio.samples)


@dataclass
class Data:
    """An open data set."""

    dataset: Dataset  # every clip; in a split that was opened, only clips that decode
    train: Reader | None = None  # None if not asked for; may be empty
    test: Reader | None = None


def open_data(
    path: Path | str,
    audio: AudioConfig,
    *,
    splits: Sequence[str] = ("train", "test"),
    channel: int | None = None,
    strict: bool = False,
) -> Data:
    """Open a data set: sound files, each of which is decoded once to check it, or their packed store.

    Both give the same clips, in the same order, and the same samples. `path` is a data folder, a manifest
    (.csv) or a packed store; `splits` are those to make readers for. `channel` is taken from files with
    several, counted from 0; by default the layout's own. A UserError if nothing is usable or, when `strict`,
    anything is not; if a store is not finished, damaged, or of another rate, length or channel.
    """
    if not is_store(path):
        dataset = scan(path, channel)
        dataset.clips = cut(dataset.clips, audio, splits)
        readers = {split: FolderReader(dataset, dataset.split(split), audio) for split in splits}
    else:
        header, dataset, lines = read_store(path, first=audio.clip_step == 0)
        wanted = settings(audio, header["channel"] if channel is None else channel)
        first = {} if audio.clip_step else {"step": header["step"]}
        if header | wanted | first != header:
            given = (item for item in wanted.items() if item[1] is not None)
            options = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in given)
            raise UserError(
                f"{printable(path)} holds {describe(header)}; make another store: python -m osscl_min pack "
                f"{printable(header['data'])} OTHER {options}"
            )
        readers = {split: StoreReader(Path(path), split, dataset, lines, audio) for split in splits}
    dataset.report(strict)
    return Data(dataset, **readers)


def with_others(own: Data, others: Path | str, audio: AudioConfig, run: Path, strict: bool = False) -> Data:
    """Add other machines' training clips to one's own, as further classes: the method needs several.

    `others` is a data folder, or "simulated" for the machines of `synth`, written into `run`/simulated at the
    model's length; their types are called "simulated fan" and so on. The result keeps the root of one's own.
    """
    simulated = str(others) == SIMULATED
    if simulated:
        rate = max(SynthConfig.sample_rate, audio.sample_rate)
        config = SynthConfig(seconds=audio.seconds, sample_rate=rate, test_normal=1, test_anomaly=1)
        others = write_dataset(run / SIMULATED, config)
    added = open_data(others, audio, splits=["train"], strict=strict)
    if simulated:
        for holder in (added.train, added.dataset):
            holder.clips = [replace(c, machine_type=f"{SIMULATED} {c.machine_type}") for c in holder.clips]
    if same := {clip.machine for clip in own.train.clips} & {clip.machine for clip in added.train.clips}:
        raise UserError(
            f"{printable(own.dataset.root)} and {printable(added.dataset.root)} both have a machine "
            f"{' id '.join(min(same))}; give one of them another type or id"
        )
    first, second, name = own.dataset, added.dataset, added.dataset.root.name
    first.clips += second.clips
    first.problems |= {f"{name}/{file}": why for file, why in second.problems.items()}
    first.remarks += second.remarks
    first.usage |= {f"{name}/{split}": text for split, text in second.usage.items()}
    rows = zip(own.train.clips + added.train.clips, own.train.rows + added.train.rows, strict=True)
    return Data(first, Reader(dict(rows), own.train.length))
