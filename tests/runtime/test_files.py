"""Files are written whole or not at all, and only where they may be."""

import errno
import os
import stat

import pytest
from conftest import refused

from osscl_min.runtime import files
from osscl_min.runtime.files import printable, replacing


def test_a_block_that_fails_leaves_the_old_file_and_its_own_error(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with replacing(path) as file:
        file.write("first")
    errors = ZeroDivisionError(), BrokenPipeError(errno.EPIPE, "Broken pipe"), FileNotFoundError(2, "", "x")
    for error in errors:
        with pytest.raises(type(error)), replacing(path) as file:
            file.write("second")
            raise error
    assert path.read_text() == "first" and os.listdir(path.parent) == ["table.csv"]


@pytest.mark.parametrize("mask", [0o077, 0o027])
def test_replacing_respects_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "secret", "wb"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o666 & ~mask


def test_replacing_says_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    places = {
        "file/run/out.csv": "Not a directory",
        "folder": "Is a directory",
        "x" * 300: "File name too long",
    }
    for name, reason in places.items():
        with refused(f"cannot write .*: {reason}"), replacing(tmp_path / name):
            pass
    with refused("cannot write .*full: No space left"), replacing(tmp_path / "full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_folder_is_locked_for_one(tmp_path):
    for _ in range(2):
        with files.locked(tmp_path / "run", "training"):
            with refused("another process is training here"):
                files.locked(tmp_path / "run", "training").__enter__()


def test_names_from_outside_stay_in_their_folder_and_apart():
    names = ["fan", "ToyCar", "../../escaped", "..", ".", "", "/etc/passwd", "a/b", "a_b", "a\0b", "x" * 400]
    names += ["caf\udce9", "con\nline", ".hidden"]
    safe = [files.safe_name(name) for name in names]
    assert safe[:2] == names[:2] and len(set(safe)) == len(names)
    for name in safe:
        assert name.isprintable() and not set(name) & set("/\\\0") and not name.startswith(".")
        assert 0 < len(os.fsencode(name)) <= 120 and printable(name) == name


def test_csv_comes_back_and_hostile_json_is_one_line(tmp_path):
    path = tmp_path / "a.csv"
    files.write_csv(path, ["file", "score"], [["x, y.wav", 0.1 + 0.2]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert files.read_csv(path) == [{"file": "x, y.wav", "score": repr(0.1 + 0.2)}]
    for content, message in (("[" * 100_000, "JSON file"), ("[1]", "JSON object")):
        path.write_text(content)
        with refused(f"not a readable {message}"):
            files.read_json(path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "file").touch()
    reason = "this folder cannot be read (Not a directory)"
    assert list(files.walk(tmp_path / "file")) == [(tmp_path / "file", reason)]
