"""Checkpoints: written whole or not at all, loaded without running code, ours and the authors'."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osscl_min.config import AudioConfig, Config, ModelConfig, from_dict, to_dict
from osscl_min.data.clips import BENCHMARK, Clip
from osscl_min.model import OSSCL
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


# --- the authors' checkpoints ------------------------------------------------------------------------------

# Layers of the authors' model that never run or never get a gradient.
UPSTREAM_UNUSED = re.compile(
    r"^(TFgramNet\.(pre_block4|spec_augmenter|bn0|conv_block[1-6]|fc1|fc_audioset)|mobilefacenet\.fc_out)\."
)
_TFGRAM = (
    ("pre_conv0", "pre_bn0"),
    *((f"pre_block{b}.conv{i}", f"pre_block{b}.bn{i}") for b in (1, 2, 3) for i in (1, 2)),
)


def _upstream_name(name: str) -> str:
    """Our state entry's name -> the authors'."""
    part, _, rest = name.partition(".")
    if part == "tfgram":
        kind, number, entry = rest.split(".")
        return f"TFgramNet.{_TFGRAM[int(number)][kind == 'norm']}.{entry}"
    if part == "tgram":
        return "tgramnet." + rest.replace("extractor", "conv_extrctor").replace("encoder", "conv_encoder")
    return {"encoder": "mobilefacenet.", "head": "head.", "arcface": "arcface."}[part] + rest.replace(
        "layers", "head"
    )


def _live_entries(model: OSSCL) -> dict[str, tuple[str, torch.Tensor]]:
    """The authors' name -> (our name, tensor) of every entry but the batch counters."""
    state = model.state_dict()
    return {
        _upstream_name(name): (name, value)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }


def upstream_state_shapes(config: ModelConfig = ModelConfig()) -> dict[str, tuple[int, ...]]:
    """The authors' names and the shapes of every live state entry, without num_batches_tracked."""
    with torch.device("meta"):
        model = OSSCL(config)
    return {theirs: tuple(value.shape) for theirs, (_, value) in _live_entries(model).items()}


def load_upstream_state(model: OSSCL, state: Mapping[str, torch.Tensor]) -> OSSCL:
    """Load the authors' checkpoint, whole or pruned of its unused layers, into this model.

    Parameters
    ----------
    model : OSSCL
        Entries for inputs that it does not have are passed over, as are the authors' unused layers.
    state : mapping
        The authors' state dict; a "module." prefix is taken off.

    Raises
    ------
    UserError
        If a live entry is missing, has another shape, or a name is unknown.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    live = _live_entries(model)
    missing = sorted(set(live) - set(state))
    if missing:
        raise UserError(
            f"not a checkpoint of this model: {len(missing)} entries are missing, first {missing[0]}"
        )
    loaded = {}
    for name, value in state.items():
        if name in live:
            ours, tensor = live[name]
            if value.shape != tensor.shape:
                raise UserError(
                    f"checkpoint of another configuration: {name} has shape {tuple(value.shape)}, "
                    f"the model {tuple(tensor.shape)}"
                )
            loaded[ours] = value
        elif not (
            UPSTREAM_UNUSED.match(name)
            or name.endswith("num_batches_tracked")
            or (model.tgram is None and name.startswith("tgramnet."))
            or (model.tfgram is None and name.startswith("TFgramNet."))
        ):
            raise UserError(f"not a checkpoint of this model: unknown entry {name}")
    model.load_state_dict({**model.state_dict(), **loaded})
    return model
