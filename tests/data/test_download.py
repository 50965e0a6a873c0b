"""Downloading, against a server on this machine that answers like Zenodo and fails on demand."""

import io
import threading
import zipfile
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
from conftest import contents, noise, refused

from osscl_min.data import download as module
from osscl_min.data.clips import scan
from osscl_min.data.download import CHECKSUM, CORRUPT, FULL, NETWORK, PARTS, UNWRITABLE, download

IDS = {"fan": ("00", "01"), "ToyCar": ("01", "05")}  # one of the development set, one of the evaluation set
FAN = {"parts": ("dev",), "types": ("fan",)}  # one file


def packed(names, seconds=0.1):
    """A zip with a sound for each name."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            sound = io.BytesIO()
            soundfile.write(sound, noise(list(name.encode()), seconds), 16_000, format="WAV")
            archive.writestr(name, sound.getvalue())
    return content.getvalue()


def miniature(ids, clips, seconds=0.1):
    """The four records, (record, file) -> content: `clips` of a kind, and one more without a known truth."""
    files, labels = {}, []
    for kind, (development, evaluation) in ids.items():
        names = {
            "dev": [f"train/normal_id_{development}_{n:08d}" for n in range(clips)]
            + [f"test/{t}_id_{development}_{n:08d}" for t in ("normal", "anomaly") for n in range(clips)],
            "eval-train": [f"train/normal_id_{evaluation}_{n:08d}" for n in range(clips)],
            "eval-test": [f"test/id_{evaluation}_{n:08d}" for n in range(clips + 1)],
        }
        for part in names:
            record, pattern = PARTS[part]
            zipped = packed([f"{kind}/{name}.wav" for name in names[part]], seconds)
            files[record, pattern.format(kind)] = zipped
        labels += [kind, *(f"id_{evaluation}_{n:08d}.wav,x_{n}.wav,{n % 2}" for n in range(clips + 1))]
    files[PARTS["labels"]] = "\n".join([*labels, ""]).encode()
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
    with Zenodo.serving(miniature(IDS, 2)) as server:
        yield server


def fetch(zenodo, folder, **options):
    return download(folder, **{"types": tuple(IDS), "mirror": zenodo.url, "trust_mirror": True, **options})


def tree(folder):
    """Every file of a folder, without the notes in .download."""
    return {name for name in contents(folder) if not name.startswith(".download")}


def everything(zenodo):
    zips = [content for (_, name), content in zenodo.files.items() if name.endswith(".zip")]
    return {"eval_data_list.csv"}.union(*(zipfile.ZipFile(io.BytesIO(zip)).namelist() for zip in zips))


def leftovers(folder):
    return [p.name for p in (folder / ".download").iterdir() if p.suffix != ".json"]


def test_everything_arrives_and_is_counted(zenodo, tmp_path):
    data = tmp_path / "data"
    half = data / ".download" / "tmp123"  # of a call that was killed
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a zip")
    text = fetch(zenodo, data)
    assert tree(data) == everything(zenodo) and not leftovers(data)
    archive = zipfile.ZipFile(io.BytesIO(zenodo.files[3841772, "eval_data_test_fan.zip"]))
    name = "fan/test/id_01_00000002.wav"
    assert (data / name).read_bytes() == archive.read(name)
    clips = scan(data).clips
    assert {clip.anomaly for clip in clips if clip.machine_id == "05" and clip.split == "test"} == {0, 1}
    assert "fan          00       2      4" in text and "ToyCar       05       2      3" in text
    asked = Counter(zenodo.asked)
    assert fetch(zenodo, data) == text
    assert zenodo.asked == asked, "nothing is asked for again"
    (data / name).write_bytes(b"short")
    fetch(zenodo, data)
    assert zenodo.asked - asked == {"eval_data_test_fan.zip": 1}
    assert (data / name).read_bytes() == archive.read(name)


def test_the_command_takes_parts_and_types(zenodo, tmp_path, osscl):
    command = ["download", tmp_path, "--mirror", zenodo.url, "--trust-mirror", "--types", "fan"]
    status, out, _ = osscl(*command, "--parts", "dev")
    assert status == 0 and "fan          00       2      4" in out
    assert set(zenodo.asked) == {"dev_data_fan.zip"}
    status, out, _ = osscl(*command[:1], tmp_path / "labels", *command[2:], "--parts", "labels")
    assert "no clips to count" in out and tree(tmp_path / "labels") == {"eval_data_list.csv"}


@pytest.mark.parametrize("fault", ["cut", 503])
def test_a_passing_fault_is_overcome(fault, zenodo, tmp_path):
    zenodo.faults["dev_data_fan.zip"] = [fault, fault]
    fetch(zenodo, tmp_path)
    assert zenodo.asked["dev_data_fan.zip"] == 3
    assert tree(tmp_path) == everything(zenodo) and not leftovers(tmp_path)


@pytest.mark.parametrize("fault", [404, "cut"])
def test_a_file_that_cannot_be_fetched(fault, zenodo, tmp_path):
    zenodo.faults["eval_data_train_fan.zip"] = [fault] * 99
    reason = rf"cannot be fetched \({'ChunkedEncodingError' if fault == 'cut' else fault}"
    with refused(f"3727685/files/eval_data_train_fan.zip/content: {reason}", NETWORK):
        fetch(zenodo, tmp_path)
    assert tree(tmp_path) and not leftovers(tmp_path)
    with refused("ConnectionError.*check the network", NETWORK):
        fetch(zenodo, tmp_path, mirror="http://127.0.0.1:9")
    zenodo.faults.clear()
    fetch(zenodo, tmp_path)
    assert zenodo.asked["dev_data_fan.zip"] == 1 and tree(tmp_path) == everything(zenodo)


def test_the_published_checksums_are_pinned(zenodo, tmp_path):
    assert len(module.MD5) == 18 and all(len(bytes.fromhex(value)) == 16 for value in module.MD5.values())
    zips = {pattern.format(name) for _, pattern in module.PARTS.values() for name in module.TYPES}
    assert zips - module.MD5.keys() == {"eval_data_list.csv"}
    with refused("dev_data_fan.zip/content: wrong checksum", CHECKSUM):
        fetch(zenodo, tmp_path, trust_mirror=False, **FAN)
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
    with refused(message, CORRUPT):
        fetch(zenodo, tmp_path, **FAN)
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
        with refused(message, FULL):
            fetch(zenodo, tmp_path, **FAN)
    assert tree(tmp_path) == set() and leftovers(tmp_path) == ["dev_data_fan.zip"]
    fetch(zenodo, tmp_path, **FAN)
    assert zenodo.asked["dev_data_fan.zip"] == 1, "the zip was kept"


@pytest.mark.parametrize("place", ["data", "data/.download", "data/fan"])
def test_a_folder_that_cannot_be_written(place, zenodo, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("in the way")
    with refused(f"{place}.*cannot be written", UNWRITABLE):
        fetch(zenodo, tmp_path / "data", **FAN)
    assert (tmp_path / place).read_text() == "in the way"
