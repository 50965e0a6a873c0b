"""Sound files: open them, decode them to the model's input, measure them."""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import scipy.signal
import soundfile
from tqdm import tqdm

from osscl_min.config import AudioConfig
from osscl_min.runtime.files import UserError

LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000  # Hz; a header outside this range is damaged
LARGEST = 1e15  # full scale is 1; the square of a larger sample overflows float32
FULL_SCALE = 32767 / 32768  # samples this large count as clipped
BLOCK = 1 << 18  # samples, all channels together, in memory at a time
AHEAD = 64  # items that threads work on before the next ones begin
Item, Result = TypeVar("Item"), TypeVar("Result")


@contextmanager
def open_sound(path: Path | str) -> Iterator[soundfile.SoundFile]:
    """Open a sound file for reading; what is wrong with the file is a UserError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError("not a regular file")
        with soundfile.SoundFile(path) as file:
            if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
                raise UserError(f"its header gives a rate of {file.samplerate} Hz, not 1 kHz to 1 MHz")
            if file.frames >= 1 << 62:  # libsndfile's "unknown"
                raise UserError("its header gives no length; convert it to wav")
            # libsndfile takes the length of a truncated wav to be what is left of it, and notes the other
            declared = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
            if declared and int(declared[1]) < 0x7FFFFFFF:  # larger: a header that never got its length
                raise UserError(f"truncated: {declared[2]} of {declared[1]} bytes of sound")
            yield file
    except (OSError, RuntimeError, UnicodeError) as error:  # soundfile's errors are RuntimeErrors
        reason = getattr(error, "error_string", "").rstrip(".") or getattr(error, "strerror", "") or error
        raise UserError(f"not a readable sound file ({reason})") from error


def _blocks(file: soundfile.SoundFile, frames: int, dtype: str) -> Iterator[np.ndarray]:
    """The next `frames` samples of all channels, as blocks (n, channels)."""
    if not frames:
        raise UserError("empty")
    done = 0
    while done < frames:
        size = min(max(1, BLOCK // file.channels), frames - done)
        block = file.read(size, dtype=dtype, always_2d=True)
        if not len(block):
            raise UserError(f"truncated: {done} of {frames} samples")
        if dtype != "int16" and not np.abs(block).max() < LARGEST:
            raise UserError(f"holds NaN or infinite samples, or some beyond {LARGEST:g}")
        done += len(block)
        yield block


def duration(path: Path | str) -> float:
    """Seconds of a sound file according to its header."""
    with open_sound(path) as file:
        return file.frames / file.samplerate


def window_starts(length: float, audio: AudioConfig, step: float, cover: bool = True) -> list[float]:
    """Where the clips within `length` seconds of sound begin: one every `step` seconds (0: the first alone).

    With `cover`, a last one ends with the sound, so that every sample lies in one; without, the rest that is
    shorter than a step is not used. Sound shorter than a clip is one clip.
    """
    last = length - audio.seconds
    if step == 0 or last * audio.sample_rate < 0.5:
        return [0.0]
    starts = (np.arange(int(last / step + 1e-9) + 1) * step).tolist()
    return [*starts, last] if cover and last - starts[-1] > 1e-9 * step else starts


def decode(
    path: Path | str, audio: AudioConfig, channel: int | None = None, start: float = 0.0
) -> tuple[np.ndarray, list[str]]:
    """Read one clip of a sound file as the model takes it: (audio.samples,) int16, mono; 32768 is full scale.

    The clip begins at `start` (seconds); only that part of the file is read. Other rates are resampled, and
    a clip that the end of the file cuts short is repeated. `channel` is taken from a file with several, whose
    mean is the default. Also returns what was done, as phrases for `Dataset.remarks`. A file that is
    truncated or shorter than one second, or a clip that is silent or holds NaN, is a UserError.
    """
    remarks = []
    with open_sound(path) as file:
        rate, channels = file.samplerate, file.channels
        first = file.seek(min(round(start * rate), file.frames))
        frames = file.frames - first
        if 0 < frames < rate:
            raise UserError(f"shorter than one second ({frames / rate:.2f} s)")
        if channels == 1:
            channel = 0
        elif channel is not None and not 0 <= channel < channels:
            raise UserError(f"has no channel {channel}, only 0 to {channels - 1}")
        common = math.gcd(rate, audio.sample_rate)
        up, down = audio.sample_rate // common, rate // common
        clip = min(frames, -(-audio.samples * down // up))
        # the resampling filter reaches 10 * max(up, down) / up samples ahead; twice that is safe
        needed = min(frames, clip + 20 * max(up, down) // up + 2)
        mean = channel is None
        exact = file.subtype == "PCM_16" and rate == audio.sample_rate and not mean
        blocks = _blocks(file, needed, "int16" if exact else "float64")
        samples = np.concatenate([block.mean(axis=1) if mean else block[:, channel] for block in blocks])
        if needed < frames and file.format == "FLAC":  # its header does not show that the end is missing
            file.seek(file.frames - 1)
            if not len(file.read(1)):
                raise UserError(f"truncated: less than {file.frames} samples")
    if samples[:clip].min() == samples[:clip].max():
        raise UserError("silent")
    if channels > 1:
        remarks.append(f"with several channels, {'averaged' if mean else f'channel {channel} taken'}")
    if rate != audio.sample_rate:
        samples = scipy.signal.resample_poly(samples, up, down)
        remarks.append(f"resampled from {rate} Hz to {audio.sample_rate} Hz")
    samples = samples[: audio.samples]
    if not exact:
        scaled = np.rint(samples * 32768)
        if np.abs(scaled).max() > 32768:
            remarks.append("clipped to 16 bits")
        samples = scaled.clip(-32768, 32767).astype(np.int16)
    if len(samples) < audio.samples:
        remarks.append(f"repeated to {audio.seconds:g} s")
        samples = np.resize(samples, audio.samples)
    return samples, remarks


def measure(path: Path | str) -> dict[str, Any]:
    """What a whole file holds, all channels together, read block by block."""
    digest, clipped, power, low, high = hashlib.sha256(), 0, 0.0, np.inf, -np.inf
    with open_sound(path) as file:
        rate, channels, frames, encoding = file.samplerate, file.channels, file.frames, file.subtype
        digest.update(f"{rate} {channels}".encode())
        for block in _blocks(file, frames, "float32"):
            digest.update(block)
            power += float(np.vdot(block, block)) / (frames * channels)
            low, high = min(low, block.min()), max(high, block.max())
            clipped += int(np.count_nonzero(np.abs(block) >= FULL_SCALE))
    return {
        "seconds": frames / rate,
        "sample_rate": rate,  # Hz
        "channels": channels,
        "encoding": encoding,  # "PCM_16", ...
        # root mean square, dB of full scale
        "level": round(10 * math.log10(power), 2) if power > 0 else None,
        "clipped": clipped,  # samples at full scale
        "silent": bool(low == high),  # one value throughout
        "content": digest.hexdigest()[:16],  # of rate and samples: equal for equal sounds in any container
    }


def attempt(function: Callable[..., Result], *arguments: Any) -> Result | str:
    """The function's result, or the text of its UserError."""
    try:
        return function(*arguments)
    except UserError as error:
        return str(error)


def read_ahead(
    function: Callable[[Item], Result], batches: Iterable[Sequence[Item]], jobs: int | None = None
) -> Iterator[tuple[Sequence[Item], Iterator[Result]]]:
    """Each batch with `function` of its items; threads read the next batch while one is worked on.

    Decoding and hashing release the interpreter's lock.
    """
    ready = None
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        for batch in chain(batches, [()]):
            ready, following = (batch, pool.map(function, batch)), ready
            if following:
                yield following


def on_threads(
    function: Callable[[Item], Result], items: Sequence[Item], title: str, jobs: int | None = None
) -> Iterable[Result]:
    """`function` of every item, in their order, with a progress bar; few results wait at any moment."""
    batches = (items[start : start + AHEAD] for start in range(0, len(items), AHEAD))
    results = chain.from_iterable(results for _, results in read_ahead(function, batches, jobs))
    return tqdm(results, title, len(items), unit="file", disable=None, leave=False)
