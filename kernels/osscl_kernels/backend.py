"""Which implementation of a kernel runs, and with which tiles. Importing this never touches CUDA."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import pathlib
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is published for Linux only
    triton = tl = None

jit = triton.jit if triton else lambda function: function  # which is then never launched
BACKENDS = ("auto", "triton", "torch")
ENVIRONMENT_VARIABLE = "OSSCL_KERNELS_BACKEND"
# Read once, as Triton does: the variable must be set before the kernels are imported.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
TILES = pathlib.Path(__file__).with_name("tiles.json")
# GPUs by what a tile may use: 99 KB of shared memory (also every GPU not named), 163 KB, 227 KB, and 227 KB
# beside tensor memory.
FAMILIES = {86: 0, 80: 1, 87: 1, 90: 2, 100: 3, 103: 3}


def resolve(tensor: Tensor, backend: str = "auto", missing: str = "") -> str:
    """Choose the implementation for a tensor: "triton" or "torch".

    "auto" follows OSSCL_KERNELS_BACKEND where it is set, and otherwise takes Triton for a CUDA tensor on
    compute capability 8.0 or newer, PyTorch for anything else; also PyTorch where the kernel lacks what is
    asked of it (`missing`). A RuntimeError says why Triton cannot run where it is requested.
    """
    source = "argument"
    if backend == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        backend, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    expect(source, "backend", backend, BACKENDS)
    if missing and source != "argument":
        backend = "auto"
    obstacle = missing or _obstacle(tensor)
    if backend == "triton" and obstacle:
        raise RuntimeError(f"{source} requests the triton backend, but {obstacle}")
    if backend == "auto":  # the interpreter runs only when it is requested
        backend = "triton" if tensor.is_cuda and not obstacle else "torch"
    return backend


def _obstacle(tensor: Tensor) -> str:
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


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU, 90 for 9.0; the interpreter counts as 90."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


@functools.cache
def tile_rows() -> list[dict[str, Any]]:
    """The rows of tiles.json: the tile of a kernel for a precision, from family `sm` and `size` rows on."""
    return json.loads(TILES.read_text())


def tile(kernel: str, precision: str, tensor: Tensor, size: int = 0) -> dict[str, Any]:
    """The tile of a kernel for a problem of `size` rows on the tensor's device."""
    family = FAMILIES.get(capability(tensor), 0)
    rows = [row for row in tile_rows() if (row["kernel"], row["precision"]) == (kernel, precision)]
    rows = [row for row in rows if FAMILIES[row["sm"]] <= family and row["size"] <= size]
    return dict(max(rows, key=lambda row: (FAMILIES[row["sm"]], row["size"]))["tile"])


def constants(kernel: str, precision: str, tensor: Tensor, size: int = 0) -> dict[str, Any]:
    """The tile, and the type and the product that the kernel computes a precision with."""
    bf16 = precision == "bf16"
    # The interpreter multiplies the bit patterns of bfloat16: there the products are float32.
    operand = tl.bfloat16 if bf16 and not INTERPRETED else tl.float32
    product = "tf32" if bf16 else precision  # bfloat16 operands have one product only
    return {"DT": operand, "PRECISION": product} | tile(kernel, precision, tensor, size)


def expect(function: str, what: str, given: str, known: tuple[str, ...]) -> None:
    """Refuse an unknown choice."""
    if given not in known:
        raise ValueError(f"{function}: unknown {what} {given!r}; expected one of {', '.join(known)}")


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step; False where the C library has no such setting.

    Getting activations back from the system page by page can cost a large part of a step. The setting holds
    for the whole process, which stays at its largest size: a training program calls this, a library does not.
    """
    options = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, 2**31 - 1) for option in options)
