"""Every shipped configuration compiles for every architecture, and the check would see a fault."""

import csv
import os
import pathlib
import subprocess
import sys

import pytest
from osscl_kernels import backend

KERNELS = pathlib.Path(backend.__file__).parents[1]
SCRIPT = KERNELS / "benchmarks" / "aot.py"
pytestmark = pytest.mark.skipif(backend.triton is None, reason="triton is not installed")
# `before` and `after` start as the same tensor: Triton 3.6 to 3.9 compile a loop that carries neither.
FAULTY = """
import sys
sys.path[:0] = sys.argv[1:3]
import aot
from osscl_kernels.backend import CompileCase, jit, tl


@jit
def aliased(OUT, n, N: tl.constexpr):
    start = tl.zeros([N], tl.float32)
    before = start
    after = start
    column = tl.arange(0, N)
    for i in range(n):
        tl.store(OUT + i * N + column, before)
        before = after
        after = column.to(tl.float32) + i


@jit
def separate(OUT, n, N: tl.constexpr):
    before = tl.zeros([N], tl.float32)
    after = tl.zeros([N], tl.float32)
    column = tl.arange(0, N)
    for i in range(n):
        tl.store(OUT + i * N + column, before)
        before = after
        after = column.to(tl.float32) + i


for kernel, expected in (
    (separate, ()),
    (aliased, ("0 loops carry values, 1 should", "0 values carried, 2")),
):
    arguments, constants = {"OUT": "*fp32", "n": "i32"}, {"N": 128}
    case = CompileCase(kernel.__name__, kernel, arguments, constants, 4, 2, loop_carried=1, carried_values=2)
    found = aot.check_case(case, 90)["problems"]
    print(case.name, "->", found or "nothing")
    assert bool(found) == bool(expected) and all(phrase in found for phrase in expected), found
"""


def environment(tmp_path):
    """The interpreter compiles nothing: these processes go without it."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(KERNELS)}


@pytest.mark.parametrize("module", ["supcon", "tfgram_infer", "tfgram_train"])
def test_every_configuration_compiles_cleanly(module, tmp_path):
    table = tmp_path / "table.csv"
    command = [sys.executable, SCRIPT, "--only", f"{module} ", "--out", table]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert table.is_file(), done.stderr[-2000:]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    refused = [f"{r['name']} sm_{r['capability']}: {r['problems']}" for r in rows if r["problems"]]
    assert not refused, "\n".join(refused)
    assert done.returncode == 0
    assert {row["capability"] for row in rows} == {"80", "86", "90", "100"}
    assert all(int(row["registers"]) > 0 for row in rows)


def test_faults_are_seen(tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    command = [sys.executable, script, SCRIPT.parent, KERNELS]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
