"""What users see and no other test pins: help texts, the files of a run, columns and keys.

`tests/golden/surface.txt` holds it. After a decided change: `python tests/test_surface.py`.
"""

import csv
import json
import re
import sys
from pathlib import Path

import pytest

COMMANDS = "synth download inspect pack train evaluate score metrics ablate report bench".split()


def keys(value):
    """The keys of JSON content; a list is its first item, and names of files or machines are `*`."""
    if isinstance(value, list):
        return f"[{keys(value[0])}]" if value and isinstance(value[0], dict) else ""
    if not isinstance(value, dict):
        return ""
    if any(re.search(r"[/.]", key) for key in value):
        return "{*" + keys(next(iter(value.values()))) + "}"
    return "{" + ", ".join(key + keys(entry) for key, entry in value.items()) + "}"


def files(folder):
    """Every file below a folder, with the columns of a CSV and the keys of a JSON."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or "data/" in name and path.suffix == ".wav":
            continue
        if path.suffix == ".csv" and "anomaly_score" not in name:
            with open(path, newline="") as file:
                name += ": " + ", ".join(next(csv.reader(file)))
        elif path.suffix == ".json":
            name += ": " + keys(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            name += ": " + keys(json.loads(path.read_text().splitlines()[0]))
        lines.append(name)
    return "\n".join(lines)


GOLDEN = Path(__file__).parent / "golden" / "surface.txt"


def compare(parts, request):
    """Compare sections of the golden text; with --golden, write them instead."""
    golden = dict(re.findall(r"^=== (.+)\n((?:(?!=== ).*\n)*)", GOLDEN.read_text(), re.MULTILINE))
    parts = {name: text + "\n\n" for name, text in parts.items()}
    if request.config.getoption("--golden"):
        golden |= parts
        GOLDEN.write_text("".join(f"=== {name}\n{text}" for name, text in golden.items()))
    for name, text in parts.items():
        assert text == golden[name], f"{name}: a decided change? Then: python tests/test_surface.py"


def test_help(request, help_text):
    compare({"osscl": help_text(), **{f"osscl {name}": help_text(name) for name in COMMANDS}}, request)


def test_files_of_a_run_and_its_analyses(reported, tmp_path, request, monkeypatch):
    from osscl_min.config import EvaluateConfig
    from osscl_min.data.inspection import inspect, write
    from osscl_min.experiments import analyses

    monkeypatch.setattr(analyses, "BANDS", 2)
    monkeypatch.setattr(analyses, "SNRS", (0.0,))
    quick = EvaluateConfig(batch_size=24, bootstrap=10)
    best, data = reported / "best.pt", reported / "data"
    for name in ("bands", "noise", "scores", "embeddings"):
        analyses.examine(name, {"given": [best]}, data, tmp_path / name, quick, device="cpu")
    write(inspect(data), tmp_path / "inspect")
    compare({"a run": files(reported), "analyses and inspection": files(tmp_path)}, request)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "--golden"]))
