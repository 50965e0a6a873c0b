"""Training's layers on a CPU, compiled from `layers.cpp` where there is a C++ compiler.

The first use compiles the file, in a few seconds, into the user's cache folder. Without a compiler, or with
OSSCL_KERNELS_NATIVE=0, callers take PyTorch's own layers.
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

SOURCE = pathlib.Path(__file__).with_name("layers.cpp")
ENVIRONMENT_VARIABLE = "OSSCL_KERNELS_NATIVE"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
FOR_THIS_CPU = (("-march=native", "-mprefer-vector-width=512"), ("-mcpu=native",), ())  # first that compiles
CHANNELS = 32  # of a product's inputs and outputs: a multiple
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class Step(ctypes.Structure):
    """One layer and its clips, as `layers.cpp` describes them; null where a pointer does not apply."""

    SIZES = (
        "clips parts rows inputs outputs taps dilation height width out_height out_width stride samples maps"
    ).split()
    POINTERS = (
        "x below scale shift slope other wave first_weight weight kept y centre sums dz centre_scale "
        "centre_shift mean extra d weight_gradient start end"
    ).split()
    _fields_ = (
        [(name, ctypes.c_int64) for name in SIZES]
        + [(name, ctypes.c_void_p) for name in POINTERS]
        + [("windows", ctypes.c_int64)]
    )

    def __init__(self, **values: torch.Tensor | int | None):
        self.tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]  # alive as long as this
        assert all(t.is_contiguous() for t in self.tensors)
        super().__init__(**{k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in values.items()})


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they are switched off or cannot be compiled."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get(ENVIRONMENT_VARIABLE) == "0" or compiler is None:
        return None
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, _processor())).encode())
    # never a folder that others can write: it is loaded as code
    path = _cache() / f"layers-{key.hexdigest()[:16]}.so"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if not path.exists():
            compile_library(compiler, path)
        return ctypes.CDLL(str(path))
    return None


def function(name: str, dtype: torch.dtype) -> Callable[[Step, int], None]:
    """A function of the library, such as "product_forward", of a step and the number of a part."""
    found = getattr(library(), f"{name}_{DTYPES[dtype]}")
    found.argtypes, found.restype = (ctypes.POINTER(Step), ctypes.c_int64), None
    return found


def pack(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights (taps, inputs, outputs) in the order in which products of activations of a dtype read them."""
    taps, inputs, outputs = matrix.shape
    panel = library().panel()
    if dtype == torch.bfloat16 and library().pairs():
        matrix = matrix.to(dtype).view(taps, inputs // 2, 2, outputs // panel, panel).permute(3, 0, 1, 4, 2)
    else:
        matrix = matrix.float().view(taps, inputs, outputs // panel, panel).permute(2, 0, 1, 3)
    return matrix.contiguous()


def compile_library(compiler: str, path: pathlib.Path, *options: str) -> None:
    """Compile `layers.cpp`, for this processor if the compiler knows it.

    Raises
    ------
    subprocess.SubprocessError
        If it does not compile.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(descriptor)
    try:
        for flags in FOR_THIS_CPU:
            command = [compiler, *FLAGS, *flags, *options, "-o", temporary, str(SOURCE)]
            if not subprocess.run(command, capture_output=True, timeout=120).returncode:
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
