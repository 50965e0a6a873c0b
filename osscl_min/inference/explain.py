"""Pictures of a recording: its scores over time, and what in its highest window raised the score."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from osscl_min.config import AudioConfig
from osscl_min.data.audio import decode, duration, window_starts
from osscl_min.features import hz_to_mel, mel_ticks, mel_to_hz, to_wave
from osscl_min.inference.recordings import Recording, Scorer
from osscl_min.neighbours import FORMS
from osscl_min.runtime.files import UserError
from osscl_min.runtime.plotting import BLUE, GREY, VERMILLION, legend, panels, picture, signed

COLUMNS = 1500  # of a spectrogram at most; a longer recording's frames are averaged
BANDS, PARTS = 16, 10  # patches of an explanation, over frequency and over time


def _title(scorer: Scorer, recording: Recording) -> str:
    simulated = "\nby a network trained on simulated machines" if scorer.trained.synthetic else ""
    machine = " id ".join(scorer.trained.classes[recording.label])
    return f"{Path(recording.file).name} scored as {machine}{simulated}"


def _samples(scorer: Scorer, recording: Recording, start: float = 0.0) -> torch.Tensor:
    """Samples (1, samples) int16 of the window that begins at `start` (s)."""
    samples, _ = decode(recording.file, scorer.audio, recording.channel, start)
    return torch.from_numpy(samples[None]).to(scorer.device)


def _log_mel(scorer: Scorer, recording: Recording, start: float) -> np.ndarray:
    """Log-mel (mels, frames) in dB of that window."""
    return scorer.front(_samples(scorer, recording, start))[1][0, 0].cpu().numpy()


def _draw_log_mel(ax: Axes, audio: AudioConfig, levels: np.ndarray, start: float, end: float) -> None:
    """Draw levels (mels, columns) in dB over seconds and Hz."""
    limits = np.nanpercentile(levels, (1, 99.5))
    image = picture(ax, levels, "magma", limits, (start, end, 0, audio.mels))
    ax.figure.colorbar(image, ax=ax, label="dB", pad=0.02, extend="both")
    ax.set_yticks(*mel_ticks(audio))
    ax.set(xlabel="time (s)", ylabel="frequency (Hz)")


def spectrogram(scorer: Scorer, recording: Recording) -> np.ndarray:
    """Log-mel (mels, columns) in dB of a whole recording, read piece by piece; silence is NaN."""
    audio, pieces = scorer.audio, []
    starts = window_starts(duration(recording.file), audio, audio.seconds)
    columns = min(audio.frames, max(1, COLUMNS // len(starts)))  # per piece
    for number, start in enumerate(starts):
        try:
            log_mel = _log_mel(scorer, recording, start)
        except UserError:
            log_mel = np.full((audio.mels, audio.frames), np.nan, np.float32)
        means = [part.mean(axis=1) for part in np.array_split(log_mel, columns, axis=1)]
        overlap = number - start / audio.seconds  # of the last piece with the one before
        pieces += means[round(overlap * columns) :]
    return np.stack(pieces, axis=1)


def timeline(scorer: Scorer, recording: Recording, threshold: float | None) -> Figure:
    """Each window's score, the threshold, and the log-mel spectrogram below."""
    seconds, starts = scorer.audio.seconds, np.array(recording.starts)
    length = max(duration(recording.file), seconds)
    title = _title(scorer, recording)
    figure, (above, below) = panels(title, False, ["score", "log-mel"], 1, (9, 2.6), sharex=True)
    if len(starts) > 1:
        start = starts[recording.highest]
        look = {"color": VERMILLION, "alpha": 0.15, "linewidth": 0}
        above.axvspan(start, start + seconds, label="highest window", **look)
    label = f"window of {seconds:g} s"
    above.hlines(recording.scores, starts, starts + seconds, color=BLUE, linewidth=2, label=label)
    if threshold is not None:
        above.axhline(threshold, color=VERMILLION, linestyle="--", linewidth=1.2, label="threshold")
    above.set(yscale="linear" if scorer.form in FORMS else "log", ylabel="anomaly score")
    _draw_log_mel(below, scorer.audio, spectrogram(scorer, recording), 0, length)
    below.set_xlim(0, length)
    legend(figure, [above])
    return figure


def _stft(scorer: Scorer) -> dict[str, Any]:
    """The settings of `torch.stft` with which the log-mel sees a wave."""
    audio, window = scorer.audio, scorer.front.log_mel.window.float()
    return {"n_fft": audio.n_fft, "hop_length": audio.hop, "window": window}


def _spectrum(scorer: Scorer, samples: torch.Tensor) -> torch.Tensor:
    """Samples (1, samples) int16 -> (bins, frames) complex."""
    return torch.stft(to_wave(samples), **_stft(scorer), pad_mode="constant", return_complex=True)[0]


def usual_level(scorer: Scorer, recordings: Iterable[Recording]) -> torch.Tensor | None:
    """Root mean square of each frequency bin over the first windows of recordings; None without any."""
    spectra = (_spectrum(scorer, _samples(scorer, recording)) for recording in recordings)
    powers = [spectrum.abs().square().mean(1) for spectrum in spectra]
    return torch.stack(powers).mean(0).sqrt() if powers else None


def occlusion(
    scorer: Scorer, recording: Recording, level: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How far the score of the highest window falls when a part of its spectrum takes its usual level.

    The part's magnitudes are replaced, its phases kept, and the wave is resynthesised, so that every input of
    the network changes. `level` (bins,) is the usual magnitude of each frequency bin, see `usual_level`;
    by default the window's own mean over time, which leaves steady sounds as they are. Returns the falls for
    patches (BANDS, PARTS), which miss an anomaly in several places at once, and for bands (BANDS,) over the
    whole window.
    """
    audio = scorer.audio
    samples = _samples(scorer, recording, recording.starts[recording.highest])
    spectrum = _spectrum(scorer, samples)
    if level is None:
        level = spectrum.abs().square().mean(1).sqrt()
    usual = torch.polar(level[:, None].expand_as(spectrum).contiguous(), spectrum.angle())
    low, high = hz_to_mel(np.array([audio.f_min, audio.f_max]))
    edges = mel_to_hz(np.linspace(low, high, BANDS + 1))[1:-1]
    band = np.digitize(np.linspace(0, audio.sample_rate / 2, len(spectrum)), edges)
    part = np.arange(spectrum.shape[1]) * PARTS // spectrum.shape[1]
    times = np.stack([part >= 0, *(part == number for number in range(PARTS))])[:, None]

    def scores(masks: np.ndarray) -> np.ndarray:
        replaced = torch.where(torch.from_numpy(masks).to(scorer.device), usual, spectrum)
        waves = torch.istft(replaced, **_stft(scorer), length=audio.samples)
        repeated = samples.expand(len(masks), -1).cpu().numpy()
        return scorer.scores(repeated, [recording.label], lambda _: waves)[:, 0]

    falls = np.stack([scores((band == number)[:, None] & times) for number in range(BANDS)])
    falls = scores(np.zeros((1, *spectrum.shape), bool)) - falls
    return falls[:, 1:], falls[:, 0]


def explanation(scorer: Scorer, recording: Recording, level: torch.Tensor | None = None) -> Figure:
    """The highest window's log-mel, its deviation from the training clips, and the drop in its score (% of a
    cross-entropy) when parts of it take their usual level."""
    audio, score = scorer.audio, recording.scores[recording.highest]
    start = recording.starts[recording.highest]
    falls, near = occlusion(scorer, recording, level), scorer.trained.neighbours
    unit = "drop in the score" + ("" if scorer.form in FORMS else " (%)")
    patches, bands = (fall if scorer.form in FORMS else 100 * fall / score for fall in falls)
    usual = "the window's own mean over time" if level is None else "the mean level of normal recordings"
    title = f"{_title(scorer, recording)}\nscore {score:.3g}; each part replaced by {usual}"
    names = ["log-mel", *["deviation from the training clips"] * (near is not None)]
    names += ["drop in the score, part by part", "drop in the score, whole bands"]
    figure, axes = panels(title, False, names, 2, (4.8, 3), sharey=True)
    extent, log_mel = (start, start + audio.seconds, 0, audio.mels), _log_mel(scorer, recording, start)
    if near is not None:
        signed(axes[1], near.deviation(log_mel, recording.label), extent, "standard deviations", 5)
        axes[1].set_xlabel("time (s)")
    signed(axes[-2], patches, extent, unit)
    axes[-2].set_xlabel("time (s)")
    height = audio.mels / BANDS
    colours = [VERMILLION if fall > 0 else BLUE for fall in bands]
    axes[-1].barh((np.arange(BANDS) + 0.5) * height, bands, 0.85 * height, color=colours)
    axes[-1].axvline(0, color=GREY, linewidth=0.8)
    axes[-1].set(xlabel=unit, ylim=(0, audio.mels))
    _draw_log_mel(axes[0], audio, log_mel, *extent[:2])
    return figure
