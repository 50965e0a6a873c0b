"""From a folder to clips: names, labels, truth, decoding, and everything that can be wrong with a file."""

import csv
import re
from collections import Counter

import numpy as np
import pytest
import scipy.signal
from conftest import write_sound

from osscl_min.config import AudioConfig
from osscl_min.data.clips import BENCHMARK, decode, duration, label_table, read_truth, scan
from osscl_min.data.reader import FolderReader
from osscl_min.runtime.files import UserError

AUDIO = AudioConfig(seconds=2.0)


def tone(seconds=2.0, rate=16_000, frequency=440.0, amplitude=0.3):
    """A sine at `frequency` Hz, float64."""
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def write(path, samples=None, rate=16_000, **options):
    return write_sound(path, tone() if samples is None else samples, rate, **options)


@pytest.fixture
def data(tmp_path):
    """Two machines of one type, two training clips each, and three test clips."""
    for number in ("00", "02"):
        for clip in range(2):
            write(tmp_path / f"fan/train/normal_id_{number}_{clip:08d}.wav")
    for name in ("normal_id_00_00000000", "anomaly_id_00_00000000", "id_01_00000000"):
        write(tmp_path / f"fan/test/{name}.wav")
    return tmp_path


def problems(data, split="train"):
    """What reading the clips of a split finds to be unusable: file name -> reason."""
    dataset = scan(data)
    reader = FolderReader(dataset, dataset.split(split), AUDIO)
    assert [clip.path.name for clip in reader.clips] == [clip.path.name for clip in dataset.split(split)]
    return {name.split("/")[-1]: reason for name, reason in dataset.problems.items()}, dataset, reader


def test_benchmark_has_the_41_labels_in_the_authors_order():
    assert len(BENCHMARK) == 41
    position = {machine: label for label, machine in enumerate(BENCHMARK)}
    assert [position["fan", "00"], position["pump", "00"], position["slider", "06"]] == [0, 7, 20]
    assert [position["ToyCar", "01"], position["ToyCar", "07"]] == [21, 27]
    assert [position["ToyConveyor", "01"], position["ToyConveyor", "06"]] == [28, 33]
    assert [position["valve", "00"], position["valve", "06"]] == [34, 40]


def test_names_tell_type_id_split_and_truth(data):
    clips = {f"{clip.split}/{clip.path.name}": clip for clip in scan(data).clips}
    assert len(clips) == 7
    assert clips["train/normal_id_02_00000001.wav"].machine == ("fan", "02")
    assert clips["train/normal_id_02_00000001.wav"].anomaly == 0
    assert clips["test/normal_id_00_00000000.wav"].anomaly == 0
    assert clips["test/anomaly_id_00_00000000.wav"].anomaly == 1
    unlabelled = clips["test/id_01_00000000.wav"]
    assert (unlabelled.anomaly, unlabelled.subset, unlabelled.machine_id) == (None, "evaluation", "01")


def test_only_type_folder_and_file_name_count(data):
    odd = data / "valve_id_06_anomaly"
    for folder in list(data.iterdir()):
        odd.mkdir(exist_ok=True)
        folder.rename(odd / folder.name)
    assert {clip.machine for clip in scan(odd).clips} == {("fan", "00"), ("fan", "01"), ("fan", "02")}


def test_truth_is_read_beside_the_data_without_renaming(data):
    (data / "eval_data_list.csv").write_text(
        "fan\nid_01_00000000.wav,anomaly_id_01_00000097.wav,1\npump\nid_01_00000000.wav,normal_id_01_00000003.wav,0\n"
    )
    clip = next(clip for clip in scan(data).clips if clip.path.name == "id_01_00000000.wav")
    assert (clip.anomaly, clip.subset) == (1, "evaluation")


def test_truth_of_another_form_names_the_line(tmp_path):
    file = tmp_path / "eval_data_list.csv"
    file.write_text("fan\nid_01_00000000.wav,normal_id_01_00000003.wav,0\nid_01_00000001.wav,maybe\n")
    with pytest.raises(UserError, match="line 3.*maybe"):
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


def test_real_clips(real_data):
    dataset = scan(real_data / "mimii_mini")
    assert (len(dataset.split("train")), len(dataset.split("test")), dataset.problems) == (224, 256, {})
    table = label_table(dataset.split("train"))
    assert table == BENCHMARK and table.index(("valve", "06")) == 40


def test_label_table_of_other_machines_is_their_own(data):
    write(data / "grinder/train/normal_id_07_00000000.wav")
    clips = scan(data).split("train")
    assert label_table(clips) == (("fan", "00"), ("fan", "02"), ("grinder", "07"))
    with pytest.raises(UserError, match="at least two machines.*grinder 07"):
        label_table([clip for clip in clips if clip.machine_type == "grinder"])
    with pytest.raises(UserError, match="there is none"):
        label_table([])


def test_missing_empty_and_incomplete_folders(tmp_path):
    with pytest.raises(UserError, match="no such data folder.*nowhere"):
        scan(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no usable clips; expected TYPE/train"):
        scan(tmp_path)
    write(tmp_path / "fan/test/normal_id_00_00000000.wav")
    with pytest.raises(UserError, match="fan: no train/ folder"):
        scan(tmp_path)


def test_names_that_cannot_be_clips_are_listed_with_the_reason(data):
    write(data / "fan/train/fan_without_id.wav")
    write(data / "fan/train/anomaly_id_00_00000009.wav")
    (data / "fan/train/notes.txt").write_text("louder than usual")
    (data / "fan/train/.hidden.wav").write_text("")
    found, _, _ = problems(data)
    assert "no machine id" in found.pop("fan_without_id.wav")
    assert "anomalous clip in train" in found.pop("anomaly_id_00_00000009.wav")
    assert found == {"notes.txt": "not a .wav or .flac file"}


@pytest.fixture(
    params=[
        ("text", "not a readable sound file"),
        ("truncated wav", r"truncated: \d+ of 64000 bytes"),
        ("truncated flac", "not a readable sound file|truncated"),
        ("zero bytes", "not a readable sound file"),
        ("zero samples", "empty"),
        ("silent", "silent"),
        ("constant", "silent"),
        ("nan", "NaN"),
        ("infinite", "NaN or infinite"),
        ("short", r"shorter than one second \(0.50 s\)"),
    ],
    ids=lambda case: case[0],
)
def broken(request, data):
    """A data folder with one unusable file, its name, and what its reason must say."""
    kind, reason = request.param
    path = data / f"fan/train/normal_id_02_00000099.{'flac' if 'flac' in kind else 'wav'}"
    noise = np.random.default_rng(0).standard_normal(32_000) * 0.1
    match kind:
        case "text":
            path.write_text("This is no sound.\n" * 100)
        case "truncated wav" | "truncated flac":
            write(path, noise)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 1])
        case "zero bytes":
            path.touch()
        case "zero samples":
            write(path, np.zeros(0))
        case "silent":
            write(path, np.zeros(32_000))
        case "constant":
            write(path, np.full(32_000, 0.25))
        case "nan" | "infinite":
            noise[1234] = np.nan if kind == "nan" else np.inf
            write(path, noise, subtype="FLOAT")
        case "short":
            write(path, noise[:8_000])
    return data, path.name, reason


def test_unusable_files_are_left_out_counted_and_named_once(broken):
    data, name, reason = broken
    found, dataset, reader = problems(data)
    assert list(found) == [name]
    assert len(reader) == 4
    report = dataset.report()
    assert "1 file not used" in report and report.count(name) == 1
    assert re.search(reason, found[name])
    with pytest.raises(UserError, match="strict"):
        dataset.report(strict=True)


def test_long_lists_of_problems_are_cut_but_counted(data):
    for number in range(15):
        (data / f"fan/train/normal_id_02_000001{number:02d}.wav").write_text("no sound")
    _, dataset, _ = problems(data)
    lines = dataset.report().splitlines()
    assert lines[0] == "15 files not used:" and lines[-1].strip() == "... and 5 more" and len(lines) == 12


def test_int16_is_read_exactly(tmp_path):
    samples = np.random.default_rng(1).integers(-32768, 32768, 32_000).astype(np.int16)
    for suffix in ("wav", "flac"):
        decoded, remarks = decode(write(tmp_path / f"a.{suffix}", samples), AUDIO)
        np.testing.assert_array_equal(decoded, samples)
        assert decoded.dtype == np.int16 and remarks == []


def test_float_is_rounded_to_the_same_int16(tmp_path):
    samples = np.random.default_rng(1).integers(-32768, 32768, 32_000).astype(np.int16)
    path = write(tmp_path / "a.wav", samples / 32768, subtype="FLOAT")
    np.testing.assert_array_equal(decode(path, AUDIO)[0], samples)
    decoded, remarks = decode(write(tmp_path / "b.wav", samples / 20000, subtype="FLOAT"), AUDIO)
    assert remarks == ["clipped to 16 bits"]
    np.testing.assert_array_equal(decoded, np.rint(samples / 20000 * 32768).clip(-32768, 32767))


def test_stereo_is_averaged_or_a_channel_taken_and_it_is_said(tmp_path):
    left, right = tone(frequency=440), tone(frequency=1000)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1))
    mean, remarks = decode(path, AUDIO)
    assert remarks == ["with several channels, averaged"]
    np.testing.assert_allclose(mean, (left + right) / 2 * 32768, atol=1.51)
    second, remarks = decode(path, AUDIO, channel=1)
    assert remarks == ["with several channels, channel 1 taken"]
    np.testing.assert_allclose(second, right * 32768, atol=1.01)
    with pytest.raises(UserError, match="no channel 2, only 0 to 1"):
        decode(path, AUDIO, channel=2)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_other_rates_are_resampled_and_it_is_said(tmp_path, rate):
    decoded, remarks = decode(write(tmp_path / "a.wav", tone(rate=rate), rate), AUDIO)
    assert remarks == [f"resampled from {rate} Hz to 16000 Hz"] and len(decoded) == 32_000
    middle = slice(2_000, -2_000)  # the filter's ends
    expected = tone() * 32768
    assert np.abs(decoded - expected)[middle].max() < 0.005 * 32768
    frequencies, power = scipy.signal.periodogram(decoded, 16_000)
    assert frequencies[power.argmax()] == pytest.approx(440, abs=1)


def test_longer_is_cropped_and_shorter_repeated_and_it_is_said(tmp_path):
    long = np.random.default_rng(2).integers(-999, 999, 40_000).astype(np.int16)
    decoded, remarks = decode(write(tmp_path / "a.wav", long), AUDIO)
    assert remarks == ["cropped to 2 s"]
    np.testing.assert_array_equal(decoded, long[:32_000])
    decoded, remarks = decode(write(tmp_path / "b.wav", long[:20_000]), AUDIO)
    assert remarks == ["repeated to 2 s"]
    np.testing.assert_array_equal(decoded, np.concatenate([long[:20_000], long[:12_000]]))


@pytest.mark.parametrize(("rate", "suffix"), [(16_000, "wav"), (16_000, "flac"), (44_100, "wav")])
def test_a_clip_within_a_recording_is_as_a_file_of_its_own(tmp_path, rate, suffix):
    long = np.random.default_rng(3).integers(-999, 999, 5 * rate).astype(np.int16)
    path = write(tmp_path / f"a.{suffix}", long, rate)
    assert duration(path) == 5
    for start in (0, 1.5, 3):
        first = round(start * rate)
        cut = write(tmp_path / f"b.{suffix}", long[first : first + 2 * rate], rate)
        np.testing.assert_array_equal(decode(path, AUDIO, start=start)[0], decode(cut, AUDIO)[0])
    with pytest.raises(UserError, match="empty"):
        decode(path, AUDIO, start=6)


def test_what_was_done_is_counted(data):
    write(data / "fan/train/normal_id_02_00000097.wav", tone(3))
    write(data / "fan/train/normal_id_02_00000098.wav", np.stack([tone(), tone()], 1))
    write(data / "fan/train/normal_id_02_00000099.wav", np.stack([tone(), tone()], 1))
    _, dataset, _ = problems(data)
    assert dataset.report().splitlines() == [
        "1 file cropped to 2 s",
        "2 files with several channels, averaged",
    ]


@pytest.mark.parametrize("keep", [2 << 30, 0], ids=["kept", "decoded anew"])
def test_reader_gives_the_rows_asked_for(data, keep):
    rng = np.random.default_rng(3)
    written = {}
    for path in sorted(data.glob("fan/train/*.wav")):
        written[path.name] = rng.integers(-9999, 9999, 32_000).astype(np.int16)
        write(path, written[path.name])
    (data / "fan/train/normal_id_00_00000000.wav").write_text("broken")
    dataset = scan(data)
    reader = FolderReader(dataset, dataset.split("train"), AUDIO, keep)
    assert (reader.samples is None) == (keep == 0) and len(reader) == 3
    batch = np.zeros((3, 32_000), np.int16)
    assert reader.read([2, 0, 2], out=batch) is batch
    for row, position in zip(batch, [2, 0, 2], strict=True):
        np.testing.assert_array_equal(row, written[reader.clips[position].path.name])
    assert reader.read([]).shape == (0, 32_000)
