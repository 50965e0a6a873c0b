"""The encoder's training forward: a chain from its first layer to its last 1 x 1 expansion."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .chain import Chain, Layer, Patches
from .native import CHANNELS


def forward(module: nn.Module, maps: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, maps, mels, frames) -> (B, embedding), with the batch's own statistics."""
    source, last = Patches(maps, module.conv1.conv.stride[0]), module.linear7
    x = Chain(source, chain_layers(module, tuple(maps.shape[2:])), dtype, len(maps))()
    # the last kernel is as large as the map
    x = (x * last.conv.weight.flatten(1).T).sum(1)[:, :, None, None]
    return module.linear1(last.bn(x)).flatten(1)


def chain_layers(module: nn.Module, size: tuple[int, int]) -> list[Layer]:
    """The layers for maps of a size (height, width); ValueError if one of them is not compiled."""
    layers: list[Layer] = []
    for conv, norm, prelu, residual in _modules(module):
        kernel = 3 if conv.groups > 1 or not layers else 1
        strides = ((1, 1), (2, 2)) if kernel == 3 else ((1, 1),)
        shape = conv.kernel_size, conv.padding, conv.groups in (1, conv.in_channels), conv.stride in strides
        if shape != ((kernel,) * 2, (kernel // 2,) * 2, True, True) or conv.out_channels % CHANNELS:
            raise ValueError(f"no compiled {conv}")
        if not layers:  # its input is one row per patch
            size = tuple((length - 1) // conv.stride[0] + 1 for length in size)
        slope, shortcut = 1.0 if prelu is None else prelu.weight, layers[-3] if residual else None
        layers.append(Layer(conv, norm, slope, size, shortcut))
        size = layers[-1].out_size
    return layers


def _modules(module: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d, nn.PReLU | None, bool]]:
    """Convolution, normalisation, PReLU and whether a block's input is added, in order."""
    for block in (module.conv1, module.dw_conv1, *module.blocks, module.conv2):
        if isinstance(block.conv, nn.Conv2d):
            yield block.conv, block.bn, block.prelu, False
        else:
            yield *block.conv[:3], False
            yield *block.conv[3:6], False
            yield *block.conv[6:], None, block.residual
