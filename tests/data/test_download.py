"""Downloading, against a server on this machine that answers like Zenodo and fails on demand."""

import io
import subprocess
import threading
import zipfile
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
from conftest import COMMAND, environment, noise

from osscl_min.data import download as module
from osscl_min.data.clips import scan
from osscl_min.data.download import CHECKSUM, CORRUPT, FULL, NETWORK, UNWRITABLE, download
from osscl_min.runtime.files import UserError

IDS = {"fan": ("00", "01"), "ToyCar": ("01", "05")}  # one of the development set, one of the evaluation set
TYPES = tuple(IDS)
CLIPS = 3  # of a kind
FAN = {"parts": ("dev",), "types": ("fan",)}  # one file
LABELS = "".join(
    f"{machine_type}\n"
    + "".join(f"id_{IDS[machine_type][1]}_{n:08d}.wav,normal_{n}.wav,{n % 2}\n" for n in range(CLIPS))
    for machine_type in TYPES
).encode()


def packed(names, seconds=0.1):
    """A zip with a sound for each name."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            sound = io.BytesIO()
            soundfile.write(sound, noise(list(name.encode()), seconds), 16_000, format="WAV")
            archive.writestr(name, sound.getvalue())
    return content.getvalue()


def miniature():
    """(record, file) -> content."""
    files = {(3951620, "eval_data_list.csv"): LABELS}
    for kind, (development, evaluation) in IDS.items():
        zips = {
            (3678171, "dev_data"): [f"train/normal_id_{development}_{n:08d}" for n in range(CLIPS)]
            + [f"test/{truth}_id_{development}_{n:08d}" for truth in ("normal", "anomaly") for n in range(2)],
            (3727685, "eval_data_train"): [f"train/normal_id_{evaluation}_{n:08d}" for n in range(CLIPS)],
            (3841772, "eval_data_test"): [f"test/id_{evaluation}_{n:08d}" for n in range(CLIPS)],
        }
        for (record, name), clips in zips.items():
            files[record, f"{name}_{kind}.zip"] = packed([f"{kind}/{clip}.wav" for clip in clips])
    return files


class Zenodo(ThreadingHTTPServer):
    """The files of records; `faults[name]` is a list of what happens to the next requests for a file."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.faults, self.asked = files, {}, Counter()
        self.stalled, self.resume = threading.Event(), threading.Event()

    @classmethod
    @contextmanager
    def serving(cls, files):
        """A server at work, of (record, file) -> content."""
        with cls(files) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            yield server
            server.shutdown()
            thread.join()


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        _, _, _, record, _, name, _ = self.path.split("/")  # /api/records/RECORD/files/NAME/content
        server.asked[name] += 1
        fault = server.faults[name].pop(0) if server.faults.get(name) else None
        if isinstance(fault, int):
            return self.send_error(fault)
        body = server.files[int(record), name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault else body)
        if fault == "stall":
            server.stalled.set()
            server.resume.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture
def zenodo(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time", SimpleNamespace(sleep=lambda seconds: None))
    with Zenodo.serving(miniature()) as server:
        yield server


def fetch(zenodo, folder, **options):
    return download(folder, **{"types": TYPES, "mirror": zenodo.url, "trust_mirror": True, **options})


def tree(folder):
    """Every file of a folder, without the notes in .download."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if path.parts[0] != ".download"}


def everything(zenodo):
    zips = [content for (_, name), content in zenodo.files.items() if name.endswith(".zip")]
    return {"eval_data_list.csv"}.union(*(zipfile.ZipFile(io.BytesIO(zip)).namelist() for zip in zips))


def leftovers(folder):
    return [p.name for p in (folder / ".download").iterdir() if p.suffix != ".json"]


def test_everything_arrives_and_is_counted(zenodo, tmp_path):
    text = fetch(zenodo, tmp_path / "data")
    assert tree(tmp_path / "data") == everything(zenodo) and not leftovers(tmp_path / "data")
    archive = zipfile.ZipFile(io.BytesIO(zenodo.files[3841772, "eval_data_test_fan.zip"]))
    name = "fan/test/id_01_00000002.wav"
    assert (tmp_path / "data" / name).read_bytes() == archive.read(name)
    clips = scan(tmp_path / "data").clips
    assert {clip.anomaly for clip in clips if clip.machine_id == "05" and clip.split == "test"} == {0, 1}
    assert "fan          00       3      4" in text and "ToyCar       05       3      3" in text
    asked = Counter(zenodo.asked)
    assert fetch(zenodo, tmp_path / "data") == text
    assert zenodo.asked == asked, "nothing is asked for again"
    (tmp_path / "data" / name).write_bytes(b"short")
    fetch(zenodo, tmp_path / "data")
    assert zenodo.asked - asked == {"eval_data_test_fan.zip": 1}
    assert (tmp_path / "data" / name).read_bytes() == archive.read(name)


def test_parts_and_types_can_be_chosen(zenodo, tmp_path):
    fetch(zenodo, tmp_path, **FAN)
    assert set(zenodo.asked) == {"dev_data_fan.zip"}
    with pytest.raises(UserError, match="cannot download fans; choose from fan,pump"):
        fetch(zenodo, tmp_path, types=("fans",))
    text = fetch(zenodo, tmp_path / "labels", parts=("labels",))
    assert "no clips to count" in text and tree(tmp_path / "labels") == {"eval_data_list.csv"}


@pytest.mark.parametrize("fault", ["cut", 503])
def test_a_passing_fault_is_overcome(fault, zenodo, tmp_path):
    zenodo.faults["dev_data_fan.zip"] = [fault, fault]
    fetch(zenodo, tmp_path)
    assert zenodo.asked["dev_data_fan.zip"] == 3
    assert tree(tmp_path) == everything(zenodo) and not leftovers(tmp_path)


def refused(zenodo, folder, status, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        fetch(zenodo, folder, **options)
    assert caught.value.exit_status == status
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [404, "cut"])
def test_a_file_that_cannot_be_fetched(fault, zenodo, tmp_path):
    zenodo.faults["eval_data_train_fan.zip"] = [fault] * 99
    reason = rf"cannot be fetched \({'ChunkedEncodingError' if fault == 'cut' else fault}"
    refused(zenodo, tmp_path, NETWORK, f"3727685/files/eval_data_train_fan.zip/content: {reason}")
    assert tree(tmp_path) and not leftovers(tmp_path)
    refused(zenodo, tmp_path, NETWORK, "ConnectionError.*check the network", mirror="http://127.0.0.1:9")
    zenodo.faults.clear()
    fetch(zenodo, tmp_path)
    assert zenodo.asked["dev_data_fan.zip"] == 1 and tree(tmp_path) == everything(zenodo)


def test_the_published_checksums_are_pinned(zenodo, tmp_path):
    assert len(module.MD5) == 18 and all(len(bytes.fromhex(value)) == 16 for value in module.MD5.values())
    zips = {pattern.format(name) for _, pattern in module.PARTS.values() for name in module.TYPES}
    assert zips - module.MD5.keys() == {"eval_data_list.csv"}
    refused(zenodo, tmp_path, CHECKSUM, "dev_data_fan.zip/content: wrong checksum", trust_mirror=False, **FAN)
    assert tree(tmp_path) == set() and not leftovers(tmp_path)


CLIP = "fan/train/normal_id_00_00000000.wav"


def damaged(content):
    """A zip whose first clip has another byte."""
    content = bytearray(content)
    content[zipfile.ZipFile(io.BytesIO(content)).infolist()[0].header_offset + 1500] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[: len(content) // 2], "a corrupt zip"),
        (damaged, "a corrupt zip"),
        (lambda _: packed(["__MACOSX/fan/train/._a.wav", "fan/readme.wav"]), "no TYPE/train"),
    ],
)
def test_a_broken_zip_is_fetched_again(spoil, message, zenodo, tmp_path):
    key = 3678171, "dev_data_fan.zip"
    whole = zenodo.files[key]
    zenodo.files[key] = spoil(whole)
    refused(zenodo, tmp_path, CORRUPT, message, **FAN)
    assert tree(tmp_path) == set()
    zenodo.files[key] = whole
    fetch(zenodo, tmp_path)
    assert tree(tmp_path) == everything(zenodo) and not leftovers(tmp_path)


def test_a_hostile_zip_writes_its_clips_alone(zenodo, tmp_path):
    evil = "../evil fan/train/../../../evil.wav /evil C:/evil fan\\..\\..\\evil fan/train/..wav".split()
    zenodo.files[3678171, "dev_data_fan.zip"] = packed([CLIP, *evil])
    fetch(zenodo, tmp_path / "data", **FAN)
    assert tree(tmp_path / "data") == {CLIP}
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and not Path("/evil").exists()


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("function", "replacement", "message"),
    [
        ("disk_usage", lambda folder: SimpleNamespace(free=10_000), "GB needed and 1e-05 GB free"),
        ("copyfileobj", full, "the disk is full"),
    ],
)
def test_a_disk_that_fills_up(function, replacement, message, zenodo, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, function, replacement)
        refused(zenodo, tmp_path, FULL, message, **FAN)
    assert tree(tmp_path) == set() and leftovers(tmp_path) == ["dev_data_fan.zip"]
    fetch(zenodo, tmp_path, **FAN)
    assert zenodo.asked["dev_data_fan.zip"] == 1, "the zip was kept"


@pytest.mark.parametrize("place", ["data", "data/.download", "data/fan"])
def test_a_folder_that_cannot_be_written(place, zenodo, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("in the way")
    refused(zenodo, tmp_path / "data", UNWRITABLE, f"{place}.*cannot be written", **FAN)
    assert (tmp_path / place).read_text() == "in the way"


def test_the_command_resumes_after_a_kill(zenodo, tmp_path):
    command = [*COMMAND, "download", tmp_path, "--parts", "dev", "--types", "fan,ToyCar"]
    command += ["--mirror", zenodo.url, "--trust-mirror"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    zenodo.faults["dev_data_ToyCar.zip"] = ["stall"]
    process = subprocess.Popen(command, **pipes)
    assert zenodo.stalled.wait(60)
    process.kill()
    process.communicate()
    zenodo.resume.set()
    assert "tmp" in "".join(leftovers(tmp_path)), "half a file is there, under another name"
    assert {name.split("/")[0] for name in tree(tmp_path)} == {"fan"}
    completed = subprocess.run(command, **pipes | {"timeout": 120})
    assert completed.returncode == 0 and completed.stderr == ""
    assert "ToyCar       01       3      4" in completed.stdout and not leftovers(tmp_path)
    assert zenodo.asked == {"dev_data_fan.zip": 1, "dev_data_ToyCar.zip": 2}
