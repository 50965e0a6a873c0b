"""What tests of kernels share. Importing it makes Triton's interpreter round as a GPU does.

By itself the interpreter truncates float32 to bfloat16 where the hardware rounds to the nearest, and
multiplies tf32 operands exactly where tensor cores ignore the last 13 bits.
"""

import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import torch
from osscl_kernels import LAYERS, backend, frames
from osscl_kernels.tfgram_infer import pool_ref
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def error(value, exact, least=1e-30, norm=False):
    """Of the largest entry, or of the Euclidean norm; NaN, within no bound, where a value is not finite."""
    assert value.shape == exact.shape
    value, exact = value.detach().cpu().double(), exact.detach().cpu().double()
    size = torch.linalg.vector_norm if norm else lambda x: x.abs().max()
    relative = size(value - exact) / size(exact).clamp(min=least)
    return float(relative) if relative.isfinite() else math.nan


def python(*arguments, **variables):
    """What a process of its own writes, whose Triton compiles."""
    kernels = {"PYTHONPATH": str(pathlib.Path(backend.__file__).parents[1]), "TRITON_INTERPRET": "0"}
    command, environment = [sys.executable, *arguments], os.environ | kernels | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


class Modules(nn.Module):
    """TFgram from plain layers, with statistics and gammas (some negative, one 0) as training leaves them."""

    def __init__(self, momentum=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.ModuleList(
            nn.Conv1d(x.inputs, x.outputs, x.kernel, x.stride, x.padding, x.dilation, bias=False)
            for x in LAYERS
        )
        self.norm = nn.ModuleList(nn.BatchNorm1d(x.outputs, momentum=momentum) for x in LAYERS)
        for norm in self.norm:
            nn.init.normal_(norm.weight)
            norm.weight.data[3] = 0.0
            nn.init.normal_(norm.bias, std=0.3)
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.2, 2.0)

    def forward(self, wave):
        x, count = wave.unsqueeze(1), frames(wave.shape[1])
        for conv, norm, layer in zip(self.conv, self.norm, LAYERS, strict=True):
            x = pool_ref(norm(conv(x)).relu(), layer, count)
        return x


if backend.INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(bits.astype(np.uint32).view(np.float32)), np.uint16(0x7FC0), nearest)

    def truncated(handle):
        if handle.data.dtype != np.float32:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.uint32) & np.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype.scalar)

    def multiplied(self, a, b, d, precision, imprecise):
        if str(precision).rpartition(".")[2].upper() == "TF32":
            a, b = truncated(a), truncated(b)
        return dot(self, a, b, d, precision, imprecise)

    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = multiplied
