"""Which implementation of a kernel runs: Triton on a CUDA device, PyTorch everywhere else, or as asked.

Importing this module never touches CUDA. Triton is optional: without it the kernels are plain functions
that nobody calls, and every public function takes its PyTorch path.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is published for Linux only
    triton = tl = None

BACKENDS = ("auto", "triton", "torch")
ENVIRONMENT_VARIABLE = "OSSCL_KERNELS_BACKEND"
# Read once, as Triton does: the variable must be set before the kernels are imported.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable) -> Callable:
    """`triton.jit` where Triton is installed, the bare function elsewhere."""
    return triton.jit(function) if triton is not None else function


@dataclass(frozen=True)
class CompileCase:
    """One shipped kernel configuration, as the ahead-of-time check compiles it.

    Every kernel module yields its own from `compile_cases(capability)`, with capability 80, 86, 90 or 100.
    """

    name: str  # "supcon_backward tf32x3 D=128"
    kernel: Any  # the jitted function
    signature: dict[str, str]  # argument -> Triton type: "*fp32", "i32", ...
    constants: dict[str, Any]  # tl.constexpr arguments
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16 at run time
    tensor_cores: bool = False  # tensor-core instructions are meant to be there
    loop_carried: int = 0  # loops that must carry values (a known miscompilation drops them)
    carried_values: int = 0  # values that all loops together must carry


def resolve(tensor: torch.Tensor, backend: str = "auto") -> tuple[str, str]:
    """Choose the implementation for an input, and say why.

    Parameters
    ----------
    tensor : torch.Tensor
        The input that decides: its device and dtype.
    backend : {"auto", "triton", "torch"}
        "auto" lets OSSCL_KERNELS_BACKEND decide where it is set, and otherwise takes Triton for a CUDA
        tensor on compute capability 8.0 or newer, PyTorch for anything else.

    Returns
    -------
    choice : {"triton", "torch"}
    reason : str
        One line for logs and error messages.

    Raises
    ------
    ValueError
        If `backend` or the environment variable names no known backend.
    RuntimeError
        If Triton is asked for where it cannot run.
    """
    source = "argument"
    if backend == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        backend, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if backend not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    obstacle = _obstacle(tensor)
    if backend == "torch":
        return "torch", f"asked for by {source}"
    if backend == "triton":
        if obstacle:
            raise RuntimeError(f"{source} asks for the triton backend, but {obstacle}")
        return "triton", f"asked for by {source}"
    if INTERPRETED and not tensor.is_cuda:
        return "torch", "the Triton interpreter runs only when asked for"
    return ("torch", obstacle) if obstacle else ("triton", "CUDA tensor")


def _obstacle(tensor: torch.Tensor) -> str:
    """Why Triton cannot take this tensor; empty where it can."""
    if triton is None:
        return "triton is not installed"
    if tensor.dtype == torch.float64:
        return "float64 has no Triton path"
    if not tensor.is_cuda:
        return "" if INTERPRETED else f"the tensor is on {tensor.device} and TRITON_INTERPRET is not 1"
    if torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return ""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step instead of returning it to the system.

    Activations are freed at the end of every step; getting them back page by page can cost a large part of
    the next one. It holds for the whole process, which then stays at its largest size: a training program
    calls it once, a library does not.

    Returns
    -------
    bool
        False where the C library has no such setting.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_threshold, 2**31 - 1))
