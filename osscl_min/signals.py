"""What is done to clips to learn what a detector relies on: noise added, bands of the log-mel replaced."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import scipy.signal
import torch

from osscl_min.config import AudioConfig
from osscl_min.features import LogMel, hertz_to_mel, mel_to_hertz

NOISES = ("white", "pink", "factory")
HEARD = ("white", "pink")  # in noise-augmented training; factory-like noise stays new to the detector
HEARD_SNR = (-10.0, 20.0)  # dB, the range there


def noise(kind: str, samples: int, rate: int, random: np.random.Generator) -> np.ndarray:
    """Noise of unit power.

    Parameters
    ----------
    kind : {"white", "pink", "factory"}
        Equal power per Hz; per octave (from 20 Hz); or a simulated hall: a pink floor, mains hum with its
        harmonics and metallic knocks at random times. The last is made here, not recorded.
    samples : int
    rate : int
        Hz
    random : np.random.Generator

    Returns
    -------
    (samples,) float32
    """
    wave = random.standard_normal(samples, np.float32)
    if kind != "white":
        frequency = np.fft.rfftfreq(samples, 1 / rate)
        spectrum = np.fft.rfft(wave) / np.sqrt(np.maximum(frequency, 20.0))
        spectrum[frequency < 20.0] = 0
        wave = _unit(np.fft.irfft(spectrum, samples))
    if kind == "factory":
        time = np.arange(samples) / rate
        hum = sum(
            np.sin(2 * np.pi * (50 * order * time + random.random())) / order
            for order in (1, 2, 3, 4, 6, 8, 12)
        )
        strokes = np.zeros(samples)
        at = random.integers(0, samples, 1 + random.poisson(2 * samples / rate))
        strokes[at] = random.uniform(0.3, 1, len(at)) * random.choice((-1, 1), len(at))
        ring = time[: rate // 4]
        modes = random.uniform(600, 5000, 3)  # Hz
        knock = sum(
            np.exp(-ring * random.uniform(15, 60)) * np.sin(2 * np.pi * mode * ring) for mode in modes
        )
        knocks = scipy.signal.fftconvolve(strokes, knock)[:samples]
        wave = wave + 0.7 * _unit(hum) + 0.9 * _unit(knocks)
    return _unit(wave).astype(np.float32)


def _unit(wave: np.ndarray) -> np.ndarray:
    return wave / np.sqrt(np.mean(np.square(wave)))


def add_noise(wave: torch.Tensor, added: np.ndarray, snr: np.ndarray | float) -> torch.Tensor:
    """Waves (B, samples) with noise (B, samples) of unit power at a signal-to-noise ratio (dB) of each clip.

    The ratio is to the clip's own mean power, background and all; the sum is not clipped.
    """
    level = wave.square().mean(1, keepdim=True).sqrt()
    gain = 10 ** (-torch.as_tensor(snr, dtype=wave.dtype).reshape(-1, 1) / 20)
    return wave + level * gain.to(wave.device) * torch.from_numpy(added).to(wave)


def clip_noise(kind: str, snr: float, audio: AudioConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Waves (B, samples) -> the same in noise; a clip's noise follows from its samples alone."""

    def apply(wave: torch.Tensor) -> torch.Tensor:
        seeds = [zlib.crc32(row.tobytes()) for row in wave.cpu().numpy()]
        added = [
            noise(kind, wave.shape[1], audio.sample_rate, np.random.default_rng([seed, NOISES.index(kind)]))
            for seed in seeds
        ]
        return add_noise(wave, np.stack(added), snr)

    return apply


def training_noise(
    share: float, audio: AudioConfig, random: np.random.Generator
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Waves (B, samples) -> the same, a share of them in noise of HEARD at a ratio within HEARD_SNR."""

    def apply(wave: torch.Tensor) -> torch.Tensor:
        chosen = np.flatnonzero(random.random(len(wave)) < share)
        if not len(chosen):
            return wave
        kinds, snr = random.choice(HEARD, len(chosen)), random.uniform(*HEARD_SNR, len(chosen))
        added = np.stack([noise(kind, wave.shape[1], audio.sample_rate, random) for kind in kinds])
        wave = wave.clone()
        wave[chosen] = add_noise(wave[chosen], added, snr)
        return wave

    return apply


def bands(audio: AudioConfig, count: int) -> list[tuple[slice, float, float]]:
    """The log-mel's rows in `count` bands of equally many: rows, and the edges in Hz.

    Neighbouring triangles overlap; an edge lies where two of them cross.
    """
    low, high = hertz_to_mel(audio.f_min), hertz_to_mel(audio.f_max)
    cuts = np.linspace(0, audio.mels, count + 1).round().astype(int)
    edges = mel_to_hertz(low + (high - low) * (cuts + 0.5) / (audio.mels + 1))
    edges[[0, -1]] = audio.f_min, audio.f_max
    return [
        (slice(first, last), float(below), float(above))
        for first, last, below, above in zip(cuts, cuts[1:], edges, edges[1:], strict=False)
    ]


def replace_band(
    rows: slice, level: torch.Tensor | None = None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Log-mels (B, 1, mels, frames) and labels (B,) -> the same, some rows at a constant level.

    Parameters
    ----------
    rows : slice
        Of the mels.
    level : (classes, mels), optional
        dB, of each machine; silence without.
    """

    def apply(log_mel: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        log_mel = log_mel.clone()
        if level is None:
            log_mel[:, :, rows] = 10 * np.log10(LogMel.floor)
        else:
            log_mel[:, :, rows] = level.to(log_mel)[labels][:, None, rows, None]
        return log_mel

    return apply
