"""Scoring many files and a long one: clips a second, memory; and the false alarms that thresholds promise."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from itertools import compress, cycle
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from osscl_min import checkpoint
from osscl_min.bench import fresh, write_rows
from osscl_min.config import PRESETS
from osscl_min.data.reader import open_data
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.inference.calibration import Calibration
from osscl_min.inference.recordings import Scorer
from osscl_min.inference.score import score
from osscl_min.runtime.device import choose_device
from osscl_min.runtime.files import peak_memory_mb
from osscl_min.train import train

FILES = (250, 2000)
MINUTES = (3, 20)  # of a long recording
RATES = (0.05, 0.1)


def case(best: str, folder: str, device: str) -> dict[str, float]:
    """Score a folder: windows a second, processor time, and the largest memory of this process."""
    warm = next(Path(folder).rglob("*.wav"))
    next(Scorer(checkpoint.load(best, choose_device(device)))([str(warm)]))
    with tempfile.TemporaryDirectory() as out:
        wall, processor = time.perf_counter(), time.process_time()
        _, summary = score(best, [folder], csv_path=Path(out) / "scores.csv", device=device)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    windows = summary.windows
    return {
        "windows": windows,
        "windows_per_second": windows / wall,
        "processor_ms_per_window": 1e3 * processor / windows,
        "peak_mb": peak_memory_mb(),
    }


def false_alarms(best: Path, data: Path, device: str) -> list[dict[str, Any]]:
    """Thresholds against normal test clips: the share called anomalous, and what chance allows."""
    trained = checkpoint.load(best, choose_device(device))
    test = open_data(data, trained.config.model.audio, splits=["test"]).test.clips
    recordings = list(Scorer(trained)(str(clip.path) for clip in test))
    scores = np.array([recording.timeline()[1].max() for recording in recordings])
    truth = np.array([clip.anomaly for clip in test])
    machines = [clip.machine for clip in test]
    own, held_out = trained.held_out()
    none = np.zeros(len(test), bool)
    half = (truth == 0) & [int(clip.path.stem[-1]) % 2 == 0 for clip in test]  # each machine's even numbers
    rows = []
    for name, more in (("validation split", none), ("and half of the test normals", half)):
        for rate in RATES:
            known = [*own, *compress(machines, more)]
            calibration = Calibration(known, [*held_out, *scores[more]], rate)
            *_, row = calibration.alarms(list(compress(machines, ~more)), scores[~more], truth[~more])
            for interval in ("binomial", "chance"):
                row[f"{interval}_low"], row[f"{interval}_high"] = row.pop(interval) or (None, None)
            for left_out in ("machine_type", "anomalous_clips", "detected"):
                del row[left_out]
            rows.append({"held_out_clips": f"{name}, {len(known)}", "rate_asked": rate} | row)
    return rows


def _many(folder: Path, files: Sequence[Path], count: int) -> Path:
    """A folder of `count` clips: links to `files`, again and again."""
    for number, file in zip(range(count), cycle(files), strict=False):
        place = folder / str(number // len(files)) / Path(*file.parts[-3:])
        place.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(file, place)
    return folder


def _long(folder: Path, files: Sequence[Path], seconds: float) -> Path:
    """A folder with one recording: normal clips of one machine, one after the other, again and again."""
    path = folder / "fan" / "id_00" / "long.wav"
    path.parent.mkdir(parents=True)
    with soundfile.SoundFile(path, "w", 16_000, 1, "PCM_16") as out:
        for file in cycle(files):
            out.write(soundfile.read(file, dtype="int16")[0])
            if out.frames >= seconds * 16_000:
                return folder


def bench_score(out: Path, *, data: Path | None = None, device: str = "auto") -> Path:
    """Measure scoring and write OUT/score_cpu.csv and .md, and OUT/score_false_alarms.csv and .md.

    Parameters
    ----------
    out : Path
    data : Path, optional
        A data folder with test clips, of preset quick's form; simulated machines without.
    device : str

    Returns
    -------
    Path
        The table.
    """
    where = choose_device(device)
    config = PRESETS["quick"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = write_dataset(work / "data", SynthConfig()) if data is None else Path(data).resolve()
        synthetic = (data / "synthetic.json").is_file()
        origin = "Synthetic: simulated machines" if synthetic else f"Data {data.name}"
        best = train(data, work / "run", config, device=str(where))
        clips = sorted(data.glob("*/test/*.wav"))
        normal = [clip for clip in clips if clip.parts[-3] == "fan" and clip.stem.startswith("normal_id_00")]
        cases = [(f"{count} files", _many(work / f"many{count}", clips, count)) for count in FILES]
        cases += [(f"one of {m} minutes", _long(work / f"long{m}", normal, 60 * m)) for m in MINUTES]
        for what, folder in cases:
            figures = fresh("osscl_min.bench_score:case", str(best), str(folder), str(where))
            rows.append({"recordings": what, **figures})
        alarms = false_alarms(best, data, str(where))
    what = f"{origin}; preset `quick`, {config.train.epochs} epochs."
    write_rows(
        out / "score_false_alarms",
        alarms,
        title=f"False alarms on normal test clips, which were never trained on. {what}",
        notes=[
            "Each machine's clips, its type's or all are taken, whichever are the first to resolve the rate. "
            "Binomial: the 95 % interval (Clopper-Pearson) of the share found, for the clips counted alone. "
            "Chance: the central 95 % of what is to be expected where clips are like those held out, "
            "which counts in that few held-out clips place a threshold."
        ],
    )
    return write_rows(
        out / f"score_{where.type}",
        rows,
        title=f"Scoring with `python -m osscl_min score`, windows of 2 s, CSV written. {what}",
        notes=["Each row is a process of its own; its memory includes PyTorch and the network."],
    )
