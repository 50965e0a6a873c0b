"""Long recordings as clips: which ones, their samples, the same from folder and store, and what is told."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from conftest import LOG_MEL, TINY, noise, refused, tiny, write_sound
from test_store import same

from osscl_min import checkpoint
from osscl_min.config import AudioConfig
from osscl_min.data import audio, inspection
from osscl_min.data.audio import decode, window_starts
from osscl_min.data.reader import open_data, with_others
from osscl_min.data.store import pack
from osscl_min.evaluate import evaluate
from osscl_min.train import train

AUDIO = AudioConfig(seconds=1.0, clip_step=1.0)
FIRST = replace(AUDIO, clip_step=0.0)
LENGTHS = {"a": 2.5, "b": 1.0, "c": 4.0}  # s, of the training recordings; the test recording has 3.4 s


@pytest.fixture
def data(tmp_path):
    for seed, (name, seconds) in enumerate(LENGTHS.items()):
        write_sound(tmp_path / f"data/fan/{name}/x.wav", noise(seed, seconds))
    write_sound(tmp_path / "data/test/fan/a/anomaly/y.flac", noise(9, 3.4, 22_050), 22_050)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("length", "step", "train", "test"),
    [
        (4, 10, [0], [0]),
        (10, 10, [0], [0]),
        (10 + 1 / 16_000, 5, [0], [0, 1 / 16_000]),
        (11, 10, [0], [0, 1]),
        (20, 10, [0, 10], [0, 10]),
        (25, 10, [0, 10], [0, 10, 15]),
        (25, 5, [0, 5, 10, 15], [0, 5, 10, 15]),
        (10.7, 0.1, np.arange(8) / 10, np.arange(8) / 10),
        (25, 0, [0], [0]),
    ],
)
def test_the_clips_of_a_recording(length, step, train, test):
    assert window_starts(length, AudioConfig(), step, cover=False) == pytest.approx(train)
    assert window_starts(length, AudioConfig(), step) == pytest.approx(test)


def starts(reader):
    return [(clip.path.parts[-2], clip.start) for clip in reader.clips]


def test_every_clip_is_what_its_file_holds_there(data):
    opened = open_data(data, AUDIO)
    train = [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1), ("c", 2), ("c", 3)]
    assert starts(opened.train) == train and opened.train.recordings.tolist() == [0, 0, 1, 2, 2, 2, 2]
    last = pytest.approx(2.4)  # ends with the recording
    assert [clip.start for clip in opened.test.clips] == [0, 1, 2, last]
    for reader in (opened.train, opened.test):
        for clip, row in zip(reader.clips, reader.read(range(len(reader))), strict=True):
            np.testing.assert_array_equal(row, decode(clip.path, AUDIO, start=clip.start)[0])
    whole = soundfile.read(opened.train.clips[-1].path, dtype="int16")[0]
    np.testing.assert_array_equal(opened.train.read([3, 4, 5, 6]).ravel(), whole)
    assert opened.dataset.report().splitlines()[:2] == [
        "train: 7 clips of 1 s from 3 recordings, 7 of 8 s used",
        "test: 4 clips of 1 s from 1 recording, 3 of 3 s used",
    ]
    sparse = open_data(data, replace(AUDIO, clip_step=3.0))  # a test is heard whole whatever the step
    assert starts(sparse.train) == [("a", 0), ("b", 0), ("c", 0), ("c", 3)] and len(sparse.test) == 4


def test_short_recordings_are_as_without_a_step(data):
    (data / "fan/c/x.wav").unlink()
    write_sound(data / "fan/d/x.wav", noise(5, 1.9))
    (data / "fan/a/x.wav").unlink()
    one, other = open_data(data, AUDIO, splits=["train"]), open_data(data, FIRST, splits=["train"])
    assert one.train.clips == other.train.clips and vars(one.dataset) == vars(other.dataset)
    np.testing.assert_array_equal(one.train.read([0, 1]), other.train.read([0, 1]))
    assert one.dataset.report() == "train: 2 clips of 1 s from 2 recordings, 2 of 3 s used"


def test_a_silent_part_is_not_used_and_named(data):
    wave = noise(1, 4.0)
    wave[16_000:32_000] = 0
    write_sound(data / "fan/c/x.wav", wave)
    opened = open_data(data, AUDIO, splits=["train"])
    assert opened.dataset.problems == {"fan/c/x.wav at 1 s": "silent"}
    assert starts(opened.train)[-3:] == [("c", 0), ("c", 2), ("c", 3)]
    assert "train: 6 clips of 1 s from 3 recordings, 6 of 8 s used" in opened.dataset.report()


@pytest.mark.parametrize("step", [0.5, 1.0, 3.0])
def test_a_store_is_its_folder_and_serves_the_first_clips_too(data, tmp_path, step):
    audio = replace(AUDIO, clip_step=step)
    assert open_data(data, audio).dataset.report() in pack(data, tmp_path / "store", audio)
    for served in (audio, FIRST):
        same(data, tmp_path / "store", served)
    with refused(f"one every {step:g} s, .* --seconds 1 --step 0.25$"):
        open_data(tmp_path / "store", replace(AUDIO, clip_step=0.25))
    with refused("one every .*, not clips of 1 s at 16000 Hz, one per recording"):
        pack(data, tmp_path / "store", FIRST)
    assert "0 decoded" in pack(data, tmp_path / "store", audio, verify=True)


def test_other_machines_are_cut_alike(data, tmp_path):
    write_sound(tmp_path / "more/saw/x/long.wav", noise(3, 2.0))
    (tmp_path / "more/saw/x/bad.wav").write_text("no sound")
    own = open_data(data, AUDIO, splits=["train"])
    with refused("both have a machine fan id a"):
        with_others(own, data, AUDIO, tmp_path)
    both = with_others(own, tmp_path / "more", AUDIO, tmp_path)
    rows = both.train.read([8, 0])
    for row, clip in zip(rows, (both.train.clips[8], both.train.clips[0]), strict=True):
        np.testing.assert_array_equal(row, decode(clip.path, AUDIO, start=clip.start)[0])
    assert both.dataset.problems.keys() == {"more/saw/x/bad.wav"}
    assert both.train.recordings.tolist() == [0, 0, 1, 2, 2, 2, 2, 3, 3]
    assert "more/train: 2 clips of 1 s from 1 recording, 2 of 2 s used" in both.dataset.report()


@pytest.mark.slow
def test_train_with_simulated_machines_and_score_ones_own(tmp_path, monkeypatch):
    for k in range(6):
        write_sound(tmp_path / f"own/drill/A/{k}.wav", noise(k, 1.0))
    write_sound(tmp_path / "own/test/drill/A/anomaly/x.wav", noise(9, 1.0))
    with refused("--with simulated"):
        train(tmp_path / "own", tmp_path / "run", TINY)
    monkeypatch.setattr("osscl_min.data.synth.IDS", {"fan": ("00", "02"), "valve": ("00",)})
    tiny_run = tiny({"epochs": 1}, model=LOG_MEL)
    best = train(tmp_path / "own", tmp_path / "run", tiny_run, others="simulated", device="cpu")
    names = [" ".join(machine) for machine in checkpoint.load(best).classes]
    assert names == ["drill A", "simulated fan 00", "simulated fan 02", "simulated valve 00"]
    data = json.loads((tmp_path / "run/config.json").read_text())["data"]
    assert (data["folder"], data["others"], data["synthetic"]) == ("own", "simulated", False)
    assert (tmp_path / "run/simulated/synthetic.json").is_file()
    scoring = replace(tiny_run.evaluate, bootstrap=0)
    result = evaluate(best, tmp_path / "own", tmp_path / "out", config=scoring, device="cpu")
    assert result["clips"] == 1 and result["machines"] == 1 and result["not_scored"] == ""


def test_a_long_file_is_never_read_whole(data, monkeypatch):
    long = write_sound(data / "fan/c/x.wav", noise(1, 120.0))
    sizes, read = [], soundfile.SoundFile.read

    def counted(file, frames=-1, **options):
        sizes.append(frames)
        return read(file, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    reader = open_data(data, AUDIO, splits=["train"]).train
    assert len(reader) == 3 + 120 == len(sizes) and 0 < max(sizes) < 1.1 * 16_000
    sizes.clear()
    assert audio.measure(long)["seconds"] == 120
    assert sum(sizes) == 120 * 16_000 and max(sizes) <= audio.BLOCK < 120 * 16_000


def test_inspect_and_pack_tell_how_much_is_used(data, tmp_path, osscl):
    used = "train: 3 clips of 1 s from 3 recordings, 3 of 8 s used"
    assert used in inspection.remarks(inspection.inspect(data, FIRST))
    used = used.replace("3 clips", "7 clips").replace("3 of", "7 of")
    for command in (("inspect", data), ("pack", data, tmp_path / "store")):
        status, out, _ = osscl(*command, "--seconds", 1)
        assert status == 0 and used in out
    assert inspection.inspect(tmp_path / "store", AUDIO) == inspection.inspect(data, AUDIO)
