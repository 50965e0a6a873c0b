"""Noise has the power and colour that it says; a clip's noise is its own; bands cover the log-mel once."""

import numpy as np
import pytest
import torch

from osscl_min.augment import NOISES, noise, training_noise
from osscl_min.config import AudioConfig
from osscl_min.experiments.analyses import clip_noise, mel_bands, replace_band
from osscl_min.features import LogMel, mel_filters

AUDIO = AudioConfig(seconds=2.0)
RATE = AUDIO.sample_rate


@pytest.fixture(scope="module")
def wave():
    return 0.05 * torch.randn(4, AUDIO.samples, generator=torch.Generator().manual_seed(0))


def octaves(wave):
    """Power (dB) from 125 to 250 Hz, ..., 4 to 8 kHz."""
    edges = np.searchsorted(np.fft.rfftfreq(len(wave), 1 / RATE), 125 * 2.0 ** np.arange(7))
    return 10 * np.log10(np.add.reduceat(np.abs(np.fft.rfft(wave)) ** 2, edges)[:-1])


def test_colours():
    noises = {kind: noise(kind, 8 * RATE, RATE, np.random.default_rng(0)) for kind in NOISES}
    for wave in noises.values():
        assert wave.dtype == np.float32 and np.mean(wave**2) == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(np.diff(octaves(noises["white"])), 10 * np.log10(2), atol=0.5)
    np.testing.assert_allclose(np.diff(octaves(noises["pink"])), 0, atol=0.5)
    power = np.abs(np.fft.rfft(noises["factory"])) ** 2  # bins of 1/8 Hz
    assert power[400] > 100 * np.median(power[380:420])  # the hum
    heights = np.abs(noises["factory"])
    assert (heights > 5).mean() > 10 * (np.abs(noises["pink"]) > 5).mean()  # the knocks


@pytest.mark.parametrize("snr", [20.0, -10.0])
def test_the_ratio_is_kept_for_each_clip(wave, snr):
    wave = wave * torch.tensor([[1.0], [0.1], [2.0], [0.5]])
    added = clip_noise("pink", snr, AUDIO)(wave) - wave
    measured = 10 * torch.log10(wave.square().mean(1) / added.square().mean(1))
    torch.testing.assert_close(measured, torch.full((4,), snr), rtol=0, atol=0.01)


def test_a_clips_noise_is_its_own_in_any_batch(wave):
    apply = clip_noise("factory", 0.0, AUDIO)
    together = apply(wave)
    assert torch.equal(together[2:3], apply(wave[2:3]))
    added = together - wave
    assert (added[0] - added[1]).abs().max() > 0.01
    assert torch.equal(apply(torch.zeros_like(wave)), torch.zeros_like(wave))  # silence stays silent


def test_training_noise_follows_from_its_generator(wave):
    def draw(share, seed):
        return training_noise(share, AUDIO, np.random.default_rng(seed))(wave)

    assert torch.equal(draw(0.5, 1), draw(0.5, 1)) and not torch.equal(draw(1.0, 1), draw(1.0, 2))
    assert torch.equal(draw(0.0, 1), wave)
    changed = [(draw(0.5, seed) != wave).any(1) for seed in range(50)]
    assert 0.35 < torch.stack(changed).double().mean() < 0.65


def test_bands_cover_the_rows_once_and_their_edges_are_the_filters():
    rows, lows, highs = zip(*mel_bands(AUDIO, 8), strict=True)
    assert [(part.start, part.stop) for part in rows] == [(k, k + 16) for k in range(0, 128, 16)]
    assert (lows[0], highs[-1]) == (0, 8000) and lows[1:] == highs[:-1]
    peaks = mel_filters(AUDIO).argmax(1).reshape(8, 16) * RATE / AUDIO.n_fft
    assert (peaks.min(1) >= np.array(lows) - 8).all()  # bins of 7.8 Hz
    assert (peaks.max(1) <= np.array(highs) + 8).all()


def test_a_band_is_replaced_by_silence_or_its_machines_level(wave):
    log_mel, labels = LogMel(AUDIO)(wave), torch.tensor([0, 1, 1, 0])
    levels = -torch.arange(256.0).reshape(2, 128)
    for level, expected in (
        (torch.full((2, 128), -100.0), -100.0),
        (levels, levels[labels][:, None, 16:32, None]),
    ):
        changed = replace_band(slice(16, 32), level)(log_mel, labels)
        assert (changed[:, :, 16:32] == expected).all()
        assert torch.equal(changed[:, :, :16], log_mel[:, :, :16])
        assert torch.equal(changed[:, :, 32:], log_mel[:, :, 32:])
