"""Which device computes, in which precision."""

from __future__ import annotations

import os

import torch
from osscl_kernels import keep_freed_memory


def choose_device(name: str = "auto") -> torch.device:
    """ "auto" is a CUDA device where there is one, the CPU elsewhere; torchrun's processes take one each."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def prepare(device: torch.device, precision: str = "fp32") -> str:
    """Set the process up for a long computation and say what runs.

    On a CPU, freed memory is kept for the next batch. On a GPU, "tf32" lets float32 products round their
    factors to TensorFloat-32, and "fp32" does not.

    Returns
    -------
    str
        One line for logs.
    """
    if device.type == "cpu":
        keep_freed_memory()
        threads = torch.get_num_threads()
        what = f"cpu, {threads} thread{'' if threads == 1 else 's'}"
        if precision == "tf32":
            return f"float32 on {what}: it has no TensorFloat-32"
        fast = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("bf16")
        if precision == "bf16":
            return f"bfloat16 on {what}" + (
                "" if fast else ", which has no instructions for it: expect less speed"
            )
        return f"float32 on {what}"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    names = {"fp32": "float32", "tf32": "TensorFloat-32", "bf16": "bfloat16"}
    return f"{names[precision]} on {torch.cuda.get_device_name(device)}"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the network runs: bfloat16 activations and products for "bf16", else none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
