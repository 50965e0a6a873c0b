"""The choice between Triton and PyTorch."""

import pytest
import torch
from hardware import python
from osscl_kernels import backend
from osscl_kernels.backend import ENVIRONMENT_VARIABLE, resolve

CPU = torch.zeros(1)


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def on_gpu(monkeypatch, capability):
    """A tensor that says it is on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    class Pretended:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

    return Pretended()


@pytest.fixture
def installed(monkeypatch):
    """Triton seems to be there, compiling."""
    monkeypatch.setattr(backend, "triton", object())
    monkeypatch.setattr(backend, "INTERPRETED", False)


def test_auto(monkeypatch, installed):
    assert resolve(CPU) == "torch"
    assert resolve(on_gpu(monkeypatch, (8, 0))) == resolve(on_gpu(monkeypatch, (12, 0))) == "triton"
    assert resolve(on_gpu(monkeypatch, (7, 5))) == "torch"
    monkeypatch.setattr(backend, "triton", None)
    assert resolve(on_gpu(monkeypatch, (9, 0))) == "torch"


def test_the_interpreter_runs_only_on_request(monkeypatch, installed):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert resolve(CPU) == "torch"
    assert resolve(CPU, "triton") == "triton"


def test_environment(monkeypatch, installed):
    gpu = on_gpu(monkeypatch, (9, 0))
    for value, choice in (("torch", "torch"), ("auto", "triton"), ("", "triton")):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, value)
        assert resolve(gpu) == choice
        assert resolve(gpu, "triton") == "triton"  # an argument comes first
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cudnn")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE}: unknown backend 'cudnn'; expected one of"):
        resolve(gpu)


def test_refusals(monkeypatch, installed):
    with pytest.raises(ValueError, match="argument: unknown backend 'numpy'; expected one of auto, triton"):
        resolve(CPU, "numpy")
    old = on_gpu(monkeypatch, (7, 0))
    for tensor, reason in (
        (CPU, "argument requests the triton backend, but the tensor is on cpu"),
        (CPU.double(), "float64 has no Triton path"),
        (old, "older than compute capability 8.0"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            resolve(tensor, "triton")
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resolve(CPU, "triton")


def test_tiles_are_those_of_the_family_or_the_one_before_it(monkeypatch):
    rows = [
        {"kernel": "k", "precision": "bf16", "sm": sm, "size": size, "tile": {"BM": value}}
        for sm, size, value in ((90, 0, 3), (86, 0, 1), (90, 1000, 4), (80, 0, 2))
    ]
    monkeypatch.setattr(backend, "tile_rows", lambda: rows)
    for capability, size, expected in (
        ((8, 6), 0, 1), ((8, 9), 5000, 1), ((12, 0), 0, 1), ((8, 0), 0, 2), ((9, 0), 999, 3),
        ((9, 0), 1000, 4), ((10, 0), 0, 3), ((10, 3), 2000, 4),
    ):  # fmt: skip
        chosen = backend.tile("k", "bf16", on_gpu(monkeypatch, capability), size)
        assert chosen == {"BM": expected}, capability
        chosen["BM"] = 99  # a caller's own
    assert rows[0]["tile"] == {"BM": 3}


@pytest.mark.slow
def test_importing_touches_no_gpu_and_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, osscl_kernels
assert not torch.cuda.is_initialized()
z = torch.randn(8, 4, requires_grad=True)
osscl_kernels.supcon_loss(z, torch.arange(8) % 2).backward()
assert z.grad.abs().sum() > 0
"""
    python("-c", code)
