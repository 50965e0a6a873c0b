"""Hostile input to every command: an exit status and one clear line, no traceback, nothing lost, no hang.

A case is a command, run in a folder that holds good data (`data`), a detector (`best.pt`), a finished run
(`run`), good scores (`scores`) and one hostile thing.
"""

import io
import os
import shutil
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import contents, put

RATE = 16_000
WAVE = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)
TRAIN = "train --data data --out new --preset quick --train.epochs 1 --model.audio.seconds 1"
EVALUATE = "evaluate --checkpoint best.pt --data data --out new --bootstrap 10"
SCORE = "score best.pt data/fan/test"
ABLATE = "ablate bands --checkpoint best.pt --data data --out new --preset quick"
BAD = "normal_id_00_99999999.wav"


CASES: dict[str, tuple] = {}


def case(kind, commands, put=(), says="", status=(2,), given=b"", changes="\0") -> None:
    """Commands between bars, what is put into their folder first (path -> bytes, text or a function that
    makes it) and what must come of each; `given` is the input, `changes` a path that may change."""
    for command in filter(None, map(str.strip, commands.replace("\n", "|").split("|"))):
        name = f"{command} ({kind})"
        assert name not in CASES, name
        CASES[name] = command, dict(put), says, status, given, changes


# --- sounds


def wav(path, samples=WAVE, subtype=None, rate=None, share=1.0) -> None:
    """A sound file, with another rate in its header or cut short."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, subtype=subtype, format="WAV")
    content = bytearray(buffer.getvalue())
    if rate is not None:
        content[24:28] = struct.pack("<I", rate)
    path.write_bytes(content[: int(share * len(content))])


def spoiled(*values):
    """A sound with values that no microphone gives."""
    samples = WAVE.astype(np.float64)
    samples[100 : 100 + len(values)] = values
    return partial(wav, samples=samples, subtype="DOUBLE")


SOUNDS = {
    "empty": b"",
    "text": "this is no sound\n",
    "riff-only": b"RIFF\x24\0\0\0WAVE",
    "no-samples": partial(wav, samples=WAVE[:0]),
    "cut-header": partial(wav, share=0.0005),
    "truncated": partial(wav, share=0.5),
    "silent": partial(wav, samples=0 * WAVE),
    "nan": spoiled(np.nan),
    "infinite": spoiled(np.inf),
    "huge": spoiled(1e300, -1e300),
    "short": partial(wav, samples=WAVE[:800]),
    "rate-0": partial(wav, rate=0),
    "rate-1": partial(wav, rate=1),
    "rate-4M": partial(wav, rate=4_000_000),
    "rate-max": partial(wav, rate=0xFFFFFFFF),
    "mp3": b"ID3\x04" + bytes(500) + b"\xff\xfb\x90\x64" * 200,
    "noise": np.random.default_rng(1).bytes(5000),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling": lambda path: path.symlink_to("nowhere.wav"),
    "self-link": lambda path: path.symlink_to(path.name),
}
for number, (kind, sound) in enumerate(SOUNDS.items()):  # one decoder: each kind meets some of the commands
    both = {f"data/fan/{split}/{BAD}": sound for split in ("train", "test")}
    case(kind, ("inspect data --out new", "pack data new --seconds 1")[number % 2], both, BAD, status=(0,))
    case(kind, f"{SCORE} --csv new.csv", both, BAD, status=(1,))
    case(kind, f"{TRAIN} --strict", both, BAD)
    alone, machine = {f"given/{BAD}": sound}, "--machine fan --id 00"
    if number % 2:
        case(kind, f"score best.pt given/{BAD} {machine}", alone)
    else:
        case(kind, f"{SCORE} --calibrate given/{BAD} {machine}", alone, "calibrate")
ALL = {f"data/fan/{s}/normal_id_00_{kind}.wav": SOUNDS[kind] for kind in SOUNDS for s in ("train", "test")}
case("all sounds", f"{TRAIN} | {EVALUATE}", ALL, "42 files not used", status=(0,))

# --- names and folders

NAMES = {
    "not-utf-8": os.fsdecode(b"normal_id_00_\xe4.wav"),
    "newline": "normal_id_00_0\n1.wav",
    "long": f"normal_id_00_{'9' * 230}.wav",
    "quote": "normal_id_00_'\";.wav",
    "escape": "normal_id_00_\x1b[31m.wav",
}
ALL = {f"data/fan/{split}/{name}": wav for name in NAMES.values() for split in ("train", "test")}
case("all names", f"{TRAIN} | {EVALUATE}", ALL, status=(0,))
for kind, name in NAMES.items():
    both = {f"data/fan/train/{name}": wav, f"data/fan/test/{name}": wav}
    case(kind, "inspect data --out new | pack data new --seconds 1", both, status=(0,))
    case(kind, f"{SCORE} --csv new.csv --json new.json", both, status=(0, 1))
LOOPS = {
    "data/fan/loop": lambda path: path.symlink_to(".."),
    "data/fan/test/x": lambda path: path.symlink_to("."),
}
case("loop", f"inspect data | {SCORE} | pack data new --seconds 1", LOOPS, status=(0, 1))
ODD = f"inspect odd | {TRAIN.replace('data data', 'data odd')} | pack odd new"
case("deep", ODD, {f"odd/fan/a/b/c/d/{n}.wav": wav for n in range(3)}, "fan")
case("flat", ODD, {f"odd/{n}.wav": wav for n in range(3)}, "TYPE")
case("mp3", f"{ODD} | score best.pt odd", {f"odd/fan/00/{n}.mp3": SOUNDS["mp3"] for n in range(3)}, "mp3")

# --- tables

SCORES = "normal_id_00_0.wav,0.1\nanomaly_id_00_0.wav,0.9\nanomaly_id_00_1.wav,0.7\n"
SCORE_FILE = "given/anomaly_score_fan_id_00.csv"
TRUTH = "fan,,\nid_00_0.wav,anomaly_id_00_9.wav,1\n"
MANIFEST = "path,machine_type,machine_id,split,anomaly\n" + "".join(
    f"data/{kind}/train/normal_id_00_0000000{n}.wav,{kind},00,train,0\n"
    for kind in ("fan", "pump")
    for n in range(3)
)
TABLES = {
    "utf-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.replace("00", "0ä").encode("latin-1"),
    "nul": lambda text: text.encode() + b"\0\0\n",
    "binary": lambda text: np.random.default_rng(2).bytes(400),
    "wide": lambda text: f"{text.rstrip()},more,cells\n".encode(),
    "quote": lambda text: b'"' + text.encode(),
    "html": lambda text: b"<html><body>404</body></html>\n",
    "empty": lambda text: b"",
    "folder": lambda text: Path.mkdir,
    "pipe": lambda text: os.mkfifo,
}
for number, (kind, spoil) in enumerate(TABLES.items()):
    case(kind, "metrics given", {SCORE_FILE: spoil(SCORES)}, "given")
    case(kind, "metrics scores --labels truth.csv", {"truth.csv": spoil(TRUTH)}, "truth.csv")
    status = (0, 2) if kind in ("empty", "folder", "pipe") else (2,)
    case(f"truth {kind}", "inspect data", {"data/eval_data_list.csv": spoil(TRUTH)}, status=status)
    commands = "inspect m.csv", "pack m.csv new", "score best.pt m.csv", TRAIN.replace("a data", "a m.csv")
    case(kind, " | ".join(commands[number % 2 :: 2]), {"m.csv": spoil(MANIFEST)}, "m.csv")
case("decimal comma", "metrics given", {SCORE_FILE: SCORES.replace(".1\n", ",1\n")}, "line 1")
case("nan", "metrics given", {SCORE_FILE: SCORES.replace("0.9", "nan")}, "nan")
case("byte order mark", "metrics given", {SCORE_FILE: "\ufeff" + SCORES}, "100.00", status=(0,))
case("out", "metrics scores --out new --bootstrap 0", says="100.00", status=(0,))
case("no clip", "metrics scores --labels truth.csv", {"truth.csv": TRUTH}, "1 ", status=(0,))

# --- checkpoints


def changed(change):
    """A maker of the good checkpoint with a change: of its content in place, or to what is returned."""

    def make(path) -> None:
        content = torch.load(path.parent / "best.pt", weights_only=True)
        replaced = change(content)
        torch.save(content if replaced is None else replaced, path)

    return make


def with_entry(key, *value):
    """The same with an entry set to a value, or removed."""
    *path, last = key.split("/")

    def change(content) -> None:
        for part in path:
            content = content[part]
        content.pop(last)
        content.update({last: value[0]} if value else {})

    return changed(change)


def nan_weights(content) -> None:
    for value in content["ema"].values():
        if value.is_floating_point():
            value.fill_(float("nan"))


WEIGHT = "ema/arcface.weight"
LABELS, VALUES = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.float64)
CHECKPOINTS = {
    "empty": b"",
    "text": "weights\n",
    "sound": wav,
    "zip": b"PK\x05\x06" + bytes(18),
    "cut": lambda path: path.write_bytes((path.parent / "best.pt").read_bytes()[:5000]),
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "list": changed(lambda content: [1, 2, 3]),
    "tensor": changed(lambda content: torch.zeros(3)),
    "no-format": with_entry("format"),
    "no-config": with_entry("config"),
    "config-text": with_entry("config", "paper"),
    "no-ema": with_entry("ema"),
    "no-synthetic": with_entry("synthetic"),
    "ema-list": with_entry("ema", []),
    "epoch-text": with_entry("epoch", "three"),
    "unknown-neighbours": with_entry("neighbours/labels", LABELS + 99),
    "weight-text": with_entry(WEIGHT, "x"),
    "weight-shape": with_entry(WEIGHT, torch.zeros(2, 2)),
    "nan-weights": changed(nan_weights),
    "no-classes": with_entry("classes"),
    "classes-numbers": with_entry("classes", [1, 2, 3]),
    "classes-text": with_entry("classes", "fan"),
    "no-epoch": with_entry("epoch"),
    "calibration-text": with_entry("calibration", "none"),
    "calibration-uneven": with_entry("calibration", {"labels": LABELS, "scores": VALUES[:2]}),
    "calibration-recordings": with_entry("calibration/recordings", LABELS),
    "calibration-no-form": with_entry("calibration/nearest"),
    "neighbours-shape": with_entry("neighbours/profiles", VALUES),
    "borrowed-unknown": with_entry("borrowed", [99]),
    "recognition-part": with_entry("recognition/p_value"),
    "recognition-text": with_entry("recognition", "good"),
    "calibration-nan": with_entry("calibration", {"labels": LABELS, "scores": VALUES + float("nan")}),
}
for number, (kind, content) in enumerate(CHECKPOINTS.items()):
    command = (SCORE, EVALUATE, SCORE, ABLATE)[number % 4].replace("best.pt", "bad.pt")
    case(kind, command, {"bad.pt": content}, "bad.pt")
AGAIN = TRAIN.replace("out new", "out run").replace("epochs 1", "epochs 2")
for kind in ("empty", "text", "cut", "list", "no-config", "no-ema", "sound"):
    case(f"last {kind}", AGAIN, {"run/last.pt": CHECKPOINTS[kind]}, "run")

# --- settings

RANGES = {
    TRAIN: """
        --train.learning-rate nan | --loss.temperature 0 | --model.audio.seconds 1e9 | --model.embedding 0
        --model.audio.f-min 8000 | --model.audio.mels 100000 | --engine.checkpoint-seconds nan | --seeds -1
        --trian.epochs 3 | --device cuda cuda:7 tpu cpu:x""",
    EVALUATE: "--bootstrap -1 | --batch-size 0 -3 | --device cuda",
    SCORE: """
        --batch-size 0 -1 | --window-step 0 -1 nan | --false-alarm-rate 0 1 nan -0.1 | --machine rocket
        --channel -1 | --device cuda | --calibrate nowhere.wav""",
    "pack data new": "--seconds 0 nan | --sample-rate 0 -1 | --channel -1 | --jobs 0 -1",
    "synth new": """
        --seconds 0.5 -1 1e12 nan | --sample-rate 0 8000 | --ids-per-type 0 5 | --train-clips 0 -1 | --seed -1
        --snr-db nan inf 1e9 | --test-normal -1 | --test-anomaly 1000000000000""",
    "ablate scores --data data --out new --preset quick": "--seeds -1 | --variants nonsense | --jobs 0",
    "ablate high-frequency --checkpoint best.pt --data data --out new": "--cutoffs -1 nan 9000",
    "metrics scores": "--bootstrap -1 | --labels nowhere.csv",
    "download new": "--parts nonsense | --types rocket | --jobs 0 | --mirror nonsense",
}
for command, options in RANGES.items():
    for option, *values in filter(None, map(str.split, options.replace("\n", "|").split("|"))):
        values = [value for value in values if value != "cuda" or not torch.cuda.is_available()]
        case("range", "|".join(f"{command} {option}={value}" for value in values), status=(2, 3))
case("one epoch", "ablate training --data data --out new --preset quick --train.epochs 1", status=(1, 2))
case("latin-1 names", "score best.pt -", given=b"data/fan/test/normal\xe4.wav\n", status=(1, 2))
case("no names", "score best.pt -")

# --- outputs

SOUND = "data/fan/test/normal_id_00_00000000.wav"
for option, end in (("--csv", "csv"), ("--json", "json"), ("--plot", "png"), ("--explain", "png")):
    command = f"{SCORE} {option}"
    case("an input", f"{command} {SOUND} | {command} best.pt | {command} /proc/none/x.{end}")
    case("precious", f"{command} new.wav | {command} new.pt | {command} .")
    for kind, content in (("folder", Path.mkdir), ("pipe", os.mkfifo), ("disguised", wav)):
        case(kind, f"{command} x.{end}", {f"x.{end}": content})
case("the manifest", "inspect inspect.csv --out .", {"inspect.csv": MANIFEST})
for file in ("best.pt", "initial.pt"):
    case(f"another {file}", TRAIN.replace("out new", "out new2"), {f"new2/{file}": b"weights"}, file)
case("a link", f"score best.pt {SOUND.replace('00.wav', '01.wav')} --csv {SOUND}")
for target in ("best.pt", "/proc/none/x", "/dev/null"):
    commands = (
        f"inspect data --out | metrics scores --out | {EVALUATE} --out | {TRAIN} --out | synth | pack data"
    )
    case("output", commands.replace(" |", f" {target} |") + f" {target}")

# --- what is missing or damaged

MISSING = f"""
    inspect nowhere | pack nowhere new | {TRAIN.replace("a data", "a nowhere")} | score best.pt nowhere.wav
    {EVALUATE.replace("a data", "a nowhere")} | {EVALUATE.replace("best", "nowhere")} | score nowhere.pt data
    metrics nowhere | report nowhere | report best.pt | report empty | bench model --data nowhere
    ablate scores --data nowhere --out new --preset quick | {TRAIN} --with nowhere | {TRAIN} --resume
    ablate scores --checkpoint nowhere.pt --data data --out new | inspect empty | pack empty new
    {TRAIN.replace("a data", "a empty")} | score best.pt empty | {EVALUATE.replace("a data", "a empty")}
    inspect best.pt | metrics best.pt | metrics empty"""
case("missing", MISSING, {"empty": Path.mkdir})
FILES = """config.json config.json config.json log.jsonl best.pt evaluation/metrics.json evaluation/scores.csv
    evaluation/evaluation.json untrained/metrics.json high_frequency/high_frequency.json"""
for number, file in enumerate(FILES.split()):
    content = (b"", b"\xff\xfe\0\1", b"[1, 2]\n")[number % 3]
    case(f"{file} {content}", "report run", {f"run/{file}": content}, Path(file).name, changes="run/")
for machine in ("x/../../../escaped", "..", "/absolute", "a\\b", "x" * 300):
    rows = MANIFEST.replace("fan,00", f"{machine},00").replace("train,0", "test,0")
    named = changed(lambda content, machine=machine: content["classes"].__setitem__(0, [machine, "00"]))
    command = EVALUATE.replace("best.pt --data data --out new", "named.pt --data m.csv --out new")
    case(machine[:9], command, {"m.csv": rows, "named.pt": named}, status=(0, 2))


# --- the test


@pytest.fixture(scope="module")
def stage(tiny_run, tmp_path_factory):
    """What every case's folder holds."""
    folder, ignored = tmp_path_factory.mktemp("stage"), shutil.ignore_patterns
    shutil.copytree(tiny_run, folder / "run", ignore=ignored("data", "figures", "report*", "paper"))
    for kind in ("fan", "pump"):
        shutil.copytree(tiny_run / "data" / kind, folder / "data" / kind, ignore=ignored("*_id_02_*"))
    shutil.copy(tiny_run / "best.pt", folder / "best.pt")
    (folder / "scores").mkdir()
    (folder / "scores" / "anomaly_score_fan_id_00.csv").write_text(SCORES)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if n % 5 else ()) for n, name in enumerate(CASES)]
)
def test_hostile(name, stage, tmp_path, monkeypatch, osscl):
    command, hostile, says, statuses, given, changes = CASES[name]
    folder, needs_run = tmp_path / "case", "run" in command.split()
    shutil.copytree(stage, folder, ignore=None if needs_run else shutil.ignore_patterns("run"))
    for path, content in hostile.items():
        put(folder / path, content)
    before = contents(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = osscl(*command.split(), given=given)
    assert "Traceback" not in out + err
    assert status in statuses, out + err
    assert says in out + err
    if status == 2 and "╭" not in out + err:  # the argument parser's box is a message too
        assert err.count("osscl: ") == 1, err
    after = contents(tmp_path)
    lost = [path for path, digest in before.items() if after.get(path) != digest]
    assert all(path.startswith(f"case/{changes}") for path in lost)
    made = [path for path in after.keys() - before.keys() if not path.startswith(f"case/{changes}")]
    assert all(path.startswith("case/new") for path in made), "a file outside of the output folder"


def test_there_are_enough_cases():
    commands = {name.split()[0] for name in CASES}
    assert len(CASES) >= 300 and len(commands) == 11
