"""Pictures of a recording: its scores over time, and what in its highest window raised the score."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from osscl_min.data.audio import decode, duration, window_starts
from osscl_min.features import hz_to_mel, mel_ticks, mel_to_hz, to_wave
from osscl_min.inference.recordings import Recording, Scorer
from osscl_min.neighbours import FORMS
from osscl_min.runtime.files import UserError
from osscl_min.runtime.plotting import BLUE, GREY, VERMILLION, legend_below, panels, picture, save

COLUMNS = 1500  # of a spectrogram at most; a longer recording's frames are averaged
BANDS, PARTS = 16, 10  # patches of an explanation, over frequency and over time


def _title(scorer: Scorer, recording: Recording) -> str:
    simulated = "\nby a network trained on simulated machines" if scorer.trained.synthetic else ""
    return f"{Path(recording.file).name} as {' id '.join(scorer.trained.classes[recording.label])}{simulated}"


def _window(scorer: Scorer, recording: Recording, start: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Samples (samples,) int16 and log-mel (mels, frames) of a recording from `start` (s) on."""
    samples, _ = decode(recording.file, scorer.audio, recording.channel, start)
    log_mel = scorer.front(torch.from_numpy(samples[None]).to(scorer.device))[1]
    return samples, log_mel[0, 0].cpu().numpy()


def spectrogram(scorer: Scorer, recording: Recording) -> np.ndarray:
    """Log-mel (mels, columns) in dB of a whole recording, read piece by piece; silence is NaN."""
    audio, pieces = scorer.audio, []
    starts = window_starts(duration(recording.file), audio, audio.seconds)
    columns = min(audio.frames, max(1, COLUMNS // len(starts)))  # per piece
    for number, start in enumerate(starts):
        try:
            _, log_mel = _window(scorer, recording, start)
        except UserError:
            log_mel = np.full((audio.mels, audio.frames), np.nan, np.float32)
        means = [part.mean(axis=1) for part in np.array_split(log_mel, columns, axis=1)]
        overlap = number - (start or 0) / audio.seconds  # of the last piece with the one before
        pieces += means[round(overlap * columns) :]
    return np.stack(pieces, axis=1)


def timeline(scorer: Scorer, recording: Recording, threshold: float | None) -> Figure:
    """Each window's score, the threshold, and the log-mel spectrogram below."""
    audio = scorer.audio
    starts, scores = recording.timeline()
    length = max(duration(recording.file), audio.seconds)
    title = _title(scorer, recording)
    figure, (above, below) = panels(title, False, ["score", "log-mel"], 1, (9, 2.6), sharex=True)
    if len(starts) > 1:
        start = starts[recording.highest]
        look = {"color": VERMILLION, "alpha": 0.15, "linewidth": 0}
        above.axvspan(start, start + audio.seconds, label="highest window", **look)
    label = f"window of {audio.seconds:g} s"
    above.hlines(scores, starts, starts + audio.seconds, color=BLUE, linewidth=2, label=label)
    if threshold is not None:
        above.axhline(threshold, color=VERMILLION, linestyle="--", linewidth=1.2, label="threshold")
    above.set(yscale="linear" if scorer.form in FORMS else "log", ylabel="anomaly score")
    levels = spectrogram(scorer, recording)
    image = picture(below, levels, "magma", np.nanpercentile(levels, (1, 99.5)), (0, length, 0, audio.mels))
    below.set_yticks(*mel_ticks(audio))
    below.set(xlabel="time (s)", ylabel="frequency (Hz)", xlim=(0, length))
    figure.colorbar(image, ax=below, label="dB", pad=0.01, extend="both")
    legend_below(figure, [above])
    return figure


def _spectrum(scorer: Scorer, wave: torch.Tensor) -> torch.Tensor:
    """(B, samples) -> (B, bins, frames) complex, as the log-mel sees it."""
    log_mel = scorer.front.log_mel
    window = log_mel.window.to(wave.dtype)
    options = {"window": window, "center": True, "pad_mode": "constant", "return_complex": True}
    return torch.stft(wave, scorer.audio.n_fft, scorer.audio.hop, **options)


def usual_level(scorer: Scorer, recordings: Iterable[Recording]) -> torch.Tensor | None:
    """Root mean square of each frequency bin over the first windows of recordings; None without any."""
    powers = []
    for recording in recordings:
        samples, _ = decode(recording.file, scorer.audio, recording.channel)
        spectrum = _spectrum(scorer, to_wave(samples[None], scorer.device))
        powers.append(spectrum.abs().square().mean(dim=(0, 2)))
    return torch.stack(powers).mean(0).sqrt() if powers else None


def occlusion(
    scorer: Scorer, recording: Recording, level: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How far the score of the highest window falls when a part of its spectrum takes its usual level.

    The part's magnitudes are replaced, its phases kept, and the wave is resynthesised, so that every input of
    the network changes. An anomaly in several places at once is not seen part by part.

    Parameters
    ----------
    level : (bins,), optional
        Usual magnitude of each frequency bin, see `usual_level`; without it, the window's own mean over time,
        which leaves steady sounds as they are.

    Returns
    -------
    patches : (BANDS, PARTS) float64
    bands : (BANDS,) float64
        Each band over the whole window.
    """
    audio = scorer.audio
    samples, _ = _window(scorer, recording, recording.starts[recording.highest])
    spectrum = _spectrum(scorer, to_wave(samples[None], scorer.device))[0]
    if level is None:
        level = spectrum.abs().square().mean(1).sqrt()
    usual = torch.polar(level[:, None].expand_as(spectrum).contiguous(), spectrum.angle())
    low, high = hz_to_mel(np.array([audio.f_min, audio.f_max]))
    edges = mel_to_hz(np.linspace(low, high, BANDS + 1))[1:-1]
    band = np.digitize(np.linspace(0, audio.sample_rate / 2, len(spectrum)), edges)
    part = np.arange(spectrum.shape[1]) * PARTS // spectrum.shape[1]
    falls = []
    for chosen in range(-1, BANDS):  # -1: none, the score as it is
        times = [part >= 0, *(part == number for number in range(PARTS))]
        masks = torch.from_numpy((band == chosen)[None, :, None] & np.array(times)[:, None, :])
        waves = torch.istft(
            torch.where(masks.to(spectrum.device), usual, spectrum), audio.n_fft, audio.hop,
            window=scorer.front.log_mel.window.float(), length=audio.samples,
        )  # fmt: skip
        repeated = np.repeat(samples[None], len(waves), axis=0)
        falls.append(scorer.scores(repeated, [recording.label], lambda _, waves=waves: waves)[:, 0])
    falls = falls[0][0] - np.array(falls[1:])
    return falls[:, 1:], falls[:, 0]


def explanation(scorer: Scorer, recording: Recording, level: torch.Tensor | None = None) -> Figure:
    """The highest window's log-mel, and how far the score falls when parts of it take their usual level."""
    audio = scorer.audio
    patches, bands = occlusion(scorer, recording, level)
    starts, scores = recording.timeline()
    highest = recording.highest
    _, log_mel = _window(scorer, recording, recording.starts[highest])
    usual = "the window's own mean over time" if level is None else "the mean level of normal recordings"
    title = f"{_title(scorer, recording)}\nscore {scores[highest]:.3g}; each part replaced by {usual}"
    names = ["log-mel (dB)", "fall of the score, part by part", "whole bands"]
    figure, axes = panels(title, False, names, 3, (3.8, 3.4), sharey=True)
    extent = (starts[highest], starts[highest] + audio.seconds, 0, audio.mels)
    most = np.abs(patches).max() or 1.0
    for ax, content, colours, limits in (
        (axes[0], log_mel, "magma", np.percentile(log_mel, (1, 99.5))),
        (axes[1], patches, "RdBu_r", (-most, most)),
    ):
        figure.colorbar(picture(ax, content, colours, limits, extent), ax=ax, pad=0.02)
        ax.set(xlabel="time (s)")
    height = audio.mels / BANDS
    colours = [VERMILLION if fall > 0 else BLUE for fall in bands]
    axes[2].barh((np.arange(BANDS) + 0.5) * height, bands, 0.85 * height, color=colours)
    axes[2].axvline(0, color=GREY, linewidth=0.8)
    axes[2].set(xlabel="fall of the score", ylim=(0, audio.mels))
    axes[0].set_yticks(*mel_ticks(audio))
    axes[0].set_ylabel("frequency (Hz)")
    return figure


def write(
    scorer: Scorer,
    recording: Recording,
    threshold: float | None,
    plot: Path | None,
    explain: Path | None,
    normal: Iterable[Recording] = (),
) -> None:
    """Draw a scored recording; the `normal` recordings of its machine give the usual level."""
    if plot is not None:
        save(timeline(scorer, recording, threshold), plot)
    if explain is not None:
        normal = [other for other in normal if other.machine == recording.machine]
        save(explanation(scorer, recording, usual_level(scorer, normal)), explain)
