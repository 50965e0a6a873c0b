"""The simulated machines: files, reproducibility, levels, physics, and whether the faults can be learned."""

import functools
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from conftest import contents, put, refused
from scipy import signal
from sklearn.metrics import roc_auc_score

from osscl_min.data.synth import ANOMALIES, IDS, SynthConfig, clip_generator, machine_clip
from osscl_min.data.synth import write_dataset as write

SMALL = SynthConfig(seconds=1.0, ids_per_type=2, train_clips=2, test_normal=1, test_anomaly=4, seed=3)
ONE = replace(SMALL, ids_per_type=1, train_clips=1, test_anomaly=1)


def simulate(machine_type, machine_id, index, anomaly=None, config=SynthConfig()):
    kind = "normal" if anomaly is None else "anomaly"
    rng = clip_generator(config.seed, machine_type, machine_id, "test", kind, index)
    return machine_clip(machine_type, machine_id, rng, config, anomaly)


def examples(ids):
    """Six normal and six faulty clips of each type's first machines: type, id, fault, wave."""
    for machine_type, kinds in ANOMALIES.items():
        for machine_id, k in itertools.product(IDS[machine_type][:ids], range(6)):
            for fault in (None, kinds[k % len(kinds)]):
                yield machine_type, machine_id, fault, simulate(machine_type, machine_id, k, fault)


def features(wave):
    """Mean and deviation over time of 128 equal bands up to 8 kHz, in dB."""
    power = np.abs(signal.stft(wave, nperseg=2048, noverlap=1536)[2][:-1]) ** 2
    bands = 10 * np.log10(power.reshape(128, 8, -1).mean(1) + 1e-12)
    return np.concatenate([bands.mean(1), bands.std(1)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("synth") / "data", SMALL)


# Files


def test_layout_counts_and_record(folder):
    expected = {
        f"{machine_type}/{split}/{kind}_id_{machine_id}_{k:08d}.wav"
        for machine_type, ids in IDS.items()
        for machine_id in ids[:2]
        for split, kind, count in (("train", "normal", 2), ("test", "normal", 1), ("test", "anomaly", 4))
        for k in range(count)
    }
    assert set(contents(folder)) == expected | {"synthetic.json"}
    for file in expected:
        info = soundfile.info(folder / file)
        assert (info.samplerate, info.channels, info.subtype, info.frames) == (16000, 1, "PCM_16", 16000)
    record = json.loads((folder / "synthetic.json").read_text())
    assert record["note"].startswith("Synthetic")
    assert record["anomalies"].keys() == {file for file in expected if "anomaly" in file}
    faults = [record["anomalies"][f"pump/test/anomaly_id_00_{k:08d}.wav"] for k in range(4)]
    assert faults == ["leak", "bearing", "imbalance", "leak"]  # the kinds cycle


def test_a_file_is_its_clip_alone(folder):
    """Any clip can be made again without those before it."""
    samples, _ = soundfile.read(folder / "valve/test/anomaly_id_02_00000002.wav", dtype="int16")
    wave = simulate("valve", "02", 2, "rattle", SMALL)
    np.testing.assert_array_equal(samples, np.round(wave * 32767).astype(np.int16))


def test_same_seed_same_bytes_other_seed_other_clips(folder, tmp_path):
    first = contents(folder)
    assert contents(write(tmp_path / "again", SMALL)) == first
    other = contents(write(tmp_path / "other", replace(SMALL, seed=4)))
    assert other.keys() == first.keys()
    assert not any(other[file] == first[file] for file in first)
    assert len(set(first.values())) == len(first), "clips differ from each other"


def test_complete_folder_is_left_alone_and_interrupted_one_is_completed(tmp_path):
    root = write(tmp_path / "data", ONE)
    before, times = contents(root), {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    write(root, ONE)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == times

    (root / "fan/train/normal_id_00_00000000.wav").unlink()
    (root / "fan/train/.x1.part").write_bytes(b"half a clip")
    kept = root / "pump/train/normal_id_00_00000000.wav"
    write(root, ONE)
    assert {name: data for name, data in contents(root).items() if not name.endswith(".part")} == before
    assert kept.stat().st_mtime_ns == times[kept]


TROUBLE = {
    "other seed": lambda root: write(root, replace(ONE, seed=99)),
    "other file": lambda root: put(root / "valve/train/normal_id_00_00000000.wav", "a recording"),
    "broken record": lambda root: put(root / "synthetic.json", "{"),
    "deep record": lambda root: put(root / "synthetic.json", "[" * 100_000),
    "a file": lambda root: root.write_text("mine"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_refuses_what_it_did_not_write(tmp_path, trouble):
    root = tmp_path / "data"
    TROUBLE[trouble](root)
    before = contents(tmp_path)
    with refused("folder|not a readable JSON file|File exists"):
        write(root, ONE)
    assert contents(tmp_path) == before


# Levels


def test_level_does_not_give_the_fault_away():
    """Every clip keeps to the same 4 dB of RMS, none clips, and the level ranks no better than chance."""
    labels, levels = [], []
    for _, _, fault, wave in examples(4):
        assert wave.dtype == np.float64 and wave.shape == (32000,)
        assert np.max(np.abs(wave)) < 0.98
        labels.append(fault is not None)
        levels.append(10 * np.log10(np.mean(wave**2)))
    assert np.min(levels) >= -35.001 and np.max(levels) <= -30.999
    assert np.std(levels) > 0.8
    assert 0.38 < roc_auc_score(labels, levels) < 0.62


def test_snr_is_as_stated():
    """The same draws without background give the machine alone; the rest of the clip is background."""
    for machine_type, machine_id in (("fan", "00"), ("valve", "02")):
        machine = simulate(machine_type, machine_id, 0, config=SynthConfig(snr_db=300.0))
        for snr_db in (0.0, 6.0, 20.0):
            wave = simulate(machine_type, machine_id, 0, config=SynthConfig(snr_db=snr_db))
            part = machine * (wave @ machine) / (machine @ machine)
            measured = 10 * np.log10(np.mean(part**2) / np.mean((wave - part) ** 2))
            assert measured == pytest.approx(snr_db, abs=0.5)


# Physics


@functools.cache
def normal_features(machine_type):
    return np.array([features(simulate(machine_type, IDS[machine_type][0], k)) for k in range(24)])


@pytest.mark.parametrize(("machine_type", "fault"), [(t, k) for t, kinds in ANOMALIES.items() for k in kinds])
def test_each_fault_changes_the_spectrum_or_its_variation(machine_type, fault):
    """A faulty clip lies farther from the normal ones than they lie from each other."""
    normal = normal_features(machine_type)
    faulty = [features(simulate(machine_type, IDS[machine_type][0], k, fault)) for k in range(6)]
    centre, spread = normal[:16].mean(0), normal[:16].std(0)
    distance = [np.sqrt(np.mean(((x - centre) / spread) ** 2, axis=1)) for x in (normal[16:], faulty)]
    assert np.median(distance[1]) > 1.3 * np.median(distance[0])
