"""How fast clips come: packing, batches from a store and from files, log-mel, and the memory of it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from osscl_min.bench import fresh, measure, write_rows
from osscl_min.config import AudioConfig
from osscl_min.data.clips import BENCHMARK, scan
from osscl_min.data.reader import FolderReader, open_data
from osscl_min.data.store import ARRAY, FORMAT, SAMPLE, pack, write_index
from osscl_min.features import FrontEnd
from osscl_min.runtime.device import prepare

AUDIO = AudioConfig()
BATCH = 64
SPARE = 3e9  # bytes of disk to leave free
TARGETS = {"packing": 400, "batches from the store": 5_000, "log-mel on the fly": 250}  # clips a second


def _name(number: int) -> tuple[str, str, str]:
    """Machine type, id and file of a training clip."""
    machine_type, machine_id = BENCHMARK[number % len(BENCHMARK)]
    return machine_type, machine_id, f"{machine_type}/train/normal_id_{machine_id}_{number:08d}.wav"


def write_clips(folder: Path, count: int) -> None:
    """Training clips of noise, 16-bit wav files."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / _name(number)[2]
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, random.integers(-9999, 9999, AUDIO.samples, np.int16), AUDIO.sample_rate)


def write_store(store: Path, count: int) -> None:
    """A store of `count` training clips of random int16, without the files that it would be made from."""
    random = np.random.default_rng(0)
    store.mkdir(parents=True)
    lines = []
    with open(store / ARRAY.format("train"), "wb") as file:
        for number in range(count):
            file.write(random.integers(-32768, 32768, AUDIO.samples, SAMPLE))
            machine_type, machine_id, name = _name(number)
            clip = {"path": name, "machine_type": machine_type, "machine_id": machine_id, "split": "train"}
            line = {"file": name, "clip": clip | {"anomaly": 0}, "sha256": f"{number:064x}", "sound": ""}
            lines.append(line | {"problem": "", "remarks": [], "content": f"{number:064x}"})
    header = {"sample_rate": AUDIO.sample_rate, "seconds": AUDIO.seconds, "channel": None, "problems": {}}
    header |= {"format": FORMAT, "layout": "DCASE 2020", "synthetic": True, "data": "", "root": str(store)}
    write_index(store, header | {"notes": [], "files": {"train": "", "test": ""}}, lines)


def anonymous_memory_mb() -> float | None:
    """Resident memory of this process that no file stands behind, MB; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon:")), None)


def packing(data: str, store: str, jobs: int) -> dict[str, float]:
    """Seconds that `pack` takes, its processes' start and the disk's end included."""
    for path in Path(data).rglob("*.wav"):  # into the page cache
        path.read_bytes()
    wall, processor = time.perf_counter(), sum(os.times()[:4])
    pack(data, store, AUDIO, jobs=jobs)
    return {"seconds": time.perf_counter() - wall, "processor": sum(os.times()[:4]) - processor}


def reading(path: str, passes: int) -> dict[str, float | None]:
    """Read every training clip of a store, or of a folder that is not kept in memory, in shuffled batches.

    Returns
    -------
    dict
        "seconds" and "processor" of the last pass, "clips" of it, and "memory_mb": by how much the anonymous
        memory grew at most from before the data was opened.
    """
    random, before = np.random.default_rng(0), anonymous_memory_mb()
    if (Path(path) / ARRAY.format("train")).is_file():
        reader = open_data(path, AUDIO, splits=["train"]).train
    else:
        dataset = scan(path)
        reader = FolderReader(dataset, dataset.clips, AUDIO, keep=0)
    buffer = np.empty((BATCH, AUDIO.samples), np.int16)
    most = 0.0
    for _ in range(passes):
        order = random.permutation(len(reader))
        wall, processor = time.perf_counter(), time.process_time()
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            reader.read(batch, buffer[: len(batch)])
            if before is not None and start % (50 * BATCH) == 0:
                most = max(most, anonymous_memory_mb() - before)
        seconds = {"seconds": time.perf_counter() - wall, "processor": time.process_time() - processor}
    memory = None if before is None else max(most, anonymous_memory_mb() - before)
    return {**seconds, "clips": len(reader), "memory_mb": memory}


def log_mel() -> dict[str, float]:
    """Batches of samples to waves and log-mels, as in training."""
    prepare(torch.device("cpu"))
    front = FrontEnd(AUDIO)
    samples = torch.randint(-9999, 9999, (BATCH, AUDIO.samples), dtype=torch.int16)
    return measure(lambda: front(samples), seconds=5)


def bench_data(
    out: Path, *, clips: int = 36_000, files: int = 4_000, jobs: int | None = None, place: Path | None = None
) -> Path:
    """Measure the way of the clips and write OUT/data_cpu.csv and .md.

    Parameters
    ----------
    out : Path
    clips : int
        Of the store that batches are read from, or as many as the disk allows.
    files : int
        Sound files to pack.
    jobs : int, optional
        Processes that pack, and threads of the log-mel; all cores without.
    place : Path, optional
        A folder on the disk to use, of about 12 GB; what is written there is removed. The system's folder
        for temporary files without.

    Returns
    -------
    Path
        The table.
    """
    jobs = jobs or os.cpu_count()
    row = AUDIO.samples * SAMPLE.itemsize
    with tempfile.TemporaryDirectory(dir=place) as folder:
        data, packed, large = (Path(folder) / name for name in ("data", "packed", "large"))
        write_clips(data, files)
        done = fresh("osscl_min.bench_data:packing", str(data), str(packed), jobs)
        decoded = fresh("osscl_min.bench_data:reading", str(data), 1)
        shutil.rmtree(data)
        shutil.rmtree(packed)
        allowed = int((shutil.disk_usage(folder).free - SPARE) // row)
        count = max(min(clips, allowed), BATCH)
        write_store(large, count)
        read = fresh("osscl_min.bench_data:reading", str(large), 2)
    spectra = fresh("osscl_min.bench_data:log_mel", threads=jobs)
    spectra = {"seconds": spectra["wall_ms"] / 1e3, "processor": spectra["processor_ms"] / 1e3}
    rows = []
    for what, number, figures in (
        ("packing", files, done),
        ("batches from files, decoded", files, decoded),
        ("batches from the store", count, read),
        ("log-mel on the fly", BATCH, spectra),
    ):
        rows.append(
            {
                "what": what,
                "clips": number,
                "clips_per_second": number / figures["seconds"],
                "at_least": TARGETS.get(what),
                "processor_ms_per_clip": 1e3 * figures["processor"] / number,
                "anonymous_memory_mb": figures.get("memory_mb"),
            }
        )
    limit = "" if count == clips else f" ({clips:,} were asked for; the disk allows no more)"
    notes = [
        f"Clips of 10 s, 16 kHz, random int16. packing: {files:,} wav files from the page cache with {jobs} "
        "processes, their start and the writing to disk included. Batches: 64 clips in a new order, into one "
        f"buffer, one thread; the store holds {count:,} clips, {count * row / 1e9:.1f} GB{limit}, and the "
        "second pass counts. anonymous_memory_mb: growth of RssAnon from before the data is opened, at most. "
        f"log-mel: batches of 64 int16 clips, {jobs} threads. at_least: what was aimed at."
    ]
    return write_rows(
        Path(out) / "data_cpu", rows, title="The way of the clips, each in a fresh process.", notes=notes
    )
