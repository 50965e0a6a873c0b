"""Which device computes, in which precision, with which implementation."""

from __future__ import annotations

import os

import torch
from osscl_kernels import keep_freed_memory
from osscl_kernels.backend import resolve

from osscl_min.runtime.files import UserError


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is CUDA where available, else the CPU; each of torchrun's processes takes its own GPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: no {device}, PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def prepare(device: torch.device, precision: str = "fp32") -> str:
    """Set the process up for a long computation; returns a line such as "float32 on cpu, 2 threads".

    On a CPU, freed memory is kept for the next batch. On a GPU, cuDNN searches for the fastest convolutions,
    and float32 products round their factors to TensorFloat-32 with "tf32" but not with "fp32".
    """
    # PyTorch itself still reads these flags, and reading them fails after fp32_precision was set instead
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = device.type == "cuda"  # shapes stay the same
    names = {"fp32": "float32", "tf32": "TensorFloat-32", "bf16": "bfloat16"}
    if device.type == "cuda":
        return f"{names[precision]} on {torch.cuda.get_device_name(device)}"
    keep_freed_memory()
    threads = torch.get_num_threads()
    line = f"{names[precision]} on cpu, {threads} thread{'' if threads == 1 else 's'}"
    if precision == "tf32":
        return line.replace("TensorFloat-32", "float32") + ": a CPU has no TensorFloat-32"
    capable = torch.cpu.get_capabilities()
    if precision == "bf16" and not (capable.get("avx512_bf16") or capable.get("bf16")):
        line += ", which has no bfloat16 instructions: expect it to be slow"
    return line


def implementation(tensor: torch.Tensor) -> str:
    """What computes the fused kernels for tensors such as this: "Triton kernels" or "PyTorch"."""
    try:
        return "Triton kernels" if "triton" in resolve(tensor) else "PyTorch"
    except (ValueError, RuntimeError) as error:  # of OSSCL_KERNELS_BACKEND
        raise UserError(str(error)) from error


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the network runs: bfloat16 activations and products for "bf16", else none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
