"""What every notebook opens: a run, its detector and its data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from osscl_min import checkpoint
from osscl_min.config import AudioConfig, Config
from osscl_min.data.reader import Data, open_data
from osscl_min.runtime.files import ROOT, UserError


@dataclass(frozen=True)
class OpenRun:
    """A run's folder, its detector, and its data."""

    folder: Path
    trained: checkpoint.Checkpoint
    data: Data

    @property
    def config(self) -> Config:
        """The settings of its training."""
        return self.trained.config

    @property
    def audio(self) -> AudioConfig:
        """What a clip is for this detector."""
        return self.config.model.audio

    @property
    def note(self) -> str:
        """The end of a figure's title: simulated machines are always called synthetic."""
        return " (synthetic data)" if self.data.dataset.synthetic else ""


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
    return OpenRun(run, trained, data)
