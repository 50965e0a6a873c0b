"""Simulated machines: six types written as a folder in the DCASE 2020 Task 2 layout.

A stand-in for the real recordings, so that everything runs without a download. Each machine identity has
its own fixed physical parameters; clips vary a little in speed, load, phase and gain, in factory-like noise.
A fault changes the structure of the sound, never just its level. Results on these clips show that the code
learns; they say nothing about real machines.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
from scipy import signal
from scipy.io import wavfile
from tqdm import tqdm

from osscl_min.data.clips import DEVELOPMENT as IDS
from osscl_min.runtime.files import UserError, printable, read_json, replacing, write_json
from osscl_min.runtime.settings import Settings

ANOMALIES: dict[str, tuple[str, ...]] = {
    "fan": ("bearing", "imbalance", "rattle"),
    "pump": ("leak", "bearing", "imbalance"),
    "slider": ("missing_stroke", "bearing", "rattle"),
    "ToyCar": ("bearing", "imbalance", "rattle"),
    "ToyConveyor": ("bearing", "imbalance", "rattle"),
    "valve": ("missing_stroke", "leak", "rattle"),
}
# What distinguishes the identities of one type. Frequencies in Hz, periods in seconds; whole numbers are
# counts (upper end excluded). `speed` is turns per second, `mode_k` a resonance of the housing.
PARAMETERS: dict[str, dict[str, tuple[float, float]]] = {
    "fan": dict(speed=(23.0, 29.0), blades=(5, 9), mode_1=(420.0, 640.0), mode_2=(1300.0, 1900.0),
                mode_3=(3000.0, 4200.0)),
    "pump": dict(speed=(44.0, 54.0), vanes=(5, 9), mode_1=(500.0, 760.0), mode_2=(1600.0, 2300.0),
                 mode_3=(3600.0, 5200.0)),
    "slider": dict(speed=(60.0, 80.0), teeth=(9, 13), period=(0.42, 0.56), mode_1=(350.0, 530.0),
                   mode_2=(1200.0, 1700.0), mode_3=(3000.0, 4200.0)),
    "ToyCar": dict(speed=(85.0, 115.0), teeth=(8, 12), gear_ratio=(3.2, 4.8), mode_1=(600.0, 900.0),
                   mode_2=(1700.0, 2500.0), mode_3=(3800.0, 5400.0)),
    "ToyConveyor": dict(speed=(38.0, 50.0), teeth=(16, 22), gear_ratio=(5.0, 8.0), mode_1=(300.0, 450.0),
                        mode_2=(900.0, 1400.0), mode_3=(2200.0, 3300.0)),
    "valve": dict(period=(0.30, 0.42), open_share=(0.35, 0.60), room=(160.0, 260.0), mode_1=(800.0, 1000.0),
                  mode_2=(2200.0, 2800.0), mode_3=(4300.0, 5300.0)),
}  # fmt: skip
LEVEL_DB, GAIN_DB = -33.0, 2.0  # RMS of a clip, dB re full scale, and its random gain (plus or minus)
RECIPE = 1  # raise it when the sound of a clip changes: a folder of an older recipe is then refused
NOTE = "Synthetic: simulated machines made by osscl_min.data.synth, no recordings. Not the DCASE 2020 data."


Count = Annotated[int, "[1, 1000000]"]


@dataclass(frozen=True)
class SynthConfig(Settings):
    """What the simulated data set holds."""

    seconds: Annotated[float, "[1, 3600]"] = 2.0  # length of a clip, at least 1
    sample_rate: Annotated[int, "[16000, 1000000]"] = 16000  # Hz, at least 16000
    ids_per_type: Annotated[int, "[1, 4]"] = 3  # machines per type, 1 to 4 (ToyConveyor has three at most)
    train_clips: Count = 24  # normal training clips per machine
    test_normal: Count = 10  # normal test clips per machine
    test_anomaly: Count = 10  # anomalous test clips per machine
    snr_db: Annotated[float, "[-300, 300]"] = 6.0  # power of a normal machine over the background, dB
    seed: Annotated[int, "[0, 1e18]"] = 0  # draws the machines and the clips


def clip_generator(seed: int, *name: str | int) -> np.random.Generator:
    """A clip's own generator; its name: type, id, "train" or "test", "normal" or "anomaly", index."""
    return np.random.default_rng([seed, *"/".join(map(str, name)).encode()])


def machine_parameters(machine_type: str, machine_id: str, seed: int) -> SimpleNamespace:
    """The fixed parameters of one machine, named as in PARAMETERS; a Latin hypercube over the type's ids, so
    that two machines of a type are alike but never the same."""
    rng, ids = clip_generator(seed, machine_type), IDS[machine_type]
    values = {}
    for name, (low, high) in PARAMETERS[machine_type].items():
        cells = rng.permutation(len(ids)) + rng.uniform(0.25, 0.75, len(ids))
        value = low + (high - low) * cells[ids.index(machine_id)] / len(ids)
        values[name] = int(value) if isinstance(low, int) else float(value)
    return SimpleNamespace(**values)


def _unit(x: np.ndarray) -> np.ndarray:
    """Scale to an RMS of one, so that the parts of a sound are mixed in stated proportions."""
    return x / (np.sqrt(np.mean(x**2)) + 1e-12)


class _Clip:
    """One recording: its clock, its random generator and its small natural variation."""

    def __init__(
        self, rng: np.random.Generator, config: SynthConfig, anomaly: str | None, machine: SimpleNamespace
    ):
        self.rng, self.rate, self.anomaly = rng, config.sample_rate, anomaly
        self.modes = machine.mode_1, machine.mode_2, machine.mode_3
        self.samples = round(config.seconds * config.sample_rate)
        self.time = np.arange(self.samples) / self.rate
        self.load = rng.uniform(-1, 1)
        # An electric motor slips under load; a damaged rotor loads it more.
        slip = rng.uniform(0.02, 0.045) if anomaly in ("bearing", "imbalance") else 0.0
        self.pace = 1 + 0.003 * rng.standard_normal() - 0.003 * self.load - slip

    def angle(self, hz: float, motion: np.ndarray | float = 1.0) -> np.ndarray:
        """Angle (radians) of a shaft that turns at `hz` times `motion`, with a slow wander of its speed."""
        wander = 0.002 * np.sin(2 * np.pi * (self.rng.uniform(0.2, 0.8) * self.time + self.rng.random()))
        turns = np.cumsum(hz * self.pace * (1 + wander) * motion) / self.rate
        return 2 * np.pi * (turns + self.rng.random())

    def cycle(self, period: float) -> np.ndarray:
        """Strokes made so far, as a growing number; the clip remembers the number of the stroke."""
        cycle = self.time * self.pace / period + self.rng.random()
        self.stroke = cycle.astype(int)
        return cycle

    def noise(self, low: float, high: float) -> np.ndarray:
        """White noise in a band (Hz)."""
        band = signal.butter(2, (low, high), "bandpass", fs=self.rate, output="sos")
        return signal.sosfilt(band, self.rng.standard_normal(self.samples))

    def knocks(self, angle: np.ndarray, scatter: float = 0.0) -> np.ndarray:
        """One impulse of random strength at each full turn of `angle`, late by up to `scatter` seconds."""
        at = np.flatnonzero(np.diff(np.floor(angle / (2 * np.pi))))
        at = at + (scatter * self.rate * self.rng.random(len(at))).astype(int)
        at = at[at < self.samples]
        train = np.zeros(self.samples)
        np.add.at(train, at, self.rng.uniform(0.6, 1.4, len(at)))
        return train

    def resonate(self, x: np.ndarray, *modes: float, q: float = 12.0, direct: float = 0.0) -> np.ndarray:
        """A sound through resonances (Hz), the machine's by default, plus a `direct` share; unit RMS."""
        modes = modes or self.modes
        return _unit(sum((signal.lfilter(*signal.iirpeak(f, q, self.rate), x) for f in modes), direct * x))


def _harmonics(angle: np.ndarray, *amplitudes: float) -> np.ndarray:
    """Sum of a_k sin(k angle), k = 1, 2, ..., looked up in one finely sampled turn."""
    points = 8192
    turn = np.fft.irfft(-0.5j * points * np.array([0.0, *amplitudes]), points)
    return turn[(angle * (points / (2 * np.pi))).astype(np.int64) % points]


Sound = tuple[np.ndarray, np.ndarray]  # of a machine, and the angle of the drive that its faults follow


def _fan(clip: _Clip, p: SimpleNamespace) -> Sound:
    """Axial fan: blade-pass tones over shaft tones, and air noise that the passing blades modulate."""
    shaft = clip.angle(p.speed)
    blades = _harmonics(p.blades * shaft, 1.0, 0.6, 0.4, 0.25, 0.15)
    air = clip.noise(100, 7000) * (1 + 0.5 * np.sin(p.blades * shaft))
    body = clip.resonate(air, direct=0.1)
    return _unit(blades + 0.4 * _harmonics(shaft, 1.0, 0.5)) + (1.0 + 0.2 * clip.load) * body, shaft


def _pump(clip: _Clip, p: SimpleNamespace) -> Sound:
    """Centrifugal pump: vane-pass tones, and cavitation: bubbles that collapse at random in the casing."""
    shaft = clip.angle(p.speed)
    vanes = _harmonics(p.vanes * shaft, 1.0, 0.5, 0.35, 0.2) + 0.5 * _harmonics(shaft, 1.0, 0.6)
    bubbles = (clip.rng.random(clip.samples) < 0.03) * clip.rng.exponential(1.0, clip.samples)
    bubbles *= 1 + 0.6 * np.sin(p.vanes * shaft)  # pressure is lowest behind a vane
    casing = clip.resonate(bubbles, direct=0.1)
    return _unit(vanes) + (1.0 + 0.2 * clip.load) * casing, shaft


def _slider(clip: _Clip, p: SimpleNamespace) -> Sound:
    """Linear slide: strokes of a toothed drive (ramp, run, ramp, rest), rolling noise, and an end stop."""
    cycle = clip.cycle(p.period)
    position = cycle % 1
    motion = np.clip(np.minimum(position, 0.75 - position) / 0.1, 0, 1)
    drive = clip.angle(p.speed, motion)
    teeth = _harmonics(p.teeth * drive, 1.0, 0.5, 0.3) + 0.6 * _harmonics(drive, 1.0, 0.6, 0.4)
    stops = np.diff(motion > 0, append=False) * (position > 0.5)
    body = clip.resonate(clip.noise(150, 7000) * motion, direct=0.1)
    ends = clip.resonate(stops)
    return _unit(teeth * motion) + (0.8 + 0.2 * clip.load) * body + 0.4 * ends, drive


def _toy_car(clip: _Clip, p: SimpleNamespace) -> Sound:
    """Toy car: gear mesh with sidebands at the wheel's rate, over the brushes of a small motor."""
    shaft = clip.angle(p.speed)
    wheel = shaft / p.gear_ratio
    mesh = _harmonics(p.teeth * shaft + 0.8 * np.sin(wheel), 1.0, 0.6, 0.35) * (1 + 0.4 * np.sin(wheel))
    brushes = clip.knocks(6 * shaft) + 0.3 * clip.noise(300, 7500)
    body = clip.resonate(brushes, direct=0.1)
    return _unit(mesh + 0.4 * _harmonics(shaft, 1.0, 0.7, 0.5)) + (1.0 + 0.2 * clip.load) * body, shaft


def _toy_conveyor(clip: _Clip, p: SimpleNamespace) -> Sound:
    """Conveyor: belt rumble in time with the rollers, roller knocks on the frame, and a geared motor."""
    shaft = clip.angle(p.speed)
    roller = shaft / p.gear_ratio
    mesh = _harmonics(p.teeth * shaft, 1.0, 0.6, 0.3) * (1 + 0.4 * np.sin(roller))
    rumble = clip.noise(50, 350) * (1 + 0.5 * np.sin(roller))
    rollers = clip.knocks(3 * roller, scatter=0.005) + 0.02 * clip.rng.standard_normal(clip.samples)
    frame = clip.resonate(rollers, direct=0.05)
    return _unit(mesh) + 0.8 * _unit(rumble) + (1.0 + 0.2 * clip.load) * frame, shaft


def _valve(clip: _Clip, p: SimpleNamespace) -> Sound:
    """Solenoid valve: a click to open and one to close, ringing in body and room, with flow in between."""
    lift = clip.cycle(p.period) % 1 < p.open_share
    click = np.abs(np.diff(lift, prepend=lift[0])) * clip.rng.uniform(0.8, 1.2, clip.samples)
    body = clip.resonate(click)
    room = clip.resonate(click, p.room, 2.1 * p.room, q=40)
    flow = clip.resonate(clip.noise(300, 7000) * lift, p.mode_2, p.mode_3, q=4)
    mains = clip.angle(100.0, lift)  # the coil pulls twice in each period of 50 Hz
    coil = _unit(np.sin(mains) * lift)
    return body + 0.5 * room + (0.6 + 0.1 * clip.load) * flow + 0.3 * coil, mains


MACHINES = dict(zip(IDS, (_fan, _pump, _slider, _toy_car, _toy_conveyor, _valve), strict=True))


def _damage(clip: _Clip, sound: np.ndarray, drive: np.ndarray) -> np.ndarray:
    """Add the clip's fault to a sound of unit RMS."""
    severity, draw = clip.rng.uniform(0.8, 1.3), clip.rng.uniform
    if clip.anomaly == "bearing":  # a ball passes a pit: impulses at no whole multiple of the speed
        pit = clip.knocks(drive * draw(3.05, 3.6)) * (1 + 0.5 * np.sin(drive))
        return sound + 0.8 * severity * clip.resonate(pit, draw(2200, 5000), q=6)
    if clip.anomaly == "imbalance":  # once a turn: a force with its harmonics, and all else modulated
        swing = _unit(_harmonics(drive, *np.linspace(1.0, 0.3, 10)))
        return sound * (1 + 0.6 * severity * np.sin(drive)) + 0.9 * severity * swing
    if clip.anomaly == "leak":  # a jet: steady broadband hiss
        return sound + 0.7 * severity * _unit(clip.noise(draw(1500, 3000), 7600))
    if clip.anomaly == "rattle":  # a loose part, struck about once a turn, rings at frequencies of its own
        knocks, part = clip.knocks(drive * draw(0.6, 1.0), scatter=0.005), draw(700, 2500)
        return sound + severity * clip.resonate(knocks, part, 1.6 * part, 2.7 * part, q=15)
    if clip.anomaly == "missing_stroke":  # it moves at each second or third command, else hums and grinds
        every = clip.rng.integers(2, 4)
        stuck = clip.stroke % every != clip.rng.integers(every)
        hum = _harmonics(clip.angle(100.0), 1.0, 1.0, 0.8, 0.6, 0.5, 0.4)
        return np.where(stuck, 0.6 * severity * (_unit(hum) + _unit(clip.noise(500, 7000))), sound)
    return sound


def _background(clip: _Clip) -> np.ndarray:
    """Factory noise: pink, with the hum of the mains."""
    frequency = np.fft.rfftfreq(clip.samples, 1 / clip.rate)
    spectrum = np.fft.rfft(clip.rng.standard_normal(clip.samples)) / np.sqrt(np.maximum(frequency, 20.0))
    hum = _harmonics(2 * np.pi * (50 * clip.time + clip.rng.random()), 0.5, 1.0, 0.3, 0.4)
    return _unit(np.fft.irfft(spectrum, clip.samples)) + 0.3 * _unit(hum)


def machine_clip(
    machine_type: str,
    machine_id: str,
    rng: np.random.Generator,
    config: SynthConfig,
    anomaly: str | None = None,
) -> np.ndarray:
    """One recording of a machine: float64 in [-1, 1], (round(seconds * sample_rate),). `rng` draws what
    differs between clips; `anomaly` is a fault of ANOMALIES[machine_type], or None for a normal clip."""
    p = machine_parameters(machine_type, machine_id, config.seed)
    clip = _Clip(rng, config, anomaly, p)
    sound, drive = MACHINES[machine_type](clip, p)
    machine = _damage(clip, _unit(sound), drive)
    wave = _unit(machine + 10 ** (-config.snr_db / 20) * _unit(_background(clip)))
    wave = wave * 10 ** ((LEVEL_DB + rng.uniform(-GAIN_DB, GAIN_DB)) / 20)
    return wave * min(1.0, 0.99 / np.max(np.abs(wave)))


def write_dataset(root: Path, config: SynthConfig) -> Path:
    """Write the simulated data set as 16-bit mono wav files in the DCASE 2020 layout; returns `root`.

    synthetic.json, which comes first, marks the folder: the next call adds the missing clips. Another
    configuration or a folder with other files is refused; nothing is ever overwritten.
    """
    root = Path(root)
    kinds = ("train", "normal", config.train_clips), ("test", "normal", config.test_normal)
    clips = [
        (machine_type, machine_id, split, kind, k)
        for machine_type, ids in IDS.items()
        for machine_id in ids[: config.ids_per_type]
        for split, kind, count in (*kinds, ("test", "anomaly", config.test_anomaly))
        for k in range(count)
    ]
    files = {"{0}/{2}/{3}_id_{1}_{4:08d}.wav".format(*clip): clip for clip in clips}
    faults = {
        file: ANOMALIES[machine_type][k % len(ANOMALIES[machine_type])]
        for file, (machine_type, _, _, kind, k) in files.items()
        if kind == "anomaly"
    }
    name, recipe = printable(root), root / "synthetic.json"
    record = {"note": NOTE, "recipe": RECIPE, "config": asdict(config), "anomalies": faults}
    if os.path.exists(recipe):
        there = read_json(recipe)
        if any(there[key] != record[key] for key in ("recipe", "config")):
            raise UserError(f"{name}/synthetic.json describes other clips: use a new folder")
    elif root.is_dir() and any(not path.name.startswith(".") for path in root.iterdir()):
        raise UserError(f"{name} holds other files: use a new folder")
    else:
        write_json(recipe, record)
    missing = [file for file in files if not os.path.exists(root / file)]
    for file in tqdm(missing, "simulated clips", unit="clip", disable=None):
        draws = clip_generator(config.seed, *files[file])
        wave = machine_clip(*files[file][:2], draws, config, faults.get(file))
        with replacing(root / file, "wb") as target:
            wavfile.write(target, config.sample_rate, np.round(wave * 32767).astype("<i2"))
    return root
