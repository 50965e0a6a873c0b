"""TFgram at inference: the layer table that both kernels share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One TFgram layer: bias-free convolution, batch normalisation, ReLU, then maybe a maximum pool."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    padding: int
    pool: str  # "", "max4" (by four), "frames2" (adaptive to 2 T) or "frames" (adaptive to T)


LAYERS = (
    Layer(1, 64, 11, 5, 1, 5, ""),
    Layer(64, 64, 3, 1, 1, 1, ""),
    Layer(64, 64, 3, 1, 2, 2, "max4"),
    Layer(64, 128, 3, 1, 1, 1, ""),
    Layer(128, 128, 3, 1, 2, 2, "frames2"),
    Layer(128, 128, 3, 1, 1, 1, ""),
    Layer(128, 128, 3, 1, 2, 2, "frames"),
)


def frames(samples: int, hop: int = 512) -> int:
    """T, the number of log-mel frames of a wave of `samples` samples (centred STFT)."""
    return 1 + samples // hop
