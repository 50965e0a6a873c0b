"""The commands of a GPU's first minutes, as far as a CPU can take them."""

import csv
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
from osscl_kernels import backend

BENCHMARKS = pathlib.Path(backend.__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(backend.triton is None, reason="triton is not installed")


def test_gpu_dry(tmp_path):
    """Every case runs through the code that a GPU takes, and leaves its row."""
    out = tmp_path / "gpu.csv"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--dry", "--out", out]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    commands = [row for row in rows if row["kernel"] in ("tests", "training step")]
    timed = [row for row in rows if row not in commands]
    assert [row["kernel"] for row in commands] == ["tests", "training step"] and "passed" in commands[0][
        "note"
    ]
    assert all(float(row["median_ms"]) > 0 and not row["note"] for row in timed)
    cases = {(row["kernel"], row["provider"], row["pass"]) for row in timed}
    for passing in ("forward", "both"):
        for provider in ("kernels", "chunked", "checkpointed", "dense", "dense, compiled"):
            assert ("supcon", provider, passing) in cases
    for passing in ("inference", "training"):
        for provider in ("kernels", "modules", "modules, compiled"):
            assert ("tfgram", provider, passing) in cases


def test_cases_after_the_time_are_rows_that_say_so(tmp_path):
    out = tmp_path / "gpu.csv"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--dry", "--minutes", "0", "--out", out]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 1
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 20 and all("not run: the time was spent" in row["note"] for row in rows)


def test_prediction_takes_the_busiest_unit(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    predict = importlib.import_module("predict")
    work = {"tensor_flop": 4096e3, "instructions": 2000, "exponentials": 0, "wavefronts": 900, "l2_bytes": 0}
    assert predict.clocks(work, "bf16") == (1000, "tensor cores")
    assert predict.clocks(work, "ieee", 0.5) == (450, "wavefronts")
    row = {
        "kernel": "supcon",
        "precision": "bf16",
        "passes": ["both"],
        "rows": 64,
        "columns": 1000,
        "work": work,
    }
    monkeypatch.setattr(predict, "COUNTED", tmp_path / "counted.json")
    predict.COUNTED.write_text(json.dumps([row]))
    one, two = (predict.milliseconds("supcon", "both", "bf16", 64 * 132 * waves) for waves in (1, 2))
    assert one == pytest.approx(64 * 132 / 1000 * 1000 / predict.CLOCK * 1e3) and two == pytest.approx(
        4 * one
    )
    assert predict.milliseconds("supcon", "forward", "bf16", 64) == ""
