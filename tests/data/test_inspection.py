"""Inspection: counts, formats, duplicates and conflicts of a folder, in table and files."""

import json

import numpy as np
import pytest
from conftest import noise, refused, write_sound

from osscl_min.config import AudioConfig
from osscl_min.data import inspection
from osscl_min.data.store import pack


@pytest.fixture
def folder(tmp_path):
    """Two machines and two rates; a sound in train and test with both truths, a clipped and a broken file."""
    fan, pump = tmp_path / "data/fan", tmp_path / "data/pump"
    for k in range(3):
        write_sound(fan / f"train/normal_id_00_{k:08d}.wav", noise(k))
        write_sound(pump / f"train/normal_id_02_{k:08d}.wav", noise(k, 3 + k, 8_000, 2), 8_000)
    loud = noise(4, 2.0)
    loud[10:13] = 32767
    write_sound(fan / "test/normal_id_00_00000000.wav", noise(3))
    write_sound(fan / "test/anomaly_id_00_00000000.wav", loud)
    for name in ("normal_id_00_00000007.flac", "anomaly_id_00_00000007.wav"):
        write_sound(fan / "test" / name, noise(1))
    (fan / "train/normal_id_00_00000009.wav").write_bytes(b"no sound")
    write_sound(pump / "train/normal_id_02_00000005.wav", np.zeros(16_000), 8_000)
    return tmp_path / "data"


def test_everything_is_counted(folder):
    result = inspection.inspect(folder)
    fan, pump = result["machines"]
    assert (fan["train"], fan["test_normal"], fan["test_anomaly"], fan["test_unlabelled"]) == (3, 2, 2, 0)
    assert (fan["seconds"], fan["sample_rates"], fan["channels"]) == ([1, 2], [16_000], [1])
    assert (pump["seconds"], pump["sample_rates"], pump["channels"]) == ([2, 5], [8_000], [1, 2])
    assert (fan["silent"], pump["silent"], fan["clipped"]) == (0, 1, 1)
    assert list(result["problems"]) == ["fan/train/normal_id_00_00000009.wav"]
    clipped = {row["file"]: row["clipped"] for row in result["files"] if row["clipped"]}
    assert clipped == {"fan/test/anomaly_id_00_00000000.wav": 3}
    silent = next(row for row in result["files"] if row["silent"])
    assert silent["level"] is None
    # duplicates are found by content whatever the container
    same = [f"fan/test/{name}_id_00_00000007" for name in ("anomaly", "normal")]
    same = [same[0] + ".wav", same[1] + ".flac", "fan/train/normal_id_00_00000001.wav"]
    for kind in ("duplicates", "across", "conflicts"):
        assert [sorted(files) for files in result[kind]] == [same]
    text = inspection.remarks(result)
    assert "in train and in test" in text and "two truths" in text and "files that cannot be used (1)" in text


def test_a_store_tells_the_same(folder, tmp_path, osscl):
    pack(folder, tmp_path / "store", AudioConfig(seconds=1.0))
    status, out, error = osscl("inspect", tmp_path / "store", "--out", tmp_path / "out")
    assert status == 0 and "| fan          | 00 | 3" in out and "| all " in out, error
    result = inspection.inspect(folder, AudioConfig(clip_step=10.0))
    assert json.loads((tmp_path / "out/inspect.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "out/inspect.csv").read_text().count("\n") == 1 + result["clips"] == 12


def test_a_folder_without_a_readable_file_is_refused(folder):
    for path in [*folder.rglob("*.wav"), *folder.rglob("*.flac")]:
        path.write_bytes(b"")
    with refused("no file can be read"):
        inspection.inspect(folder)
