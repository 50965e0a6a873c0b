"""What a CPU does in and between convolutions, compiled from `clipwise.cpp` where there is a C++ compiler.

The first use compiles the file, in two seconds, into the user's cache folder. Without a compiler, or with
OSSCL_KERNELS_NATIVE=0, callers do the same by PyTorch operations, each a pass of its own over memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable

import torch

SOURCE = pathlib.Path(__file__).with_name("clipwise.cpp")
ENVIRONMENT_VARIABLE = "OSSCL_KERNELS_NATIVE"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
FOR_THIS_CPU = (("-march=native", "-mprefer-vector-width=512"), ("-mcpu=native",), ())  # first that compiles
LANES = 16  # channels must be a multiple, as in the source
ARGUMENTS = {  # of each function: pointers, then integers
    "moments": (3, 2), "activate": (6, 2), "activate_backward": (8, 2), "centre": (5, 2), "pool": (6, 2),
    "pool_backward": (9, 3), "first": (4, 4), "first_backward": (5, 5), "depthwise": (3, 8),
    "depthwise_weight": (3, 7), "weight_gradient": (3, 6),
}  # fmt: skip
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they are switched off or cannot be compiled."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0" or compiler is None:
        return None
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, _processor())).encode()).hexdigest()[
        :16
    ]
    path = _cache() / f"clipwise-{key}.so"  # never a folder that others can write: it is loaded as code
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    return None


@functools.cache
def function(name: str) -> Callable | None:
    """A function of `clipwise.cpp`, such as "moments_float32"; None where there is none."""
    if name == "weight_gradient_bfloat16" and not library().tiles():
        return None
    try:
        address = ctypes.c_void_p.in_dll(library(), name).value
    except ValueError:
        return None
    pointers, integers = ARGUMENTS[name.rpartition("_")[0]]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * integers)(address)


def fits(*tensors: torch.Tensor) -> bool:
    """Whether the compiled functions take these activations (n, C, H, W)."""
    first = tensors[0]
    return first.dtype in DTYPES and first.shape[1] % LANES == 0 and library() is not None


def has(name: str, dtype: torch.dtype) -> bool:
    """Whether this machine has that function; those of every dtype are wherever the library is."""
    return function(f"{name}_{DTYPES[dtype]}") is not None


def call(name: str, dtype: torch.dtype, *arguments: torch.Tensor | int | None) -> None:
    """Call a function of `clipwise.cpp` with tensors (their data, dense) and integers."""
    values = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    function(f"{name}_{DTYPES[dtype]}")(*values)


def _compile(compiler: str, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(descriptor)
    try:
        for flags in FOR_THIS_CPU:
            command = [compiler, *FLAGS, *flags, "-o", temporary, str(SOURCE)]
            if not subprocess.run(command, capture_output=True, timeout=60).returncode:
                os.replace(temporary, path)
                return
        raise subprocess.SubprocessError(f"{compiler} does not compile {SOURCE}")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _processor() -> str:
    """What decides the instructions that may be used: a cache folder may be shared by several machines."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() + platform.node()


def _cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "osscl_kernels"
