"""From a folder to clips: names, labels, truth, and everything that can be wrong with a folder."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import noise, refused, write_sound

from osscl_min.config import AudioConfig
from osscl_min.data.audio import decode
from osscl_min.data.clips import BENCHMARK, Clip, label_table, scan
from osscl_min.data.layouts import read_truth
from osscl_min.data.reader import FolderReader, open_data
from osscl_min.runtime.files import UserError

AUDIO = AudioConfig(seconds=2.0)


@pytest.fixture
def data(tmp_path):
    """Two machines of one type, two training clips each, and three test clips."""
    train = [f"train/normal_id_{machine}_{k:08d}" for machine in ("00", "02") for k in range(2)]
    test = ["test/normal_id_00_00000000", "test/anomaly_id_00_00000000", "test/id_01_00000000"]
    for seed, name in enumerate(train + test):
        write_sound(tmp_path / f"fan/{name}.wav", noise(seed, 2.0))
    return tmp_path


def test_benchmark_has_the_41_labels_in_the_authors_order():
    counts = {"fan": 7, "pump": 7, "slider": 7, "ToyCar": 7, "ToyConveyor": 6, "valve": 7}
    first = {"ToyCar": 1, "ToyConveyor": 1}
    expected = [(name, f"0{first.get(name, 0) + k}") for name, count in counts.items() for k in range(count)]
    assert BENCHMARK == tuple(expected)


TRUTH = "fan\nid_01_00000000.wav,anomaly_id_01_00000097.wav,1\n"


@pytest.mark.parametrize(
    ("text", "report"),
    [
        *((start + TRUTH, []) for start in ("", "\ufeff", "\n")),
        ("pump,,\nid_07_00000000.wav,x.wav,0\n" + TRUTH, ["1 row of truth without a test clip"]),
        (
            TRUTH.replace("id_01", "id_09").replace("fan\n", "fan\n" * 2),
            ["1 clip in test without a known truth", "1 row of truth without a test clip"],
        ),
    ],
)
def test_truth_is_read_beside_the_data_without_renaming(text, report, data):
    (data / "eval_data_list.csv").write_text(text, encoding="utf-8")
    dataset = scan(data)
    clip = next(clip for clip in dataset.clips if clip.path.name == "id_01_00000000.wav")
    assert (clip.anomaly, clip.subset) == (1 if "id_01" in text else None, "evaluation")
    assert dataset.report().splitlines() == report


@pytest.mark.parametrize("rest", [",maybe", ",x.wav,0,3", ",x.wav,2", ""])
def test_truth_of_another_form_names_the_line(rest, tmp_path):
    file = tmp_path / "eval_data_list.csv"
    file.write_text(f"fan\nid_01_00000000.wav,normal_id_01_00000003.wav,0\nid_01_00000001.wav{rest}\n")
    with refused(f"line 3: .*id_01_00000001.wav{rest}'"):
        read_truth(file)
    file.write_bytes("fän\n".encode("utf-16"))
    with refused("not in UTF-8"):
        read_truth(file)


def test_published_truth_file(real_data):
    file = real_data / "dcase2020_eval_labels" / "eval_data_list.csv"
    truth = read_truth(file)
    assert len(truth) == 7103
    # the original name, which the reader does not use, says the same
    machine_type = None
    for row in csv.reader(file.open(newline="")):
        if len(row) == 1:
            machine_type = row[0]
        else:
            assert truth[machine_type, row[0].removesuffix(".wav")] == row[1].startswith("anomaly"), row
    machines = Counter((kind, stem.split("_")[1]) for kind, stem in truth)
    assert len(machines) == 18 and set(machines) <= set(BENCHMARK)
    assert machines["ToyCar", "05"] == 515


def machines(*names, pattern="data/{}/train/normal_id_{}_00000000.wav"):
    """A training clip of every "TYPE ID"."""
    pairs = [name.split() for name in names]
    return [Clip(Path(pattern.format(*pair)), *pair, "train", 0) for pair in pairs]


FANS = ("fan 00", "fan 02", "fan 04", "fan 06")


@pytest.mark.parametrize(
    ("clips", "classes"),
    [
        (machines("fan 00", "fan 02"), 2),
        (machines("fan A", "fan B"), 2),
        (machines(*FANS), 41),
        (machines(*FANS, "fan 01", "ToyConveyor 01", "ToyConveyor 02", "ToyConveyor 03"), 41),
        (machines(*FANS, "pump 00"), 5),
        (machines(*FANS, "grinder 00"), 5),
        (machines(*FANS, "fan 08"), 5),
        (machines(*FANS, pattern="data/{}/{}/monday.wav"), 4),
        (machines(*(" ".join(machine) for machine in BENCHMARK)), 41),
    ],
)
def test_only_the_benchmark_has_its_41_classes(clips, classes):
    table = label_table(clips)
    assert len(table) == classes and (table == BENCHMARK) == (classes == 41)
    assert set(table) >= {clip.machine for clip in clips}
    inside = {clip.machine for clip in clips} <= set(BENCHMARK)
    assert (label_table(clips, benchmark=True) == BENCHMARK) == inside
    assert len(label_table(clips, benchmark=False)) == len({clip.machine for clip in clips})


def test_label_table_of_other_machines_is_their_own():
    clips = machines("grinder 07", "fan 00", "fan 02")
    assert label_table(clips) == (("fan", "00"), ("fan", "02"), ("grinder", "07"))
    with refused("at least two machines.*grinder 07"):
        label_table(clips[:1])
    with refused("there is none"):
        label_table([])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no usable clips; expected TYPE/train/.* or TYPE/ID/any_name.wav"),
        (["fan/training/normal_id_00_00000000.wav"], "the layout DCASE 2020: TYPE/train/normal_id_00"),
        (["fan/00/section_00_source_train_normal_0000.wav"], "the layout DCASE 2021-2025: TYPE/train"),
        (["fan/a.wav", "fan/b.wav"], "none of 2 files can be used .fan/a.wav: .* plain: TYPE/ID/any_name"),
        (["a.wav"], "a.wav: does not fit the layout plain: TYPE/ID/any_name.wav"),
        (
            ["fan/00/a.mp3", "fan/00/b.mp3", "fan/00/c.ogg"],
            "3 files such as fan/00/a.mp3, but no .wav.*ffmpeg",
        ),
    ],
)
def test_a_folder_without_clips_names_the_layout_that_nearly_fits(names, message, tmp_path):
    for name in names:
        write_sound(tmp_path / name, noise(0), format="WAV" if name.endswith("wav") else "OGG")
    with refused(message):
        scan(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "a\0b", "\udcff"])
def test_a_missing_folder_is_one_line(name, tmp_path):
    with refused("no such data folder"):
        open_data(tmp_path / name, AUDIO)


def test_what_was_done_is_counted_and_what_is_not_used_is_named(data):
    train = data / "fan/train"
    write_sound(train / "fan_without_id.wav", noise(0))
    write_sound(train / "anomaly_id_00_00000009.wav", noise(0))
    (train / "notes.txt").write_text("louder than usual")
    (train / ".hidden.wav").write_text("")
    for number, seconds, channels in ((96, 0.5, 1), (97, 3, 1), (98, 2, 2), (99, 2, 2)):
        write_sound(train / f"normal_id_02_000000{number}.wav", noise(number, seconds, channels=channels))
    opened = open_data(data, AUDIO, splits=["train"])
    dataset = opened.dataset
    assert opened.train.clips == dataset.split("train")
    reasons = {name.split("/")[-1]: reason for name, reason in dataset.problems.items()}
    assert "does not fit" in reasons.pop("fan_without_id.wav")
    assert "anomalous clip in train" in reasons.pop("anomaly_id_00_00000009.wav")
    assert reasons == {
        "notes.txt": "not a .wav or .flac file",
        "normal_id_02_00000096.wav": "shorter than one second (0.50 s)",
    }
    report = dataset.report().splitlines()
    assert report[:4] == [
        "train: 7 clips of 2 s from 7 recordings, 14 of 15 s used",
        "1 clip in test without a known truth",
        "2 files with several channels, averaged",
        "4 files not used:",
    ]
    assert len(report) == 8 and dataset.report(most=1).splitlines()[-1] == "  ... and 3 more"
    with pytest.raises(UserError, match="strict"):
        dataset.report(strict=True)


@pytest.mark.parametrize("keep", [2 << 30, 0], ids=["kept", "decoded anew"])
def test_reader_gives_the_rows_asked_for(data, keep):
    (data / "fan/train/normal_id_00_00000000.wav").write_text("broken")
    dataset = scan(data)
    reader = FolderReader(dataset, dataset.split("train"), AUDIO, keep)
    assert all(map(callable, reader.rows)) == (keep == 0) and len(reader) == 3
    for row, position in zip(reader.read([2, 0, 2]), [2, 0, 2], strict=True):
        np.testing.assert_array_equal(row, decode(reader.clips[position].path, AUDIO)[0])
    assert reader.read([]).shape == (0, 32_000)
