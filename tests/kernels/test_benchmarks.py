"""The benchmarks, as far as a CPU can take them."""

import csv
import importlib
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import pytest
from osscl_kernels import backend

BENCHMARKS = pathlib.Path(backend.__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(backend.triton is None, reason="triton is not installed")


def dry_run(out, *options):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--dry", "--out", out, *options]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    with out.open(newline="") as file:
        return done, list(csv.DictReader(file))


@pytest.mark.slow
def test_gpu_dry(tmp_path):
    """Every case runs through the code that a GPU takes, and leaves its row."""
    done, rows = dry_run(tmp_path / "gpu.csv")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert all(float(row["median_ms"]) > 0 and not row["note"] for row in rows)
    cases = {(row["kernel"], row["provider"], row["pass"]) for row in rows}
    supcon = ("kernels", "chunked", "dense", "dense, compiled", "dense, checkpointed")
    tfgram = ("kernels", "modules", "modules, compiled")
    expected = {("supcon", name, passing) for name in supcon for passing in ("forward", "both")}
    expected |= {("tfgram", name, passing) for name in tfgram for passing in ("inference", "training")}
    assert cases == expected | {("all", name, "") for name in ("kernels' tests", "bench train")}


def test_cases_after_the_time_are_rows_that_say_so(tmp_path):
    done, rows = dry_run(tmp_path / "gpu.csv", "--minutes", "0")
    assert done.returncode == 1
    assert len(rows) > 15 and all("not run: the time was spent" in row["note"] for row in rows)


def test_tuning_times_the_host_function_that_launches_a_kernel(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the import does so too, but not for others
    tune = importlib.import_module("tune")
    call = mock.create_autospec(tune.aot.launch)
    monkeypatch.setattr(tune.aot, "launch", call)
    monkeypatch.setattr(backend.triton.testing, "do_bench", lambda *_, **__: 0.5)
    for kernel, part in (
        ("supcon_forward", "supcon"),
        ("tfgram_layer", "tfgram_infer"),
        ("tfgram_conv", "tfgram_train"),
    ):
        assert tune.milliseconds(kernel, "bf16", 0, {"BM": 64}) == 0.5
        call.assert_called_with(part, "bf16", 64, device="cuda")
    monkeypatch.setattr(backend.triton.testing, "do_bench", mock.Mock(side_effect=RuntimeError))
    assert tune.milliseconds("tfgram_layer", "bf16", 0, {"BM": 64}) == float("inf")
    assert len(list(tune.neighbours({"BM": 64, "num_warps": 4}))) == 4


def test_prediction_takes_the_busiest_unit(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    predict = importlib.import_module("predict")
    work = {"tensor_flop": 4096e3, "instructions": 2000, "exponentials": 0, "wavefronts": 900, "l2_bytes": 0}
    assert predict.clocks(work, "bf16") == 1000  # of the tensor cores
    assert predict.clocks(work, "ieee") == 900  # wavefronts
    row = {"kernel": "supcon", "precision": "bf16", "passes": ["both"], "rows": 64, "columns": 1000}
    monkeypatch.setattr(predict, "COUNTED", tmp_path / "counted.json")
    predict.COUNTED.write_text(json.dumps([row | {"work": work}]))
    one, two = (predict.milliseconds("supcon", "both", "bf16", 64 * 132 * waves) for waves in (1, 2))
    assert one == pytest.approx(64 * 132 / 1000 * 1000 / predict.CLOCK * 1e3)
    assert two == pytest.approx(4 * one)
    assert predict.milliseconds("supcon", "forward", "bf16", 64) == ""
