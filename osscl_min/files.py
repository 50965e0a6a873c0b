"""Errors that a user can act on, files that are never half-written, and where a result came from."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent  # of the project


class UserError(Exception):
    """A mistake in the input: what, where, what to do, in one line, which is all the command line prints.

    Parameters
    ----------
    message : str
    exit_status : int
        What the command line ends with; other than 2 where a script may want to tell reasons apart.
    """

    def __init__(self, message: str, exit_status: int = 2):
        super().__init__(message)
        self.exit_status = exit_status


def first_lines(found: Sequence[str], most: int) -> list[str]:
    """Lines for the first of a list of findings, and one that counts the rest."""
    rest = [f"  ... and {len(found) - most} more"] if len(found) > most else []
    return [f"  {one}" for one in found[:most]] + rest


@contextmanager
def replacing(path: Path | str, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it to `path` when the block ends without an error.

    Parameters
    ----------
    path : Path or str
        The final name; its folder is made where missing. An existing file stays whole until the rename.
    mode : {"w", "wb"}

    Raises
    ------
    UserError
        If the folder cannot be written or the disk is full; the old file is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.fchmod(descriptor, 0o644)
        as_text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
        with os.fdopen(descriptor, mode, **as_text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` (UTF-8), replacing the file as a whole."""
    with replacing(path) as file:
        file.write(text)


def read_json(path: Path | str) -> Any:
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: Path | str, content: Any) -> None:
    """Write `content` as indented JSON, replacing the file as a whole."""
    with replacing(path) as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")


def read_csv(path: Path | str) -> list[dict[str, str]]:
    """The rows of a CSV file by the names in its header."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path | str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a header and rows as CSV, replacing the file as a whole; floats keep every digit."""
    with replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def provenance(device: Any = None) -> dict[str, str]:
    """Describe what produced a result: package commit, versions, processor, time (UTC).

    Parameters
    ----------
    device : torch.device, optional
        The device that computed; a CUDA device is named by its product name.
    """
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
    """The largest resident memory that this process has had, MB; None where the system does not tell."""
    try:  # getrusage would count what the parent held when it started this process
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3, 1)
    except (OSError, TypeError):  # not Linux
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if platform.system() == "Darwin" else 1e3), 1)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
