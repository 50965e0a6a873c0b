"""What every notebook opens: a run, its detector and its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from osscl_min import checkpoint
from osscl_min.config import AudioConfig, Config
from osscl_min.data.reader import Data, open_data
from osscl_min.runtime.files import ROOT, UserError


class OpenRun(NamedTuple):
    """A run's folder, its detector, and its data."""

    folder: Path
    trained: checkpoint.Checkpoint
    data: Data
    config: Config
    audio: AudioConfig
    note: str  # the end of a figure's title: simulated machines are always called synthetic


def run_folder() -> Path:
    """The folder named by OSSCL_RUN, relative to the repository; by default runs/quick."""
    run = ROOT / os.environ.get("OSSCL_RUN", "runs/quick")
    if not (run / "best.pt").is_file():
        raise UserError(f"no trained run in {run}: `bash reproduce.sh` makes runs/quick, or set OSSCL_RUN")
    return run


def data_folder() -> Path:
    """The data folder or store named by OSSCL_DATA, relative to the repository; by default the run's data."""
    return ROOT / os.environ.get("OSSCL_DATA", run_folder() / "data")


def open_run(*splits: str) -> OpenRun:
    """Open the run of `run_folder` and the "train" or "test" clips of its data, by default both."""
    run = run_folder()
    trained = checkpoint.load(run / "best.pt")
    data = open_data(data_folder(), trained.config.model.audio, splits=splits or ("train", "test"))
    counts = [f"{len(getattr(data, split))} {split} clips" for split in splits or ("train", "test")]
    source = "simulated machines, no recordings" if data.dataset.synthetic else data.dataset.root.name
    print(f"{source}: {', '.join(counts)}")
    note = " (synthetic data)" if data.dataset.synthetic else ""
    return OpenRun(run, trained, data, trained.config, trained.config.model.audio, note)
