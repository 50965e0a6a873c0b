"""The compiled kernels, through the package's host functions, against float64.

On a machine with a GPU the kernels run there. Elsewhere the emulator executes what Triton compiles for sm_80
and sm_90, and also finds races and reads of memory that was not written.
"""

import contextlib

import pytest
import torch
from compiled import DEVICE, Case, cases, only_compiled, test_in_a_process_that_compiles  # noqa: F401

pytest.importorskip("triton")
from emulator import emulated  # noqa: E402

ARCHITECTURES = (80, 90)
# Of the ordinary suite: what a first run compiles is most of its time.
SMALL = {
    (90, "supcon tf32x3"), (90, "supcon bf16"), (80, "supcon tf32x3"), (90, "tfgram_infer bf16"),
    (90, "tfgram_train bf16"),
}  # fmt: skip
if DEVICE == "cuda":
    ARCHITECTURES = (10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1],)
ALL = [(architecture, case) for architecture in ARCHITECTURES for case in cases()]
FIRST = set(map(str, cases(small=True)))


def parameter(architecture, case):
    small = DEVICE == "cuda" or (architecture, f"{case.kernel} {case.precision}") in SMALL
    marks = () if small and str(case) in FIRST else pytest.mark.exhaustive
    return pytest.param(architecture, case, id=f"sm_{architecture} {case}", marks=marks)


@only_compiled
@pytest.mark.parametrize("architecture, case", [parameter(*pair) for pair in ALL])
def test_error_against_float64(architecture, case, poisoned):
    with contextlib.nullcontext() if DEVICE == "cuda" else emulated(architecture) as emulation:
        errors = case.errors()
    for name, (error, budget) in errors.items():
        assert error <= budget, name
    if emulation:
        assert emulation.launches and not emulation.findings() and not emulation.findings(notes=True)


@only_compiled
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU counts nothing")
def test_work_counted_for_predictions(monkeypatch):
    import count_work

    monkeypatch.setattr(count_work, "COLUMNS", 256)
    records = count_work.records("supcon", "bf16")
    assert [record["passes"] for record in records] == 2 * [["forward", "both"], ["both"]]
    for record, products in zip(records, (1, 2, 1, 2), strict=True):
        assert record["work"]["tensor_flop"] == products * 2 * record["rows"] * 256 * 128
        assert min(record["work"].values()) > 0


@only_compiled
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU counts nothing")
def test_report_of_errors_and_counted_work():
    import compiled_report  # it turns the interpreter off

    row, launches = compiled_report.measure(Case("supcon", "bf16", (65, 100)), 90)
    assert row["error"] <= row["budget"] and row["findings"] == "none"
    assert [launch["kernel"] for launch in launches] == ["_forward_kernel", "_backward_kernel"]
    assert all(launch["tensor FLOP"] > 0 and launch["wavefronts"] > 0 for launch in launches)
