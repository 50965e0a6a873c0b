"""Pictures of a recording: its windows where they lie, and an explanation that finds what was put there."""

import numpy as np
import pytest
from conftest import write_sound

from osscl_min.features import hz_to_mel
from osscl_min.inference import explain as score_figures
from osscl_min.inference.recordings import Recording, Scorer
from osscl_min.inference.score import score


@pytest.fixture
def recording(tmp_path):
    """3.3 s of noise, the second second silent."""
    wave = 0.05 * np.random.default_rng(0).standard_normal(52_800)
    wave[16_000:32_000] = 0
    return str(write_sound(tmp_path / "fan/id_00/a.wav", wave))


def test_the_time_line_shows_every_window_and_the_whole_spectrogram(trained, recording, monkeypatch):
    scorer = Scorer(trained)
    (one,) = scorer([recording])
    figure = score_figures.timeline(scorer, one, None)
    above, below = figure.axes[:2]
    segments = above.collections[0].get_segments()
    assert len(segments) == len(one.starts) == 6 and above.get_yscale() == "log"
    starts, scores = one.timeline()
    for segment, start, value in zip(segments, starts, scores, strict=True):  # none where it is silent
        assert np.isnan(value) == (not len(segment)) == (start == 1.0)
        if len(segment):
            np.testing.assert_allclose(segment, [(start, value), (start + 1, value)])
    (image,) = below.images
    levels = np.asarray(image.get_array().filled(np.nan))
    assert levels.shape == (128, 32 + 32 + 32 + 10) and tuple(image.get_extent()[:2]) == (0, 3.3)
    assert np.isnan(levels[:, 32:64]).all() and np.isfinite(levels[:, :32]).all()
    monkeypatch.setattr(score_figures, "COLUMNS", 20)
    coarse = score_figures.spectrogram(scorer, one)
    assert coarse.shape[1] <= 25
    np.testing.assert_allclose(coarse[:, 0], levels[:, :6].mean(1), rtol=1e-4)


def test_the_occlusion_finds_the_place_of_a_tone(trained, tmp_path, monkeypatch):
    """The network is replaced by a meter of the energy at 3 kHz, so what raises the score is known."""
    time = np.arange(16_000) / 16_000
    wave = 0.01 * np.random.default_rng(0).standard_normal(16_000)
    wave[9_000:10_500] += 0.2 * np.sin(2 * np.pi * 3_000 * time[9_000:10_500])
    path = write_sound(tmp_path / "fan/id_00/a.wav", wave)

    class Meter(Scorer):
        def scores(self, samples, rows, labels, transform=None):
            if transform is None:
                return np.ones(len(rows))
            spectrum = np.fft.rfft(transform(None).numpy())
            return (np.abs(spectrum[:, 2_900:3_100]) ** 2).sum(1)

    parts = np.array_split(np.arange(32), score_figures.PARTS)
    part = next(number for number, frames in enumerate(parts) if 9_750 // 512 in frames)
    scorer = Meter(trained)
    (one,) = scorer([str(path)])
    noise = 0.01 * np.random.default_rng(1).standard_normal(16_000)
    quiet = write_sound(tmp_path / "fan/id_00/quiet.wav", noise)
    for level in (None, score_figures.usual_level(scorer, [str(quiet)])):
        patches, bands = score_figures.occlusion(scorer, one, level)
        band = int(hz_to_mel(np.array(3_000.0)) / hz_to_mel(np.array(8_000.0)) * score_figures.BANDS)
        assert np.unravel_index(patches.argmax(), patches.shape) == (band, part)
        assert patches.shape == (score_figures.BANDS, score_figures.PARTS)
    assert bands.argmax() == band  # the quiet recording's level removes it


def test_without_occlusion_the_score_is_the_recordings(trained, tiny_run):
    scorer = Scorer(trained)
    (one,) = scorer([str(tiny_run / "data/fan/test/normal_id_00_00000000.wav")])
    found = []
    plain, scorer.scores = scorer.scores, lambda *a: found.append(plain(*a)) or found[-1]
    score_figures.occlusion(scorer, one)
    assert found[0][0] == pytest.approx(one.timeline()[1].max(), rel=1e-3)
    assert sum(map(len, found)) == 1 + score_figures.BANDS * (1 + score_figures.PARTS)


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_pictures_are_written(tiny_run, recording, tmp_path, suffix):
    files = [str(tiny_run / "data/fan/test/normal_id_00_00000000.wav"), recording]
    scorer, summary = score(tiny_run / "best.pt", files, device="cpu")
    assert isinstance(summary.strangest[1], Recording)
    plot, explain = (tmp_path / f"{name}.{suffix}" for name in ("plot", "explain"))
    score_figures.write(scorer, summary, plot, explain, files[:1])
    start = {"png": b"\x89PNG", "pdf": b"%PDF"}[suffix]
    assert plot.read_bytes().startswith(start) and explain.read_bytes().startswith(start)
