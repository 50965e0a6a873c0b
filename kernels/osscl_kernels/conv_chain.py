"""Chains of two-dimensional convolutions, such as the encoder, trained on a CPU by `Chain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .chain_cpu import Chain, Layer, Threads


@dataclass(frozen=True)
class ChainLayer:
    """One layer: convolution without bias, BatchNorm, then a PReLU or a shortcut or nothing."""

    stride: int = 1
    padding: int = 0
    groups: int = 1
    prelu: bool = True
    shortcut: int = 0  # adds the output of the layer this many back, both without a PReLU; 0: none


def chain_layers(
    size: tuple[int, int], layers: Sequence[ChainLayer], weights: Sequence[Tensor], slopes: Sequence[Tensor]
) -> list[Layer] | None:
    """The layers for maps of a size, as `Chain` takes them; None where it cannot."""
    result, slopes = [], iter(slopes)
    for index, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        outputs, inputs, *kernel = weight.shape
        out = tuple(
            (s + 2 * layer.padding - k) // layer.stride + 1 for s, k in zip(size, kernel, strict=True)
        )
        slope = next(slopes) if layer.prelu else 1.0
        shape, how, maps = (*kernel, layer.padding), (layer.stride, layer.groups), 0
        depthwise = inputs == 1 and layer.groups == outputs
        if depthwise and shape == (3, 3, 1) and layer.stride in (1, 2) and index:
            kind, weight = "depthwise", weight.flatten(1)
        elif depthwise and shape == (*size, 0) and index:
            kind, weight = "whole", weight.flatten(1)
        elif shape == (1, 1, 0) and how == (1, 1) and inputs % native.CHANNELS == 0:
            kind, weight = "product", weight.flatten(2)
        elif not index and shape == (3, 3, 1) and layer.groups == 1 and 9 * inputs <= native.CHANNELS:
            kind, maps = "product", inputs
            patches = weight.permute(0, 2, 3, 1).flatten(1)
            weight = F.pad(patches, (0, native.CHANNELS - 9 * inputs)).unsqueeze(2)
        else:
            return None
        if outputs % native.CHANNELS:
            return None
        result.append(Layer(kind, weight, size, out, slope, layer.stride, 1, maps, layer.shortcut))
        size = out
    return result


@torch.compiler.disable
def conv_chain(
    x: Tensor,
    layers: Sequence[ChainLayer],
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    slopes: Sequence[Tensor],
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
    """Run the layers with batch statistics, as the modules in training mode do; for a CPU.

    Parameters
    ----------
    x : torch.Tensor
        (B, C, H, W), float32 or bfloat16; computed in bfloat16 under autocast to that.
    layers : sequence of ChainLayer
    weights : sequence of torch.Tensor
        (outputs, inputs / groups, height, width) of each layer.
    gammas, betas : sequences of torch.Tensor
        (outputs,) of each layer.
    slopes : sequence of torch.Tensor
        (outputs,) of each layer with a PReLU.
    eps : float

    Returns
    -------
    output : torch.Tensor
        (B, outputs, H', W') of the last layer, float32.
    means, variances : lists of torch.Tensor
        Batch mean and biased variance of each layer, for the running buffers.
    None
        Where the compiled functions do not take these layers or this dtype, or are not there; then the caller
        runs the modules.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", ICML 2015; He et al., "Delving Deep into Rectifiers", ICCV 2015.
    """
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if dtype not in native.DTYPES or native.library() is None or layers[-1].prelu:
        return None
    if chain_layers(tuple(x.shape[2:]), layers, weights, slopes) is None:
        return None
    with torch.autocast("cpu", enabled=False):
        output, *statistics = _ConvChain.apply(
            x, eps, tuple(layers), dtype, *weights, *gammas, *betas, *slopes
        )
    return output, statistics[: len(layers)], statistics[len(layers) :]


class _ConvChain(torch.autograd.Function):
    """output, *means, *variances = f(x, eps, layers, dtype, *weights, *gammas, *betas, *slopes)."""

    @staticmethod
    def forward(ctx, x, eps, layers, dtype, *parameters):
        n = len(layers)
        weights, gammas, betas = (parameters[i * n : (i + 1) * n] for i in range(3))
        image = x.to(dtype).permute(0, 2, 3, 1).contiguous()
        chain = Chain(
            chain_layers(tuple(x.shape[2:]), layers, weights, parameters[3 * n :]),
            gammas, betas, eps, dtype, len(x), {"x": image},
        )  # fmt: skip
        with Threads() as threads:
            means, variances = chain.forward(threads)
        norm, y, last = chain.norms[-1], chain.raw[n - 1], layers[-1].shortcut
        output = y.float() * norm.scale + norm.shift
        if last:
            output = output + chain.inputs[n - 1 - last].float()
        output = output.transpose(1, 2).unflatten(2, chain.layers[-1].out_size)
        ctx.chain, ctx.like = chain, (x, parameters)
        statistics = [t.float() for t in (*means, *variances)]
        ctx.mark_non_differentiable(*statistics)
        return output, *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, *_):
        chain, ctx.chain = ctx.chain, None
        if chain is None:
            raise RuntimeError("conv_chain: the backward pass ran a second time; its buffers are freed")
        x, parameters = ctx.like
        norm, y = chain.norms[-1], chain.raw[len(chain.layers) - 1]
        dz = gradient.flatten(2).transpose(1, 2).double()
        sums = torch.stack([(dz * (y.double() - norm.mean)).sum((0, 1)), dz.sum((0, 1))])
        below, maps = None, chain.layers[0].maps
        if ctx.needs_input_grad[0]:
            like = chain.source["x"]
            below = {"d": torch.zeros(like.shape) if maps else torch.empty_like(like)}
        with Threads() as threads:
            weights, gammas, betas, slopes = chain.backward(
                threads, dz.to(chain.dtype).contiguous(), sums, below
            )
        if maps:
            weights[0] = weights[0][:, : 9 * maps, 0].unflatten(1, (3, 3, maps)).permute(0, 3, 1, 2)
        found = [*weights, *gammas, *betas, *(s for s in slopes if s is not None)]
        found = [g.reshape(p.shape).to(p.dtype) for g, p in zip(found, parameters, strict=True)]
        dx = below and below["d"].permute(0, 3, 1, 2).to(x.dtype)
        return dx, None, None, None, *found
