"""Pictures of a recording: its windows where they lie, and an explanation that finds what was put there."""

import numpy as np
import pytest
from conftest import write_sound

from osscl_min.features import hz_to_mel
from osscl_min.inference import explain
from osscl_min.inference.recordings import Scorer
from osscl_min.inference.score import score


@pytest.fixture
def recording(tmp_path):
    """3.3 s of noise, the second second silent."""
    wave = 0.05 * np.random.default_rng(0).standard_normal(52_800)
    wave[16_000:32_000] = 0
    return str(write_sound(tmp_path / "fan/id_00/a.wav", wave))


def test_the_time_line_shows_every_window_and_the_whole_spectrogram(trained, recording, monkeypatch):
    scorer = Scorer(trained, step=0.5)
    (one,) = scorer([recording])
    figure = explain.timeline(scorer, one, None)
    above, below = figure.axes[:2]
    segments = above.collections[0].get_segments()
    assert len(segments) == len(one.starts) == 6 and above.get_yscale() == "log"
    starts, scores = one.starts, one.scores
    for segment, start, value in zip(segments, starts, scores, strict=True):  # none where it is silent
        assert np.isnan(value) == (not len(segment)) == (start == 1.0)
        if len(segment):
            np.testing.assert_allclose(segment, [(start, value), (start + 1, value)])
    (image,) = below.images
    levels = np.asarray(image.get_array().filled(np.nan))
    assert levels.shape == (128, 32 + 32 + 32 + 10) and tuple(image.get_extent()[:2]) == (0, 3.3)
    assert np.isnan(levels[:, 32:64]).all() and np.isfinite(levels[:, :32]).all()
    monkeypatch.setattr(explain, "COLUMNS", 20)
    coarse = explain.spectrogram(scorer, one)
    assert coarse.shape[1] == 5 + 5 + 5 + 1  # at most five per second, and the last 0.3 s
    np.testing.assert_allclose(coarse[:, 0], levels[:, :7].mean(1), rtol=1e-4)


def test_the_occlusion_finds_the_place_of_a_tone(trained, tmp_path, monkeypatch):
    """The network is replaced by a meter of the energy at 3 kHz, so what raises the score is known."""
    time = np.arange(16_000) / 16_000
    wave = 0.01 * np.random.default_rng(0).standard_normal(16_000)
    wave[9_000:10_500] += 0.2 * np.sin(2 * np.pi * 3_000 * time[9_000:10_500])
    path = write_sound(tmp_path / "fan/id_00/a.wav", wave)

    class Meter(Scorer):
        def scores(self, samples, labels, transform=None):
            if transform is None:
                return np.ones((len(samples), 1))
            spectrum = np.fft.rfft(transform(None).numpy())
            return (np.abs(spectrum[:, 2_900:3_100]) ** 2).sum(1, keepdims=True)

    parts = np.array_split(np.arange(32), explain.PARTS)
    part = next(number for number, frames in enumerate(parts) if 9_750 // 512 in frames)
    scorer = Meter(trained)
    (one,) = scorer([str(path)])
    noise = 0.01 * np.random.default_rng(1).standard_normal(16_000)
    quiet = write_sound(tmp_path / "fan/id_00/quiet.wav", noise)
    for level in (None, explain.usual_level(scorer, scorer([str(quiet)]))):
        patches, bands = explain.occlusion(scorer, one, level)
        band = int(hz_to_mel(np.array(3_000.0)) / hz_to_mel(np.array(8_000.0)) * explain.BANDS)
        assert np.unravel_index(patches.argmax(), patches.shape) == (band, part)
        assert patches.shape == (explain.BANDS, explain.PARTS)
    assert bands.argmax() == band  # the quiet recording's level removes it


def test_without_occlusion_the_score_is_the_recordings(trained, tiny_run, monkeypatch):
    scorer = Scorer(trained)
    (one,) = scorer([str(tiny_run / "data/fan/test/normal_id_00_00000000.wav")])
    masked = []
    plain, scorer.scores = scorer.scores, lambda *a: masked.append(plain(*a)) or masked[-1]
    monkeypatch.setattr(explain, "BANDS", 2)
    explain.occlusion(scorer, one)
    assert masked[-1] == pytest.approx(one.scores.max(), rel=1e-3)
    assert [len(scores) for scores in masked] == [1 + explain.PARTS] * 2 + [1]


def test_pictures_are_written(tiny_run, recording, tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "BANDS", 2)
    normal = str(tiny_run / "data/fan/test/normal_id_00_00000000.wav")
    _, summary = score(
        tiny_run / "best.pt", [normal, recording], device="cpu", calibrate_with=[normal],
        plot_path=tmp_path / "plot.svg", explain_path=tmp_path / "explain.pdf",
    )  # fmt: skip
    assert summary.scored == 2
    assert (tmp_path / "plot.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "explain.pdf").read_bytes().startswith(b"%PDF")
