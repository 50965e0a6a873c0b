"""Optional: TFgram and the encoder, trained on a CPU by C++ that is compiled when it is first used."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import encoder, native, tfgram

__all__ = ["accelerate"]


def accelerate(model: nn.Module) -> str:
    """Replace the training forward of `model.tfgram` and `model.encoder` with compiled layers, if possible.

    Results agree with the modules' own forward up to rounding, and state entries stay the same. In evaluation
    mode, in float64, for a single clip and under torch.compile the modules' own forward runs.

    Parameters
    ----------
    model : nn.Module
        An `osscl_min.model.OSSCL`.

    Returns
    -------
    str
        One line for the log: what computes the training layers, and why; empty for a model not on a CPU.
    """
    first = model.encoder.conv1.conv
    if first.weight.device.type != "cpu":
        return ""
    obstacle = native.load()[1]
    if os.environ.get("OSSCL_KERNELS_BACKEND") == "triton":
        obstacle = "OSSCL_KERNELS_BACKEND=triton"
    elif first.weight.dtype not in native.DTYPES:
        obstacle = f"{first.weight.dtype} has no compiled layers"
    try:
        encoder.chain_layers(model.encoder, (1, 1))
    except ValueError as error:
        obstacle = obstacle or str(error)
    if obstacle:
        return f"training layers: PyTorch's own ({obstacle})"
    for module, compiled in ((model.encoder, encoder.forward), (model.tfgram, tfgram.forward)):
        if module is not None:
            module.forward = MethodType(_training(compiled), module)
    return "training layers: compiled for this CPU"


def _training(compiled: Callable[[nn.Module, Tensor, torch.dtype], Tensor]) -> Callable:
    """A module's forward that takes the compiled path in training and the module's own elsewhere."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if (
            not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and {x.dtype, dtype} <= native.DTYPES.keys()
            and len(x) > 1
            and all(norm.training for norm in self.modules() if isinstance(norm, _BatchNorm))
        ):
            return compiled(self, x, dtype)
        return type(self).forward(self, x)

    return forward
