"""The device, its precision, and CUDA graphs without CUDA."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from osscl_min.runtime import graph
from osscl_min.runtime.device import choose_device, implementation, prepare
from osscl_min.runtime.files import UserError
from osscl_min.runtime.graph import CaptureError, Graphed

CPU = torch.device("cpu")


def test_prepare_describes_what_runs():
    assert prepare(CPU, "fp32").startswith("float32 on cpu")
    assert prepare(CPU, "bf16").startswith("bfloat16 on cpu")
    assert "no TensorFloat-32" in prepare(CPU, "tf32")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_every_tensorfloat_flag_can_be_read_after_prepare(precision):
    """Setting the newer fp32_precision makes PyTorch's own reads of the older flags fail."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    prepare(CPU, precision)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = precision == "tf32"
    assert matmul.allow_tf32 == cudnn.allow_tf32 == allowed
    assert (matmul.fp32_precision == "tf32") == (cudnn.conv.fp32_precision == "tf32") == allowed
    assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
    prepare(CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:3", "gpu", "mps", "meta", ""])
def test_devices_that_are_not_there(name):
    with pytest.raises(UserError, match="--device"):
        choose_device(name)


def test_an_impossible_backend_is_one_line(monkeypatch):
    assert implementation(torch.zeros(1)) == "PyTorch"
    monkeypatch.setenv("OSSCL_KERNELS_BACKEND", "cuda")
    with pytest.raises(UserError, match="unknown backend 'cuda'"):
        implementation(torch.zeros(1))


class FakeGraph:
    """Replays `captured`; unlike CUDA's, the step already runs while it is captured."""

    def captured(self):
        pass

    def replay(self):
        self.captured()


@pytest.fixture
def cuda(monkeypatch):
    """A CUDA of the CPU's own; `ending` is raised where a capture ends, `modes` are those asked for."""
    state = SimpleNamespace(ending=None, modes=[])

    @contextmanager
    def capture(fake, capture_error_mode="global"):
        state.modes.append(capture_error_mode)
        try:
            yield
        finally:
            if state.ending:
                raise state.ending

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(graph.torch, "cuda", SimpleNamespace(
        Stream=lambda: stream, current_stream=lambda: stream, stream=lambda other: nullcontext(),
        CUDAGraph=FakeGraph, graph=capture,
    ))  # fmt: skip
    return state


def test_a_graph_is_recorded_after_the_warm_up_and_replayed_on_new_values(cuda):
    total = torch.zeros(())
    step = Graphed(lambda x: {"total": total.add_(x.sum())})
    for value in range(3):
        step(torch.full((2,), float(value)))
    assert step.graph is None and total == 6
    step(torch.ones(2))
    step.graph.captured = lambda: step.function(*step.inputs)
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
