"""The packed store: equals its folder, follows it, survives kill -9, and its damage is one clear line."""

import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import COMMAND, contents, environment, kill_when, noise, refused, write_sound

from osscl_min.config import AudioConfig
from osscl_min.data import store as module
from osscl_min.data.reader import FolderReader, StoreReader, open_data
from osscl_min.data.store import pack, read_store
from osscl_min.runtime.files import UserError, locked

AUDIO = AudioConfig(seconds=1.0)


@pytest.fixture
def data(tmp_path):
    """Two machines, of clips that are usual, long, short, stereo, of another rate, and no sound at all."""
    root = tmp_path / "data"
    for machine in ("00", "02"):
        for k in range(4):
            write_sound(root / f"fan/train/normal_id_{machine}_{k:08d}.wav", noise(k + 10 * int(machine)))
    write_sound(root / "fan/train/normal_id_02_00000004.flac", noise(50, 1.5))
    write_sound(root / "fan/train/normal_id_02_00000005.wav", noise(51, 1.2, channels=2))
    write_sound(root / "fan/train/normal_id_02_00000006.wav", noise(52, 1.0, 48_000), 44_100)
    (root / "fan/train/normal_id_02_00000007.wav").write_text("no sound")
    (root / "fan/train/notes.txt").write_text("louder than usual")
    for k, name in enumerate(("normal_id_00_00000000", "anomaly_id_00_00000000", "id_02_00000000")):
        write_sound(root / f"fan/test/{name}.wav", noise(100 + k))
    write_sound(root / "fan/test/normal_id_00_00000001.wav", np.zeros(16_000, np.int16))
    return root


def same(folder, store, audio=AUDIO):
    """Assert that a folder and its store are the same data."""
    here, there = open_data(folder, audio), open_data(store, audio)
    assert isinstance(here.train, FolderReader) and isinstance(there.train, StoreReader)
    assert vars(here.dataset) == vars(there.dataset) and here.dataset.report() == there.dataset.report()
    for split in ("train", "test"):
        one, other = getattr(here, split), getattr(there, split)
        assert one.clips == other.clips and (one.recordings == other.recordings).all()
        order = np.random.default_rng(0).permutation(len(one))
        a, b = one.read(order), other.read(order)
        assert a.dtype == b.dtype and np.array_equal(a, b)


def state(store):
    """Every visible file of a store and a digest of it."""
    return {name: digest for name, digest in contents(store).items() if not name.startswith(".")}


def test_a_store_is_its_folder(data, tmp_path):
    text = pack(data, tmp_path / "store", AUDIO)
    assert "11 training and 3 test clips of 1 s at 16000 Hz" in text
    assert "16 decoded, 0 kept" in text and "3 files not used" in text
    same(data, tmp_path / "store")
    assert sorted(state(tmp_path / "store")) == ["index.jsonl", "test.int16", "train.int16"]
    with pytest.raises(UserError, match="stopped because of --strict"):
        open_data(tmp_path / "store", AUDIO, strict=True)
    header, dataset, lines = read_store(tmp_path / "store")
    assert len(lines) == 16 and header["layout"] == "DCASE 2020" and not header["synthetic"]
    for line, clip in zip(lines, dataset.clips, strict=True):
        assert clip.path == data / line["file"] and clip.machine_type == "fan"
    assert "not a readable sound file" in lines[-1]["problem"] == lines[-1]["sound"]
    assert (lines[12]["sound"]["seconds"], lines[12]["sound"]["encoding"]) == (1.5, "PCM_16")


def test_a_split_whose_files_changed_is_packed_again(data, tmp_path):
    store, train_folder = tmp_path / "store", data / "fan/train"
    pack(data, store, AUDIO)
    before = state(store)
    assert "0 decoded, 16 kept" in pack(data, store, AUDIO)
    assert state(store) == before
    old = open_data(store, AUDIO)  # opened before the change, it still reads what it opened
    expected = old.train.read(range(11))
    write_sound(train_folder / "normal_id_00_00000000.wav", noise(70))
    write_sound(train_folder / "normal_id_00_00000009.wav", noise(71))
    (train_folder / "normal_id_02_00000001.wav").unlink()
    assert "12 decoded, 4 kept" in pack(data, store, AUDIO)
    same(data, store)
    assert np.array_equal(old.train.read(range(11)), expected)
    assert state(store)["test.int16"] == before["test.int16"]
    (data / "eval_data_list.csv").write_text("fan\nid_02_00000000.wav,anomaly_id_02_00000000.wav,1\n")
    assert "0 decoded" in pack(data, store, AUDIO)  # for a truth that comes later
    same(data, store)
    clips = open_data(store, AUDIO).test.clips
    assert [clip.anomaly for clip in clips if clip.machine_id == "02"] == [1]


def test_verify_finds_what_size_and_time_hide(data, tmp_path):
    store, path = tmp_path / "store", data / "fan/train/normal_id_00_00000001.wav"
    pack(data, store, AUDIO)
    assert pack(data, store, AUDIO, verify=True).endswith("0 decoded, 16 kept")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write_sound(path, noise(80))
    os.utime(path, ns=times)
    with open(store / "test.int16", "r+b") as file:  # a row damaged on the disk
        file.seek(40_000)
        file.write(b"\x55")
    assert "0 decoded" in pack(data, store, AUDIO), "unseen without --verify"
    text = pack(data, store, AUDIO, verify=True).splitlines()
    assert text[1] == "fan/test/id_02_00000000.wav: damaged in test.int16; test packed again"
    assert text[0].startswith("fan/train/normal_id_00_00000001.wav: other content, though")
    assert "16 decoded, 0 kept" in text[-1]
    assert len(text) == 2 + len(open_data(data, AUDIO).dataset.report().splitlines()) + 1
    same(data, store)


@pytest.mark.slow
def test_kill_9_while_packing(data, tmp_path):
    for k in range(400):  # so that there is a middle
        first = data / "fan/train/normal_id_00_00000000.wav"
        os.link(first, first.with_stem(f"normal_id_00_{k + 100:08d}"))
    store = tmp_path / "store"
    command = [*COMMAND, "pack", data, store, "--jobs", "2", "--seconds", "1", "--step", "0"]
    index, options = store / "index.jsonl", {"stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, env=environment(), **options)
    kill_when(process, lambda: index.is_file() and index.read_bytes().count(b"\n") >= 60)
    with refused("store: its packing was not finished; run the same `pack` again"):
        open_data(store, AUDIO)
    with open(index, "a") as file:  # the last line may be half there
        file.write('{"file": "fan/tr')
    with open(store / "train.int16", "r+b") as file:  # a noted row that never reached the disk
        file.seek(20 * 32_000)
        file.write(bytes(32_000))
    assert "clips: 396 decoded, 20 kept" in pack(data, store, AUDIO)
    same(data, store)
    assert sorted(state(store)) == ["index.jsonl", "test.int16", "train.int16"]


def test_a_write_error_is_one_line_and_the_next_call_resumes(data, tmp_path):
    command = ["bash", "-c", 'ulimit -f 128; exec "$@"', "limit", *COMMAND, "pack"]
    command += [data, tmp_path / "store", "--seconds", "1", "--step", "0", "--jobs", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"{tmp_path / 'store'}: cannot be written: File too large; run the same" in result.stderr
    assert re.search(r" [1-9]\d* kept", pack(data, tmp_path / "store", AUDIO))
    same(data, tmp_path / "store")


def test_a_full_disk_is_told_before(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100_000))
    with refused("0.0005.* GB needed and 0.0001 GB free; make room", 5):
        pack(data, tmp_path / "store", AUDIO)


def edit(store, old, new):
    index = store / "index.jsonl"
    content = index.read_text()
    assert old in content
    index.write_text(content.replace(old, new))


INDEX = "index.jsonl is damaged"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: os.truncate(s / "train.int16", 90_000), "train.int16 is damaged: 90000 bytes, not 384000"),
        (lambda s: (s / "test.int16").unlink(), "test.int16 is damaged: 0 bytes, not 128000"),
        (lambda s: os.truncate(s / "index.jsonl", 3000), INDEX),
        (lambda s: (s / "index.jsonl").write_bytes(b"{}\n"), INDEX),
        (lambda s: (s / "index.jsonl").write_bytes(b"[" * 100_000), INDEX),
        (lambda s: (s / "index.jsonl").write_bytes(b"\xff\x00\n"), INDEX),
        (lambda s: edit(s, '"machine_id": "02"', '"machine_id": 2'), INDEX),
        (lambda s: edit(s, '"channels": 1', '"channels": null'), INDEX),
        (lambda s: edit(s, '"seconds": 1.0, "step"', '"seconds": "1", "step"'), INDEX),
        (lambda s: edit(s, '"layout": "DCASE 2020"', '"layout": 5'), INDEX),
        (lambda s: edit(s, '"digest"', '"other"'), INDEX),
    ],
)
def test_a_damaged_store_is_one_line_and_repaired_by_packing(damage, message, data, tmp_path):
    store = tmp_path / "store"
    pack(data, store, AUDIO)
    damage(store)
    with refused(f"{message}.*run the same `pack` again"):
        open_data(store, AUDIO)
    pack(data, store, AUDIO)
    same(data, store)


def test_a_store_of_something_else_is_refused(data, tmp_path):
    store, old = tmp_path / "store", tmp_path / "old"
    pack(data, store, AUDIO)
    before, two = state(store), AudioConfig(seconds=2.0)
    write_sound(tmp_path / "other/pump/train/normal_id_00_00000000.wav", noise(1))
    old.mkdir()
    (old / "index.jsonl").write_text('{"format": 1, "files": 1}\n{"file": "fan/train/a.wav"}\n')
    holds = "store holds clips of 1 s at 16000 Hz, one per recording, the mean of all channels"
    other = f"{holds}; make another store: python -m osscl_min pack {data} OTHER --sample-rate 16000"
    channel = "not clips of 1 s at 16000 Hz, one per recording, channel 1; choose another"
    version = "another version; remove it and pack again"
    for message, call in (
        (f"{other} --seconds 2 --step 0$", lambda: open_data(store, two)),
        (f"{other} --seconds 1 --step 0 --channel 1$", lambda: open_data(store, AUDIO, channel=1)),
        (f"{holds}, not clips of 2 s at 16000", lambda: pack(data, store, two)),
        (channel, lambda: pack(data, store, AUDIO, channel=1)),
        ("is a packed store itself", lambda: pack(store, tmp_path / "again", AUDIO)),
        ("lies in the data folder", lambda: pack(data, data / "store", AUDIO)),
        ("is neither empty nor a packed store", lambda: pack(data, tmp_path, AUDIO)),
        ("is the store of other data; choose another", lambda: pack(tmp_path / "other", store, AUDIO)),
        ("give at least 1", lambda: pack(data, store, AUDIO, jobs=0)),
        (version, lambda: open_data(old, AUDIO)),
        (version, lambda: pack(data, old, AUDIO)),
    ):
        with refused(message):
            call()
    with locked(store, "packing"), refused("another process is packing here"):
        pack(data, store, AUDIO)
    assert state(store) == before


def test_other_rates_and_layouts_are_kept(tmp_path):
    """MIMII with eight channels, at half the rate."""
    for k in range(3):
        for state_, seed in (("normal", 0), ("abnormal", 50)):
            path = tmp_path / f"mimii/6_dB_fan/fan/id_00/{state_}/{k:08d}.wav"
            write_sound(path, noise(seed + k, 2.0, channels=8))
    half = AudioConfig(sample_rate=8_000, seconds=1.0, f_max=4_000.0)
    pack(tmp_path / "mimii", tmp_path / "store", half)
    same(tmp_path / "mimii", tmp_path / "store", half)
    opened = open_data(tmp_path / "store", half)
    assert (opened.dataset.layout, opened.dataset.channel) == ("MIMII", 0)
    assert opened.train.clips[0].domain == "6_dB" and opened.train.read([0]).shape == (1, 8_000)


def test_a_manifest_is_packed_too(tmp_path):
    """With a file outside its folder."""
    write_sound(tmp_path / "elsewhere/a.wav", noise(1))
    write_sound(tmp_path / "list/b.wav", noise(2))
    rows = f"{tmp_path / 'elsewhere/a.wav'},saw,1,train,0\nb.wav,saw,2,test,\n"
    (tmp_path / "list/manifest.csv").write_text(f"path,machine_type,machine_id,split,anomaly\n{rows}")
    pack(tmp_path / "list", tmp_path / "store", AUDIO)
    same(tmp_path / "list", tmp_path / "store")


def test_a_store_of_the_former_format_is_read(data, tmp_path):
    """It has no step and no place in the recording."""
    pack(data, tmp_path / "store", AUDIO)
    index = tmp_path / "store/index.jsonl"
    header, *lines = map(json.loads, index.read_text().splitlines())
    header = {name: value for name, value in header.items() if name not in ("step", "digest")}
    for line in lines:
        line["clip"] = {name: line["clip"][name] for name in line["clip"] if name not in ("start", "length")}
    module._write_index(tmp_path / "store", header, lines, finished=True)
    here, there = open_data(data, AUDIO), open_data(tmp_path / "store", AUDIO)
    assert here.train.clips == there.train.clips and "0 decoded" in pack(data, tmp_path / "store", AUDIO)
    np.testing.assert_array_equal(here.test.read([0, 1, 2]), there.test.read([0, 1, 2]))
