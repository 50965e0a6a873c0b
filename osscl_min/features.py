"""From samples to the network's input: the wave, filtered where configured, and its log-mel spectrogram."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.fft
import scipy.signal
import torch
from torch import nn

from osscl_min.config import AudioConfig
from osscl_min.runtime.files import UserError


def hz_to_mel(frequency: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above (Auditory Toolbox, 1998)."""
    frequency = np.asarray(frequency, np.float64)
    return np.where(
        frequency < 1000.0,
        frequency * 3 / 200,
        15.0 + 27.0 * np.log(np.maximum(frequency, 1000.0) / 1000.0) / np.log(6.4),
    )


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """The reverse of `hz_to_mel`."""
    mel = np.asarray(mel, np.float64)
    return np.where(
        mel < 15.0, mel * 200 / 3, 1000.0 * np.exp((np.maximum(mel, 15.0) - 15.0) * np.log(6.4) / 27.0)
    )


def mel_filters(audio: AudioConfig) -> np.ndarray:
    """Triangular mel filters of unit area ("slaney" norm): (mels, n_fft // 2 + 1) float64."""
    bins = np.linspace(0, audio.sample_rate / 2, audio.n_fft // 2 + 1)  # Hz
    edges = mel_to_hz(np.linspace(hz_to_mel(audio.f_min), hz_to_mel(audio.f_max), audio.mels + 2))  # Hz
    widths = np.diff(edges)[:, None]
    distance = edges[:, None] - bins[None, :]
    rising, falling = -distance[:-2] / widths[:-1], distance[2:] / widths[1:]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    if empty := np.count_nonzero(filters.max(1) == 0):
        raise UserError(
            f"audio: {empty} of {audio.mels} mel bands hold no FFT bin; set fewer mels or a larger n_fft"
        )
    return filters


def mel_ticks(audio: AudioConfig) -> tuple[np.ndarray, list[int]]:
    """Positions of round frequencies on an axis that counts mel bands, and these frequencies (Hz)."""
    hertz = [f for f in (250, 500, 1000, 2000, 4000) if audio.f_min < f < audio.f_max]
    low, *mel, high = hz_to_mel(np.array([audio.f_min, *hertz, audio.f_max]))
    return (np.array(mel) - low) / (high - low) * (
        audio.mels + 1
    ) - 0.5, hertz  # band k, whose centre is edge k + 1, is drawn from k to k + 1


class LogMel(nn.Module):
    """Waves to log-mel spectrograms in dB: power STFT, slaney mel filters, 10 log10, no normalisation.

    Centred frames with zero padding and no top_db limit, as in the authors' code; silence is -100 dB.
    """

    floor = 1e-10  # power; -100 dB

    def __init__(self, audio: AudioConfig = AudioConfig()):
        super().__init__()
        self.audio = audio
        # float64 buffers, cast to the wave's dtype: float32 filters would cost 1e-6 of the float64 result
        window = torch.hann_window(audio.n_fft, periodic=True, dtype=torch.float64)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", torch.from_numpy(mel_filters(audio)), persistent=False)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """(B, samples) or (B, 1, samples), float32 or float64 -> (B, 1, mels, 1 + samples // hop) in dB."""
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
        # .to(dtype) must not round the filters: only device moves apply
        converted = function(torch.empty(0, device=self.filters.device))
        self.window, self.filters = self.window.to(converted.device), self.filters.to(converted.device)
        return self


def to_wave(samples: np.ndarray | torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """(B, samples) int16 -> float32 in [-1, 1), on `device` or where the samples are."""
    return torch.as_tensor(samples, device=device).float() / 32768


class ZeroPhaseFilter(nn.Module):
    """A Butterworth filter ("low-pass" or "high-pass") run forwards and backwards, as one FFT product.

    The response is the squared magnitude without any phase: -6 dB at the cut-off (Hz). The ends are extended
    by their odd reflection, as `scipy.signal.sosfiltfilt` does.
    """

    order = 8  # in one direction
    padding = 4_000  # samples of reflection at each end

    def __init__(self, kind: str, cutoff: float, audio: AudioConfig = AudioConfig()):
        super().__init__()
        if not 0 < cutoff < audio.sample_rate / 2:
            raise UserError(f"cut-offs must lie between 0 and {audio.sample_rate / 2:g} Hz, got {cutoff:g}")
        self.sections = scipy.signal.butter(
            self.order, cutoff, kind.replace("-", ""), fs=audio.sample_rate, output="sos"
        )
        self.rate = audio.sample_rate
        self.gains: dict[tuple[int, torch.device], torch.Tensor] = {}  # by length and device

    def gain(self, frequency: np.ndarray) -> np.ndarray:
        """Magnitude response of both passes at frequencies in Hz."""
        return np.abs(scipy.signal.sosfreqz(self.sections, frequency, fs=self.rate)[1]) ** 2

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """(B, samples) floating point -> the same, filtered."""
        pad = min(self.padding, wave.shape[1] - 1)
        first, last = wave[:, :1], wave[:, -1:]
        left, right = wave[:, 1 : pad + 1].flip(1), wave[:, -pad - 1 : -1].flip(1)
        padded = torch.cat([2 * first - left, wave, 2 * last - right], 1)
        length = scipy.fft.next_fast_len(padded.shape[1], real=True)
        key = (length, wave.device)
        if key not in self.gains:
            response = torch.from_numpy(self.gain(np.fft.rfftfreq(length, 1 / self.rate)))
            self.gains[key] = response.to(wave.device)
        spectrum = torch.fft.rfft(padded, length) * self.gains[key].to(wave.dtype)
        return torch.fft.irfft(spectrum, length)[:, pad : pad + wave.shape[1]].contiguous()


class FrontEnd(nn.Module):
    """From stored samples to the network's input, the same in training and scoring."""

    def __init__(self, audio: AudioConfig = AudioConfig()):
        super().__init__()
        self.log_mel = LogMel(audio)
        self.filter = None if audio.filter == "none" else ZeroPhaseFilter(audio.filter, audio.cutoff, audio)

    @torch.no_grad()
    def forward(
        self, samples: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples (B, samples) int16 -> waves (B, samples), log-mels (B, 1, mels, frames) in dB.

        `transform` is applied to the waves first, such as a filter or added noise.
        """
        wave = to_wave(samples)
        if transform is not None:
            wave = transform(wave)
        if self.filter is not None:
            wave = self.filter(wave)
        return wave, self.log_mel(wave)
