"""Compiles `layers.cpp` once with the system's C++ compiler and calls its functions."""

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
from collections.abc import Iterator

import torch

SOURCE = pathlib.Path(__file__).with_name("layers.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
# the first that compiles is taken
FOR_THIS_CPU = ("-march=native", "-mprefer-vector-width=512"), ("-mcpu=native",), ()
CHANNELS = 32  # channel counts must be multiples of this
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

LAYER_SIZES = "rows inputs outputs taps dilation height width out_height out_width stride".split()
POINTERS = (
    "x below scale shift slope other wave first_weight weight kept y centre sums dz centre_scale "
    "centre_shift mean extra d weight_gradient start end"
).split()


class Step(ctypes.Structure):
    """The struct of the same name in `layers.cpp`; fields that are not given are zero or null."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("clips", "parts", "threads", *LAYER_SIZES, "samples")),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("windows", ctypes.c_int64),
    ]

    def __init__(self, **values: torch.Tensor | int | None):
        self.tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]  # keeps their memory alive
        assert all(t.is_contiguous() for t in self.tensors)
        super().__init__(**{k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in values.items()})


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The compiled library, or None and the reason why there is none."""
    if os.environ.get("OSSCL_KERNELS_NATIVE") == "0":
        return None, "OSSCL_KERNELS_NATIVE=0"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "no C++ compiler"
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, _processor())).encode()).hexdigest()
    try:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        path = cache / "osscl_cpu" / f"layers-{key[:16]}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            compile_library(compiler, path)
        return ctypes.CDLL(str(path)), ""
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        return None, str(error).splitlines()[0]


def run(name: str, dtype: torch.dtype, **fields: torch.Tensor | int | None) -> None:
    """Call a function of the library, such as "product_forward", with the fields of its step."""
    getattr(load()[0], f"{name}_{DTYPES[dtype]}")(ctypes.byref(Step(**fields)))


@contextlib.contextmanager
def threads() -> Iterator[int]:
    """PyTorch's number of threads, for the library's use; PyTorch itself computes on one meanwhile.

    Its OpenMP threads spin for a while after each operation and would take the cores from the library's.
    Autocast is off too.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autocast("cpu", enabled=False):
            yield count
    finally:
        torch.set_num_threads(count)


def pack(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights (taps, inputs, outputs) in the order in which products with `dtype` activations read them."""
    (taps, inputs, outputs), library = matrix.shape, load()[0]
    panel = library.panel()
    if dtype == torch.bfloat16 and library.pairs():
        matrix = matrix.to(dtype).view(taps, inputs // 2, 2, outputs // panel, panel).permute(3, 0, 1, 4, 2)
    else:
        matrix = matrix.float().view(taps, inputs, outputs // panel, panel).permute(2, 0, 1, 3)
    return matrix.contiguous()


def compile_library(compiler: str, path: pathlib.Path, *options: str) -> None:
    """Compile `layers.cpp` for this processor; SubprocessError with the compiler's first error on failure."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = pathlib.Path(folder) / path.name
        for flags in FOR_THIS_CPU:
            command = [compiler, *FLAGS, *flags, *options, "-o", str(temporary), str(SOURCE)]
            run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
            if not run.returncode:
                os.replace(temporary, path)
                return
    errors = [line for line in run.stderr.splitlines() if "error" in line] or [f"status {run.returncode}"]
    raise subprocess.SubprocessError(f"{compiler} does not compile {SOURCE.name}: {errors[0]}")


def _processor() -> str:
    """The processor's instruction sets: machines of several kinds may share a cache folder."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line for line in lines if line.startswith(("flags", "Features")))
    return next(named, platform.processor() + platform.node())
