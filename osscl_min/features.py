"""The log-mel spectrogram, as the authors' front end computes it, without torchaudio."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from osscl_min.config import AudioConfig


def hertz_to_mel(frequency: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above (Auditory Toolbox, 1998)."""
    frequency = np.asarray(frequency, np.float64)
    return np.where(
        frequency < 1000.0,
        frequency * 3 / 200,
        15.0 + 27.0 * np.log(np.maximum(frequency, 1000.0) / 1000.0) / np.log(6.4),
    )


def mel_to_hertz(mel: np.ndarray) -> np.ndarray:
    """The reverse of `hertz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    return np.where(
        mel < 15.0, mel * 200 / 3, 1000.0 * np.exp((np.maximum(mel, 15.0) - 15.0) * np.log(6.4) / 27.0)
    )


def mel_filters(audio: AudioConfig) -> np.ndarray:
    """Triangular mel filters of unit area ("slaney" norm).

    Returns
    -------
    (mels, n_fft // 2 + 1) float64
    """
    bins = np.linspace(0, audio.sample_rate / 2, audio.n_fft // 2 + 1)  # Hz
    edges = mel_to_hertz(
        np.linspace(hertz_to_mel(audio.f_min), hertz_to_mel(audio.f_max), audio.mels + 2)
    )  # Hz
    widths = np.diff(edges)[:, None]
    distance = edges[:, None] - bins[None, :]
    rising, falling = -distance[:-2] / widths[:-1], distance[2:] / widths[1:]
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]


class LogMel(nn.Module):
    """Waves to log-mel spectrograms in dB: power STFT, slaney mel filters, 10 log10, no normalisation.

    Centred frames with zero padding and no top_db limit, as in the authors' code; silence is -100 dB.

    Parameters
    ----------
    audio : AudioConfig
    """

    floor = 1e-10  # power; -100 dB

    def __init__(self, audio: AudioConfig = AudioConfig()):
        super().__init__()
        self.audio = audio
        # float64 buffers, cast to the wave's dtype: float32 filters would cost 1e-6 of the float64 result
        self.register_buffer(
            "window", torch.hann_window(audio.n_fft, periodic=True, dtype=torch.float64), persistent=False
        )
        self.register_buffer("filters", torch.from_numpy(mel_filters(audio)), persistent=False)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """
        Parameters
        ----------
        wave : (B, samples) or (B, 1, samples) float32 or float64

        Returns
        -------
        (B, 1, mels, frames), dB, in the wave's dtype; frames = 1 + samples // hop
        """
        wave = wave.flatten(1)
        spectrum = torch.stft(
            wave,
            self.audio.n_fft,
            self.audio.hop,
            window=self.window.to(wave.dtype),
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()
        mel = self.filters.to(wave.dtype) @ power
        return 10 * mel.clamp(min=self.floor).log10().unsqueeze(1)

    def _apply(self, function, recurse=True):
        # .to(dtype) must not round the filters: device moves only
        converted = function(torch.empty(0, device=self.filters.device))
        self.window, self.filters = self.window.to(converted.device), self.filters.to(converted.device)
        return self


def to_wave(samples: np.ndarray | torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """(B, samples) int16 -> float32 in [-1, 1), on `device` or where the samples are."""
    return torch.as_tensor(samples, device=device).float() / 32768


class FrontEnd(nn.Module):
    """From stored samples to what the network takes: the wave and its log-mel spectrogram.

    Training and scoring both pass here, so a clip is heard the same way in both.

    Parameters
    ----------
    audio : AudioConfig
    """

    def __init__(self, audio: AudioConfig = AudioConfig()):
        super().__init__()
        self.log_mel = LogMel(audio)

    @torch.no_grad()
    def forward(
        self, samples: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Parameters
        ----------
        samples : (B, samples) int16
        transform : callable, optional
            Applied to the waves (B, samples) before the log-mel, such as a filter or added noise.

        Returns
        -------
        wave : (B, samples) float32, in [-1, 1)
        log_mel : (B, 1, mels, frames) float32, dB
        """
        wave = to_wave(samples)
        if transform is not None:
            wave = transform(wave)
        return wave, self.log_mel(wave)
