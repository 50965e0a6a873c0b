"""Hostile input to every command: an exit status and one clear line, no traceback, nothing lost, no hang.

A case is a command in a folder that holds good data (`data`), a detector (`best.pt`), a finished run (`run`)
and one hostile thing. `Worker` runs the commands in one process, which is replaced when it hangs.
"""

import hashlib
import json
import os
import queue
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, environment

RATE = 16_000
WAVE = (0.1 * np.random.default_rng(0).standard_normal(RATE)).astype(np.float32)


class Worker:
    """A process that runs commands; `hung` answers stop it."""

    def __init__(self):
        self.process = None

    def start(self):
        command = [sys.executable, str(ROOT / "tests" / "hostile_worker.py")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(OMP_NUM_THREADS="1", COLUMNS="200", NO_COLOR="1", TQDM_DISABLE="1"),
        )
        self.answers = queue.Queue()
        output, answers = self.process.stdout, self.answers
        threading.Thread(target=lambda: [answers.put(line) for line in output], daemon=True).start()
        self.answers.get(timeout=120)

    def __call__(self, argv, folder, given="", timeout=40):
        if self.process is None or self.process.poll() is not None:
            self.start()
        task = {
            "argv": [os.fsdecode(os.fsencode(text)) for text in argv],
            "folder": str(folder),
            "input": given,
        }
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        try:
            return json.loads(self.answers.get(timeout=timeout))
        except queue.Empty:
            self.stop()
            return None

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def worker():
    worker = Worker()
    yield worker
    worker.stop()


# --- hostile sounds -------------------------------------------------------------------------------------------


def wav(path: Path, samples=WAVE, rate=RATE, subtype=None) -> None:
    soundfile.write(path, samples, rate, subtype=subtype)


def patched_rate(rate: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        wav(path)
        content = bytearray(path.read_bytes())
        content[24:28] = struct.pack("<I", rate)
        path.write_bytes(content)

    return make


def cut(share: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        wav(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return make


def with_values(*values: float, subtype="DOUBLE") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        samples = WAVE.astype(np.float64)
        samples[100 : 100 + len(values)] = values
        wav(path, samples, subtype=subtype)

    return make


SOUNDS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is no sound\n"),
    "riff-only": lambda path: path.write_bytes(b"RIFF\x24\0\0\0WAVE"),
    "no-samples": lambda path: wav(path, WAVE[:0]),
    "cut-header": cut(0.0005),
    "truncated": cut(0.5),
    "silent": lambda path: wav(path, 0 * WAVE),
    "constant": lambda path: wav(path, 0 * WAVE + 0.25),
    "nan": with_values(np.nan),
    "infinite": with_values(np.inf, subtype="FLOAT"),
    "huge": with_values(1e300, -1e300),
    "short": lambda path: wav(path, WAVE[:800]),
    "rate-1": patched_rate(1),
    "rate-0": patched_rate(0),
    "rate-4M": patched_rate(4_000_000),
    "rate-max": patched_rate(0xFFFFFFFF),
    "mp3": lambda path: path.write_bytes(b"ID3\x04" + bytes(500) + b"\xff\xfb\x90\x64" * 200),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "noise": lambda path: path.write_bytes(np.random.default_rng(1).bytes(5000)),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling": lambda path: path.symlink_to("nowhere.wav"),
    "self-link": lambda path: path.symlink_to(path.name),
}


# --- hostile tables -------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[str], bytes]] = {
    "utf-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.replace("fan", "fän").encode("latin-1"),
    "nul": lambda text: text.encode() + b"\0\0\n",
    "binary": lambda text: np.random.default_rng(2).bytes(400),
    "wide": lambda text: text.replace("\n", ",more,cells\n").encode(),
    "quote": lambda text: b'"' + text.encode(),
    "empty": lambda text: b"",
    "html": lambda text: b"<html><body>404</body></html>\n",
    "json": lambda text: b'{"scores": [1, 2]}\n',
    "directory": lambda text: b"",
}


def table(path: Path, kind: str, text: str) -> None:
    path.mkdir() if kind == "directory" else path.write_bytes(TABLES[kind](text))


SCORES = "normal_id_00_0.wav,0.1\nanomaly_id_00_0.wav,0.9\nanomaly_id_00_1.wav,0.7\n"
MANIFEST = "path,machine_type,machine_id,split,anomaly\n" + "".join(
    f"data/{kind}/train/normal_id_00_0000000{n}.wav,{kind},00,train,0\n"
    for kind in ("fan", "pump")
    for n in range(3)
)
TRUTH = "fan,,\nid_00_0.wav,anomaly_id_00_9.wav,1\n"


# --- hostile checkpoints --------------------------------------------------------------------------------------


def changed(change: Callable[[dict], object]) -> Callable[[Path, Path], None]:
    def make(path: Path, good: Path) -> None:
        content = torch.load(good, weights_only=True)
        content = change(content) or content
        torch.save(content, path)

    return make


def without(*keys: str) -> Callable[[Path, Path], None]:
    def remove(content: dict) -> None:
        for key in keys:
            del content[key]

    return changed(remove)


def setting(key: str, value: object) -> Callable[[Path, Path], None]:
    *path, last = key.split(".")

    def put(content: dict) -> None:
        for part in path:
            content = content[part]
        content[last] = value

    return changed(put)


CHECKPOINTS: dict[str, Callable[[Path, Path], None]] = {
    "empty": lambda path, good: path.write_bytes(b""),
    "text": lambda path, good: path.write_text("weights\n"),
    "sound": lambda path, good: (wav(path.with_suffix(".wav")), path.with_suffix(".wav").rename(path)),
    "cut": lambda path, good: path.write_bytes(good.read_bytes()[:5000]),
    "flipped": lambda path, good: path.write_bytes(good.read_bytes()[:-3000] + bytes(3000)),
    "folder": lambda path, good: path.mkdir(),
    "pipe": lambda path, good: os.mkfifo(path),
    "a-list": changed(lambda content: [1, 2, 3]),
    "a-tensor": changed(lambda content: torch.zeros(3)),
    "no-format": without("format"),
    "format-99": setting("format", 99),
    "no-config": without("config"),
    "no-ema": without("ema"),
    "no-classes": without("classes"),
    "no-epoch": without("epoch"),
    "short-classes": changed(lambda content: content["classes"].pop() and None),
    "classes-of-numbers": setting("classes", [1, 2, 3]),
    "classes-text": setting("classes", "fan"),
    "infinite-scale": setting("config.model.scale", float("inf")),
    "unknown-setting": setting("config.model.colour", "red"),
    "negative-length": setting("config.model.audio.seconds", -1.0),
    "config-text": setting("config", "paper"),
    "missing-weight": changed(lambda content: content["ema"].pop(next(iter(content["ema"]))) is None or None),
    "weight-text": changed(lambda content: content["ema"].update({next(iter(content["ema"])): "x"})),
    "nan-weight": changed(
        lambda content: (
            [value.fill_(float("nan")) for value in content["ema"].values() if value.is_floating_point()]
            and None
        )
    ),
    "calibration-text": setting("calibration", "none"),
    "calibration-uneven": setting(
        "calibration", {"labels": torch.zeros(3, dtype=torch.int64), "scores": torch.zeros(2)}
    ),
    "calibration-labels": setting("calibration", {"labels": torch.full((3,), 99), "scores": torch.zeros(3)}),
    "zip": lambda path, good: zipfile.ZipFile(path, "w").close(),
}


# --- cases


@dataclass
class Case:
    name: str
    command: list[str]
    make: Callable[[Path], object] = lambda folder: None
    status: tuple[int, ...] = (2,)
    says: tuple[str, ...] = ()  # must appear in what is printed
    given: str = ""  # standard input
    written: tuple[str, ...] = ()  # files that the command may change
    slow: bool = False
    extra: dict = field(default_factory=dict)


CASES: list[Case] = []


def case(name: str, command: str | list[str], **options) -> None:
    CASES.append(Case(name, command.split() if isinstance(command, str) else command, **options))


def into(*places: str):
    """A maker of one hostile sound in several places of the case's folder."""

    def for_sound(make: Callable[[Path], None]):
        def both(folder: Path) -> None:
            for place in places:
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                make(folder / place)

        return both

    return for_sound


BAD = "normal_id_00_99999999.wav"
TRAIN = (
    "train --data data --out new --preset quick --train.epochs 1 --model.audio.seconds 1 --train.batch-size 8"
)
for kind, make in SOUNDS.items():
    in_data = into(f"data/fan/train/{BAD}", f"data/fan/test/{BAD}")(make)
    alone = into(f"given/{BAD}")(make)
    fine = {"rate-4M": (), "rate-max": ()}
    case(f"inspect-{kind}", "inspect data", make=in_data, status=(0,), says=(BAD,))
    case(f"inspect-out-{kind}", "inspect data --out new", make=in_data, status=(0,), says=(BAD,))
    case(f"pack-{kind}", "pack data new --seconds 1", make=in_data, status=(0,), says=(BAD,))
    case(f"train-{kind}", TRAIN, make=in_data, status=(0,), says=(BAD,), slow=True)
    case(f"strict-{kind}", TRAIN + " --strict", make=in_data, says=(BAD, "strict"))
    case(
        f"evaluate-{kind}",
        "evaluate --checkpoint best.pt --data data --out new --bootstrap 10",
        make=in_data,
        status=(0,),
        says=(BAD,),
    )
    case(f"score-{kind}", f"score best.pt given/{BAD} --machine fan --id 00", make=alone)
    case(
        f"score-among-{kind}",
        ["score", "best.pt", "data/fan/test", "--csv", "new.csv"],
        make=in_data,
        status=(1,),
        says=(BAD,),
    )
    case(
        f"calibrate-{kind}",
        f"score best.pt data/fan/test --calibrate given/{BAD} --machine fan --id 00",
        make=alone,
        says=("calibrate",),
    )

for kind in TABLES:
    case(
        f"metrics-{kind}",
        "metrics scores",
        says=("anomaly_score_fan_id_00.csv",),
        make=lambda folder, kind=kind: (
            (folder / "scores").mkdir(),
            table(folder / "scores/anomaly_score_fan_id_00.csv", kind, SCORES),
        ),
    )
    case(
        f"labels-{kind}",
        "metrics good-scores --labels truth.csv",
        says=("truth.csv",),
        make=lambda folder, kind=kind: table(folder / "truth.csv", kind, TRUTH),
    )
    for command in (
        "inspect manifest.csv",
        "pack manifest.csv new --seconds 1",
        "score best.pt manifest.csv",
        TRAIN.replace("data data", "data manifest.csv"),
    ):
        case(
            f"manifest-{command.split()[0]}-{kind}",
            command,
            says=("manifest.csv",),
            make=lambda folder, kind=kind: table(folder / "manifest.csv", kind, MANIFEST),
        )
    case(
        f"truth-{kind}",
        "inspect data",
        says=("eval_data_list.csv",),
        make=lambda folder, kind=kind: table(folder / "data/eval_data_list.csv", kind, TRUTH),
        status=(0,) if kind in ("empty", "directory") else (2,),
        extra={"unsaid": kind in ("empty", "directory")},
    )
case(
    "metrics-decimal-comma",
    "metrics scores",
    says=("line 1",),
    make=lambda folder: (
        (folder / "scores").mkdir(),
        (folder / "scores/anomaly_score_fan_id_00.csv").write_text("normal_id_00_0.wav,0,3\n"),
    ),
)
case(
    "metrics-nan",
    "metrics scores",
    says=("nan",),
    make=lambda folder: (
        (folder / "scores").mkdir(),
        (folder / "scores/anomaly_score_fan_id_00.csv").write_text(SCORES.replace("0.9", "nan")),
    ),
)
case("labels-missing", "metrics good-scores --labels nowhere.csv", says=("nowhere.csv",))
case(
    "labels-without-match",
    "metrics good-scores --labels truth.csv",
    status=(0,),
    says=("1 ",),
    make=lambda folder: (folder / "truth.csv").write_text(TRUTH),
)

for kind, damage in CHECKPOINTS.items():
    at = lambda name: lambda folder, damage=damage: damage(folder / name, folder / "best.pt")  # noqa: E731
    harmless = kind in ("calibration-text", "calibration-uneven", "calibration-labels")
    case(f"checkpoint-score-{kind}", "score bad.pt data/fan/test", make=at("bad.pt"), says=("bad.pt",))
    case(
        f"checkpoint-evaluate-{kind}",
        "evaluate --checkpoint bad.pt --data data --out new",
        make=at("bad.pt"),
        says=("bad.pt",),
    )
    case(
        f"checkpoint-ablate-{kind}",
        "ablate bands --checkpoint bad.pt --data data --out new --preset quick",
        make=at("bad.pt"),
        says=("bad.pt",),
        status=(2,) if not harmless else (0, 2),
        slow=harmless,
    )
for kind in ("empty", "text", "cut", "a-list", "no-config", "no-ema", "sound"):

    def last(folder: Path, damage=CHECKPOINTS[kind]) -> None:
        (folder / "run/last.pt").unlink()
        damage(folder / "run/last.pt", folder / "best.pt")

    case(
        f"resume-{kind}",
        "train --data data --out run --preset quick --train.epochs 2 --model.audio.seconds 1 "
        "--train.batch-size 24",
        make=last,
        says=("last.pt",),
    )

RANGES = {
    "--train.epochs": ("0", "-1"),
    "--train.batch-size": ("0", "-4", "1"),
    "--train.learning-rate": ("-1", "nan", "inf", "0"),
    "--train.final-learning-rate": ("-1", "nan"),
    "--train.seed": ("-1",),
    "--train.validation-fraction": ("-1", "2", "0", "nan"),
    "--train.noise": ("2", "-0.5", "nan"),
    "--train.ema-decay": ("1.5", "-1", "nan"),
    "--train.student-decay": ("-1", "2"),
    "--train.pretrain-epochs": ("1", "5", "-1"),
    "--loss.mixup-alpha": ("0", "-1", "nan"),
    "--loss.temperature": ("0", "-0.1", "nan"),
    "--loss.base-temperature": ("0", "nan"),
    "--loss.contrastive-weight": ("-1", "nan"),
    "--model.audio.seconds": ("0", "-1", "nan", "0.01", "1e9"),
    "--model.audio.sample-rate": ("0", "-16000", "999"),
    "--model.audio.f-max": ("9000", "0", "-1", "nan"),
    "--model.audio.f-min": ("-1", "8000", "nan"),
    "--model.audio.mels": ("0", "-1", "100000"),
    "--model.audio.hop": ("0", "-1"),
    "--model.audio.n-fft": ("0", "-1"),
    "--model.audio.cutoff": ("-1", "nan"),
    "--model.scale": ("0", "-1", "inf", "nan"),
    "--model.margin": ("-1", "nan", "10"),
    "--model.embedding": ("0", "-1"),
    "--evaluate.batch-size": ("0", "-1"),
    "--evaluate.bootstrap": ("-1",),
    "--engine.checkpoint-seconds": ("nan", "-1"),
    "--engine.log-steps": ("0", "-1"),
    "--device": ("cuda", "cuda:7", "tpu", "", "cpu:x"),
    "--seeds": ("a", "1,,2", "-1", "0,0"),
}
for option, values in RANGES.items():
    for value in values:
        name = option.removeprefix("--").split(".")[-1].replace("-", "_")
        case(f"train-{name}={value}", [*TRAIN.split(), f"{option}={value}"])
for option, value in (
    ("--bootstrap", "-1"),
    ("--batch-size", "0"),
    ("--batch-size", "-3"),
    ("--device", "cuda"),
):
    case(
        f"evaluate{option}={value}",
        ["evaluate", "--checkpoint", "best.pt", "--data", "data", "--out", "new", f"{option}={value}"],
    )
for option, value in (
    ("--batch-size", "0"),
    ("--batch-size", "-1"),
    ("--window-step", "0"),
    ("--window-step", "-1"),
    ("--window-step", "nan"),
    ("--false-alarm-rate", "0"),
    ("--false-alarm-rate", "1"),
    ("--false-alarm-rate", "nan"),
    ("--false-alarm-rate", "-0.1"),
    ("--machine", "rocket"),
    ("--machine", ""),
    ("--channel", "-1"),
    ("--device", "cuda"),
    ("--calibrate", "nowhere"),
    ("--calibrate", "empty"),
):
    case(
        f"score{option}={value}",
        ["score", "best.pt", "data/fan/test", f"{option}={value}"]
        if option != "--calibrate"
        else ["score", "best.pt", "data/fan/test", option, value],
        make=lambda folder: (folder / "empty").mkdir(),
    )
for option, value in (
    ("--seconds", "0"),
    ("--seconds", "nan"),
    ("--sample-rate", "0"),
    ("--sample-rate", "-1"),
    ("--channel", "-1"),
    ("--channel", "7"),
    ("--jobs", "0"),
    ("--jobs", "-1"),
):
    case(
        f"pack{option}={value}",
        ["pack", "data", "new", f"{option}={value}"],
        status=(2,) if "7" != value else (0, 2),
    )
for option, value in (
    ("--seconds", "0"),
    ("--seconds", "-1"),
    ("--seconds", "nan"),
    ("--sample-rate", "0"),
    ("--ids-per-type", "0"),
    ("--ids-per-type", "99"),
    ("--train-clips", "-1"),
    ("--seed", "-1"),
    ("--snr-db", "nan"),
    ("--test-normal", "-1"),
):
    case(f"synth{option}={value}", ["synth", "new", f"{option}={value}"])
for argv in (
    ["scores", "--seeds"],
    ["scores", "--seeds", "-1"],
    ["scores", "--variants", "nonsense"],
    ["high-frequency", "--checkpoint", "best.pt", "--cutoffs", "-1"],
    ["high-frequency", "--checkpoint", "best.pt", "--cutoffs", "nan"],
    ["high-frequency", "--checkpoint", "best.pt", "--cutoffs", "9000"],
    ["components", "--jobs", "0"],
    ["components", "--seeds", "0", "0"],
    ["components", "--variants", "nonsense"],
    ["training", "--train.epochs", "1"],
):
    case(
        f"ablate-{'_'.join(argv)}",
        ["ablate", *argv, "--data", "data", "--out", "new", "--preset", "quick"],
        status=(1, 2) if argv[0] == "training" else (2,),
    )

OUTPUTS = {
    "sound": lambda path: wav(path.with_name("x.wav")),
    "checkpoint": lambda path: None,
    "folder": lambda path: (path.parent / "x.csv").mkdir(),
    "pipe": lambda path: os.mkfifo(path.parent / "x.csv"),
}
for option in ("--csv", "--json", "--plot", "--explain"):
    end = ".png" if option in ("--plot", "--explain") else option.replace("--", ".")

    def special(kind, end=end):
        def make(folder: Path) -> None:
            {"folder": lambda path: path.mkdir(), "pipe": os.mkfifo}[kind](folder / f"x{end}")

        return make

    sound = "data/fan/test/normal_id_00_00000000.wav"
    case(f"score{option}-sound", ["score", "best.pt", "data/fan/test", option, sound])
    case(f"score{option}-checkpoint", ["score", "best.pt", "data/fan/test", option, "best.pt"])
    case(f"score{option}-glob", ["score", "best.pt", sound, option, sound])
    case(
        f"score{option}-folder",
        ["score", "best.pt", "data/fan/test", option, f"x{end}"],
        make=special("folder"),
    )
    case(
        f"score{option}-pipe", ["score", "best.pt", "data/fan/test", option, f"x{end}"], make=special("pipe")
    )
    case(
        f"score{option}-disguised",
        ["score", "best.pt", "data/fan/test", option, f"x{end}"],
        make=lambda folder, end=end: (folder / f"x{end}").write_bytes((folder / "best.pt").read_bytes()),
    )
    case(f"score{option}-unwritable", ["score", "best.pt", "data/fan/test", option, f"/proc/none/x{end}"])
case("plot-as-sound", ["score", "best.pt", "data/fan/test", "--plot", "new.wav"])
for command in (
    "inspect data --out",
    "metrics good-scores --out",
    "evaluate --checkpoint best.pt --data data --out",
    TRAIN.replace("--out new", "--out"),
    "synth",
    "pack data",
):
    words = command.split()
    at = words.index("--out") + 1 if "--out" in words else len(words)
    for target in ("best.pt", "/proc/none/x", "/dev/null"):
        case(f"{words[0]}-out-{target}", [*words[:at], target, *words[at:]])

MISSING = {
    "inspect": "inspect nowhere",
    "pack": "pack nowhere new",
    "train": TRAIN.replace("data data", "data nowhere"),
    "evaluate": "evaluate --checkpoint best.pt --data nowhere --out new",
    "evaluate-checkpoint": "evaluate --checkpoint nowhere.pt --data data --out new",
    "score": "score best.pt nowhere.wav",
    "score-checkpoint": "score nowhere.pt data",
    "metrics": "metrics nowhere",
    "report": "report nowhere",
    "report-file": "report best.pt",
    "report-empty": "report empty",
    "ablate": "ablate scores --data nowhere --out new --preset quick",
    "ablate-checkpoint": "ablate scores --checkpoint nowhere.pt --data data --out new",
    "bench": "bench model --data nowhere",
    "train-with": TRAIN + " --with nowhere",
    "resume": TRAIN + " --resume",
    "inspect-empty": "inspect empty",
    "pack-empty": "pack empty new",
    "train-empty": TRAIN.replace("data data", "data empty"),
    "score-empty": "score best.pt empty",
    "evaluate-empty": "evaluate --checkpoint best.pt --data empty --out new",
    "inspect-file": "inspect best.pt",
    "metrics-file": "metrics best.pt",
    "metrics-empty": "metrics empty",
    "download-part": "download new --parts nonsense",
    "download-type": "download new --types rocket",
    "download-jobs": "download new --jobs 0",
    "download-mirror": "download new --mirror nonsense",
}
for name, command in MISSING.items():
    case(f"missing-{name}", command, make=lambda folder: (folder / "empty").mkdir(), status=(2, 3))
case("stdin-latin-1", "score best.pt -", given="data/fan/test/normal\udce4.wav\n", status=(1, 2))
case("stdin-empty", "score best.pt -", given="")
case("id-alone", "score best.pt data/fan/test --id 99", status=(0, 2))

RUN_FILES = (
    "config.json",
    "log.jsonl",
    "evaluation/metrics.json",
    "evaluation/scores.csv",
    "evaluation/evaluation.json",
    "untrained/metrics.json",
    "best.pt",
    "high_frequency/high_frequency.json",
)
for file in RUN_FILES:
    for kind, content in (("empty", b""), ("binary", b"\xff\xfe\0\1"), ("other", b"[1, 2]\n")):
        case(
            f"report-{file}-{kind}",
            "report run",
            says=(Path(file).name,),
            slow=kind == "other",
            make=lambda folder, file=file, content=content: (folder / "run" / file).write_bytes(content),
            written=("run",),
        )


def links(folder: Path) -> None:
    (folder / "data/fan/loop").symlink_to("..")
    (folder / "data/fan/test/loop").symlink_to(".")


for command in ("inspect data", "score best.pt data/fan/test", "pack data new --seconds 1"):
    case(f"loop-{command.split()[0]}", command, make=links, status=(0, 1))
NAMES = {
    "not-utf-8": os.fsdecode(b"normal_id_00_\xe4.wav"),
    "newline": "normal_id_00_0\n1.wav",
    "long": "normal_id_00_" + 230 * "9" + ".wav",
    "quote": "normal_id_00_'\";.wav",
    "escape": "normal_id_00_\x1b[31m.wav",
}
for kind, name in NAMES.items():
    make = into(f"data/fan/train/{name}", f"data/fan/test/{name}")(wav)
    status = (0, 1)
    case(f"name-inspect-{kind}", "inspect data --out new", make=make, status=status)
    case(f"name-pack-{kind}", "pack data new --seconds 1", make=make, status=status)
    case(
        f"name-score-{kind}",
        "score best.pt data/fan/test --csv new.csv --json new.json",
        make=make,
        status=status,
    )
    case(f"name-train-{kind}", TRAIN, make=make, status=status, slow=True)
    case(
        f"name-evaluate-{kind}",
        "evaluate --checkpoint best.pt --data data --out new --bootstrap 10",
        make=make,
        status=status,
    )
for machine in ("x/../../../escaped", "..", "/absolute", "a\\b", "con", 300 * "x"):
    rows = MANIFEST.replace("fan,00", f"{machine},00").replace("train,0", "test,0")
    case(
        f"machine-{machine[:10]}",
        "evaluate --checkpoint named.pt --data manifest.csv --out new/deep --bootstrap 0",
        make=lambda folder, rows=rows, machine=machine: (
            (folder / "manifest.csv").write_text(rows),
            changed(lambda content: content["classes"].__setitem__(0, [machine, "00"]))(
                folder / "named.pt", folder / "best.pt"
            ),
        ),
        status=(0, 2),
    )
for layout, says in (("TYPE/ID", ("fan",)), ("mp3", ("mp3",)), ("flat", ("TYPE",))):

    def shape(folder: Path, layout=layout) -> None:
        for n in range(3):
            path = {
                "TYPE/ID": f"odd/fan/a/b/c/d/e/{n}.wav",
                "mp3": f"odd/fan/00/{n}.mp3",
                "flat": f"odd/{n}.wav",
            }[layout]
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            wav(folder / path) if layout != "mp3" else (folder / path).write_bytes(b"ID3" + bytes(99))

    for command in ("inspect odd", TRAIN.replace("data data", "data odd"), "pack odd new"):
        case(f"layout-{layout}-{command.split()[0]}", command, make=shape, says=says)
    if layout == "mp3":
        case("layout-mp3-score", "score best.pt odd", make=shape, says=says)


# --- the test -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tiny_run, tmp_path_factory):
    """What every case's folder begins with."""
    folder = tmp_path_factory.mktemp("stage")
    shutil.copytree(tiny_run, folder / "run", ignore=shutil.ignore_patterns("data"))
    for kind in ("fan", "pump"):
        shutil.copytree(tiny_run / "data" / kind, folder / "data" / kind)
    shutil.copy(tiny_run / "best.pt", folder / "best.pt")
    (folder / "good-scores").mkdir()
    (folder / "good-scores/anomaly_score_fan_id_00.csv").write_text(SCORES)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every regular file's digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES]
)
def test_hostile(case, stage, worker, tmp_path):
    folder = tmp_path / "case"
    shutil.copytree(stage, folder, symlinks=True)
    case.make(folder)
    before, outside = contents(folder), contents(tmp_path)
    answer = worker(case.command, folder, case.given)
    assert answer is not None, "the command hangs"
    printed = answer["out"] + answer["err"]
    assert "Traceback" not in printed, printed[-2000:]
    assert answer["status"] in case.status, printed
    if answer["status"] == 2 and "╭" not in printed:  # an argument parser's box is one message too
        lines = [line for line in answer["err"].splitlines() if line.startswith("osscl: ")]
        assert len(lines) == 1, printed
    if not case.extra.get("unsaid"):
        for text in case.says:
            assert text in printed, printed
    after = contents(folder)
    lost = [
        name
        for name, digest in before.items()
        if after.get(name) != digest and not name.startswith(tuple(case.written) or "\0")
    ]
    assert not lost, f"changed or lost: {lost}"
    assert contents(tmp_path).keys() - outside.keys() <= {f"case/{name}" for name in after}, (
        "written elsewhere"
    )


def test_there_are_many():
    assert len(CASES) >= 300
