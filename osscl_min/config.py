"""Every constant of the method with its source, and the three presets.

Sources: "paper" is OS-SCL (ICASSP 2025, arXiv 2509.13853); "code" is the authors' released code, which
decides where the two could differ; "ours" marks a choice of this package.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from osscl_min.runtime.files import UserError

Precision = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class AudioConfig:
    """The front end: what a clip is and how its log-mel spectrogram is made."""

    sample_rate: int = 16_000  # Hz; the data set's
    seconds: float = 10.0  # longer clips are cropped (ToyCar is 11 s; code), shorter ones repeated (ours)
    n_fft: int = 2048  # samples; window length too, periodic Hann (code)
    hop: int = 512  # samples (code); Tgram and TFgram are made to match
    mels: int = 128  # slaney scale and norm (code)
    f_min: float = 0.0  # Hz (code)
    f_max: float = 8_000.0  # Hz (code)
    filter: Literal["none", "low-pass", "high-pass"] = "none"  # of every clip, in training and at test (ours)
    cutoff: float = 4_000.0  # Hz, of that filter (ours)

    @property
    def samples(self) -> int:
        """Samples of one clip."""
        return round(self.seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Frames of a centred STFT of one clip: 313 for 10 s, 63 for 2 s."""
        return 1 + self.samples // self.hop


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    audio: AudioConfig = field(default_factory=AudioConfig)
    inputs: tuple[Literal["log_mel", "tgram", "tfgram"], ...] = ("log_mel", "tgram", "tfgram")  # maps (paper)
    classes: int = 41  # machine identities of DCASE 2020 Task 2 (code); other data sets it to their own
    embedding: int = 128  # dimensions (code)
    # feature perturbation head: ReLU, LeakyReLU 0.01 (paper)
    head: Literal["basic", "leaky", "none"] = "basic"
    frozen: tuple[Literal["tgram", "tfgram"], ...] = ()  # convolutions left as they were drawn (ours)
    scale: float = 30.0  # ArcFace s (code)
    margin: float = 0.4  # ArcFace m, radians (code)


@dataclass(frozen=True)
class LossConfig:
    """w_ce (lambda CE(y_a) + (1 - lambda) CE(y_b)) + contrastive_weight SupCon(z, y_a); the rest is for
    comparisons."""

    mixup: bool = True  # mix every clip with a partner (paper)
    mixup_alpha: float = 0.5  # lambda ~ Beta(alpha, alpha), one a batch, not folded (code)
    temperature: float = 0.02  # SupCon tau (code)
    base_temperature: float = 0.07  # SupCon scale tau / base (code)
    contrastive_weight: float = 1.0  # of SupCon in the loss (code)
    # SupCon of mixed clips under y_a (noise, paper), of clean clips in a pass of their own, of mixed clips
    # under both labels weighted by lambda, or none
    contrastive: Literal["noise", "clean", "weighted", "none"] = "noise"
    cross_entropy_weight: float = 1.0  # of both cross-entropies (code)
    margin_on: Literal["own", "each"] = "own"  # y_a's logit in both terms (code), or each term's own label


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation."""

    epochs: int = 300  # passes over the training clips (code)
    batch_size: int = 64  # clips, of all processes together (code)
    learning_rate: float = 1e-4  # AdamW, default betas, eps and weight decay 0.01 (code)
    final_learning_rate: float = 1e-5  # cosine annealing over the epochs (code)
    ema_decay: float = 0.9999  # after every step, over every float entry of the state (code)
    # every such entry of the student times 1 - this, after the EMA (code); 0 is off
    student_decay: float = 2e-6
    pretrain_epochs: int = 0  # first epochs with SupCon of clean clips alone, then cross-entropy alone (ours)
    # share of the training clips that get white or pink noise added, 20 to -10 dB SNR (ours)
    noise: float = 0.0
    precision: Precision = "fp32"  # of the network (code); cosines, losses and statistics stay float32
    validation_fraction: float = 0.05  # random split (code)
    seed: int = 2024  # of every random draw (code)


@dataclass(frozen=True)
class EngineConfig:
    """How a run is carried out; a run may go on under other settings of these (all ours)."""

    checkpoint_seconds: float = 300.0  # between two checkpoints within an epoch; each epoch ends with one
    log_steps: int = 20  # steps between two looks at the losses
    resident: Literal["auto", "yes", "no"] = "auto"  # keep all samples in GPU memory; auto: where they fit
    compile: bool = False  # torch.compile the network; on a CPU that takes minutes and gains little
    cuda_graph: Literal["auto", "no"] = "auto"  # auto: replay steps on one GPU; not with several processes


@dataclass(frozen=True)
class EvaluateConfig:
    """Scoring and its tables."""

    batch_size: int = 16  # clips (ours; the authors score one clip at a time)
    precision: Precision = "fp32"  # of the network (code)
    bootstrap: int = 1000  # resamples for the 95 % intervals (ours); 0 leaves them out
    # upstream: cross-entropy in float32, which ties at 0 (code)
    score: Literal["exact", "upstream"] = "exact"


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on besides its data."""

    preset: Literal["paper", "small", "quick"] = "paper"  # which set of defaults
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


# A few hundred steps. The EMA must forget the first steps' BatchNorm statistics before the end: a decay of
# 0.99 still keeps 4 % of them after 325 steps, and that spoils the averaged network.
_SHORT = TrainConfig(
    epochs=25,
    batch_size=16,
    learning_rate=1e-3,
    final_learning_rate=1e-5,
    ema_decay=0.95,
    validation_fraction=0.1,
)

PRESETS: dict[str, Config] = {
    # the paper's experiment, constant for constant
    "paper": Config(),
    # a few hundred clips of 10 s
    "small": Config(preset="small", train=_SHORT),
    # the embedded default: 2 s clips of simulated machines, minutes on two CPU cores
    "quick": Config(
        preset="quick",
        model=ModelConfig(audio=AudioConfig(seconds=2.0)),
        train=replace(_SHORT, epochs=12),
        evaluate=EvaluateConfig(batch_size=32, bootstrap=300),
    ),
}


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values, for JSON and checkpoints."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind: type = Config, where: str = "config") -> Any:
    """Build a configuration from plain values; the reverse of `to_dict`.

    Parameters
    ----------
    values : dict
        Missing keys keep their defaults.
    kind : type
        The dataclass to build.
    where : str
        Name of the place in error messages.

    Raises
    ------
    UserError
        If a key is unknown or a value has the wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a table of settings, got {values!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{where}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(hints))}")
    return kind(**{key: _checked(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def with_classes(config: Config, classes: int) -> Config:
    """The same configuration for another number of machine identities."""
    return replace(config, model=replace(config.model, classes=classes))


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, arguments))}")
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_checked(item, arguments[0], where) for item in value)
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _checked(value, next(a for a in arguments if a is not type(None)), where)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
