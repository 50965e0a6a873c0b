"""One machine of one's own beside others: two data folders, one table of classes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from conftest import tiny, write_sound

from osscl_min import checkpoint
from osscl_min.config import AudioConfig
from osscl_min.data.clips import label_table
from osscl_min.data.reader import open_data, with_others
from osscl_min.evaluate import evaluate
from osscl_min.runtime.files import UserError
from osscl_min.train import train

AUDIO = AudioConfig(seconds=1.0)
TINY = tiny({"epochs": 1})


def write(path, seed, samples=16_000):
    write_sound(path, 0.1 * np.random.default_rng(seed).standard_normal(samples))


@pytest.fixture
def own(tmp_path):
    """A plain folder with one machine, and test clips of it."""
    for number in range(5):
        write(tmp_path / f"own/drill/A/clip{number}.wav", number)
    for state in ("normal", "anomaly"):
        write(tmp_path / f"own/test/drill/A/{state}/one.wav", 9)
    return tmp_path / "own"


@pytest.fixture
def others(tmp_path):
    for name in ("saw/B", "mill/C"):
        for number in range(4):
            write(tmp_path / "others" / name / f"{number}.wav", 10 * number + len(name))
    (tmp_path / "others/saw/B/bad.wav").write_text("no sound")
    return tmp_path / "others"


def test_both_readers_as_one(own, others, tmp_path):
    joined = with_others(open_data(own, AUDIO, splits=["train"]), others, AUDIO, tmp_path)
    assert len(joined.train) == 13 == len(joined.train.clips)
    order = [12, 0, 5, 4, 7, 0]
    for row, position in zip(joined.train.read(order), order, strict=True):
        expected = soundfile.read(joined.train.clips[position].path, dtype="int16")[0]
        np.testing.assert_array_equal(row, expected)
    out = np.zeros((2, 16_000), np.int16)
    assert joined.train.read([1, 11], out) is out and out.any(axis=1).all()
    assert joined.dataset.problems.keys() == {"others/saw/B/bad.wav"}


def test_the_same_machine_twice_is_refused(own, others, tmp_path):
    write(others / "drill/A/1.wav", 1)
    with pytest.raises(UserError, match="both have a machine drill id A"):
        with_others(open_data(own, AUDIO, splits=["train"]), others, AUDIO, tmp_path)


def test_one_machine_alone_is_told_what_to_add(own, tmp_path):
    with pytest.raises(UserError, match="--with simulated"):
        train(own, tmp_path / "run", TINY)


def test_train_with_others_and_score_ones_own(own, others, tmp_path):
    best = train(own, tmp_path / "run", TINY, others=others, device="cpu")
    assert checkpoint.load(best).classes == (("drill", "A"), ("mill", "C"), ("saw", "B"))
    data = json.loads((tmp_path / "run/config.json").read_text())["data"]
    assert data["folder"] == "own" and data["others"] == "others"
    assert data["training"] + data["validation"] == 13 and data["clips"].startswith("13 clips")
    result = evaluate(best, own, tmp_path / "out", config=replace(TINY.evaluate, bootstrap=0), device="cpu")
    assert result["clips"] == 2 and result["machines"] == 1 and result["not_scored"] == ""


def test_simulated_machines(own, tmp_path, monkeypatch):
    monkeypatch.setattr("osscl_min.data.synth.IDS", {"fan": ("00", "02"), "valve": ("00",)})
    joined = with_others(open_data(own, AUDIO, splits=["train"]), "simulated", AUDIO, tmp_path)
    simulated = ("simulated fan", "00"), ("simulated fan", "02"), ("simulated valve", "00")
    assert label_table(joined.train.clips) == (("drill", "A"), *simulated)
    assert not joined.dataset.synthetic and (tmp_path / "simulated/synthetic.json").is_file()
    assert joined.train.read([0, 5]).any(axis=1).all()
