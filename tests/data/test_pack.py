"""The packed store: it equals its folder, follows it, survives kill -9, and its damage is one clear line."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import COMMAND, environment, tiny, write_sound

from osscl_min.config import AudioConfig, EvaluateConfig
from osscl_min.data.pack import pack
from osscl_min.data.reader import FolderReader, StoreReader, open_data
from osscl_min.data.store import read_index
from osscl_min.data.synth import SynthConfig, write_dataset
from osscl_min.evaluate import evaluate
from osscl_min.runtime.files import UserError
from osscl_min.train import read_log, train

AUDIO = AudioConfig(seconds=1.0)


def noise(seed, seconds=1.0, channels=1):
    shape = (round(16_000 * seconds), channels)
    return np.random.default_rng(seed).integers(-9000, 9000, shape, dtype=np.int16)


@pytest.fixture
def data(tmp_path):
    """Two machines, of clips that are usual, long, short, stereo, of another rate, and no sound at all."""
    root = tmp_path / "data"
    for machine in ("00", "02"):
        for k in range(4):
            write_sound(root / f"fan/train/normal_id_{machine}_{k:08d}.wav", noise(k + 10 * int(machine)))
    write_sound(root / "fan/train/normal_id_02_00000004.flac", noise(50, 1.5))
    write_sound(root / "fan/train/normal_id_02_00000005.wav", noise(51, 1.2, 2))
    write_sound(root / "fan/train/normal_id_02_00000006.wav", noise(52, 3.0), 44_100)
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
    assert vars(here.dataset) == vars(there.dataset) and here.report() == there.report()
    for split in ("train", "test"):
        one, other = getattr(here, split), getattr(there, split)
        assert one.clips == other.clips and len(one) == len(other)
        order = np.random.default_rng(0).permutation(len(one))
        a, b = one.read(order), other.read(order)
        assert a.dtype == b.dtype and np.array_equal(a, b)


def state(store):
    """Every file of a store and its bytes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in store.iterdir()}


def test_a_store_is_its_folder(data, tmp_path):
    text = pack(data, tmp_path / "store", AUDIO, jobs=1)
    assert "11 training and 3 test clips of 1 s at 16000 Hz" in text
    assert "16 decoded, 0 kept, 0 removed" in text and "3 files not used" in text
    same(data, tmp_path / "store")
    assert sorted(state(tmp_path / "store")) == ["index.jsonl", "test.int16", "train.int16"]
    with pytest.raises(UserError, match="stopped because of --strict"):
        open_data(tmp_path / "store", AUDIO, strict=True)
    only_test = open_data(tmp_path / "store", AUDIO, splits=["test"])
    assert vars(only_test.dataset) == vars(open_data(data, AUDIO, splits=["test"]).dataset)


def test_the_index_describes_every_file(data, tmp_path):
    pack(data, tmp_path / "store", AUDIO, jobs=1)
    header, lines = read_index(tmp_path / "store")
    assert header["files"] == 16 and header["layout"] == "DCASE 2020" and not header["synthetic"]
    for line in lines:
        path = data / line["file"]
        assert line["size"] == path.stat().st_size and line["mtime_ns"] == path.stat().st_mtime_ns
        assert line["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert line["label"] == (0 if line["machine_id"] == "00" else 2) and line["machine_type"] == "fan"
    by_name = {line["file"].split("/")[-1]: line for line in lines}
    long = by_name["normal_id_02_00000004.flac"]
    assert (long["frames"], long["length"], long["remarks"]) == (24_000, 16_000, ["cropped to 1 s"])
    rows = np.fromfile(tmp_path / "store" / "train.int16", "<i2")
    row = rows[long["offset"] : long["offset"] + 16_000]
    np.testing.assert_array_equal(row, noise(50, 1.5)[:16_000, 0])
    assert long["content"] == hashlib.sha256(row).hexdigest()
    assert long["level"] == pytest.approx(20 * np.log10(np.std(row / 32768.0)), abs=0.01)
    bad = by_name["normal_id_02_00000007.wav"]
    assert "not a readable sound file" in bad["problem"] and bad["offset"] is None and bad["rate"] is None


def test_clipped_samples_are_counted(tmp_path):
    loud = noise(0)
    loud[:3], loud[3:5], loud[5:7] = 32767, -32768, 32766
    write_sound(tmp_path / "data/fan/train/normal_id_00_00000000.wav", loud)
    pack(tmp_path / "data", tmp_path / "store", AUDIO, jobs=1)
    assert read_index(tmp_path / "store")[1][0]["clipped"] == 5


def test_changes_are_followed_and_nothing_else_is_decoded(data, tmp_path):
    store, train_folder = tmp_path / "store", data / "fan/train"
    pack(data, store, AUDIO, jobs=1)
    before = state(store)
    assert "0 decoded, 16 kept" in pack(data, store, AUDIO, jobs=1)
    assert state(store) == before
    old = open_data(store, AUDIO)  # opened before the change, it still reads what it opened
    expected = old.train.read(range(11))
    write_sound(train_folder / "normal_id_00_00000000.wav", noise(70))
    write_sound(train_folder / "normal_id_00_00000009.wav", noise(71))
    write_sound(train_folder / "normal_id_02_00000007.wav", noise(72))
    (train_folder / "normal_id_02_00000001.wav").unlink()
    (data / "fan/test/anomaly_id_00_00000000.wav").rename(data / "fan/test/anomaly_id_00_00000001.wav")
    text = pack(data, store, AUDIO, jobs=1)
    assert "4 decoded, 12 kept, 2 removed" in text
    same(data, store)
    assert np.array_equal(old.train.read(range(11)), expected)
    size = (store / "train.int16").stat().st_size
    write_sound(train_folder / "normal_id_00_00000008.wav", noise(73))  # takes a place that is free by now
    assert "1 decoded" in pack(data, store, AUDIO, jobs=1)
    same(data, store)
    assert (store / "train.int16").stat().st_size == size


def test_truth_that_comes_later_needs_no_decoding(data, tmp_path):
    pack(data, tmp_path / "store", AUDIO, jobs=1)
    (data / "eval_data_list.csv").write_text("fan\nid_02_00000000.wav,anomaly_id_02_00000000.wav,1\n")
    assert "0 decoded" in pack(data, tmp_path / "store", AUDIO, jobs=1)
    same(data, tmp_path / "store")
    clips = open_data(tmp_path / "store", AUDIO).test.clips
    assert [clip.anomaly for clip in clips if clip.machine_id == "02"] == [1]


def test_verify_finds_what_size_and_time_hide(data, tmp_path):
    store, path = tmp_path / "store", data / "fan/train/normal_id_00_00000001.wav"
    pack(data, store, AUDIO, jobs=1)
    assert pack(data, store, AUDIO, verify=True, jobs=1).endswith("0 decoded, 16 kept, 0 removed")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write_sound(path, noise(80))
    os.utime(path, ns=times)
    with open(store / "test.int16", "r+b") as file:  # a row damaged on the disk
        file.seek(40_000)
        file.write(b"\x55")
    assert "0 decoded" in pack(data, store, AUDIO, jobs=1), "unseen without --verify"
    text = pack(data, store, AUDIO, verify=True, jobs=1).splitlines()
    assert text[0] == "fan/test/id_02_00000000.wav: damaged in test.int16; packed again"
    assert text[1].startswith("fan/train/normal_id_00_00000001.wav: other content, though")
    assert "2 decoded, 14 kept" in text[-1]
    same(data, store)


def test_several_processes_give_the_same(data, tmp_path):
    pack(data, tmp_path / "store", AUDIO, jobs=2)
    same(data, tmp_path / "store")


def alive(group):
    """Processes of a group that have not ended."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(process_group) == group and state not in "ZX":
            found.append(int(status.parent.name))
    return found


def test_kill_9_while_packing(data, tmp_path):
    for k in range(400):  # so that there is a middle
        os.link(
            data / "fan/train/normal_id_00_00000000.wav", data / f"fan/train/normal_id_00_{k + 100:08d}.wav"
        )
    store = tmp_path / "store"
    command = [*COMMAND, "pack", data, store, "--jobs", "2", "--seconds", "1"]
    process = subprocess.Popen(command, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    journal, noted = store / "journal.jsonl", 0
    while process.poll() is None and noted < 60:
        noted = journal.read_bytes().count(b"\n") if journal.is_file() else 0
        time.sleep(0.002)
    process.kill()  # the parent alone: its processes must follow
    process.wait()
    assert not (store / "index.jsonl").exists(), "it was too fast for this test"
    with pytest.raises(UserError, match="store: its packing was not finished; run the same `pack` again"):
        open_data(store, AUDIO)
    deadline = time.monotonic() + 20
    while (left := alive(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert not left
    with open(journal, "a") as file:  # the last line may be half there
        file.write('{"file": "fan/tr')
    (store / ".index.jsonl.abc.part").write_text("half an index")
    text = pack(data, store, AUDIO, jobs=1)
    decoded = int(text.rpartition("files: ")[2].split()[0])
    assert 0 < decoded <= 416 - noted + 1
    same(data, store)
    assert sorted(state(store)) == ["index.jsonl", "test.int16", "train.int16"]


def test_what_a_stopped_machine_lost_is_packed_again(data, tmp_path):
    store = tmp_path / "store"
    pack(data, store, AUDIO, jobs=1)
    expected = state(store)
    header, *lines = (store / "index.jsonl").read_text().splitlines(keepends=True)
    (store / "journal.jsonl").write_text(header + "".join(lines[:9]))
    (store / "index.jsonl").unlink()
    lost = json.loads(lines[7])
    with open(store / "train.int16", "r+b") as file:  # noted, but its pages never reached the disk
        file.seek(lost["offset"] * 2)
        file.write(bytes(lost["length"] * 2))
    assert "8 decoded, 8 kept" in pack(data, store, AUDIO, jobs=1)
    same(data, store)
    assert state(store).keys() == expected.keys()


def test_an_update_cut_short_leaves_the_store_as_it_was(data, tmp_path, monkeypatch):
    store = tmp_path / "store"
    pack(data, store, AUDIO, jobs=1)
    before = open_data(store, AUDIO).train.read(range(11))
    for k in range(3):
        write_sound(data / f"fan/train/normal_id_00_0000000{k}.wav", noise(90 + k))

    def interrupted(task, **options):
        if task[1].endswith("00_00000002.wav"):
            raise KeyboardInterrupt
        return decode_into(task, **options)

    from osscl_min.data import pack as module

    decode_into = module._decode_into
    monkeypatch.setattr(module, "_decode_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(data, store, AUDIO, jobs=1)
    assert np.array_equal(open_data(store, AUDIO).train.read(range(11)), before)
    with open(store / "journal.jsonl", "a") as file:  # the last line may be half there
        file.write('{"file": "fan/tr')
    write_sound(data / "fan/train/normal_id_00_00000000.wav", noise(99))
    with pytest.raises(KeyboardInterrupt):
        pack(data, store, AUDIO, jobs=1)
    monkeypatch.undo()
    assert "1 decoded, 15 kept" in pack(data, store, AUDIO, jobs=1)
    same(data, store)


def test_one_packing_at_a_time(data, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "store").mkdir()
    descriptor = os.open(tmp_path / "store", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another `pack` is at work"):
        pack(data, tmp_path / "store", AUDIO, jobs=1)
    os.close(descriptor)
    pack(data, tmp_path / "store", AUDIO, jobs=1)


def test_a_write_error_is_one_line_and_the_next_call_goes_on(data, tmp_path):
    limit = ["bash", "-c", 'ulimit -f 128; exec "$@"', "limit"]
    command = [*limit, *COMMAND, "pack", data, tmp_path / "store", "--seconds", "1", "--jobs", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"osscl: cannot write {tmp_path / 'store'}: File too large; run the same")
    assert "kept, 0 removed" in (text := pack(data, tmp_path / "store", AUDIO, jobs=1))
    assert " 0 kept" not in text
    same(data, tmp_path / "store")


def test_a_full_disk_is_told_before(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 100_000))
    with pytest.raises(UserError, match="0.0005.* GB needed, 0.0001 GB free; make room") as caught:
        pack(data, tmp_path / "store", AUDIO, jobs=1)
    assert caught.value.exit_status == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: os.truncate(s / "train.int16", 90_000), "train.int16 is damaged: 90000 bytes, not 352000"),
        (lambda s: (s / "test.int16").unlink(), "test.int16 is damaged: 0 bytes, not 96000"),
        (lambda s: os.truncate(s / "index.jsonl", 3000), "index.jsonl is damaged"),
        (lambda s: (s / "index.jsonl").write_text("{}\n"), "index.jsonl is damaged"),
        (lambda s: (s / "index.jsonl").write_bytes(b"\xff\x00\n"), "index.jsonl is damaged"),
        (
            lambda s: (s / "index.jsonl").write_text(
                "".join((s / "index.jsonl").read_text().splitlines(keepends=True)[:-1])
            ),
            "index.jsonl is damaged",
        ),
    ],
)
def test_a_damaged_store_is_one_line_and_repaired_by_packing(damage, message, data, tmp_path):
    store = tmp_path / "store"
    pack(data, store, AUDIO, jobs=1)
    damage(store)
    with pytest.raises(UserError, match=message) as caught:
        open_data(store, AUDIO)
    assert "run the same `pack` again" in str(caught.value) and "\n" not in str(caught.value)
    pack(data, store, AUDIO, jobs=1)
    same(data, store)


def test_a_store_of_something_else_is_refused(data, tmp_path):
    store = tmp_path / "store"
    pack(data, store, AUDIO, jobs=1)
    before = state(store)
    message = (
        f"store holds clips of 1 s at 16000 Hz, the mean of all channels; make another store: "
        f"python -m osscl_min pack {data} OTHER --sample-rate 16000 --seconds 2$"
    )
    with pytest.raises(UserError, match=message):
        open_data(store, AudioConfig(seconds=2.0))
    with pytest.raises(UserError, match="OTHER --sample-rate 16000 --seconds 1 --channel 1$"):
        open_data(store, AUDIO, channel=1)
    with pytest.raises(UserError, match="store holds clips of 1 s .*, not clips of 2 s at 16000"):
        pack(data, store, AudioConfig(seconds=2.0))
    with pytest.raises(UserError, match="not clips of 1 s at 16000 Hz, channel 1; choose another folder"):
        pack(data, store, AUDIO, channel=1)
    with pytest.raises(UserError, match="is a packed store itself"):
        pack(store, tmp_path / "again", AUDIO)
    with pytest.raises(UserError, match="lies in the data folder"):
        pack(data, data / "store", AUDIO)
    with pytest.raises(UserError, match="is not empty and no packed store"):
        pack(data, tmp_path, AUDIO)
    write_sound(tmp_path / "other/pump/train/normal_id_00_00000000.wav", noise(1))
    with pytest.raises(UserError, match="store is the store of other data; choose another folder"):
        pack(tmp_path / "other", store, AUDIO)
    assert state(store) == before


def test_other_rates_and_layouts_are_kept(tmp_path):
    """MIMII with eight channels, at half the rate; a manifest with a file of its own place."""
    for k in range(3):
        for state_, seed in (("normal", 0), ("abnormal", 50)):
            path = tmp_path / f"mimii/6_dB_fan/fan/id_00/{state_}/{k:08d}.wav"
            write_sound(path, noise(seed + k, 2.0, 8))
    half = AudioConfig(sample_rate=8_000, seconds=1.0, f_max=4_000.0)
    pack(tmp_path / "mimii", tmp_path / "store", half, jobs=1)
    same(tmp_path / "mimii", tmp_path / "store", half)
    opened = open_data(tmp_path / "store", half)
    assert (opened.dataset.layout, opened.dataset.channel) == ("MIMII", 0)
    assert opened.train.clips[0].domain == "6_dB" and opened.train.read([0]).shape == (1, 8_000)
    assert opened.dataset.remarks["with several channels, channel 0 taken"] == 6
    write_sound(tmp_path / "elsewhere/a.wav", noise(1))
    write_sound(tmp_path / "list/b.wav", noise(2))
    (tmp_path / "list/manifest.csv").write_text(
        "path,machine_type,machine_id,split,anomaly\n"
        f"{tmp_path / 'elsewhere/a.wav'},saw,1,train,0\nb.wav,saw,2,test,\n../elsewhere/a.wav,saw,3,test,1\n"
    )
    pack(tmp_path / "list", tmp_path / "store2", AUDIO, jobs=1)
    same(tmp_path / "list", tmp_path / "store2")


TINY = tiny({"epochs": 2, "batch_size": 5}, evaluate=EvaluateConfig(batch_size=32, bootstrap=0))


def equal_runs(data, store, out, config):
    """Train and evaluate from a folder and from its store, and compare everything but times."""
    runs = []
    for name, source in (("folder", data), ("store", store)):
        best = train(source, out / name, config, device="cpu")
        summary = evaluate(best, source, out / name / "evaluation", config=config.evaluate, device="cpu")
        settings = json.loads((out / name / "config.json").read_text())
        for entry in (settings, summary, *(log := read_log(out / name))):
            for key in ("seconds", "clips_per_second", "ms_per_clip", "peak_memory_mb", "provenance"):
                entry.pop(key, None)
        scores = (out / name / "evaluation" / "scores.csv").read_text()
        runs.append({"log": log, "settings": settings, "scores": scores, "summary": summary})
    assert runs[0] == runs[1]
    assert runs[0]["scores"].count("\n") > 5
    return train(data, out / "store", config, device="cpu")  # either may go on with the other's run


def test_training_from_a_store_equals_training_from_its_folder(tmp_path):
    config = SynthConfig(seconds=1.0, ids_per_type=1, train_clips=3, test_normal=1, test_anomaly=1)
    data = write_dataset(tmp_path / "data", config)
    pack(data, tmp_path / "store", AUDIO, jobs=1)
    equal_runs(data, tmp_path / "store", tmp_path / "runs", TINY)
    assert json.loads((tmp_path / "runs" / "store" / "config.json").read_text())["data"]["synthetic"]


def test_real_clips(real_data, tmp_path):
    """All of them read alike; training, for a moment, on two machines' first second."""
    data = real_data / "mimii_mini"
    text = pack(data, tmp_path / "all", AudioConfig(), jobs=2)
    assert "224 training and 256 test clips of 10 s at 16000 Hz, 154 MB; files: 480 decoded" in text
    same(data, tmp_path / "all", AudioConfig())
    for machine_type in ("valve", "slider"):
        for split, most in (("train", 5), ("test", 4)):
            for path in sorted((data / machine_type / split).glob("*_id_00_*"))[-most:]:
                copy = tmp_path / "few" / machine_type / split / path.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.symlink_to(path)
    pack(tmp_path / "few", tmp_path / "few-store", AUDIO, jobs=1)
    few = replace(TINY, train=replace(TINY.train, epochs=1))
    equal_runs(tmp_path / "few", tmp_path / "few-store", tmp_path / "runs", few)
