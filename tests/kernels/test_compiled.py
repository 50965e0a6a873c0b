"""The compiled kernels, through the package's host functions, against float64.

On a machine with a GPU the kernels run there. Elsewhere the emulator executes what Triton compiles for sm_80
and sm_90, and also finds races and reads of memory that was not written.
"""

import contextlib
import re

import pytest
import torch
from compiled import DEVICE, INTERPRETED, Case, cases, children, only_compiled, rerun

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


@pytest.mark.skipif(not INTERPRETED, reason="this process compiles")
@children
def test_in_a_process_that_compiles(which):
    rerun(__file__, which)


@only_compiled
@pytest.mark.parametrize("architecture, case", [parameter(*pair) for pair in ALL])
def test_error_against_float64(architecture, case):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors hold NaN
    gpu = contextlib.nullcontext() if DEVICE == "cuda" else emulated(architecture)
    try:
        with gpu as emulation:
            errors = case.errors()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, (error, budget) in errors.items():
        assert error <= budget, name
    if emulation:
        assert emulation.launches and not emulation.findings() and not emulation.findings(notes=True)


@only_compiled
@pytest.mark.skipif(DEVICE == "cuda", reason="faults are planted in the emulator")
def test_missing_barriers_are_seen():
    with emulated(90, edit=lambda ptx: re.sub(r"bar\.sync[^;\n]*;", "", ptx)) as emulation:
        Case("supcon", "bf16", (65, 100)).errors()
    assert any("without a barrier" in finding for finding in emulation.findings())


@only_compiled
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU counts nothing")
def test_report_of_errors_and_counted_work():
    import compiled_report  # it turns the interpreter off

    row, launches = compiled_report.measure(Case("supcon", "bf16", (65, 100)), 90)
    assert row["error"] <= row["budget"] and row["findings"] == "none"
    assert [launch["kernel"] for launch in launches] == ["_forward_kernel", "_backward_kernel"]
    assert all(launch["tensor FLOP"] > 0 and launch["wavefronts"] > 0 for launch in launches)
