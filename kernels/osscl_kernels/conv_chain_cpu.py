"""A chain of convolution, BatchNorm and PReLU layers, trained on a CPU in groups of clips.

The same steps as `tfgram_train_cpu`, for two-dimensional layers: the raw output of every convolution is kept,
and the output of layers without a PReLU; what follows from these is computed again in the backward pass,
where it is in the cache. Batch statistics are the only thing that groups of clips wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .clipwise import Normalisation, SideBySide, aten, combine_moments, dense, moments, weight_gradient

GROUP_VALUES = 1 << 23  # of a layer's input or output in one group of clips


@dataclass(frozen=True)
class ChainLayer:
    """One layer: convolution without bias, BatchNorm, then a PReLU or a shortcut or nothing."""

    stride: int = 1
    padding: int = 0
    groups: int = 1
    prelu: bool = True
    shortcut: int = 0  # adds the output of the layer this many back, both without a PReLU; 0: none


def conv_chain(
    x: Tensor,
    layers: Sequence[ChainLayer],
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    slopes: Sequence[Tensor],
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run the layers with batch statistics, as the modules in training mode do; for a CPU.

    Parameters
    ----------
    x : torch.Tensor
        (B, C, H, W); computed in its dtype, or bfloat16 under autocast to that.
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
        (B, outputs, H', W') of the last layer, float32 or x's dtype where that is wider.
    means, variances : lists of torch.Tensor
        Batch mean and biased variance of each layer, for the running buffers.

    References
    ----------
    Ioffe and Szegedy, "Batch Normalization", ICML 2015; He et al., "Delving Deep into Rectifiers", ICCV 2015.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        output, *statistics = _ConvChain.apply(
            x, eps, tuple(layers), dtype, *weights, *gammas, *betas, *slopes
        )
    return output, statistics[: len(layers)], statistics[len(layers) :]


class _Convolution:
    """One layer's convolution and its gradients, each by the fastest way that PyTorch has for its shape."""

    def __init__(self, layer: ChainLayer, weight: Tensor, size: torch.Size, dtype: torch.dtype):
        self.layer, self.size, self.dtype = layer, tuple(size), dtype
        self.weight = self._cast(weight)
        self.kernel = weight.shape[2:]
        self.depthwise = layer.groups == weight.shape[0] and weight.shape[1] == 1
        self.pointwise = self.kernel == (1, 1) and (layer.stride, layer.padding, layer.groups) == (1, 0, 1)
        self.whole = self.depthwise and tuple(self.kernel) == self.size and not layer.padding
        self.thrice = self.depthwise and (*self.kernel, layer.padding) == (3, 3, 1)
        if self.thrice:
            self.taps = self._taps(weight)

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _taps(self, weight: Tensor) -> Tensor:
        """(3, 3, channels), as the compiled functions take them."""
        return weight.squeeze(1).permute(1, 2, 0).to(_wide(self.dtype)).contiguous()

    def _depthwise(self, x: Tensor, taps: Tensor, size: Sequence[int], gradient: bool) -> Tensor:
        out = x.new_empty(len(x), *size, x.shape[1]).permute(0, 3, 1, 2)
        sizes = *x.shape[2:], *size, self.layer.stride, gradient, x.shape[1]
        native.call("depthwise", x.dtype, dense(x), taps, out, len(x), *sizes)
        return out

    def __call__(self, a: Tensor) -> Tensor:
        if self.thrice and native.fits(a):
            size = [(s - 1) // self.layer.stride + 1 for s in self.size]
            return self._depthwise(a, self.taps, size, False)
        if self.whole:  # one value a channel: a sum of products
            weight = self.weight.squeeze(1)
            return (a.to(weight.dtype) * weight).sum((2, 3), keepdim=True, dtype=_wide(a.dtype)).to(a.dtype)
        return F.conv2d(a, self.weight, None, self.layer.stride, self.layer.padding, 1, self.layer.groups)

    def backward(self, scale: Tensor) -> None:
        """Fold dy / (centred dy), (outputs,), into the weight that the input's gradient takes."""
        weight = self.weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)
        if self.thrice:
            self.taps = self._taps(weight)
        if self.pointwise:
            weight = weight.transpose(0, 1)
        elif self.depthwise and not self.whole:
            weight = weight.flip(2, 3)
        self.folded = self._cast(weight)

    def input_gradient(self, dy: Tensor) -> Tensor:
        layer, size = self.layer, self.size
        if self.thrice and native.fits(dy):
            return self._depthwise(dy, self.taps, size, True)
        if self.whole:
            return dy * self.folded.squeeze(1)
        if self.pointwise:
            return F.conv2d(dy, self.folded)
        if self.depthwise:  # the flipped kernel over the gradient, with zeros between strides
            if layer.stride > 1:
                height, width = (
                    s + 2 * layer.padding - k + 1 for s, k in zip(size, self.kernel, strict=True)
                )
                spread = dy.new_zeros(len(dy), height, width, dy.shape[1]).permute(0, 3, 1, 2)
                spread[:, :, :: layer.stride, :: layer.stride] = dy
                dy = spread
            padding = [k - 1 - layer.padding for k in self.kernel]
            return F.conv2d(dy, self.folded, None, 1, padding, 1, layer.groups)
        x = dy.new_empty(len(dy), self.folded.shape[1] * layer.groups, *size)
        x = x.contiguous(memory_format=torch.channels_last)
        return self._backward(dy, x, self.folded, (True, False, False))[0]

    def weight_gradient(self, dy: Tensor, a: Tensor) -> Tensor:
        """Float32 at least."""
        wide = _wide(a.dtype)
        if self.whole:
            return (a.to(wide) * dy).sum(0)[:, None]
        if self.pointwise:
            return weight_gradient(a, dy)[..., None]
        if self.thrice and native.fits(dy):
            a, dy, sums = dense(a), dense(dy), torch.zeros(3, 3, len(self.weight), dtype=torch.float64)
            sizes = *self.size, *dy.shape[2:], self.layer.stride, dy.shape[1]
            native.call("depthwise_weight", dy.dtype, a, dy, sums, len(dy), *sizes)
            return sums.permute(2, 0, 1)[:, None]
        return self._backward(dy, a, self.weight, (False, True, False))[1].to(wide)

    def _backward(self, dy, a, weight, mask):
        stride, padding = [self.layer.stride] * 2, [self.layer.padding] * 2
        return aten.convolution_backward(
            dy, a, weight, None, stride, padding, (1, 1), False, (0, 0), self.layer.groups, mask
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Groups:
    """A tensor of all clips in parts of `size` clips."""

    def __init__(self, parts: Sequence[Tensor], size: int):
        self.parts, self.size = list(parts), size

    def take(self, start: int, stop: int) -> Tensor:
        """Clips `start` to `stop`; a copy only where they lie in several parts."""
        first, last = start // self.size, (stop - 1) // self.size
        if first == last:
            part, offset = self.parts[first], first * self.size
            whole = stop - start == len(part)
            return part if whole else part[start - offset : stop - offset]
        part = torch.cat(self.parts[first : last + 1])
        return part[start - first * self.size :][: stop - start]


class _State:
    """What the forward pass leaves for the backward pass, and both passes."""

    def __init__(self, x, eps, layers, dtype, parameters):
        n = len(layers)
        self.layers, self.eps, self.dtype = layers, eps, dtype
        self.weights, self.gammas, self.betas = (
            parameters[:n],
            parameters[n : 2 * n],
            parameters[2 * n : 3 * n],
        )
        slopes = iter(parameters[3 * n :])
        self.slopes = [next(slopes) if layer.prelu else 1.0 for layer in layers]
        self.clips = len(x)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        self.inputs = _Groups([x], self.clips)
        self.convolutions: list[_Convolution] = []
        self.norms: list[Normalisation] = []
        self.raw: list[_Groups | None] = []
        self.outputs: dict[int, _Groups] = {}  # of layers without a PReLU
        self.sizes: list[int] = []  # clips in a group of each layer
        self.counts: list[int] = []

    def spans(self, size: int) -> list[tuple[int, int]]:
        return [(start, min(start + size, self.clips)) for start in range(0, self.clips, size)]

    def _each(self, each: SideBySide, function, size: int) -> list:
        spans = self.spans(size)
        return each(lambda g: function(*spans[g]), len(spans))

    def output(self, index, start, stop):
        """What layer `index` gives to the next one."""
        if index < 0:
            return self.inputs.take(start, stop)
        if index in self.outputs:
            return self.outputs[index].take(start, stop)
        back = self.layers[index].shortcut
        other = self.output(index - back, start, stop) if back else None
        return self.norms[index](self.raw[index].take(start, stop), other)

    def forward(self, each):
        size = tuple(self.inputs.parts[0].shape[2:])
        values = self.inputs.parts[0][0].numel()
        means, variances = [], []
        for index, (layer, weight) in enumerate(zip(self.layers, self.weights, strict=True)):
            conv = _Convolution(layer, weight, size, self.dtype)
            size = tuple((s + 2 * layer.padding - k) // layer.stride + 1
                         for s, k in zip(size, weight.shape[2:], strict=True))  # fmt: skip
            values, before = len(weight) * size[0] * size[1], values
            most = min(GROUP_VALUES // max(values, before), self.clips // each.threads)
            group = each.share(self.clips, most)
            keep = index and not self.layers[index - 1].prelu

            def step(start, stop, index=index, conv=conv, keep=keep):
                a = self.output(index - 1, start, stop)
                y = conv(a)
                return y, moments(y), a if keep else None

            raw, parts, kept = zip(*self._each(each, step, group), strict=True)
            if keep:
                self.outputs[index - 1] = _Groups(kept, group)
            count, mean, square = combine_moments(*(torch.stack(m) for m in zip(*parts, strict=True)))
            variance = square / count
            self.raw.append(_Groups(raw, group))
            self.convolutions.append(conv)
            self.sizes.append(group)
            self.counts.append(int(count))
            affine = self.gammas[index], self.betas[index], self.eps, self.dtype
            self.norms.append(Normalisation(mean, variance, *affine, self.slopes[index]))
            means.append(mean.to(_wide(self.dtype)))
            variances.append(variance.to(_wide(self.dtype)))
        last = self._each(each, lambda i, j: self.output(len(self.layers) - 1, i, j), group)
        return torch.cat(last).to(_wide(self.dtype)), means, variances

    def backward(self, each, gradient, input_needed):
        n = len(self.layers)
        weights, gammas, betas, slopes = ([None] * n for _ in range(4))
        gradient = gradient.to(self.dtype).clone(memory_format=torch.channels_last)
        sources = {i - layer.shortcut: i for i, layer in enumerate(self.layers) if layer.shortcut}
        shortcuts: dict[int, _Groups] = {}  # gradients that wait for the layer where the shortcut begins

        def top(start, stop):
            dz, _, *rest = self.norms[-1].backward(
                gradient[start:stop], self.raw[-1].take(start, stop), False
            )
            return dz, *rest

        size, results, inputs = self.sizes[-1], self._each(each, top, self.sizes[-1]), None
        for index in range(n - 1, -1, -1):
            dz, sums, slope_sums = zip(*results, strict=True)
            dz, sums = _Groups(dz, size), sum(sums)
            gammas[index], betas[index] = sums
            if self.layers[index].prelu:
                slopes[index] = sum(slope_sums)
            elif self.layers[index].shortcut:
                shortcuts[index] = dz
            conv, norm, size = self.convolutions[index], self.norms[index], self.sizes[index]
            scale = norm.gamma.double() * norm.rstd
            conv.backward(scale)
            below = index - 1

            def step(start, stop, index=index, below=below, conv=conv, norm=norm, dz=dz, sums=sums):
                y = self.raw[index].take(start, stop)
                dy = norm.centred(dz.take(start, stop), y, *sums, self.counts[index])
                d = conv.input_gradient(dy) if index or input_needed else None
                if not index:
                    return conv.weight_gradient(dy, self.inputs.take(start, stop)), d
                if below in sources:
                    d.add_(shortcuts[sources[below]].take(start, stop))
                prelu = self.layers[below].prelu
                dz, a, *rest = self.norms[below].backward(d, self.raw[below].take(start, stop), prelu)
                a = a if prelu else self.output(below, start, stop)
                return conv.weight_gradient(dy, a), (dz, *rest)

            parts, results = zip(*self._each(each, step, size), strict=True)
            weights[index] = sum(p.double() for p in parts) * scale.view(-1, 1, 1, 1)
            self.raw[index] = None
            if not index and input_needed:
                inputs = torch.cat(results)
        return inputs, [*weights, *gammas, *betas, *(s for s in slopes if s is not None)]


class _ConvChain(torch.autograd.Function):
    """output, *means, *variances = f(x, eps, layers, dtype, *weights, *gammas, *betas, *slopes)."""

    @staticmethod
    def forward(ctx, x, eps, layers, dtype, *parameters):
        state = _State(x, eps, layers, dtype, parameters)
        with SideBySide() as each:
            output, means, variances = state.forward(each)
        ctx.state, ctx.like = state, (x.dtype, [p.dtype for p in parameters])
        ctx.mark_non_differentiable(*means, *variances)
        return output, *means, *variances

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, *_):
        state, ctx.state = ctx.state, None
        if state is None:
            raise RuntimeError("conv_chain: the backward pass ran a second time; its buffers are freed")
        with torch.autocast("cpu", enabled=False), SideBySide() as each:
            inputs, parameters = state.backward(each, gradient, ctx.needs_input_grad[0])
        dtype, dtypes = ctx.like
        inputs = None if inputs is None else inputs.to(dtype)
        return inputs, None, None, None, *(g.to(d) for g, d in zip(parameters, dtypes, strict=True))
