"""Scoring files of one's own: the scores are evaluate's, and nothing is lost, guessed or kept in memory."""

import csv
import io
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import soundfile
import torch
from conftest import write_sound

from osscl_min import cli
from osscl_min.config import AudioConfig
from osscl_min.data.audio import window_starts
from osscl_min.inference.recordings import Scorer, expand
from osscl_min.inference.score import calibrate, score
from osscl_min.runtime.files import UserError


def run(tiny_run, files, **options):
    """The summary, and the rows of the JSON file by file name."""
    out = options.pop("out")
    scorer, summary = score(
        tiny_run / "best.pt", list(map(str, files)), json_path=out / "s.json", device="cpu", **options
    )
    rows = json.loads((out / "s.json").read_text())
    return scorer, summary, {Path(row["file"]).name: row for row in rows}


def clip(tiny_run, name="fan/test/normal_id_00_00000000.wav"):
    return tiny_run / "data" / name


def standard_input(names):
    """Names, one per line, as a process gets them."""
    return io.TextIOWrapper(io.BytesIO(b"\n".join(map(os.fsencode, names)) + b"\n"), "utf-8")


def samples(path):
    return soundfile.read(path, dtype="int16")[0]


def test_scores_are_those_of_evaluate(tiny_run, tmp_path):
    files = [path for kind in sorted((tiny_run / "data").glob("*/test")) for path in sorted(kind.iterdir())]
    summary = score(tiny_run / "best.pt", map(str, files), csv_path=tmp_path / "s.csv", device="cpu")[1]
    assert (summary.scored, summary.skipped) == (48, 0)
    with open(tmp_path / "s.csv", newline="") as file:
        rows = {tuple(Path(row["file"]).parts[-3::2]): row for row in csv.DictReader(file)}
    with open(tiny_run / "evaluation/scores.csv", newline="") as file:
        expected = list(csv.DictReader(file))
    assert len(rows) == len(expected) == 48
    for one in expected:
        row = rows[one["machine_type"], one["file"]]
        assert row["machine_id"] == one["machine_id"] and row["windows"] == "1" and row["problem"] == ""
        assert float(row["score"]) == float(one["score"])


def test_a_folder_gives_the_same_and_standard_input_too(tiny_run, tmp_path, monkeypatch):
    names = sorted(map(str, (tiny_run / "data/fan/test").iterdir()))
    rows = run(tiny_run, [tiny_run / "data/fan/test"], out=tmp_path)[2]
    assert list(rows) == [Path(name).name for name in names]
    monkeypatch.setattr("sys.stdin", standard_input([names[0], "", names[1]]))
    some = run(tiny_run, ["-", names[2]], out=tmp_path)[2]
    assert list(some) == [Path(name).name for name in names[:3]]
    for name, row in some.items():
        assert row["score"] == pytest.approx(rows[name]["score"], rel=1e-4)


def test_decision_threshold_and_p_value(tiny_run, trained, tmp_path):
    held_out = np.sort(trained.calibration["scores"].numpy())
    assert len(held_out) == 4
    _, summary, rows = run(tiny_run, [tiny_run / "data"], out=tmp_path, rate=0.4)
    for row in rows.values():
        assert row["threshold"] == held_out[2]
        assert row["calibration"] == "4 normal recordings of all machines"
        assert row["anomaly"] == int(row["score"] > held_out[2])
        assert row["p_value"] == row["window_p_value"] == (1 + sum(held_out >= row["score"])) / 5
    assert f"{held_out[2]:.4g} from 4 normal recordings of all machines" in summary.text(Scorer(trained))
    _, summary, rows = run(tiny_run, [clip(tiny_run)], out=tmp_path, rate=0.05)
    row = rows[clip(tiny_run).name]
    assert row["threshold"] is row["anomaly"] is None and row["p_value"] >= 0.2
    assert "no decision from 4 normal recordings of all machines; 5 % false alarms need 15 more" in (
        summary.text(Scorer(trained))
    )


def test_a_long_recording_is_compared_with_recordings_as_long(tiny_run, tmp_path):
    """Five of three windows: one decides about three windows, and three of one window are corrected for."""
    parts = [samples(path) for path in sorted((tiny_run / "data/fan/test").iterdir())]
    for number in range(5):
        wave = np.concatenate([parts[number], parts[(number + 3) % len(parts)]])
        write_sound(tmp_path / f"normal/fan/id_00/{number}.wav", wave)
    for number in (6, 7):
        write_sound(tmp_path / f"new/fan/id_00/{number}.wav", np.concatenate([parts[number]] * 2))
    options = {"out": tmp_path, "rate": 0.2}
    alone = run(tiny_run, [tmp_path / "normal"], **options)[2]
    for row in alone.values():  # four clips of one window: a rate of 0.2 is resolved for one, not for three
        assert row["windows"] == 3 and row["anomaly"] is None
        assert row["p_value"] == pytest.approx(min(1, 3 * row["window_p_value"]))
    normal = np.array([row["score"] for row in alone.values()])
    normals = [str(tmp_path / "normal"), str(tmp_path / "normal/fan/id_00/0.wav")]  # one is named twice
    _, summary, rows = run(tiny_run, [tmp_path / "new"], calibrate_with=normals, **options)
    for row in rows.values():
        assert row["calibration"] == "5 normal recordings of fan id 00"
        # windows of other batches differ in their last bits
        lowest, highest = ((1 + sum(normal >= row["score"] + shift)) / 6 for shift in (1e-5, -1e-5))
        assert lowest <= row["p_value"] <= highest
        assert row["threshold"] == pytest.approx(normal.max(), rel=1e-6)
        assert row["anomaly"] == int(row["score"] > row["threshold"])
        assert row["window_p_value"] <= row["p_value"]


def test_the_false_alarm_rate_holds_on_held_out_normals(tiny_run, trained, tmp_path):
    """Half of the normal clips set the threshold, the other half is counted; neither was trained on."""
    normal = sorted((tiny_run / "data").glob("*/test/normal_*.wav"))
    more = calibrate(Scorer(trained), 0.2, Scorer(trained)(map(str, normal[::2])))
    assert len(more.scores) == 4 + 12
    rows = run(tiny_run, normal[1::2], out=tmp_path, rate=0.2, calibrate_with=map(str, normal[::2]))[2]
    alarms = sum(row["anomaly"] for row in rows.values())
    assert scipy.stats.binomtest(alarms, len(rows), 0.2).pvalue > 0.001
    assert {row["calibration"] for row in rows.values()} == {"16 normal recordings of all machines"}


def test_bad_files_are_reported_and_skipped(tiny_run, trained, tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    (tmp_path / "empty").mkdir()
    files = [tmp_path / "bad.wav", clip(tiny_run), tmp_path / "gone.wav", tmp_path / "silent.wav"]
    scorer, summary, rows = run(
        tiny_run, [*files, tmp_path / "empty"], out=tmp_path, machine_type="fan", machine_id="id_00"
    )
    assert (summary.scored, summary.skipped) == (1, 4) and len(rows) == 5
    assert "not a readable sound file" in rows["bad.wav"]["problem"] and rows["bad.wav"]["score"] is None
    assert rows["gone.wav"]["problem"] == "no such file" and rows["silent.wav"]["problem"] == "silent"
    assert "no .wav or .flac files" in rows["empty"]["problem"]
    text = summary.text(scorer)
    assert "4 files and 0 windows not scored:" in text and f"{tmp_path / 'gone.wav'}: no such file" in text


def test_an_unknown_id_is_scored_against_every_id_and_it_is_said(tiny_run, trained, tmp_path):
    own = [run(tiny_run, [clip(tiny_run)], out=tmp_path, machine_id=name)[2] for name in ("00", "id_02")]
    own = [list(rows.values())[0] for rows in own]
    for options in ({"machine_id": "07"}, {"machine_type": "fan", "machine_id": "07"}):
        scorer, summary, rows = run(tiny_run, [clip(tiny_run)], out=tmp_path, **options)
        (row,) = rows.values()
        lowest = min(own, key=lambda one: one["score"])
        assert row["score"] == pytest.approx(lowest["score"], rel=1e-5)
        assert row["scored_as"] == lowest["scored_as"]
        assert row["machine_id"] == "07" and "id 07 unknown: scored against every id of fan" in row["remarks"]
        assert f"(as {lowest['scored_as']})" in summary.text(scorer)


def test_an_unknown_type_is_one_clear_error(tiny_run, tmp_path):
    known = "fan, pump, slider, ToyCar, ToyConveyor, valve"
    with pytest.raises(UserError, match=f"machine type drill is unknown .*{known}"):
        run(tiny_run, [clip(tiny_run)], out=tmp_path, machine_type="drill")
    drill = tmp_path / "drill/test/normal_id_00_00000000.wav"
    drill.parent.mkdir(parents=True)
    drill.write_bytes(clip(tiny_run).read_bytes())
    (tmp_path / "loose.wav").write_bytes(clip(tiny_run).read_bytes())
    rows = run(tiny_run, [drill, tmp_path / "loose.wav", clip(tiny_run)], out=tmp_path)[2]
    problems = [row["problem"] for row in rows.values()]
    assert "loose.wav" in rows and known in rows["loose.wav"]["problem"] and len(problems) == 2
    with pytest.raises(UserError, match="nothing was scored; .*machine type drill is unknown"):
        run(tiny_run, [drill], out=tmp_path)


@pytest.mark.parametrize(
    "place",
    ["fan/id_02/any.wav", "fan/02/normal/00000001.wav", "6_dB_fan/fan/id_02/normal/00000001.wav",
     "fan/test/section_02_source_test_normal_0001.wav", "test/fan/id_02/anomaly/x.wav"],
)  # fmt: skip
def test_the_machine_is_read_from_every_layout(tiny_run, tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_bytes(clip(tiny_run).read_bytes())
    ((_, row),) = run(tiny_run, [tmp_path / place], out=tmp_path)[2].items()
    assert (row["machine_type"], row["machine_id"], row["scored_as"]) == ("fan", "02", "fan id 02")


def test_a_manifest_names_the_machines(tiny_run, tmp_path):
    (tmp_path / "loose.wav").write_bytes(clip(tiny_run).read_bytes())
    (tmp_path / "list.csv").write_text(
        "path,machine_type,machine_id,split,anomaly\nloose.wav,valve,00,test,\n"
    )
    (recording,) = expand([str(tmp_path / "list.csv")])
    assert recording.machine == ("valve", "00")
    assert run(tiny_run, [tmp_path / "list.csv"], out=tmp_path)[2]["loose.wav"]["scored_as"] == "valve id 00"


@pytest.fixture
def long(tiny_run, tmp_path):
    """Five clips one after the other and a bit, as one file; the third second is silent."""
    parts = [samples(path) for path in sorted((tiny_run / "data/fan/test").iterdir())[:5]]
    wave = np.concatenate([*parts, parts[0][:5_000]])
    wave[32_000:48_000] = 0
    return write_sound(tmp_path / "fan/id_00/long.wav", wave)


@pytest.mark.parametrize("step", [None, 0.7])
def test_a_window_scores_as_the_clip_cut_there(tiny_run, tmp_path, long, step):
    scorer, summary, rows = run(tiny_run, [long], out=tmp_path, step=step)
    row, wave = rows["long.wav"], samples(long)
    starts = [start for start, _ in row["timeline"]]
    last = len(wave) / 16_000 - 1
    expected = np.append(np.arange(0, last, step or 0.5), last)
    np.testing.assert_allclose(starts, expected)
    cuts = tmp_path / "cuts/fan/id_00"
    for number, start in enumerate(starts):
        first = round(start * 16_000)
        write_sound(cuts / f"{number:02d}.wav", wave[first : first + 16_000])
    alone = run(tiny_run, [cuts], out=tmp_path)[2]
    scores = []
    for number, (start, value) in enumerate(row["timeline"]):
        one = alone[f"{number:02d}.wav"]
        assert (value is None) == (one["problem"] == "silent") == (start == 2.0 and step is None)
        if value is not None:
            assert value == pytest.approx(one["score"], rel=1e-4)
            scores.append(value)
    assert row["score"] == max(scores) and row["windows"] == len(starts)
    assert row["windows_not_scored"] == summary.windows_not_scored == len(starts) - len(scores)
    assert dict((start, value) for start, value in row["timeline"])[row["at_seconds"]] == max(scores)
    assert ("1 of 10 windows not scored: silent" in row["remarks"]) == (step is None)
    assert f"{len(starts)} windows of 1 s, one every {scorer.step:g} s" in summary.text(scorer)
    assert ("10 (1 not scored)" in summary.text(scorer)) == (step is None)


@pytest.mark.parametrize(
    ("length", "step", "starts"),
    [
        (10, 5, [0]),
        (3.5, 10, [0]),
        (10 + 1 / 16_000, 5, [0, 1 / 16_000]),
        (14.9, 5, [0, 4.9]),
        (15, 5, [0, 5]),
        (25, 10, [0, 10, 15]),
        (39, 10, [0, 10, 20, 29]),
        (40, 10, [0, 10, 20, 30]),
        (40.02, 10, [0, 10, 20, 30, 30.02]),
        (10.7, 0.1, [*np.arange(7) / 10, 0.7]),
    ],
)
def test_every_sample_lies_in_a_window(length, step, starts):
    found = window_starts(length, AudioConfig(), step)
    assert found == pytest.approx(starts)
    ends = [(start or 0) + 10 for start in found]
    assert ends[-1] == pytest.approx(max(length, 10))
    assert all((start or 0) <= end + 1e-9 for start, end in zip(found[1:], ends, strict=False))


def test_a_recording_just_longer_than_the_model_is_two_windows(tiny_run, tmp_path):
    wave = samples(clip(tiny_run))
    path = write_sound(tmp_path / "fan/id_00/a.wav", np.concatenate([wave, wave[:7_900]]))
    row = run(tiny_run, [path], out=tmp_path)[2]["a.wav"]
    assert [start for start, _ in row["timeline"]] == [0, pytest.approx(7_900 / 16_000)]
    assert row["windows"] == 2 and row["windows_not_scored"] == 0 and "cropped" not in row["remarks"]


def test_other_rates_and_channels(tiny_run, tmp_path):
    wave = samples(clip(tiny_run)) / 32768
    place = tmp_path / "fan/id_00"
    write_sound(place / "same.wav", wave, subtype="FLOAT")
    write_sound(place / "stereo.wav", np.stack([wave, 0 * wave], 1), subtype="FLOAT")
    write_sound(place / "up.wav", scipy.signal.resample_poly(wave, 3, 1), 48_000, subtype="FLOAT")
    rows = run(tiny_run, [place], out=tmp_path, channel=0)[2]
    expected = rows["same.wav"]["score"]
    assert rows["stereo.wav"]["score"] == pytest.approx(expected, rel=1e-6)
    assert rows["up.wav"]["score"] == pytest.approx(expected, rel=0.2)  # the band near 8 kHz is lost
    assert "resampled from 48000 Hz" in rows["up.wav"]["remarks"]


def test_without_held_out_scores_there_is_a_score_but_no_decision(tiny_run, tmp_path):
    options = {"json_path": tmp_path / "s.json", "device": "cpu"}
    scorer, summary = score(tiny_run / "initial.pt", [str(clip(tiny_run))], **options)
    (row,) = json.loads((tmp_path / "s.json").read_text())
    assert row["score"] > 0 and row["threshold"] is row["anomaly"] is row["p_value"] is None
    assert "--calibrate" in summary.text(scorer)
    normal = [str(path) for path in sorted((tiny_run / "data/fan/test").glob("normal_id_02*"))]
    score(tiny_run / "initial.pt", [normal[0]], calibrate_with=normal * 3, rate=0.5, **options)
    (row,) = json.loads((tmp_path / "s.json").read_text())
    assert row["calibration"] == "2 normal recordings of fan id 02"  # each once
    assert row["p_value"] in (1 / 3, 2 / 3, 1)


def test_results_are_written_whole_or_not_at_all(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "s.csv").write_text("before")
    monkeypatch.setattr(Scorer, "scores", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(tiny_run / "best.pt", [str(clip(tiny_run))], csv_path=tmp_path / "s.csv", device="cpu")
    assert (tmp_path / "s.csv").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_batches_hold_windows_of_several_files_and_no_more(tiny_run, trained):
    sizes = []

    class Counting(Scorer):
        def scores(self, samples, labels, transform=None):
            sizes.append(len(samples))
            return super().scores(samples, labels, transform)

    files = sorted(map(str, (tiny_run / "data").glob("*/test/*.wav")))
    results = list(Counting(trained, batch_size=10)([*files[:15], "gone.wav", *files[15:]]))
    assert [recording.file for recording in results] == [*files[:15], "gone.wav", *files[15:]]
    assert sizes == [10, 9, 10, 10, 9]


def resident_kb():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from Linux")
def test_memory_does_not_grow_with_the_number_of_files(tiny_run, trained):
    files = itertools.repeat(str(clip(tiny_run)), 700)
    used = {n: resident_kb() for n, _ in enumerate(Scorer(trained)(files), 1) if n in (400, 700)}
    assert used[700] - used[400] < 4_000  # the samples of 300 clips are 9 600 kB


def command(monkeypatch, capsys, names, *arguments):
    """Exit status, standard output and standard error of the score command."""
    monkeypatch.setattr("sys.argv", ["osscl", "score", *map(str, arguments)])
    monkeypatch.setattr("sys.stdin", standard_input(names))
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def test_the_command(tiny_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.wav").write_text("no sound")
    arguments = [tiny_run / "best.pt", "-", "--machine", "fan", "--id", "id_00", "--device", "cpu"]
    arguments += ["--false-alarm-rate", "0.25", "--csv", tmp_path / "s.csv"]
    names = [clip(tiny_run), tmp_path / "bad.wav"]
    status, out, _ = command(monkeypatch, capsys, names, *arguments)
    assert status == 1  # one was skipped
    assert "1 files scored" in out and "bad.wav: not a readable sound file" in out
    assert (tmp_path / "s.csv").read_text().count("\n") == 3
    assert command(monkeypatch, capsys, names[:1], *arguments)[0] == 0
    status, _, error = command(monkeypatch, capsys, names, *arguments[:2], "--machine", "drill")
    assert status == 2 and error.startswith("osscl: machine type drill is unknown")


def test_windows_with_nan_are_told_and_change_the_exit_status(tiny_run, tmp_path, monkeypatch, capsys):
    wave = np.concatenate([samples(clip(tiny_run))] * 3) / 32768
    wave[20_000] = np.nan
    path = write_sound(tmp_path / "fan/id_00/a.wav", wave, subtype="FLOAT")
    arguments = [tiny_run / "best.pt", path, "--device", "cpu", "--csv", tmp_path / "s.csv"]
    status, out, _ = command(monkeypatch, capsys, [], *arguments)
    assert status == 1 and "0 files and 2 windows not scored:" in out
    assert "a.wav: 2 of 5 windows not scored: holds NaN" in out
    with open(tmp_path / "s.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["windows"], row["windows_not_scored"]) == ("5", "2") and float(row["score"]) > 0


@pytest.fixture
def workplace(tiny_run, tmp_path):
    """A recording, a checkpoint, a manifest and a folder, with nothing else beside them."""
    (tmp_path / "new").mkdir()
    for name in ("a.wav", "b.wav"):
        (tmp_path / "new" / name).write_bytes(clip(tiny_run).read_bytes())
    (tmp_path / "sound").write_bytes(clip(tiny_run).read_bytes())  # by its content
    (tmp_path / "best.pt").write_bytes((tiny_run / "best.pt").read_bytes())
    row = "new/a.wav,fan,00,test,\n"
    (tmp_path / "manifest.csv").write_text(f"path,machine_type,machine_id,split,anomaly\n{row}")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ("--csv new/a.wav new/b.wav", "sound"),  # the name of the CSV forgotten before new/*.wav
        ("new/b.wav --csv new/c.wav", "sound"),
        ("new/b.wav --json sound", "sound"),
        ("new/b.wav --csv best.pt", "inputs"),
        ("new/b.wav --json other.pt", "checkpoint"),
        ("manifest.csv --csv manifest.csv", "inputs"),
        ("new/b.wav --calibrate manifest.csv --csv ./new/../manifest.csv", "inputs"),
        (". --json manifest.csv", "inputs"),
        ("new/b.wav --csv new", "regular"),
        ("new/b.wav --csv pipe", "regular"),
        ("new/b.wav --json /dev/null", "regular"),
        ("new/b.wav --plot x.wav", ".png or .pdf or .svg"),
        ("new/b.wav --explain x", ".png or .pdf or .svg"),
        ("new/b.wav --csv s.csv --json ./s.csv", "same"),
    ],
)
def test_outputs_never_replace_what_is_there(workplace, monkeypatch, capsys, outputs, message):
    def content():
        return {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}

    before = content()
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(Scorer, "__call__", lambda *_: pytest.fail("scored before the outputs were checked"))
    arguments = ["best.pt", *outputs.split(), "--machine", "fan", "--device", "cpu"]
    status, _, error = command(monkeypatch, capsys, [], *arguments)
    assert status == 2 and message in error and error.count("\n") == 1
    assert content() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch-size 0", "a batch of 0 windows"),
        ("--batch-size -3", "a batch of -3 windows"),
        ("--window-step 0", "a step of 0 s"),
        ("--window-step nan", "a step of nan s"),
        ("--window-step 1.5", "so that nothing is skipped"),
        ("--channel -1", "channel -1"),
        ("--false-alarm-rate nan", "got nan"),
        ("--false-alarm-rate 0", "between 0 and 1"),
        ("--machine drill", "machine type drill is unknown"),
        ("--calibrate gone.wav", "--calibrate: gone.wav: no such file"),
    ],
)
def test_settings_have_ranges(workplace, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(workplace)
    options = ["best.pt", "new/a.wav", "--id", "00", "--device", "cpu", *arguments.split()]
    status, _, error = command(monkeypatch, capsys, [], *options)
    assert status == 2 and message in error and error.count("\n") == 1


def test_an_id_alone_needs_a_name_that_tells_the_type(tiny_run, workplace, monkeypatch, capsys):
    arguments = [tiny_run / "best.pt", "--id", "02", "--device", "cpu"]
    status, _, error = command(monkeypatch, capsys, [], *arguments, workplace / "new/a.wav")
    assert status == 2 and "its name tells no machine; give --machine, one of fan, pump" in error
    status, out, _ = command(monkeypatch, capsys, [], *arguments, clip(tiny_run))
    assert status == 0 and "| fan 02 " in out


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
def test_hostile_names_are_listed_and_the_rest_is_scored(tiny_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "fan" / "id_00"
    folder.mkdir(parents=True)
    for name in (b"good.wav", b"latin-\xe9.wav", b"._hidden.wav"):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(clip(tiny_run).read_bytes())
    (folder / "loop").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.wav")
    (folder / "zero.wav").symlink_to("/dev/zero")
    (folder / "gone.flac").symlink_to(tmp_path / "nothing")
    (tmp_path / "mp3").mkdir()
    (tmp_path / "mp3" / "a.mp3").write_bytes(b"ID3")
    (tmp_path / "list.csv").write_text("nothing,of,the,kind\n")
    places = [
        tmp_path / "fan",
        "x" * 300 + ".wav",
        folder / "pipe.wav",
        tmp_path / "mp3",
        tmp_path / "list.csv",
    ]
    places += [os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.wav"), "nul\0.wav"]
    arguments = [tiny_run / "best.pt", "-", "--device", "cpu", "--json", tmp_path / "s.json"]
    status, out, _ = command(monkeypatch, capsys, places, *arguments, "--csv", tmp_path / "s.csv")
    assert status == 1 and "1 files scored" in out
    out.encode("utf-8")
    rows = [(Path(row["file"]).name, row["problem"]) for row in json.loads((tmp_path / "s.json").read_text())]
    problems = {name: problem for name, problem in rows[:5]}
    assert problems.pop("good.wav") == ""
    assert problems["latin-\\xe9.wav"] == "its name is not UTF-8"
    assert problems["pipe.wav"] == problems["zero.wav"] == "not a regular file"
    assert "cannot be read" in problems["gone.flac"] and len(problems) == 4  # each once, in spite of the loop
    named = [problem for _, problem in rows[5:]]
    assert named[:2] == ["no such file", "not a regular file"]
    assert named[2] == "no .wav or .flac files in this folder (it has .mp3)"
    assert "no column" in named[3] and named[4] == "its name is not UTF-8" and named[5] == "no such file"


def test_the_network_is_left_in_eval_mode(tiny_run, trained):
    next(Scorer(trained)([str(clip(tiny_run))]))
    assert not trained.model.training and not any(p.grad is not None for p in trained.model.parameters())
    assert torch.is_grad_enabled()


def test_an_unreadable_folder_is_listed(tmp_path, monkeypatch):
    problems = [(tmp_path, "this folder cannot be read"), (tmp_path / "socket", "not a regular file")]
    monkeypatch.setattr("osscl_min.inference.recordings.walk", lambda _: iter(problems))
    (recording,) = expand([str(tmp_path)])
    assert recording.problem == "this folder cannot be read"
