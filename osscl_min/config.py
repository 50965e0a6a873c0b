"""Every constant of the method with its source and its range, and the three presets.

Sources: "paper" is OS-SCL (ICASSP 2025, arXiv 2509.13853); "code" is the authors' released code, which
decides where the two differ; "ours" marks a choice of this package. Ranges are intervals: (0, 1] excludes 0
and includes 1. `Settings` checks type and range of every field: a wrong value is a UserError.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from osscl_min.runtime import settings
from osscl_min.runtime.files import UserError
from osscl_min.runtime.settings import Settings

Precision = Literal["fp32", "tf32", "bf16"]
Count = Annotated[int, "[1, inf)"]
Positive = Annotated[float, "(0, inf)"]
NonNegative = Annotated[float, "[0, inf)"]


@dataclass(frozen=True)
class AudioConfig(Settings):
    """The front end: what a clip is and how its log-mel spectrogram is made."""

    sample_rate: Annotated[int, "[1000, 1000000]"] = 16_000  # Hz; others are resampled
    # length of a clip (code; recordings of ToyCar have 11 s); shorter recordings are repeated (ours)
    seconds: Annotated[float, "[1, 3600]"] = 10.0
    # seconds from one clip of a longer recording to the next (ours); 0: its first clip alone (code)
    clip_step: NonNegative = 0.0
    n_fft: Annotated[int, "[2, inf)"] = 2048  # samples of an FFT and its periodic Hann window (code)
    hop: Count = 512  # samples from frame to frame, of Tgram and TFgram too (code)
    mels: Count = 128  # mel bands, of Slaney's scale and norm (code)
    f_min: NonNegative = 0.0  # Hz, lower end of the mel bands (code)
    f_max: Positive = 8_000.0  # Hz, upper end of the mel bands, at most half the sample rate (code)
    # filter of every clip, in training and test (ours)
    filter: Literal["none", "low-pass", "high-pass"] = "none"
    cutoff: Positive = 4_000.0  # Hz, cut-off of that filter (ours)

    def __post_init__(self) -> None:
        super().__post_init__()
        nyquist = self.sample_rate / 2
        if not self.f_min < self.f_max <= nyquist:
            wrong = f"f_min {self.f_min:g} and f_max {self.f_max:g} Hz"
            raise UserError(f"audio: {wrong}; set f_min below f_max, and f_max to at most {nyquist:g} Hz, "
                            "half the sample rate")  # fmt: skip
        if 0 < self.clip_step < 0.01:
            raise UserError(f"audio.clip_step: {self.clip_step:g} s; give 0 or at least 0.01 s")

    @property
    def samples(self) -> int:
        """Samples per clip."""
        return round(self.seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Frames of a centred STFT of one clip: 313 for 10 s, 63 for 2 s."""
        return 1 + self.samples // self.hop


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The network."""

    audio: AudioConfig = field(default_factory=AudioConfig)
    # maps that the encoder takes (paper): the log-mel; Tgram and TFgram, of its size, learned from the wave
    inputs: tuple[Literal["log_mel", "tgram", "tfgram"], ...] = ("log_mel", "tgram", "tfgram")
    classes: Count = 41  # number of machines; 41 in DCASE 2020 Task 2 (code); training takes it from the data
    embedding: Annotated[int, "[2, inf)"] = 128  # dimensions of the embedding (code)
    # feature perturbation head: with ReLU (basic) or LeakyReLU 0.01 (leaky, paper), or none (ours)
    head: Literal["basic", "leaky", "none"] = "basic"
    frozen: tuple[Literal["tgram", "tfgram"], ...] = ()  # maps whose convolutions stay random (ours)
    scale: Positive = 30.0  # scale s of ArcFace (code)
    margin: Annotated[float, "[0, 3.14]"] = 0.4  # margin m of ArcFace, radians (code)


@dataclass(frozen=True)
class LossConfig(Settings):
    """The loss of clips mixed with partners: cross_entropy_weight (lambda CE(y_a) + (1 - lambda) CE(y_b)) +
    contrastive_weight SupCon(z, y_a), with y_a and y_b the labels of clip and partner, z the embedding."""

    mixup: bool = True  # mix every clip with a partner (paper)
    mixup_alpha: Positive = 0.5  # lambda ~ Beta(alpha, alpha), one per batch (code)
    temperature: Positive = 0.02  # tau of SupCon (code)
    base_temperature: Positive = 0.07  # SupCon is multiplied by tau / this (code)
    contrastive_weight: NonNegative = 1.0  # weight of SupCon (code)
    # SupCon of mixed clips with label y_a (noise, paper), of unmixed clips in a second forward pass (clean),
    # of mixed clips with both labels, weighted by lambda (weighted), or no SupCon (none)
    contrastive: Literal["noise", "clean", "weighted", "none"] = "noise"
    cross_entropy_weight: NonNegative = 1.0  # weight of both cross-entropies (code)
    # label with ArcFace's margin: y_a in both cross-entropies (own, code), or the label of each (each)
    margin_on: Literal["own", "each"] = "own"


@dataclass(frozen=True)
class TrainConfig(Settings):
    """The optimisation."""

    epochs: Count = 300  # passes over the training clips (code)
    batch_size: Annotated[int, "[2, inf)"] = 64  # clips per step, of all processes together (code)
    # learning rate of the first epoch; AdamW, default betas and eps, weight decay 0.01 (code)
    learning_rate: Positive = 1e-4
    # learning rate at the end of cosine annealing over the epochs (code)
    final_learning_rate: NonNegative = 1e-5
    # decay of the moving average (EMA) of every float entry of the network but frozen weights, updated after
    # every step (code)
    ema_decay: Annotated[float, "[0, 1)"] = 0.9999
    # after the EMA's update, every float entry of the network is scaled by 1 - this (code); 0 turns this off
    student_decay: Annotated[float, "[0, 1)"] = 2e-6
    # number of first epochs that train with SupCon alone, on unmixed clips; later ones omit it (ours)
    pretrain_epochs: Annotated[int, "[0, inf)"] = 0
    # share of the training clips to which white or pink noise is added, at 20 to -10 dB SNR (ours)
    noise: Annotated[float, "[0, 1]"] = 0.0
    # precision of the network (code); cosines, losses and statistics stay float32
    precision: Precision = "fp32"
    validation_fraction: Annotated[float, "(0, 1)"] = 0.05  # share of the recordings to hold out (code)
    # which recordings are held out of training: any (random, code), or (last, ours) the last of each machine
    # by name, since neighbours in a folder are often alike: at least two but no more than two fifths of them,
    # and of 50 recordings or more at least about 20 in all, which resolve a false-alarm rate of 5 %
    hold_out: Literal["random", "last"] = "random"
    # which epoch's EMA becomes best.pt: that of the lowest validation loss (best, code), measured on one half
    # of the held-out clips so that the other half can set thresholds (ours); or the last epoch's (last, ours)
    keep: Literal["best", "last"] = "best"
    seed: Annotated[int, "[0, 1e18]"] = 2024  # seed of every random draw (code)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pretrain_epochs >= self.epochs:
            raise UserError(f"train.pretrain_epochs: {self.pretrain_epochs} must be below train.epochs "
                            f"({self.epochs}), or no epoch learns classification")  # fmt: skip


@dataclass(frozen=True)
class EngineConfig(Settings):
    """How a run is carried out; a run may resume under other values (all ours)."""

    # seconds between checkpoints within an epoch; each epoch ends with one
    checkpoint_seconds: NonNegative = 300.0
    log_steps: Count = 20  # steps between two looks at the losses, each of which waits for the device
    resident: Literal["auto", "yes", "no"] = "auto"  # keep all samples in GPU memory; auto: where they fit
    compile: bool = False  # torch.compile the network; on a CPU this takes minutes and gains little
    cuda_graph: Literal["auto", "no"] = "auto"  # auto: replay each step on a GPU, in a single process


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Scoring and its tables."""

    batch_size: Count = 16  # clips per batch (ours; the authors score one clip at a time)
    precision: Precision = "fp32"  # precision of the network (code)
    bootstrap: Annotated[int, "[0, 1000000]"] = 1000  # resamples for 95 % intervals (ours); 0 omits them
    # exact: cross-entropy (paper); upstream: the same in float32, with ties at 0 (code); nearest: distance
    # from the machine's training clips (ours); profile, gaussian: distances without the network (ours). auto:
    # nearest for detectors of the preset small, or profile if they recognise held-out recordings no better
    # than by chance; exact for all others
    score: Literal["auto", "exact", "upstream", "nearest", "profile", "gaussian"] = "auto"


@dataclass(frozen=True)
class Config(Settings):
    """Everything that a run depends on besides its data. `Config()` is the paper's experiment."""

    preset: Literal["paper", "small", "quick"] = "paper"  # preset that gives the defaults
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


# For runs of a few hundred steps. The EMA must forget the first steps' BatchNorm statistics before the end:
# a decay of 0.99 still keeps 13 % of them after 200 steps, and that spoils the averaged network. With so few
# held-out clips the last epoch is kept, so that all of them can set thresholds.
_SHORT = TrainConfig(
    epochs=25,
    batch_size=16,
    learning_rate=1e-3,
    ema_decay=0.95,
    validation_fraction=0.1,
    keep="last",
)

PRESETS: dict[str, Config] = {
    # the paper's experiment, constant for constant
    "paper": Config(),
    # a few hundred clips of 10 s; the command line's default
    "small": Config(
        preset="small",
        model=ModelConfig(audio=AudioConfig(clip_step=10.0)),
        train=replace(_SHORT, hold_out="last"),
    ),
    # 2 s clips of simulated machines, minutes on two CPU cores
    "quick": Config(
        preset="quick",
        model=ModelConfig(audio=AudioConfig(seconds=2.0, clip_step=2.0)),
        train=replace(_SHORT, epochs=6, learning_rate=2e-3, ema_decay=0.9),
        evaluate=EvaluateConfig(batch_size=8, bootstrap=300),
    ),
}


to_dict = asdict  # plain values, for JSON and checkpoints


def from_dict(values: dict[str, Any]) -> Config:
    """A configuration from plain values; missing keys keep their defaults. Mistakes are a UserError."""
    return settings.from_dict(values, Config)


def with_classes(config: Config, classes: int) -> Config:
    """The same configuration for another number of machine identities."""
    return replace(config, model=replace(config.model, classes=classes))
