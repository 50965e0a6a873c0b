"""Checkpoints: written whole or not at all, loaded without running code, ours and the authors'."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osscl_min.config import AudioConfig, Config, ModelConfig, from_dict, to_dict
from osscl_min.data.clips import BENCHMARK, Clip
from osscl_min.model import OSSCL, load_upstream_state
from osscl_min.runtime.files import UserError, replacing

FORMAT = 1


@dataclass
class Checkpoint:
    """A network with everything needed to score a clip with it."""

    path: Path
    model: OSSCL  # in eval mode
    config: Config
    classes: tuple[tuple[str, str], ...]  # label -> (machine type, machine id)
    epoch: int | None  # epochs trained; None for the authors' files
    synthetic: bool = False  # trained on simulated machines
    calibration: dict[str, torch.Tensor] | None = None  # "labels", "scores" (n,) of held-out normal clips

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.arcface.weight.device

    def labels_of(self, clips: Iterable[Clip]) -> np.ndarray:
        """Each clip's class, (clips,) int64; -1 where its machine was never trained on."""
        numbers = {machine: label for label, machine in enumerate(self.classes)}
        return np.array([numbers.get(clip.machine, -1) for clip in clips], np.int64)

    def held_out(self) -> tuple[list[tuple[str, str]], list[float]]:
        """Machines and scores of the normal clips that were held out of training; empty without any."""
        if self.calibration is None:
            return [], []
        machines = [self.classes[label] for label in self.calibration["labels"].tolist()]
        return machines, self.calibration["scores"].tolist()


def save(path: Path | str, content: dict[str, Any], config: Config, classes: tuple, synthetic: bool) -> None:
    """Write tensors and plain values with their configuration, replacing the file as a whole."""
    header = {"format": FORMAT, "config": to_dict(config), "classes": [list(machine) for machine in classes]}
    whole = io.BytesIO()  # a full disk makes torch.save itself fail without a reason
    torch.save(header | {"synthetic": synthetic} | content, whole)
    with replacing(path, "wb") as file:
        file.write(whole.getbuffer())


def read(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The raw content of a checkpoint file.

    Raises
    ------
    UserError
        If the file is missing, damaged or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such checkpoint: {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint, but a {type(content).__name__}")
    return content


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a network for scoring.

    Parameters
    ----------
    path : Path or str
        One of a run's .pt files, or a .pth of the authors', whole or pruned of its unused layers.
    device : torch.device or str

    Raises
    ------
    UserError
        If the file is no checkpoint of this network.
    """
    path = Path(path)
    content = read(path, device)
    if "format" not in content:
        return _load_upstream(path, content, device)
    if content["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {content['format']}, this package reads {FORMAT}")
    config = from_dict(content["config"], where=str(path))
    model = OSSCL(config.model).to(device)
    try:
        model.load_state_dict(content["ema"])
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit its configuration ({error})") from error
    classes = tuple(tuple(machine) for machine in content["classes"])
    epoch, synthetic, calibration = content["epoch"], content["synthetic"], content.get("calibration")
    return Checkpoint(path, model.eval(), config, classes, epoch, synthetic, calibration)


def _load_upstream(path: Path, state: dict[str, Any], device: torch.device | str) -> Checkpoint:
    state = {name.removeprefix("module."): value for name, value in state.items()}
    first = state.get("mobilefacenet.conv1.conv.weight")
    if first is None:
        raise UserError(f"{path}: neither a checkpoint of this package nor one of the authors'")
    inputs = ("log_mel",) if first.shape[1] == 1 else ("log_mel", "tgram", "tfgram")
    config = Config(model=ModelConfig(audio=AudioConfig(), inputs=inputs))
    model = OSSCL(config.model).to(device)
    try:
        load_upstream_state(model, state)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Checkpoint(path, model.eval(), config, BENCHMARK, None)
