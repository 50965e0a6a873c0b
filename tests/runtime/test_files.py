"""Files are written whole or not at all, and only where they may be."""

import errno
import os
import stat

import pytest

from osscl_min.runtime.files import (
    UserError,
    check_output,
    locked,
    printable,
    read_csv,
    read_json,
    replacing,
    safe_name,
    walk,
    write_csv,
)


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with replacing(path) as file:
        file.write("first")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write("second")
        1 / 0  # noqa: B018
    assert path.read_text() == "first" and os.listdir(path.parent) == ["table.csv"]


@pytest.mark.parametrize("mask", [0o077, 0o027])
def test_replacing_respects_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "secret", "wb") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o666 & ~mask


def test_replacing_lets_errors_of_other_files_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(tmp_path / "out"):
        open(tmp_path / "elsewhere")
    with pytest.raises(BrokenPipeError), replacing(tmp_path / "out"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert not os.listdir(tmp_path)


def test_replacing_says_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, reason in (
        (tmp_path / "file" / "run" / "out.csv", "Not a directory"),
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=f"cannot write .*: {reason}"), replacing(path) as file:
            file.write("x")
    with pytest.raises(UserError, match="cannot write .*full: No space left"), replacing(tmp_path / "full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_folder_is_locked_for_one(tmp_path):
    with locked(tmp_path / "run", "training"):
        with pytest.raises(UserError, match="another process is training here"):
            with locked(tmp_path / "run", "training"):
                pass
    with locked(tmp_path / "run", "training"):
        pass


def test_names_from_outside_stay_in_their_folder_and_apart():
    names = ["fan", "ToyCar", "../../escaped", "..", ".", "", "/etc/passwd", "a/b", "a_b", "a\0b", "x" * 400,
             "caf\udce9", "con\nline", ".hidden"]  # fmt: skip
    safe = [safe_name(name) for name in names]
    assert safe[:2] == names[:2] and len(set(safe)) == len(names)
    for name in safe:
        assert name.isprintable() and not set(name) & set("/\\\0") and not name.startswith(".")
        assert 0 < len(os.fsencode(name)) <= 120 and printable(name) == name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfea\0", "not in UTF-8"),
        ("caf\xe9,1\n".encode("latin-1"), "not in UTF-8"),
        (b"file,score\nx.wav,0,3\n", "line 2: 3 cells, but the header has 2"),
        (b"file\nx.wav\n", "no column score"),
        (None, "cannot be read"),
    ],
)
def test_csv_mistakes_have_a_place(tmp_path, content, message):
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_csv(tmp_path / "table.csv", ["file", "score"])


def test_csv_and_json_come_back(tmp_path):
    write_csv(tmp_path / "a.csv", ["file", "score"], [["x, y.wav", 0.1 + 0.2]])
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    assert read_csv(tmp_path / "a.csv") == [{"file": "x, y.wav", "score": repr(0.1 + 0.2)}]
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a readable JSON file"):
        read_json(tmp_path / "deep.json")


def test_outputs_never_replace_what_is_precious(tmp_path):
    (tmp_path / "in.csv").write_text("x")
    (tmp_path / "hidden.csv").write_bytes(b"RIFF....WAVE")
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("in.csv", "hidden.csv", "pipe.csv", "new.wav", "new.pt", ".", "x" * 300 + ".csv"):
        with pytest.raises(UserError, match="cannot write"):
            check_output(tmp_path / name, [tmp_path / "in.csv"])
    with pytest.raises(UserError, match="must end in .png"):
        check_output(tmp_path / "new.csv", suffixes=[".png"])
    assert check_output(tmp_path / "new.csv") == tmp_path / "new.csv"


def test_a_walk_enters_each_folder_once_and_opens_no_pipe(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.wav").write_text("")
    (tmp_path / "a" / ".hidden.wav").write_text("")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "a" / "pipe.wav")
    open(os.fsencode(tmp_path) + b"/a/caf\xe9.wav", "w").close()
    reasons = {printable(path.name): reason for path, reason in walk(tmp_path)}
    assert reasons == {
        "x.wav": "",
        "pipe.wav": "not a regular file",
        "caf\\xe9.wav": "its name is not UTF-8",
    }
