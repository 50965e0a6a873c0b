"""Downloading, against a server on this machine that answers like Zenodo and fails on demand."""

import hashlib
import io
import json
import shutil
import subprocess
import threading
import zipfile
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import COMMAND, environment

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


def packed(names, samples=1600):
    """A zip with a short sound for each name."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            sound = io.BytesIO()
            noise = np.random.default_rng(list(name.encode())).integers(-9000, 9000, samples, dtype=np.int16)
            soundfile.write(sound, noise, 16000, format="WAV", subtype="PCM_16")
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
    """Records and files; `faults[name]` is a list of what happens to the next requests for a file."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.faults, self.checksums, self.asked = files, {}, {}, Counter()
        self.records = {}  # number -> what is answered instead of the record
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
        server, (*_, record) = self.server, self.path.split("/")[:4]
        name = self.path.split("/")[5] if "/files/" in self.path else record
        server.asked[name] += 1
        fault = server.faults[name].pop(0) if server.faults.get(name) else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if name == record:
            listed = {"files": [self.entry(*key) for key in server.files if key[0] == int(record)]}
            body = server.records.get(record, json.dumps(listed).encode())
        else:
            body = server.files[int(record), name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault else body)
        if fault == "stall":
            server.stalled.set()
            server.resume.wait(60)

    def entry(self, record, name):
        content = self.server.files[record, name]
        checksum = self.server.checksums.get(name, hashlib.md5(content).hexdigest())
        url = f"https://zenodo.org/api/records/{record}/files/{name}/content"
        return {"key": name, "size": len(content), "checksum": f"md5:{checksum}", "links": {"self": url}}

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
    names = {"eval_data_list.csv"}
    for (_, name), content in zenodo.files.items():
        if name.endswith(".zip"):
            names |= set(zipfile.ZipFile(io.BytesIO(content)).namelist())
    return names


def leftovers(folder):
    return [p.name for p in (folder / ".download").iterdir() if p.suffix != ".json"]


def test_everything_arrives_and_is_counted(zenodo, tmp_path):
    text = fetch(zenodo, tmp_path / "data", jobs=3)
    assert tree(tmp_path / "data") == everything(zenodo)
    archive = zipfile.ZipFile(io.BytesIO(zenodo.files[3841772, "eval_data_test_fan.zip"]))
    name = "fan/test/id_01_00000002.wav"
    assert (tmp_path / "data" / name).read_bytes() == archive.read(name)
    assert not leftovers(tmp_path / "data")
    clips = scan(tmp_path / "data").clips
    assert {clip.anomaly for clip in clips if clip.machine_id == "05" and clip.split == "test"} == {0, 1}
    assert "fan          00       3      4  not checked" in text
    assert "ToyCar       05       3      3  as expected" in text
    asked = Counter(zenodo.asked)
    assert fetch(zenodo, tmp_path / "data") == text
    assert zenodo.asked == asked, "nothing is asked for again"


def test_the_inventory_tells_what_differs(zenodo, tmp_path):
    text = fetch(zenodo, tmp_path)
    assert "fan          02       0      0  DIFFERS, no train clips" in text
    assert "development test" not in text, "only known for all types together"
    (tmp_path / "fan" / "test" / "id_01_00000001.wav").unlink()
    text = module.inventory(tmp_path, module.PARTS, module.TYPES)
    assert "fan          01       3      2  DIFFERS, 3 expected" in text
    assert "development test: 8 clips, DIFFERS, 10868 expected" in text
    assert "fan          02       0      0  not checked" in module.inventory(tmp_path, ("dev",), TYPES)


def test_parts_and_types_can_be_chosen(zenodo, tmp_path):
    fetch(zenodo, tmp_path, **FAN)
    assert set(zenodo.asked) == {"3678171", "dev_data_fan.zip"}
    with pytest.raises(UserError, match="cannot download fans; choose from fan,pump"):
        fetch(zenodo, tmp_path, types=("fans",))
    text = fetch(zenodo, tmp_path / "labels", parts=("labels",))
    assert "no inventory" in text and tree(tmp_path / "labels") == {"eval_data_list.csv"}


def test_only_what_is_damaged_is_fetched_again(zenodo, tmp_path):
    fetch(zenodo, tmp_path)
    zenodo.asked.clear()
    (tmp_path / "fan" / "test" / "id_01_00000001.wav").write_bytes(b"short")
    fetch(zenodo, tmp_path)
    assert zenodo.asked == {"3841772": 1, "eval_data_test_fan.zip": 1}
    assert (tmp_path / "fan" / "test" / "id_01_00000001.wav").stat().st_size > 5


@pytest.mark.parametrize("fault", ["cut", 503])
@pytest.mark.parametrize("name", ["dev_data_fan.zip", "3678171"])
def test_a_passing_fault_is_overcome(fault, name, zenodo, tmp_path):
    zenodo.faults[name] = [fault, fault]
    fetch(zenodo, tmp_path)
    assert zenodo.asked[name] == 3
    assert tree(tmp_path) == everything(zenodo) and not leftovers(tmp_path)


def refused(zenodo, folder, status, message, **options):
    with pytest.raises(UserError, match=message) as caught:
        fetch(zenodo, folder, **options)
    assert caught.value.exit_status == status
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [404, 503, "cut"])
def test_a_file_that_cannot_be_fetched(fault, zenodo, tmp_path):
    zenodo.faults["dev_data_fan.zip"] = [fault] * 99
    reason = rf"cannot be fetched \({'ChunkedEncodingError' if fault == 'cut' else fault}.* \(1 of 7 files"
    refused(zenodo, tmp_path, NETWORK, f"dev_data_fan.zip/content: {reason}")
    missing = {name for name in everything(zenodo) if "fan" in name and "id_00" in name}
    assert missing and tree(tmp_path) == everything(zenodo) - missing, "the other files are there"
    assert not leftovers(tmp_path)
    zenodo.faults.clear()
    zenodo.asked.clear()
    fetch(zenodo, tmp_path)
    assert zenodo.asked == {"3678171": 1, "dev_data_fan.zip": 1}
    assert tree(tmp_path) == everything(zenodo)


def test_no_network_and_no_record(zenodo, tmp_path):
    zenodo.faults["3678171"] = [404] * 9
    refused(zenodo, tmp_path / "a", NETWORK, "/api/records/3678171: cannot be fetched .404")
    zenodo.faults.clear()
    del zenodo.files[3841772, "eval_data_test_fan.zip"]
    refused(zenodo, tmp_path / "b", NETWORK, "3841772: not a record with the files eval_data_test_fan.zip")
    nowhere = {"mirror": "http://127.0.0.1:9"}
    refused(zenodo, tmp_path / "c", NETWORK, "ConnectionError.*check the network", **nowhere)


def test_the_published_checksums_are_pinned(zenodo, tmp_path):
    assert len(module.MD5) == 18 and all(len(bytes.fromhex(value)) == 16 for value in module.MD5.values())
    zips = {pattern.format(name) for _, pattern in module.PARTS.values() for name in module.TYPES}
    assert zips - module.MD5.keys() == {"eval_data_list.csv"}
    options = {"trust_mirror": False, **FAN}
    refused(zenodo, tmp_path, CHECKSUM, "dev_data_fan.zip/content.*the published one", **options)
    assert zenodo.asked == {"3678171": 1}, "nothing that would be refused is fetched"
    zenodo.checksums["dev_data_fan.zip"] = module.MD5["dev_data_fan.zip"]  # a server that tells a lie
    refused(zenodo, tmp_path, CHECKSUM, "wrong checksum", **options)
    assert tree(tmp_path) == set() and not leftovers(tmp_path)


ENTRY = {"key": "dev_data_fan.zip", "size": 9, "checksum": "md5:0", "links": {"self": "https://zenodo.org/x"}}


BROKEN = [
    "[" * 100_000,
    '{"files": ' * 10_000,
    "[]",
    "5",
    "null",
    '{"files": null}',
    '{"files": [5]}',
    "\xff",
]
BROKEN += ['{"files": [{"key": []}]}', json.dumps({"files": [ENTRY]}).replace("9", "1e999")]
ODD = ({"size": "many"}, {"links": {"self": 5}}, {"links": []})


@pytest.mark.parametrize("record", [*BROKEN, *(json.dumps({"files": [ENTRY | odd]}) for odd in ODD)])
def test_an_odd_record_is_one_line(record, zenodo, tmp_path):
    zenodo.records["3678171"] = record.encode("latin-1")
    refused(zenodo, tmp_path, NETWORK, "3678171: not a record with the files dev_data_fan.zip", **FAN)


@pytest.mark.parametrize("before", ["fetching", "unpacking"])
def test_too_little_space_is_told_first(before, zenodo, tmp_path, monkeypatch):
    content = zenodo.files[3678171, "dev_data_fan.zip"]
    clips = sum(item.file_size for item in zipfile.ZipFile(io.BytesIO(content)).infolist())
    needed, free = (2 * len(content), [10_000]) if before == "fetching" else (clips, [10**9, clips - 1])
    answers = iter(free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=next(answers)))
    refused(zenodo, tmp_path, FULL, f"{needed / 1e9:.3g} GB needed and {free[-1] / 1e9:.3g} GB free", **FAN)
    assert tree(tmp_path) == set()
    assert leftovers(tmp_path) == ([] if before == "fetching" else ["dev_data_fan.zip"])


CLIP = "fan/train/normal_id_00_00000000.wav"


def bomb():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CLIP, bytes(20_000_000))
    return content.getvalue()


def damaged(content):
    """A zip whose last clip has another byte."""
    content = bytearray(content)
    content[zipfile.ZipFile(io.BytesIO(content)).infolist()[-1].header_offset + 1500] ^= 0xFF
    return bytes(content)


HOSTILE = {
    "truncated": (lambda content: content[: len(content) // 2], "a corrupt zip"),
    "damaged clip": (damaged, "a corrupt zip"),
    "no clips": (lambda _: packed(["__MACOSX/fan/train/._a.wav", "fan/readme.wav"]), "no TYPE/train"),
    "bomb": (lambda _: bomb(), "not unpacked, its clips would take 20 MB, the zip 0.0"),
    **{
        name: (lambda _, name=name: packed([CLIP, name]), "evil.*would leave the folder")
        for name in ("../evil", "fan/train/../../../evil.wav", "/evil", "C:/evil", "fan\\..\\..\\evil")
    },
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_zip_leaves_nothing(kind, zenodo, tmp_path):
    key = 3678171, "dev_data_fan.zip"
    whole, (spoil, message) = zenodo.files[key], HOSTILE[kind]
    zenodo.files[key] = spoil(whole)
    refused(zenodo, tmp_path / "data", CORRUPT, message, **FAN)
    assert tree(tmp_path / "data") == set() and leftovers(tmp_path / "data") == ["dev_data_fan.zip"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and not Path("/evil").exists()
    zenodo.files[key] = whole
    fetch(zenodo, tmp_path / "data")
    assert tree(tmp_path / "data") == everything(zenodo) and not leftovers(tmp_path / "data")


def test_a_disk_that_fills_up(zenodo, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "copyfileobj", full)
        refused(zenodo, tmp_path, FULL, "the disk is full", **FAN)
    assert tree(tmp_path) == set() and leftovers(tmp_path) == ["dev_data_fan.zip"]
    fetch(zenodo, tmp_path, **FAN)
    assert zenodo.asked["dev_data_fan.zip"] == 1, "the zip was kept"


@pytest.mark.parametrize("place", ["data", "data/.download", "data/fan"])
def test_a_folder_that_cannot_be_written(place, zenodo, tmp_path):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("in the way")
    refused(zenodo, tmp_path / "data", UNWRITABLE, f"{place}.*cannot be written", **FAN)
    assert (tmp_path / place).read_text() == "in the way"


def osscl(zenodo, *options):
    command = [*COMMAND, "download", *map(str, options), "--mirror", zenodo.url, "--trust-mirror"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment(NO_COLOR="1"))


def test_a_killed_run_resumes(zenodo, tmp_path):
    zenodo.faults["dev_data_ToyCar.zip"] = ["stall"]
    process = osscl(zenodo, tmp_path, "--types", "fan,ToyCar", "--jobs", "1")
    assert zenodo.stalled.wait(60)
    process.kill()
    process.communicate()
    zenodo.resume.set()
    assert "tmp" in "".join(leftovers(tmp_path)), "half a file is there, under another name"
    assert tree(tmp_path) == {
        name for name in everything(zenodo) if name.startswith("fan") and "id_00" in name
    }
    fetch(zenodo, tmp_path)
    assert zenodo.asked["dev_data_fan.zip"] == 1
    assert tree(tmp_path) == everything(zenodo) and not leftovers(tmp_path)


def test_the_command(zenodo, tmp_path):
    process = osscl(zenodo, tmp_path / "data", "--parts", "dev,labels", "--types", "fan,ToyCar")
    text, errors = process.communicate()
    assert process.returncode == 0 and errors == ""
    assert "fan          00       3      4  not checked" in text
    zenodo.files[3678171, "dev_data_fan.zip"] = packed(["../evil"])
    process = osscl(zenodo, tmp_path / "other", "--parts", "dev", "--types", "fan")
    text, errors = process.communicate()
    assert process.returncode == CORRUPT
    assert errors.startswith("osscl: ") and errors.count("\n") == 1
