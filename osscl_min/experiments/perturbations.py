"""Perturbations of test clips that show what a detector relies on: added noise, replaced log-mel bands."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch

from osscl_min.augment import NOISES, add_noise, noise
from osscl_min.config import AudioConfig
from osscl_min.features import LogMel, hz_to_mel, mel_to_hz


def clip_noise(kind: str, snr: float, audio: AudioConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adds noise to waves (B, samples); the noise of a clip follows from its samples alone."""

    def apply(wave: torch.Tensor) -> torch.Tensor:
        seeds = [zlib.crc32(row.tobytes()) for row in wave.cpu().numpy()]
        added = [
            noise(kind, wave.shape[1], audio.sample_rate, np.random.default_rng([seed, NOISES.index(kind)]))
            for seed in seeds
        ]
        return add_noise(wave, np.stack(added), snr)

    return apply


def bands(audio: AudioConfig, count: int) -> list[tuple[slice, float, float]]:
    """The rows of the log-mel in `count` bands of equally many: rows, lower and upper edge (Hz).

    Neighbouring triangles overlap; an edge lies where two of them cross.
    """
    low, high = hz_to_mel(audio.f_min), hz_to_mel(audio.f_max)
    cuts = np.linspace(0, audio.mels, count + 1).round().astype(int)
    edges = mel_to_hz(low + (high - low) * (cuts + 0.5) / (audio.mels + 1))
    edges[[0, -1]] = audio.f_min, audio.f_max
    return [
        (slice(first, last), float(below), float(above))
        for first, last, below, above in zip(cuts, cuts[1:], edges, edges[1:], strict=False)
    ]


def replace_band(
    rows: slice, level: torch.Tensor | None = None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Sets mel `rows` of log-mels (B, 1, mels, frames) to silence, or to `level` (classes, mels; dB)."""

    def apply(log_mel: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_mel = log_mel.clone()
        if level is None:
            log_mel[:, :, rows] = 10 * np.log10(LogMel.floor)
        else:
            log_mel[:, :, rows] = level.to(log_mel)[labels][:, None, rows, None]
        return log_mel

    return apply
