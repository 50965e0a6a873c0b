"""The choice between Triton and PyTorch."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from osscl_kernels import backend
from osscl_kernels.backend import ENVIRONMENT_VARIABLE, resolve

CPU = torch.zeros(1)
PACKAGE = pathlib.Path(backend.__file__).parents[1]


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def on_gpu(monkeypatch, capability):
    """A tensor that says it is on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    class Pretended:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

    return Pretended()


def test_auto(monkeypatch):
    monkeypatch.setattr(backend, "triton", object())
    assert resolve(CPU)[0] == "torch"
    assert resolve(on_gpu(monkeypatch, (8, 0))) == ("triton", "CUDA tensor")
    assert resolve(on_gpu(monkeypatch, (12, 0)))[0] == "triton"
    choice, reason = resolve(on_gpu(monkeypatch, (7, 5)))
    assert choice == "torch" and "8.0" in reason
    monkeypatch.setattr(backend, "triton", None)
    assert resolve(on_gpu(monkeypatch, (9, 0))) == ("torch", "triton is not installed")


def test_the_interpreter_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(backend, "triton", object())
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert resolve(CPU)[0] == "torch"
    assert resolve(CPU, "triton") == ("triton", "asked for by argument")
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="argument asks for the triton backend, but the tensor is on cpu"):
        resolve(CPU, "triton")


def test_environment(monkeypatch):
    monkeypatch.setattr(backend, "triton", object())
    gpu = on_gpu(monkeypatch, (9, 0))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert resolve(gpu) == ("torch", f"asked for by {ENVIRONMENT_VARIABLE}")
    assert resolve(gpu, "triton") == ("triton", "asked for by argument")  # an argument comes first
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "auto")
    assert resolve(gpu)[0] == "triton"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert resolve(gpu)[0] == "triton"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cudnn")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT_VARIABLE}: unknown backend 'cudnn'; expected one of"):
        resolve(gpu)


def test_refusals(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    monkeypatch.setattr(backend, "triton", object())
    with pytest.raises(ValueError, match="argument: unknown backend 'numpy'; expected one of auto, triton"):
        resolve(CPU, "numpy")
    with pytest.raises(RuntimeError, match="float64 has no Triton path"):
        resolve(CPU.double(), "triton")
    with pytest.raises(RuntimeError, match="older than compute capability 8.0"):
        resolve(on_gpu(monkeypatch, (7, 0)), "triton")
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resolve(CPU, "triton")


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
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(PACKAGE)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
