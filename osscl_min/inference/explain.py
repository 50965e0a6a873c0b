"""Pictures of one recording: its scores over time, and what in its highest window raised the score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from osscl_min.data.audio import decode, duration
from osscl_min.features import hz_to_mel, mel_ticks, mel_to_hz, to_wave
from osscl_min.inference.calibration import Threshold
from osscl_min.inference.recordings import Recording, Scorer, expand
from osscl_min.inference.score import Summary
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
    audio = scorer.audio
    length = max(duration(recording.file), audio.seconds)
    together = max(1, int(np.ceil(length / audio.seconds * audio.frames / COLUMNS)))  # frames a column
    pieces = []
    for start in np.arange(0, length - 0.01, audio.seconds):
        begin = None if length == audio.seconds else min(start, length - audio.seconds)
        try:
            _, log_mel = _window(scorer, recording, begin)
        except UserError:
            log_mel = np.full((audio.mels, audio.frames), np.nan, np.float32)
        log_mel = log_mel[:, round((start - (begin or 0)) / audio.seconds * audio.frames) :]
        kept = log_mel.shape[1]
        pieces.append(np.add.reduceat(log_mel, range(0, kept, together), axis=1))
        pieces[-1] /= np.diff([*range(0, kept, together), kept])
    return np.concatenate(pieces, axis=1)


def timeline(scorer: Scorer, recording: Recording, threshold: Threshold | None) -> Figure:
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
        label = f"threshold, {100 * threshold.rate:g} % false alarms a window"
        above.axhline(threshold.value, color=VERMILLION, linestyle="--", linewidth=1.2, label=label)
    above.set(yscale="log", ylabel="anomaly score")
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


def usual_level(scorer: Scorer, files: Iterable[str]) -> torch.Tensor | None:
    """Root mean square of each frequency bin over the first windows of files; None without any."""
    powers = []
    for file in expand(files):
        recording = file if isinstance(file, Recording) else Recording(file)
        scorer.identify(recording)
        wave = to_wave(decode(recording.file, scorer.audio, recording.channel)[0][None], scorer.device)
        powers.append(_spectrum(scorer, wave).abs().square().mean(dim=(0, 2)))
    return torch.stack(powers).mean(0).sqrt() if powers else None


def occlusion(
    scorer: Scorer, recording: Recording, level: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How far the score of the highest window falls when a part of its spectrum is made usual.

    The part's magnitudes are replaced, its phases kept, and the wave made anew, so that every input of the
    network is changed. What is unlike the training clips in more than one place is not seen part by part.

    Parameters
    ----------
    level : (bins,), optional
        Usual magnitude of each frequency bin, see `usual_level`; the window's own mean over time without,
        which leaves steady sounds as they are.

    Returns
    -------
    patches : (BANDS, PARTS) float64
    bands : (BANDS,) float64
        Over the whole time.
    """
    audio, label = scorer.audio, np.array([recording.label])
    samples, _ = _window(scorer, recording, recording.starts[recording.highest])
    spectrum = _spectrum(scorer, to_wave(samples[None], scorer.device))[0]
    if level is None:
        level = spectrum.abs().square().mean(1).sqrt()
    usual = torch.polar(level[:, None].expand(-1, spectrum.shape[1]).contiguous(), spectrum.angle())
    hertz = torch.linspace(0, audio.sample_rate / 2, audio.n_fft // 2 + 1)
    low, high = hz_to_mel(np.array([audio.f_min, audio.f_max]))
    edges = mel_to_hz(np.linspace(low, high, BANDS + 1))
    frames = np.array_split(np.arange(spectrum.shape[1]), PARTS)

    def variants() -> Iterator[torch.Tensor]:
        yield spectrum
        for bottom, top in zip(edges, edges[1:], strict=False):
            chosen = ((hertz >= bottom) & (hertz < top + (top == edges[-1]))).to(spectrum.device)[:, None]
            for part in (slice(None), *frames):
                mask = torch.zeros_like(chosen).repeat(1, spectrum.shape[1])
                mask[:, part] = chosen
                yield torch.where(mask, usual, spectrum)

    every, found = variants(), []
    while waiting := list(islice(every, scorer.batch_size)):
        waves = torch.istft(
            torch.stack(waiting), audio.n_fft, audio.hop,
            window=scorer.front.log_mel.window.float(), length=audio.samples,
        )  # fmt: skip
        rows = np.arange(len(waiting))
        repeated = np.repeat(samples[None], len(waiting), 0)
        found.append(scorer.scores(repeated, rows, label.repeat(len(waiting)), lambda _, waves=waves: waves))
    whole, *parts = np.concatenate(found)
    falls = whole - np.array(parts).reshape(BANDS, 1 + PARTS)
    return falls[:, 1:], falls[:, 0]


def explanation(scorer: Scorer, recording: Recording, level: torch.Tensor | None = None) -> Figure:
    """The highest window's log-mel, and how far the score falls when parts of it are made usual."""
    audio = scorer.audio
    patches, bands = occlusion(scorer, recording, level)
    starts, scores = recording.timeline()
    highest = recording.highest
    _, log_mel = _window(scorer, recording, recording.starts[highest])
    made = "the window's own mean over time" if level is None else "the mean level of normal recordings"
    title = f"{_title(scorer, recording)}\nscore {scores[highest]:.3g}; each part replaced by {made}"
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
    scorer: Scorer, summary: Summary, plot: Path | None, explain: Path | None, normal: Iterable[str] = ()
) -> None:
    """Draw the most anomalous recording; `normal` recordings tell what is usual."""
    _, recording, threshold = summary.strangest
    figures = {}
    if plot is not None:
        figures[plot] = timeline(scorer, recording, threshold)
    if explain is not None:
        figures[explain] = explanation(scorer, recording, usual_level(scorer, normal))
    for path, figure in figures.items():
        save(figure, path)
