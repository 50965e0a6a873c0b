"""Noise: white, pink and factory-like, added to clips in training and by the experiments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.signal
import torch

from osscl_min.config import AudioConfig

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
