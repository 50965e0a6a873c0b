"""Checkpoints, ours and the authors': written whole or not at all, loaded without running code."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osscl_min.config import Config, ModelConfig, from_dict, to_dict
from osscl_min.data.clips import BENCHMARK, Clip
from osscl_min.model import OSSCL
from osscl_min.neighbours import FORMS, Neighbours
from osscl_min.runtime.files import UserError, printable, replacing

FORMAT = 1
SCORES = {  # what the anomaly scores are; see `EvaluateConfig.score`
    "exact": "cross-entropy against the machine's class (paper)",
    "upstream": "cross-entropy against the machine's class, in float32 (authors' code)",
    "nearest": "distance from the machine's training clips, in the embedding and in the spectrum",
    "profile": "distance from the machine's training clips in the spectrum, without the network",
    "gaussian": "Mahalanobis distance of the mean spectrum and its deviation over time, without the network",
}


@dataclass
class Checkpoint:
    """A network with everything needed to score a clip with it."""

    path: Path
    model: OSSCL  # in eval mode
    config: Config
    classes: tuple[tuple[str, str], ...]  # label -> (machine type, machine id)
    epoch: int | None  # epochs trained; None for the authors' files
    synthetic: bool = False  # trained on simulated machines
    # "labels", "recordings", "scores" and those of neighbours.FORMS, (n,), of held-out normal clips of one's
    # own machines that did not choose the epoch; older files have labels and scores alone, one clip
    # per recording
    calibration: dict[str, torch.Tensor] | None = None
    neighbours: Neighbours | None = None
    borrowed: tuple[int, ...] = ()  # classes that are not one's own machines, see `reader.with_others`
    # "recordings" held out, how many were "recognised", what "chance" gives, and its "p_value"
    recognition: dict[str, float] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.model.arcface.weight.device

    def labels_of(self, clips: Iterable[Clip]) -> np.ndarray:
        """Each clip's class, (clips,) int64; -1 if its machine was never trained on."""
        numbers = {machine: label for label, machine in enumerate(self.classes)}
        return np.array([numbers.get(clip.machine, -1) for clip in clips], np.int64)

    @property
    def at_chance(self) -> bool:
        """Whether held-out recordings are recognised no better than by chance (p > 0.05)."""
        return self.recognition is not None and self.recognition["p_value"] > 0.05

    @property
    def remark(self) -> str:
        """A line on how well held-out recordings are recognised; "" where that is unknown."""
        if self.recognition is None:
            return ""
        counts = "the network recognises {recognised} of {recordings} held-out recordings as their machine"
        line = f"{counts}; chance gives {{chance:.0%}}".format(**self.recognition)
        return f"warning: {line}, so this is no better than guessing" if self.at_chance else line

    def form(self, asked: str = "auto") -> str:
        """The score that `asked` (see `EvaluateConfig.score`) means for this checkpoint."""
        if asked == "auto":
            small = self.config.preset == "small" and self.neighbours is not None
            return "exact" if not small else "profile" if self.at_chance else "nearest"
        if asked in FORMS and self.neighbours is None:
            raise UserError(
                f"{printable(self.path)}: holds no training clips to compare with, as finished runs of this "
                f"version do, so it has no score {asked!r}; train again, or give --score exact"
            )
        return asked

    def held_out(self, form: str = "exact") -> tuple[list[tuple[str, str]], list[np.ndarray]]:
        """Machines and scores (windows,) of normal recordings that may set thresholds; empty without any."""
        if self.calibration is None:
            return [], []
        scores = self.calibration[form if form in FORMS else "scores"].numpy()
        recordings = self.calibration.get("recordings", torch.arange(len(scores))).numpy()
        parts = self.calibration["labels"].numpy(), scores, recordings
        labels, scores, recordings = (part[~np.isnan(scores)] for part in parts)
        _, first = np.unique(recordings, return_index=True)
        machines = [self.classes[label] for label in labels[first]]
        return machines, [scores[recordings == recordings[clip]] for clip in first]


def save(path: Path | str, content: dict[str, Any], config: Config, classes: tuple, synthetic: bool) -> None:
    """Write tensors and plain values with their configuration, replacing the file as a whole."""
    header = {"format": FORMAT, "config": to_dict(config), "classes": [list(machine) for machine in classes]}
    whole = io.BytesIO()  # on a full disk torch.save itself fails without a reason
    torch.save(header | {"synthetic": synthetic} | content, whole)
    with replacing(path, "wb") as file:
        file.write(whole.getbuffer())


@contextmanager
def refusing(path: Path | str) -> Iterator[None]:
    """Turn what the content of a damaged or foreign file of a run raises into one line."""
    try:
        yield
    except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        why = f"it has no entry {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        raise UserError(f"{printable(path)}: not a readable checkpoint of this package: {why}") from error


def read(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint file, ours or the authors', on the CPU; it runs no code.

    Raises
    ------
    UserError
        If the file is missing, damaged, no checkpoint, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"no such checkpoint: {printable(path)}")
    with refusing(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what torch raises depends on where the file is damaged
            if isinstance(error, OSError):
                raise ValueError(error.strerror) from error
            if not zipfile.is_zipfile(path):
                raise ValueError("it is empty, no PyTorch file, or only a part of one") from error
            raise ValueError("it is damaged, or holds more than tensors and plain values") from error
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    return content


def load(path: Path | str, device: torch.device | str = "cpu") -> Checkpoint:
    """Load a network for scoring.

    Parameters
    ----------
    path : Path or str
        One of a run's .pt files, or a .pth of the authors', whole or without its unused layers.
    device : torch.device or str

    Raises
    ------
    UserError
        If the file is no checkpoint of this network.
    """
    path = Path(path)
    content = read(path)
    with refusing(path):
        if path.name == "failed.pt":
            raise ValueError("it is the state of a run that failed, for inspection only; use best.pt")
        trained = _ours(path, content) if "format" in content else _authors(path, content)
    trained.model.to(device).eval()
    return trained


def _ours(path: Path, content: dict[str, Any]) -> Checkpoint:
    if content["format"] != FORMAT:
        raise ValueError(f"it has format {content['format']}, this version reads {FORMAT}")
    config, classes = from_dict(content["config"]), content["classes"]
    if not all(isinstance(name, str) for machine in classes for name in machine):
        raise ValueError("its machines are not named by texts")
    classes = tuple((machine_type, machine_id) for machine_type, machine_id in classes)
    if len(classes) != config.model.classes:
        raise ValueError(f"it names {len(classes)} machines for {config.model.classes} classes")
    model = OSSCL(config.model)
    try:
        model.load_state_dict(content["ema"])
    except RuntimeError as error:
        raise ValueError("its weights do not fit its configuration") from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError("its weights are not finite")
    calibration = content.get("calibration")
    if calibration is not None:
        labels, scores = calibration["labels"], calibration["scores"]
        known = all(0 <= label < len(classes) for label in labels.tolist())
        alike = {value.shape for value in calibration.values()} == {(len(labels),)}
        if not (known and alike and scores.isfinite().all()):
            raise ValueError("its calibration scores are not one finite number per clip of a known machine")
    neighbours = content.get("neighbours")
    if neighbours is not None:
        neighbours = Neighbours(**{name: value.numpy() for name, value in neighbours.items()})
        known, clips = np.isin(neighbours.labels, np.arange(len(classes))).all(), len(neighbours.labels)
        size = config.model.embedding, config.model.audio.mels
        shapes = [getattr(neighbours, name).shape for name in ("recordings", "embeddings", "profiles")]
        if not known or shapes != [(clips,), (clips, size[0]), (clips, 3, size[1])]:
            raise ValueError("its training clips do not fit its machines or its configuration")
    trained = Checkpoint(
        path,
        model,
        config,
        classes,
        int(content["epoch"]),
        bool(content["synthetic"]),
        calibration,
        neighbours,
        tuple(content.get("borrowed", ())),
        content.get("recognition"),
    )
    # what scoring needs of them; what is missing is told here
    _ = trained.remark, [classes[label] for label in trained.borrowed]
    for form in FORMS if neighbours is not None else ():
        trained.held_out(form)
    return trained


def _authors(path: Path, state: dict[str, Any]) -> Checkpoint:
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    first = state.get("mobilefacenet.conv1.conv.weight")
    if first is None:
        raise ValueError("it has neither this package's entries nor those of the authors' checkpoints")
    inputs = ("log_mel",) if first.shape[1] == 1 else ("log_mel", "tgram", "tfgram")
    config = Config(model=ModelConfig(inputs=inputs))
    return Checkpoint(path, load_upstream_state(OSSCL(config.model), state), config, BENCHMARK, None)


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
    return {
        _upstream_name(name): (name, value)
        for name, value in model.state_dict().items()
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
    for name, value in state.items():
        if name in live:
            tensor = live[name][1]
            if value.shape != tensor.shape:
                raise UserError(
                    f"checkpoint of another configuration: {name} has shape {tuple(value.shape)}, "
                    f"the model {tuple(tensor.shape)}"
                )
        elif not (
            UPSTREAM_UNUSED.match(name)
            or name.endswith("num_batches_tracked")
            or (model.tgram is None and name.startswith("tgramnet."))
            or (model.tfgram is None and name.startswith("TFgramNet."))
        ):
            raise UserError(f"not a checkpoint of this model: unknown entry {name}")
    model.load_state_dict({ours: state[name] for name, (ours, _) in live.items()}, strict=False)
    return model
