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
    """A user's mistake in one line: what, where, what to do. The command line prints it and exits with
    `exit_status`."""

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
    """A text from outside, such as a machine type, as part of a file name.

    Letters, digits, spaces and ``_.+-`` stay; a changed name gets a digest, so that different texts never
    share a file.
    """
    name = re.sub(r"[^\w .+-]", "_", text).strip(" .")
    if name and name == text and len(os.fsencode(name)) <= 100:
        return name
    return f"{name[:40]}-{sha256(os.fsencode(text)).hexdigest()[:8]}"


def walk(root: Path | str) -> Iterator[tuple[Path, str]]:
    """Every visible file under a folder, sorted, with the reason why it cannot be used ("" if it can).

    Each real folder is entered once, so loops of links end; pipes and devices are never opened.
    """
    entered = set()

    def enter(folder: Path) -> Iterator[tuple[Path, str]]:
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            yield folder, f"this folder cannot be read ({error.strerror})"
            return
        if (status.st_dev, status.st_ino) in entered:
            return
        entered.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = folder / entry.name
            try:
                mode = path.stat().st_mode
            except OSError as error:
                yield path, f"cannot be read ({error.strerror})"
                continue
            if stat.S_ISDIR(mode):
                yield from enter(path)
            elif not stat.S_ISREG(mode):
                yield path, "not a regular file"
            elif printable(path) != str(path):
                yield path, "its name is not UTF-8"
            else:
                yield path, ""

    return enter(Path(root))


def check_output(path: Path | str, inputs: Iterable[Path | str] = (), suffixes: Sequence[str] = ()) -> Path:
    """The path of a result, unless writing it would replace an input, a sound, a checkpoint, an archive, a
    folder or a special file, or its suffix is not one of `suffixes` (any, if there are none)."""
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"cannot write {printable(path)}: its name must end in {' or '.join(suffixes)}")
    try:
        precious = path.suffix.lower() in _PRECIOUS_SUFFIXES
        if path.exists():
            if not path.is_file():
                raise UserError(f"cannot write {printable(path)}: it is not a regular file")
            if any(os.path.exists(name) and os.path.samefile(name, path) for name in map(os.fspath, inputs)):
                raise UserError(f"cannot write {printable(path)}: it is one of the inputs")
            with open(path, "rb") as file:
                precious |= file.read(8).startswith(_PRECIOUS_STARTS)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {printable(path)}: {error}") from error
    if precious:
        raise UserError(
            f"cannot write {printable(path)}: it has the name or content of a sound, checkpoint or archive"
        )
    return path


@contextmanager
def replacing(path: Path | str, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` ("w" or "wb"); rename it to `path` if the block succeeds.

    An existing file stays whole until then, and for good if the block fails.

    Raises
    ------
    UserError
        If the file cannot be written or the disk is full. Other errors of the block pass through.
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
    """The rows of a CSV file in UTF-8: "FILE, line N" for messages, and the cells without outer spaces.

    Empty rows and a byte-order mark are dropped. A file that is not CSV in UTF-8 is a UserError.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                place, cells = f"{printable(path)}, line {reader.line_num}", [cell.strip() for cell in row]
                if any("\0" in cell for cell in cells):
                    raise UserError(f"{place}: holds a NUL byte, so this is no text file")
                if any(cells):
                    yield place, cells
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(path)}: not in UTF-8; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{printable(path)}: not a CSV file ({error})") from error
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({error.strerror})") from error


def read_csv(path: Path | str, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its header, which must have `columns`.

    A missing column, or a row with another number of cells than the header, is a UserError.
    """
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
        commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True)
        version = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        version = "not a git checkout"
    name = "cpu" if device is None else str(device)
    if name.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return {
        "commit": version,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": name,
        "processor": f"{_processor()}, {os.cpu_count()} cores",
    }


def peak_memory_mb() -> float | None:
    """The largest resident memory of this process so far in MB; None if the system does not tell."""
    try:  # getrusage would count the parent's memory at the start of this process
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3, 1)
    except (OSError, TypeError):  # not Linux
        return None


def _processor() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()
