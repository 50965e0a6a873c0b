"""Noise added to clips: white, pink and factory-like, for training and for analyses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.signal
import torch

from osscl_min.config import AudioConfig

NOISES = ("white", "pink", "factory")
TRAINING_NOISES = ("white", "pink")  # factory-like noise stays unseen until the test
TRAINING_SNR = (-10.0, 20.0)  # dB


def noise(kind: str, samples: int, rate: int, random: np.random.Generator) -> np.ndarray:
    """Noise of unit power, (samples,) float32, at a sample rate in Hz.

    White: equal power per Hz. Pink: equal power per octave, from 20 Hz. Factory: simulated, a pink floor with
    mains hum and its harmonics, and metallic knocks at random times.
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
    """Waves (B, samples) plus noise (B, samples) of unit power, at a signal-to-noise ratio (dB) per clip.

    The signal's power is the clip's mean power, background included; the sum is not clipped.
    """
    level = wave.square().mean(1, keepdim=True).sqrt()
    gain = 10 ** (-torch.as_tensor(snr, dtype=wave.dtype).reshape(-1, 1) / 20)
    return wave + level * gain.to(wave.device) * torch.from_numpy(added).to(wave)


def training_noise(
    share: float, audio: AudioConfig, random: np.random.Generator
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A transform of waves (B, samples) that adds TRAINING_NOISES at TRAINING_SNR to a share of them."""

    def apply(wave: torch.Tensor) -> torch.Tensor:
        chosen = np.flatnonzero(random.random(len(wave)) < share)
        if not len(chosen):
            return wave
        kinds, snr = random.choice(TRAINING_NOISES, len(chosen)), random.uniform(*TRAINING_SNR, len(chosen))
        added = np.stack([noise(kind, wave.shape[1], audio.sample_rate, random) for kind in kinds])
        wave = wave.clone()
        wave[chosen] = add_noise(wave[chosen], added, snr)
        return wave

    return apply
