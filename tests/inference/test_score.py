"""Scoring files of one's own: the scores are evaluate's, and nothing is lost, guessed or kept in memory."""

import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from conftest import contents, refused, write_sound

from osscl_min.inference.recordings import Scorer
from osscl_min.inference.score import score
from osscl_min.runtime.files import read_csv


@pytest.fixture
def clip(tiny_run):
    return tiny_run / "data/fan/test/normal_id_00_00000000.wav"


@pytest.fixture
def run(tiny_run, tmp_path):
    """Scores files with `tiny_run`; returns the text and the rows of the JSON by file name."""

    def run(*files, network="best.pt", **options):
        out = tmp_path / "rows.json"
        scorer, summary = score(tiny_run / network, map(str, files), json_path=out, device="cpu", **options)
        return summary.text(scorer), {Path(row["file"]).name: row for row in json.loads(out.read_text())}

    return run


@pytest.fixture
def command(osscl, tiny_run):
    """Runs the score command; returns exit status, standard output and standard error."""

    def run(*arguments, network=tiny_run / "best.pt", names=()):
        return osscl("score", network, *arguments, "--device", "cpu", given=lines(names))

    return run


def lines(names):
    return b"".join(os.fsencode(name) + b"\n" for name in names)


def samples(path):
    return soundfile.read(path, dtype="int16")[0]


def copy(source, *places):
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(source.read_bytes())


def test_scores_are_those_of_evaluate(tiny_run, command, tmp_path):
    """For folders, files, and names from the standard input."""
    first, *folders = sorted((tiny_run / "data").glob("*/test"))
    *files, last = sorted(first.iterdir())
    arguments = ["-", *folders, last, "--csv", tmp_path / "s.csv"]
    status, out, _ = command(*arguments, names=[files[0], "", *files[1:]])
    assert status == 0 and "files scored: 48" in out
    rows = {tuple(Path(row["file"]).parts[-3::2]): row for row in read_csv(tmp_path / "s.csv")}
    evaluated = read_csv(tiny_run / "evaluation/scores.csv")
    expected = {(row["machine_type"], row["file"]): row for row in evaluated}
    assert len(expected) == 48 and rows.keys() == expected.keys()
    for key, row in rows.items():
        assert row["machine_id"] == expected[key]["machine_id"]
        assert row["windows"] == "1" and row["problem"] == ""
        assert float(row["score"]) == pytest.approx(float(expected[key]["score"]), rel=1e-4)


def test_decision_threshold_and_p_value(run, clip, trained, monkeypatch):
    held_out = np.sort(trained.calibration["scores"].numpy())
    assert len(held_out) == 4
    text, rows = run(clip.parent, rate=0.4)
    for row in rows.values():
        assert row["threshold"] == held_out[2]
        assert row["calibration"] == "4 normal recordings of all machines"
        assert row["anomaly"] == int(row["score"] > held_out[2])
        assert row["p_value"] == row["window_p_value"] == (1 + sum(held_out >= row["score"])) / 5
    assert f"{held_out[2]:.4g} from 4 normal recordings of all machines (8 files)" in text
    more = run(clip, rate=0.2, calibrate_with=[str(clip)])[1][clip.name]
    assert more["calibration"] == "5 normal recordings of all machines"
    text, rows = run(clip, rate=0.05)
    row = rows[clip.name]
    assert row["threshold"] is row["anomaly"] is None and row["p_value"] >= 0.2
    assert "no decision from 4 normal recordings of all machines; 5 % false alarms need 15 more" in text
    monkeypatch.setattr("osscl_min.inference.score.SHOWN", 2)
    text, rows = run(clip.parent)
    first = sorted(rows.values(), key=lambda row: (row["p_value"], -row["score"]))[:2]
    assert [line.split()[1] for line in text.splitlines()[2:4]] == [row["file"] for row in first]
    assert "files scored: 8" in text and "the 2 with the lowest p-values" in text


def test_a_long_recording_is_compared_with_recordings_as_long(run, clip, tmp_path):
    """Five of three windows: one decides about three windows, and three of one window are corrected for."""
    parts = [samples(path) for path in sorted(clip.parent.iterdir())]
    for number in range(7):
        folder = tmp_path / ("normal" if number < 5 else "new") / "fan/id_00"
        write_sound(folder / f"{number}.wav", np.concatenate([parts[number], parts[(number + 3) % 8]]))
    options = {"rate": 0.2, "step": 0.5}
    alone = run(tmp_path / "normal", **options)[1]
    for row in alone.values():  # four clips of one window: a rate of 0.2 is resolved for one, not for three
        assert row["windows"] == 3 and row["anomaly"] is None
        assert row["p_value"] == 1 or 5 * row["p_value"] == pytest.approx(3)
        assert row["p_value"] == min(1, 3 * row["window_p_value"])
    normal = np.array([row["score"] for row in alone.values()])
    twice = [str(tmp_path / "normal"), str(tmp_path / "normal/fan/id_00/0.wav")]
    for row in run(tmp_path / "new", calibrate_with=twice, **options)[1].values():
        assert row["calibration"] == "5 normal recordings of fan id 00"
        # windows of other batches differ in their last bits
        lowest, highest = ((1 + sum(normal >= row["score"] + shift)) / 6 for shift in (1e-5, -1e-5))
        assert lowest <= row["p_value"] <= highest
        assert row["threshold"] == pytest.approx(normal.max(), rel=1e-6)
        assert row["anomaly"] == int(row["score"] > row["threshold"])


@pytest.mark.parametrize("options", [{}, {"machine_type": "fan"}])
def test_an_unknown_id_is_scored_against_every_id_and_it_is_said(run, clip, options):
    own = [run(clip, machine_id=name)[1][clip.name] for name in ("00", "id_02")]
    lowest = min(own, key=lambda row: row["score"])
    text, rows = run(clip, machine_id="07", **options)
    row = rows[clip.name]
    assert row["score"] == pytest.approx(lowest["score"], rel=1e-5)
    assert row["scored_as"] == lowest["scored_as"] and row["machine_id"] == "07"
    assert "id 07 unknown: scored against every id of fan" in row["remarks"]
    assert f"| 07         | {lowest['scored_as']}" in text


def test_an_unknown_type_is_one_clear_error_and_a_manifest_gives_it(run, clip, tmp_path):
    known = "fan, pump, slider, ToyCar, ToyConveyor, valve"
    with refused(f"machine type drill is unknown .*{known}"):
        run(clip, machine_type="drill")
    drill, loose = tmp_path / "drill/test/normal_id_00_00000009.wav", tmp_path / "loose.wav"
    copy(clip, drill, loose)
    header = "path,machine_type,machine_id,split,anomaly"
    (tmp_path / "list.csv").write_text(f"{header}\nloose.wav,valve,00,test,\n")
    assert run(tmp_path / "list.csv")[1]["loose.wav"]["scored_as"] == "valve id 00"
    rows = run(drill, loose, clip)[1]
    assert known in rows[loose.name]["problem"] and known in rows[drill.name]["problem"]
    with refused("nothing was scored; .*machine type drill is unknown"):
        run(drill)
    with refused("its name does not tell the machine; give --machine, one of fan, pump"):
        run(loose, machine_id="02")


@pytest.mark.parametrize(
    "place",
    ["fan/id_02/any.wav", "fan/02/normal/00000001.wav", "6_dB_fan/fan/id_02/normal/00000001.wav",
     "fan/test/section_02_source_test_normal_0001.wav", "test/fan/id_02/anomaly/x.wav"],
)  # fmt: skip
def test_the_machine_is_read_from_every_layout(run, clip, tmp_path, place):
    copy(clip, tmp_path / place)
    (row,) = run(tmp_path / place)[1].values()
    assert (row["machine_type"], row["machine_id"], row["scored_as"]) == ("fan", "02", "fan id 02")


@pytest.mark.parametrize("step", [None, 0.5, 0.7])
def test_a_window_scores_as_the_clip_cut_there(run, clip, tmp_path, step):
    """Five clips one after the other and a bit, as one file; the third second is silent."""
    parts = [samples(path) for path in sorted(clip.parent.iterdir())[:5]]
    wave = np.concatenate([*parts, parts[0][:5_000]])
    wave[32_000:48_000] = 0
    text, rows = run(write_sound(tmp_path / "fan/id_00/long.wav", wave), step=step)
    row, last = rows["long.wav"], len(wave) / 16_000 - 1
    starts, scores = np.array(row["timeline"], float).T
    np.testing.assert_allclose(starts, np.append(np.arange(0, last, step or 1), last))
    cuts = tmp_path / "cuts/fan/id_00"
    for number, first in enumerate(np.rint(starts * 16_000).astype(int)):
        write_sound(cuts / f"{number:02d}.wav", wave[first : first + 16_000])
    alone = run(cuts)[1].values()
    np.testing.assert_allclose(scores, np.array([one["score"] for one in alone], float), rtol=1e-4)
    silent = [number for number, one in enumerate(alone) if one["problem"] == "silent"]
    assert silent == np.flatnonzero(np.isnan(scores)).tolist() == np.flatnonzero(starts == 2).tolist()
    assert row["score"] == np.nanmax(scores) and row["at_seconds"] == starts[np.nanargmax(scores)]
    assert row["windows"] == len(starts) and row["windows_not_scored"] == len(silent)
    remark = f"{len(silent)} of {len(starts)} windows not scored: silent" if silent else ""
    assert row["remarks"] == remark and remark in text
    assert f"{len(starts)} windows of 1 s, one every {step or 1:g} s" in text


def test_other_rates_and_channels(run, clip, tmp_path):
    wave, place = samples(clip) / 32768, tmp_path / "fan/id_00"
    write_sound(place / "same.wav", wave, subtype="FLOAT")
    write_sound(place / "stereo.wav", np.stack([wave, 0 * wave], 1), subtype="FLOAT")
    write_sound(place / "up.wav", scipy.signal.resample_poly(wave, 3, 1), 48_000, subtype="FLOAT")
    rows = run(place, channel=0)[1]
    expected = rows["same.wav"]["score"]
    assert rows["stereo.wav"]["score"] == pytest.approx(expected, rel=1e-6)
    assert rows["up.wav"]["score"] == pytest.approx(expected, rel=0.2)  # the band near 8 kHz is lost
    assert "resampled from 48000 Hz" in rows["up.wav"]["remarks"]


def test_without_held_out_scores_there_is_a_score_but_no_decision(run, clip):
    text, rows = run(clip, network="initial.pt")
    row = rows[clip.name]
    assert row["score"] > 0 and row["threshold"] is row["anomaly"] is row["p_value"] is None
    assert "--calibrate" in text
    normal = sorted(map(str, clip.parent.glob("normal_id_02*")))
    row = run(normal[0], network="initial.pt", calibrate_with=normal * 3, rate=0.5)[1].popitem()[1]
    assert row["calibration"] == "2 normal recordings of fan id 02"  # each once
    assert row["p_value"] in (1 / 3, 2 / 3, 1)


def test_results_are_written_whole_or_not_at_all(tiny_run, clip, tmp_path, monkeypatch):
    (tmp_path / "s.csv").write_text("before")
    monkeypatch.setattr(Scorer, "scores", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(tiny_run / "best.pt", [str(clip)], csv_path=tmp_path / "s.csv", device="cpu")
    assert (tmp_path / "s.csv").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_batches_hold_windows_of_several_files_and_no_more(tiny_run, trained):
    scorer, sizes = Scorer(trained, batch_size=10), []
    plain = scorer.scores
    scorer.scores = lambda samples, labels: sizes.append(len(samples)) or plain(samples, labels)
    files = sorted(map(str, (tiny_run / "data").glob("*/test/*.wav")))[:25]
    files.insert(15, "gone.wav")
    assert [recording.file for recording in scorer(files)] == files
    assert sizes == [10, 9, 6]
    assert not trained.model.training and not any(p.grad is not None for p in trained.model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory from Linux")
def test_memory_does_not_grow_with_the_number_of_files(clip, trained):
    def resident_kb():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024

    scorer = Scorer(trained)
    scorer.scores = lambda samples, labels: np.ones((len(samples), len(labels)))
    files = itertools.repeat(str(clip), 1_000)
    used = {n: resident_kb() for n, _ in enumerate(scorer(files), 1) if n in (400, 1_000)}
    assert used[1_000] - used[400] < 4_000  # the samples of 600 clips are 19 200 kB


def test_the_command(command, clip, tmp_path):
    status, out, _ = command(clip, "--id", "02")
    assert status == 0 and "| fan id 02 " in out
    wave = np.tile(samples(clip) / 32768, 3)
    wave[20_000] = np.nan
    path = write_sound(tmp_path / "fan/id_00/a.wav", wave, subtype="FLOAT")
    status, out, _ = command(path, "--window-step", "0.5")
    assert status == 1 and "files not scored: 0; windows not scored: 2" in out
    assert "a.wav: 2 of 5 windows not scored: holds NaN" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--csv new/a.wav new/b.wav", "sound"),  # the name of the CSV forgotten before new/*.wav
        ("manifest.csv --csv manifest.csv", "inputs"),
        ("new/b.wav --calibrate manifest.csv --csv ./new/../manifest.csv", "inputs"),
        (". --json manifest.csv", "inputs"),
        ("new/b.wav --plot x.wav", ".png or .pdf or .svg"),
        ("new/b.wav --explain x", ".png or .pdf or .svg"),
        ("new/b.wav --csv s.csv --json ./s.csv", "same"),
        ("new/b.wav --window-step 1.5", "so that nothing is skipped"),
    ],
)
def test_mistakes_are_told_before_anything_is_scored(
    command, clip, tmp_path, monkeypatch, arguments, message
):
    copy(clip, tmp_path / "new/a.wav", tmp_path / "new/b.wav")
    row = "new/a.wav,fan,00,test,\n"
    (tmp_path / "manifest.csv").write_text(f"path,machine_type,machine_id,split,anomaly\n{row}")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(Scorer, "__call__", lambda *_: pytest.fail("scored before the outputs were checked"))
    status, _, error = command(*arguments.split(), "--machine", "fan")
    assert status == 2 and message in error and error.count("\n") == 1
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
def test_hostile_files_are_listed_and_the_rest_is_scored(command, clip, tmp_path):
    folder, latin = tmp_path / "fan/id_00", os.fsdecode(b"latin-\xe9.wav")
    copy(clip, *(folder / name for name in ("good.wav", latin, "._hidden.wav")))
    (folder / "bad.wav").write_text("no sound")
    (folder / "dangling.wav").symlink_to("nothing")
    (folder / "loop").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.wav")
    copy(clip, tmp_path / "mp3/a.mp3")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("nothing,of,the,kind\n")
    inside = {
        "bad.wav": "not a readable sound file",
        "dangling.wav": "cannot be read (No such file or directory)",
        "good.wav": "",
        "latin-\\xe9.wav": "its name is not UTF-8",
        "pipe.wav": "not a regular file",
    }
    given = {
        tmp_path / "gone.wav": "no such file",
        "x" * 300 + ".wav": "no such file",
        folder / "pipe.wav": "not a regular file",
        tmp_path / "mp3": "no .wav or .flac files in this folder (it has .mp3)",
        tmp_path / "empty": "no .wav or .flac files in this folder",
        tmp_path / "list.csv": "list.csv: no column path",
        folder / latin: "its name is not UTF-8",
        "nul\0.wav": "no such file",
    }
    tables = ["--json", tmp_path / "s.json", "--csv", tmp_path / "s.csv"]
    status, out, _ = command("-", *tables, names=[tmp_path / "fan", *given])
    assert status == 1 and "files scored: 1" in out and out.encode("utf-8")
    assert f"files not scored: {len(given) + 4}; windows not scored: 0" in out
    assert f"{tmp_path / 'gone.wav'}: no such file" in out
    rows = json.loads((tmp_path / "s.json").read_text())
    assert [Path(row["file"]).name for row in rows[:5]] == list(inside)  # once, in spite of the loop
    for row, problem in zip(rows, [*inside.values(), *given.values()], strict=True):
        assert problem in row["problem"] and bool(row["problem"]) == (row["score"] is None)
