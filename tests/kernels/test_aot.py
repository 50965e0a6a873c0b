"""Shipped configurations compile for every architecture, and the check would see a fault."""

import csv
import pathlib

import pytest
from hardware import python
from osscl_kernels import backend

SCRIPT = pathlib.Path(backend.__file__).parents[1] / "benchmarks" / "aot.py"
pytestmark = pytest.mark.skipif(backend.triton is None, reason="triton is not installed")
FAULTY = """
import sys
sys.path.insert(0, sys.argv[1])
import aot
from dataclasses import replace
from unittest import mock

case = next(c for c in aot.record(90) if c.kernel == "_backward_kernel" and c.precision == "bf16")
good = aot.check((case, 90))
assert not good["problems"] and good["tensor_core"] and good["registers"] > 100, good
wide = replace(case, constants=case.constants | {"BM": 128, "BN": 128})
assert "spills" in aot.check((wide, 90))["problems"]
deep = replace(case, options=case.options | {"num_stages": 8})
assert "shared memory" in aot.check((deep, 86))["problems"]
with mock.patch.object(aot, "TENSOR_CORE", aot.re.compile("absent")):
    assert aot.check((case, 90))["problems"] == "no tensor-core instructions"
broken = replace(case, constants=case.constants | {"BM": 3})
assert aot.check((broken, 90))["problems"].split(":")[0].endswith("Error")
"""


@pytest.mark.parametrize(
    "only, capabilities",
    [
        pytest.param("_backward_kernel bf16", {"90"}, marks=pytest.mark.slow),
        pytest.param("", {"80", "86", "90", "100"}, marks=pytest.mark.exhaustive),
    ],
)
def test_configurations_compile_cleanly(only, capabilities, tmp_path):
    table = tmp_path / "table.csv"
    options = "--only", only, "--out", table, "--workers", "1", "--capability", *capabilities
    python(SCRIPT, *options, TRITON_CACHE_DIR=str(tmp_path))
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["capability"] for row in rows} == capabilities
    assert all(int(row["registers"]) > 0 for row in rows)


@pytest.mark.slow
def test_faults_are_seen(tmp_path):
    python("-c", FAULTY, SCRIPT.parent, TRITON_CACHE_DIR=str(tmp_path))
