"""The device, its precision, and CUDA graphs without CUDA."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import refused

from osscl_min.runtime import graph
from osscl_min.runtime.device import implementation, prepare
from osscl_min.runtime.graph import CaptureError, Graphed

CPU = torch.device("cpu")
LINES = {"fp32": "float32 on cpu", "tf32": "a CPU has no TensorFloat-32", "bf16": "bfloat16 on cpu"}


@pytest.mark.parametrize("precision", LINES)
def test_prepare_describes_what_runs_and_leaves_every_flag_readable(precision, monkeypatch):
    """Setting the newer fp32_precision makes PyTorch's own reads of the older flags fail."""
    matmul, cudnn, allowed = torch.backends.cuda.matmul, torch.backends.cudnn, precision == "tf32"
    matmul.fp32_precision = cudnn.conv.fp32_precision = "ieee"
    assert LINES[precision] in prepare(CPU, precision)
    assert matmul.allow_tf32 == cudnn.allow_tf32 == allowed
    assert (matmul.fp32_precision == "tf32") == (cudnn.conv.fp32_precision == "tf32") == allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert prepare(torch.device("cuda"), precision).endswith(" on a GPU") and cudnn.benchmark
    prepare(CPU)
    assert not cudnn.benchmark


def test_an_impossible_backend_is_one_line(monkeypatch):
    assert implementation(torch.zeros(1)) == "PyTorch"
    monkeypatch.setenv("OSSCL_KERNELS_BACKEND", "cuda")
    with refused("unknown backend 'cuda'"):
        implementation(torch.zeros(1))


@pytest.fixture
def cuda(monkeypatch):
    """A fake torch.cuda; `ending` is raised where a capture ends; `modes` records how captures were made."""
    state = SimpleNamespace(ending=None, modes=[])

    @contextmanager
    def capture(fake, capture_error_mode="global"):
        state.modes.append(capture_error_mode)
        try:
            yield
        finally:
            if state.ending:
                raise state.ending

    # the step already runs while it is captured, so the first replay does nothing
    stream, replayed = SimpleNamespace(wait_stream=lambda other: None), lambda: None
    fake = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda other: nullcontext()}
    fake |= {"CUDAGraph": lambda: SimpleNamespace(replay=replayed), "graph": capture}
    monkeypatch.setattr(graph.torch, "cuda", SimpleNamespace(**fake))
    return state


def test_a_graph_is_recorded_after_the_warm_up_and_replayed_on_new_values(cuda):
    total = torch.zeros(())
    step = Graphed(lambda x: {"total": total.add_(x.sum())})
    for value in range(3):
        step(torch.full((2,), float(value)))
    assert step.graph is None and total == 6
    step(torch.ones(2))
    step.graph.replay = lambda: step.function(*step.inputs)
    assert cuda.modes == ["thread_local"]
    before = total.item()
    outputs = step(torch.full((2,), 5.0))
    assert total == before + 10 and outputs["total"] == total and outputs["total"] is not total


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")
UNSUPPORTED = torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing", 900)
INVALID = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture", 901)


@pytest.mark.parametrize(
    ("raised", "ending", "expected"),
    [
        (UNSUPPORTED, None, CaptureError),
        (UNSUPPORTED, INVALID, CaptureError),
        (None, INVALID, CaptureError),
        (OUT_OF_MEMORY, None, torch.OutOfMemoryError),
        (OUT_OF_MEMORY, INVALID, torch.OutOfMemoryError),
        (RuntimeError("shapes do not match"), None, RuntimeError),
    ],
)
def test_only_what_capturing_raises_is_a_capture_error(cuda, raised, ending, expected):
    def function(x):
        if step.calls > graph.WARM_UP and raised:
            raise raised
        return {"total": x.sum()}

    step, cuda.ending = Graphed(function), ending
    for _ in range(graph.WARM_UP):
        step(torch.ones(2))
    with pytest.raises(expected) as error:
        step(torch.ones(2))
    assert type(error.value) is expected
