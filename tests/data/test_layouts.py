"""Every layout of a data set leads to the same clips."""

from pathlib import PurePosixPath

import numpy as np
import pytest
import soundfile
from conftest import noise, refused, write_sound

from osscl_min.config import AudioConfig
from osscl_min.data.clips import scan
from osscl_min.data.layouts import LAYOUTS, recognise
from osscl_min.data.reader import open_data
from osscl_min.runtime.files import UserError

AUDIO = AudioConfig(seconds=2.0)


def make(root, *names, channels=1):
    """Write 2 s of noise under every name."""
    for number, name in enumerate(names):
        write_sound(root / name, noise(number, 2.0, channels=channels))
    return root


def test_mimii(tmp_path):
    normal = [f"fan/id_00/normal/{number:08d}.wav" for number in range(5)]
    abnormal = [f"fan/id_00/abnormal/{number:08d}.wav" for number in range(2)]
    other = ["pump/id_02/normal/00000000.wav", "pump/id_02/normal/00000001.wav"]
    make(tmp_path, *(f"6_dB_fan/{name}" for name in normal + abnormal), channels=8)
    make(tmp_path, *(f"-6_dB_fan/{name}" for name in normal + abnormal))
    make(tmp_path, *(f"0_dB_pump/{name}" for name in other))
    dataset = scan(tmp_path)
    assert (dataset.layout, dataset.channel, dataset.problems) == ("MIMII", 0, {})
    clips = {dataset.name(c.path): (*c.machine, c.split, c.anomaly, c.domain) for c in dataset.clips}
    # as many normal clips as abnormal ones are tested, the same ones at either signal-to-noise ratio
    for ratio in ("6_dB", "-6_dB"):
        splits = [clips[f"{ratio}_fan/{name}"] for name in normal]
        assert splits == [("fan", "00", "test", 0, ratio)] * 2 + [("fan", "00", "train", 0, ratio)] * 3
        assert clips[f"{ratio}_fan/{abnormal[1]}"] == ("fan", "00", "test", 1, ratio)
    assert clips[f"0_dB_pump/{other[0]}"] == ("pump", "02", "train", 0, "0_dB")


def test_mimii_channel_zero_is_the_default_and_another_can_be_chosen(tmp_path):
    root = make(tmp_path, "fan/id_00/normal/00000000.wav", "fan/id_02/normal/00000000.wav", channels=8)
    eight = soundfile.read(root / "fan/id_00/normal/00000000.wav", dtype="int16")[0]
    data = open_data(root, AUDIO, splits=["train"])
    np.testing.assert_array_equal(data.train.read([0])[0], eight[:, 0])
    assert "2 files with several channels, channel 0 taken" in data.dataset.report()
    third = open_data(root, AUDIO, splits=["train"], channel=3)
    np.testing.assert_array_equal(third.train.read([0])[0], eight[:, 3])
    with pytest.raises(UserError, match="no channel 8"):
        open_data(root, AUDIO, splits=["train"], channel=8, strict=True)


MEANING = {  # layout -> file -> type, id, split, truth, domain, attributes
    "DCASE 2021-2025": {
        "fan/train/section_00_source_train_normal_0000.wav": "fan 00 train 0 source",
        "fan/train/section_00_target_train_normal_0000_strength_1.wav": "fan 00 train 0 target strength_1",
        "fan/source_test/section_01_source_test_anomaly_0007.wav": "fan 01 test 1 source",
        "fan/target_test/section_03_target_test_0007.wav": "fan 03 test None target",
        # 2022 to 2025
        "dev/raw/Toy/test/section_00_target_test_normal_0003_car_A2.wav": "Toy 00 test 0 target car_A2",
        "dev_fan/fan/train/section_02_source_train_normal_0989_.wav": "fan 02 train 0 source",
        "Pet/train/section_00_source_train_normal_0000_noAttribute.wav": "Pet 00 train 0 source noAttribute",
        "eval_data/Vacuum/test/section_00_test_0199.wav": "Vacuum 00 test None",
        "Vacuum/test/section_00_0199.wav": "Vacuum 00 test None",
    },
    "plain": {
        "grinder/line 1/monday 06h.wav": "grinder line 1 train 0",
        "grinder/line 2/a.flac": "grinder line 2 train 0",
        "press/P-7/x.wav": "press P-7 train 0",
        "test/grinder/line 1/normal/b.wav": "grinder line 1 test 0",
        "test/grinder/line 1/anomaly/b.wav": "grinder line 1 test 1",
        "test/grinder/line 1/anomaly/normal_c.wav": "grinder line 1 test 1",  # the folder decides
        "test/press/P-7/anomaly_3.wav": "press P-7 test 1",
        "test/press/P-7/unknown.wav": "press P-7 test None",
        "press/P-7/test/anomaly/x.wav": "press P-7 test 1",
    },
}


@pytest.mark.parametrize(("layout", "name"), [(kind, name) for kind in MEANING for name in MEANING[kind]])
def test_what_a_name_means(tmp_path, layout, name):
    dataset = scan(make(tmp_path, name))
    assert (dataset.layout, dataset.channel, dataset.problems) == (layout, None, {})
    (clip,) = dataset.clips
    labels = *clip.machine, clip.split, clip.anomaly, clip.domain, clip.attributes
    assert " ".join(map(str, labels)).rstrip() == MEANING[layout][name]
    waits = clip.anomaly is None and layout != "plain"
    assert clip.subset == ("evaluation" if waits else "development")


def test_dcase_2021_truth_and_files_beside_the_clips(tmp_path):
    make(
        tmp_path,
        "fan/train/section_00_source_train_normal_0000_.wav",
        "fan/source_test/section_03_source_test_0000.wav",
        "fan/source_test/section_03_source_test_0001.wav",
        "fan/supplemental/section_00_machine_0001_.wav",
    )
    (tmp_path / "fan/attributes_00.csv").write_text("file_name\n")
    truth = tmp_path / "ground_truth_data/ground_truth_fan_section_03_source_test.csv"
    truth.parent.mkdir()
    truth.write_text("section_03_source_test_0000.wav,1\nsection_03_source_test_0001.wav,0\n")
    dataset = scan(tmp_path)
    test = dataset.split("test")
    assert [clip.anomaly for clip in test] == [1, 0] and {clip.subset for clip in test} == {"evaluation"}
    assert list(dataset.problems) == ["fan/supplemental/section_00_machine_0001_.wav"]
    truth.write_text("section_03_source_test_0000.wav;1\n")
    with refused("section_03_source_test.csv, line 1"):
        scan(tmp_path)


HEADER = "path,machine_type,machine_id,split,anomaly\n"


def test_manifest(tmp_path):
    make(tmp_path, "a.wav", "deep/b.wav", "c.wav", "d.wav")
    outside = make(tmp_path / "elsewhere", "e.wav") / "e.wav"
    table = tmp_path / "table/machines.csv"
    table.parent.mkdir()
    table.write_text(
        f"\ufeff{HEADER.strip()},attributes\n"
        "../a.wav,fan,7,train,,loud\n../deep/b.wav,press,x,train,0,\n../c.wav,fan,7,test,1,\n"
        f"../d.wav,fan,7,test,,\n../missing.wav,fan,7,test,0,\n../deep/../a.wav,fan,7,train,1,\n{outside},fan,7,test,0,\n",
        encoding="utf-8",
    )
    data = open_data(table, AUDIO)
    assert data.dataset.layout == "manifest"
    labels = [f"{' '.join(clip.machine)} {clip.split} {clip.anomaly}" for clip in data.dataset.clips]
    assert labels == ["fan 7 train 0", "press x train 0", *(f"fan 7 test {truth}" for truth in (1, None, 0))]
    assert data.train.clips[0].attributes == "loud"
    assert sorted(data.dataset.problems.values())[1] == "no such file" and len(data.dataset.problems) == 2
    assert len(data.train) == 2 and len(data.test) == 3
    # the same inside a folder, under its usual name
    table.rename(tmp_path / "table/manifest.csv")
    assert len(scan(tmp_path / "table").clips) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,type,id,split\na.wav,fan,0,train\n", "no column machine_type, machine_id, anomaly"),
        ("", "no column path"),
        (HEADER + "a.wav,fan,0,validation,0\n", "split train or test.*, got a.wav,fan,0,validation,0"),
        (HEADER + "a.wav,fan,0,train,0\na.wav,fan,0,test,yes\n", "got a.wav,fan,0,test,yes"),
        (HEADER + "a.wav,fan,,train,0\n", "expected a path, machine_type, .*, got a.wav,fan,,train,0"),
        (HEADER + "a.wav,fan,0,train,0\na.wav,fan,0,test,0\n", "a.wav is named a second time"),
        (HEADER + "a.wav,fan,0,train,0,loud\n", "line 2: 6 cells, but the header has 5"),
        (HEADER + "a.wav,fan,0,train\n", "line 2: 4 cells, but the header has 5"),
        (HEADER, "no usable clips"),
    ],
)
def test_manifest_of_another_form_names_the_line(tmp_path, text, message):
    make(tmp_path, "a.wav")
    (tmp_path / "machines.csv").write_text(text)
    with refused(message):
        scan(tmp_path / "machines.csv")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_each_layout_explains_its_own_example(layout):
    for example in layout.expected.split(", or "):
        assert recognise([PurePosixPath(example)]) is layout
