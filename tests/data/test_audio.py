"""Decoding and measuring sound files, and everything that can be wrong with one."""

import itertools
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
from conftest import noise, put, refused, write_sound
from test_hostile import SOUNDS

from osscl_min.config import AudioConfig
from osscl_min.data.audio import decode, duration, measure

AUDIO = AudioConfig(seconds=2.0)


def whole_file(path, channel, start):
    """What `decode` must return, computed from the whole file at once."""
    samples, rate = soundfile.read(path, always_2d=True)
    samples = samples[round(start * rate) :]
    samples = samples.mean(axis=1) if channel is None else samples[:, channel]
    if rate != 16_000:
        common = np.gcd(rate, 16_000)
        samples = scipy.signal.resample_poly(samples, 16_000 // common, rate // common)
    samples = np.rint(samples * 32768).clip(-32768, 32767).astype(np.int16)
    return np.resize(samples, max(32_000, len(samples)))[:32_000]


def test_16_bits_are_read_exactly_whatever_the_encoding(tmp_path):
    samples = np.random.default_rng(1).integers(-32768, 32768, 32_000).astype(np.int16)
    write_sound(tmp_path / "a.wav", samples)
    write_sound(tmp_path / "a.flac", samples)
    write_sound(tmp_path / "float.wav", samples / 32768, subtype="FLOAT")
    for name in ("a.wav", "a.flac", "float.wav"):
        decoded, remarks = decode(tmp_path / name, AUDIO)
        np.testing.assert_array_equal(decoded, samples)
        assert decoded.dtype == np.int16 and remarks == []
    decoded, remarks = decode(write_sound(tmp_path / "b.wav", samples / 20000, subtype="FLOAT"), AUDIO)
    assert remarks == ["clipped to 16 bits"]
    np.testing.assert_array_equal(decoded, np.rint(samples / 20000 * 32768).clip(-32768, 32767))


@pytest.mark.parametrize("rate", [4_000, 11_025, 16_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize(("seconds", "channels", "starts"), [(1.5, 1, [0]), (7.3, 2, [0, 1.5, 6])])
def test_the_part_that_is_read_equals_that_of_the_whole_file(tmp_path, rate, seconds, channels, starts):
    for suffix, channel, start in itertools.product(("wav", "flac"), (None, channels - 1), starts):
        path = write_sound(tmp_path / f"a.{suffix}", noise(rate, seconds, rate, channels), rate)
        decoded, remarks = decode(path, AUDIO, channel, start)
        np.testing.assert_array_equal(decoded, whole_file(path, channel, start))
        phrases = f"resampled from {rate} Hz to", "several channels", "repeated to 2 s"
        expected = rate != 16_000, channels > 1, seconds - start < 2
        assert tuple(phrase in "; ".join(remarks) for phrase in phrases) == expected
    assert duration(path) == pytest.approx(seconds, abs=1 / rate)
    with refused("empty"):
        decode(path, AUDIO, start=8)
    if channels > 1:
        with refused("no channel 2, only 0 to 1"):
            decode(path, AUDIO, 2)


def half_a_flac(path, seconds):
    write_sound(path, noise(0, seconds), format="FLAC")
    os.truncate(path, path.stat().st_size // 2)


UNREADABLE, CUT_FLAC = "not a readable sound file", "not a readable sound file|truncated"
MESSAGES = {
    **dict.fromkeys(("empty", "text", "riff-only", "cut-header", "rate-0", "mp3", "noise"), UNREADABLE),
    **dict.fromkeys(("self-link", "dangling", "rate-max"), UNREADABLE),
    **dict.fromkeys(("pipe", "device", "folder"), "not a regular file"),
    **dict.fromkeys(("silent", "constant"), "silent"),
    **dict.fromkeys(("half a flac", "flac cut after the part that is kept"), CUT_FLAC),
    "truncated": r"truncated: \d+ of 32000 bytes",
    "no-samples": "empty",
    "nan": "NaN",
    "infinite": "infinite",
    "huge": r"beyond 1e\+15",
    "short": r"shorter than one second \(0.05 s\)",
    "rate-1": "rate of 1 Hz",
    "rate-4M": "rate of 4000000 Hz",
    "nothing": "No such file",
}
BROKEN = SOUNDS | {
    "half a flac": partial(half_a_flac, seconds=3),
    "flac cut after the part that is kept": partial(half_a_flac, seconds=60),
    "constant": partial(write_sound, samples=np.full(32_000, 0.25)),
    "folder": Path.mkdir,
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line(kind, tmp_path):
    put(tmp_path / "a.wav", BROKEN[kind])
    with refused(MESSAGES[kind]):
        decode(tmp_path / "a.wav", AUDIO)
    if kind not in ("silent", "constant", "short"):
        with refused(MESSAGES[kind]):
            measure(tmp_path / "a.wav")


def test_measurements(tmp_path):
    sine = 0.5 * np.sin(2 * np.pi * 100 * np.arange(16_000) / 16_000)
    sound = measure(write_sound(tmp_path / "sine.wav", sine, subtype="FLOAT"))
    assert sound["level"] == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=0.01)
    assert (sound["encoding"], sound["clipped"], sound["seconds"]) == ("FLOAT", 0, 1.0)
    loud = np.full((16_000, 2), 32766, np.int16)
    loud[:3], loud[3:5, 0] = 32767, -32768
    sound = measure(write_sound(tmp_path / "loud.wav", loud))
    assert (sound["clipped"], sound["channels"], sound["silent"]) == (8, 2, False)
    silence = measure(write_sound(tmp_path / "silent.wav", np.zeros(16_000)))
    assert silence["silent"] and silence["level"] is None
