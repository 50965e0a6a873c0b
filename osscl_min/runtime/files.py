"""Errors that a user can act on, files that are never half-written, and the provenance of results."""

from __future__ import annotations

import csv
import errno
import json
import os
import platform
import re
import secrets
import stat
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]  # of the project
SOUND_SUFFIXES = (".wav", ".flac")
# What an output never replaces: sounds, checkpoints, archives, whatever their suffix says.
_PRECIOUS_SUFFIXES = {*SOUND_SUFFIXES, ".mp3", ".ogg", ".aif", ".aiff", ".m4a", ".pt", ".pth", ".zip", ".npy"}
_PRECIOUS_STARTS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM", b"PK\x03\x04", b"\x93NUMPY")


class UserError(Exception):
    """A user's mistake in one line: what, where, what to do; the command line ends with `exit_status`."""

    def __init__(self, message: str, exit_status: int = 2):
        super().__init__(message)
        self.exit_status = exit_status


def first_lines(lines: Sequence[str], most: int) -> list[str]:
    """The first lines of a list, indented, and one that counts the rest."""
    rest = [f"  ... and {len(lines) - most} more"] if len(lines) > most else []
    return [f"  {line}" for line in lines[:most]] + rest


def printable(path: Path | str) -> str:
    """A path as valid UTF-8 text, for messages and tables."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def safe_name(text: str) -> str:
    """A text from outside as part of a file name; a text that must change gets a digest against clashes."""
    name = re.sub(r"[^\w .+-]", "_", text).strip(" .")
    if name and name == text and len(os.fsencode(name)) <= 100:
        return name
    return f"{name[:40]}-{sha256(os.fsencode(text)).hexdigest()[:8]}"


def walk(root: Path | str) -> Iterator[tuple[Path, str]]:
    """Every visible file under a folder, and why it cannot be used ("" if it can); then unreadable folders.

    Each real folder is entered once, so loops of links end; pipes and devices are never opened.
    """
    entered, unreadable = set(), []
    for folder, folders, names in os.walk(root, onerror=unreadable.append, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            yield path, _problem(path)
    for error in unreadable:
        yield Path(error.filename), f"this folder cannot be read ({error.strerror})"


def _problem(path: Path) -> str:
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not regular:
        return "not a regular file"
    return "" if printable(path) == str(path) else "its name is not UTF-8"


def check_output(path: Path, inputs: Iterable[str], suffixes: Sequence[str] = ()) -> None:
    """Refuse to write a result over an input, a sound, a checkpoint, an archive, a folder or a special file,
    or under a name that ends in none of `suffixes` (any will do without)."""
    suffix = path.suffix.lower()
    try:
        exists = path.exists()
        if suffixes and suffix not in suffixes:
            reason = f"its name must end in {' or '.join(suffixes)}"
        elif exists and not path.is_file():
            reason = "it is not a regular file"
        elif exists and any(os.path.exists(name) and path.samefile(name) for name in inputs):
            reason = "it is one of the inputs"
        elif suffix in _PRECIOUS_SUFFIXES or (exists and _first_bytes(path).startswith(_PRECIOUS_STARTS)):
            reason = "it has the name or content of a sound, checkpoint or archive"
        else:
            return
    except (OSError, ValueError) as error:
        reason = error
    raise UserError(f"cannot write {printable(path)}: {reason}")


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


@contextmanager
def replacing(path: Path | str, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` ("w" or "wb"); rename it to `path` if the block succeeds.

    If it fails, an existing file stays as it is. A file that cannot be written is a UserError; the block's
    other errors pass through.
    """
    path = Path(path)
    temporary = path.parent / f".{secrets.token_hex(8)}.part"
    text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # reading and writing name no file; only writing fills a disk
            ours = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        else:
            ours = str(error.filename) in map(str, (temporary, path, *path.parents))
        if not ours:
            raise
        raise UserError(f"cannot write {printable(path)}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # renamed, or never made
            temporary.unlink()


@contextmanager
def locked(folder: Path | str, what: str) -> Iterator[None]:
    """Lock a folder until the block ends; a UserError that names the work, `what`, if it is locked."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
    except OSError as error:
        raise UserError(f"cannot write {printable(folder)}: {error.strerror}") from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"{printable(folder)}: another process is {what} here; wait, or choose another folder"
                ) from error
        yield


def write_text(path: Path | str, text: str) -> None:
    """Write `text` in UTF-8; see `replacing`."""
    with replacing(path) as file:
        file.write(text)


class _Record(dict):
    """A JSON object that names its file where an entry is missing."""

    def __init__(self, entries: dict[str, Any], path: Path | str):
        super().__init__(entries)
        self.path = path

    def __missing__(self, key: str) -> None:
        raise UserError(f"{printable(self.path)}: damaged, no entry {key!r} in it")


def read_json(path: Path | str) -> dict[str, Any]:
    """The object in a JSON file; an unreadable file, other content or a missing entry is a UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_hook=lambda entries: _Record(entries, path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{printable(path)}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{printable(path)}: not a readable JSON object")
    return content


def write_json(path: Path | str, content: Any) -> None:
    """Write `content` as indented JSON; see `replacing`."""
    with replacing(path) as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")


def read_rows(path: Path | str) -> Iterator[tuple[str, list[str]]]:
    """The non-empty rows of a CSV file in UTF-8: "FILE, line N" for messages, and the stripped cells."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{printable(path)}: not a regular file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                place, cells = f"{printable(path)}, line {reader.line_num}", [cell.strip() for cell in row]
                if any("\0" in cell for cell in cells):
                    raise UserError(f"{place}: holds a NUL byte, so this is not a text file")
                if any(cells):
                    yield place, cells
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(path)}: not in UTF-8; save it as CSV in UTF-8") from error
    except (csv.Error, OSError) as error:
        raise UserError(f"{printable(path)}: cannot be read as CSV ({error})") from error


def read_csv(path: Path | str, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its header, which must have `columns`."""
    rows = read_rows(path)
    _, header = next(rows, ("", []))
    if missing := [name for name in columns if name not in header]:
        raise UserError(f"{printable(path)}: no column {', '.join(missing)}")
    records = []
    for place, cells in rows:
        if len(cells) != len(header):
            raise UserError(f"{place}: {len(cells)} cells, but the header has {len(header)}")
        records.append(dict(zip(header, cells, strict=True)))
    return records


def write_csv(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a header and rows as CSV, floats with every digit; see `replacing`."""
    with replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def provenance(device: Any = None) -> dict[str, str]:
    """What produced a result: commit, time (UTC), versions, device (a torch.device) and processor."""
    import numpy
    import torch

    describe = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty= with changes"]
    try:
        commit = subprocess.check_output(describe, cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "not a git checkout"
    processor = _search(r"model name\s*: (.+)", "/proc/cpuinfo") or platform.processor() or platform.machine()
    return {
        "commit": commit,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": torch.cuda.get_device_name(device) if "cuda" in str(device) else "cpu",
        "processor": f"{processor}, {os.cpu_count()} cores",
    }


def peak_memory_mb() -> float | None:
    """The largest resident memory of this process so far in MB; None if the system does not tell."""
    # getrusage would count the parent's memory at the start of this process
    peak = _search(r"VmHWM:\s+(\d+) kB", "/proc/self/status")
    return peak and round(int(peak) / 1e3, 1)


def _search(pattern: str, path: str) -> str | None:
    try:
        return re.search(pattern, Path(path).read_text())[1]
    except (OSError, TypeError):  # not Linux
        return None
