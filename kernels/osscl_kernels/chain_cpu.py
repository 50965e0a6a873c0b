"""A chain of convolution, BatchNorm and ReLU or PReLU layers, trained on a CPU by functions of `layers.cpp`.

Forward, a layer keeps its raw convolution output and nothing else; its normalisation and activation are
computed again wherever they are needed, in the cache. Clips wait for each other only for a layer's batch
statistics. With z = gamma xhat + beta, f(z) = z above 0 and slope z below, d the gradient behind f:

    dz = d where z > 0, else slope d,    dslope = sum of d z where z <= 0,
    dy = gamma rstd (dz - mean(dz) - xhat mean(dz xhat)),

whose factor gamma rstd goes into the weights that dy is multiplied by. Clips are divided into parts whatever
the number of threads, so that results do not depend on it.

Sources: Ioffe and Szegedy, "Batch Normalization", ICML 2015; He et al., "Delving Deep into Rectifiers", ICCV
2015; joined statistics by Chan, Golub and LeVeque (1983).
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native

PARTS = 32


class Threads:
    """Runs functions of `layers.cpp`, part by part of the clips, each part on one thread.

    A context manager: the threads live as long as it does. Meanwhile PyTorch computes on one thread too,
    because the other threads of an operation go on waiting for its next one, busily, in the parts' way.
    """

    def __enter__(self) -> Threads:
        self.count = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(min(self.count, PARTS)) if self.count > 1 else None
        torch.set_num_threads(1)
        return self

    def run(self, name: str, dtype: torch.dtype, clips: int, **fields: Tensor | int | None) -> None:
        """Call a function for all parts; the fields are those of its step."""
        step = native.Step(clips=clips, parts=part_count(clips), **fields)
        function, pointer, numbers = native.function(name, dtype), ctypes.byref(step), itertools.count()

        def work(_: int) -> None:
            while (part := next(numbers)) < step.parts:
                function(pointer, part)

        if self.pool is None or step.parts == 1:
            work(0)
        else:
            list(self.pool.map(work, range(min(self.count, step.parts))))

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        torch.set_num_threads(self.count)


def part_count(clips: int) -> int:
    """Parts that clips are divided into; each has sums and weight gradients of its own."""
    return min(PARTS, clips)


def joined(counts: Tensor, means: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the union of parts: counts (n,), means and centred squares (n, C), in float64."""
    mean = (counts[:, None] * means).sum(0) / counts.sum()
    square = squares.sum(0) + (counts[:, None] * (means - mean).square()).sum(0)
    return mean, square / counts.sum()


@dataclass
class Pool:
    """A maximum pool with ReLU: rows start[w] <= r < end[w] of a clip are window w."""

    start: Tensor
    end: Tensor


@dataclass
class Layer:
    """One layer: what it computes, of which sizes, and what follows.

    Attributes
    ----------
    kind : {"product", "depthwise", "whole"}
        Convolution along the rows with one or three taps, 3 x 3 channel by channel, or channel by channel
        with a kernel as large as the map.
    weight : torch.Tensor
        (outputs, inputs, taps), or (channels, kernel positions).
    size, out_size : tuple of int
        Height and width of input and output.
    slope : torch.Tensor or float
        (outputs,) of the PReLU; 0 for ReLU, 1 for no activation.
    shortcut : int
        Adds the output of the layer this many back; 0: none.
    """

    kind: str
    weight: Tensor
    size: tuple[int, int]
    out_size: tuple[int, int]
    slope: Tensor | float
    stride: int = 1
    dilation: int = 1
    maps: int = 0  # of the image whose 3 x 3 patches are the input
    shortcut: int = 0
    pool: Pool | None = None

    @property
    def linear(self) -> bool:
        return isinstance(self.slope, float) and self.slope == 1.0

    def matrix(self) -> Tensor:
        """(taps, inputs, outputs), or (kernel positions, channels)."""
        return self.weight.detach().permute(*range(self.weight.dim() - 1, -1, -1))

    def sizes(self) -> dict[str, int]:
        """Of a step."""
        outputs, *inputs = self.weight.shape
        product = self.kind == "product"
        return {
            "rows": self.size[0] * self.size[1] if not self.maps else self.out_size[0] * self.out_size[1],
            "inputs": inputs[0] if product else outputs,
            "outputs": outputs,
            "taps": inputs[1] if product else 0,
            "dilation": self.dilation,
            "height": self.size[0],
            "width": self.size[1],
            "out_height": self.out_size[0],
            "out_width": self.out_size[1],
            "stride": self.stride,
            "maps": self.maps,
        }


class Normalisation:
    """What follows a convolution, as the compiled functions take it: float32 vectors of a value a channel."""

    def __init__(self, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, eps: float, slope):
        self.mean = mean.float()
        self.rstd = (variance.double() + eps).rsqrt()
        self.gamma = gamma.detach().double()
        scale = self.gamma * self.rstd
        self.scale, self.shift = scale.float(), (beta.detach() - mean * scale).float()
        self.slope = torch.zeros_like(self.mean) + torch.as_tensor(slope).detach()

    def fields(self) -> dict[str, Tensor]:
        """Of a step that reads a raw output."""
        return {"scale": self.scale, "shift": self.shift, "slope": self.slope, "mean": self.mean}

    def centring(self, dgamma: Tensor, dbeta: Tensor, count: int) -> dict[str, Tensor]:
        """Fields of a step that reads dy / (gamma rstd) = dz + y scale + shift."""
        scale = -dgamma / count * self.rstd
        shift = -dbeta / count - self.mean * scale
        return {"centre_scale": scale.float(), "centre_shift": shift.float()}


@dataclass
class Chain:
    """The layers in one forward pass and its backward pass.

    Attributes
    ----------
    layers : list of Layer
    gammas, betas : sequences of torch.Tensor
        (outputs,) of each layer.
    eps : float
    dtype : torch.dtype
        Of the activations, float32 or bfloat16.
    clips : int
    source : dict
        Fields of the step that say where the first layer's input is.
    """

    layers: list[Layer]
    gammas: Sequence[Tensor]
    betas: Sequence[Tensor]
    eps: float
    dtype: torch.dtype
    clips: int
    source: dict
    raw: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)  # that are stored, by the layer they come from
    norms: list[Normalisation] = field(default_factory=list)

    def __post_init__(self):
        self.parts = part_count(self.clips)

    def _run(self, threads: Threads, name: str, **fields) -> None:
        threads.run(name, self.dtype, self.clips, **fields)

    def _weight(self, layer: Layer, matrix: Tensor) -> Tensor:
        return native.pack(matrix, self.dtype) if layer.kind == "product" else matrix.float().contiguous()

    def _clips_in_parts(self) -> Tensor:
        edges = torch.arange(self.parts + 1) * self.clips // self.parts
        return edges.diff()

    def _input(self, index: int) -> dict[str, Tensor]:
        """Fields that say how a layer reads its input, the output of layer `index`."""
        if index < 0:
            return self.source
        if index in self.inputs:
            return {"x": self.inputs[index]}
        fields = {"below": self.raw[index], **self.norms[index].fields()}
        if self.layers[index].shortcut:
            fields["other"] = self.inputs[index - self.layers[index].shortcut]
        return fields

    def forward(self, threads: Threads) -> tuple[list[Tensor], list[Tensor]]:
        """Batch means and biased variances of all layers, float64."""
        means, variances = [], []
        for index, layer in enumerate(self.layers):
            outputs, (height, width) = len(layer.weight), layer.out_size
            y = torch.empty(self.clips, height * width, outputs, dtype=self.dtype)
            centre, sums = torch.empty(self.parts, outputs), torch.empty(self.parts, 2, outputs).double()
            fields, kept = self._input(index - 1), None
            if "below" in fields and self.layers[index - 1].linear:
                kept = torch.empty_like(fields["below"])
            self._run(
                threads, layer.kind + "_forward", weight=self._weight(layer, layer.matrix()), y=y,
                centre=centre, sums=sums, kept=kept, **layer.sizes(), **fields,
            )  # fmt: skip
            if kept is not None:
                self.inputs[index - 1] = kept
            self.raw[index] = y
            counts = self._clips_in_parts() * (height * width)
            first, second = sums.unbind(1)
            squares = (second - first.square() / counts[:, None]).clamp_(min=0)
            mean, variance = joined(counts, centre + first / counts[:, None], squares)
            affine = self.gammas[index], self.betas[index], self.eps, layer.slope
            self.norms.append(Normalisation(mean, variance, *affine))
            means.append(mean)
            variances.append(variance)
            if layer.pool:
                self.inputs[index] = self._pooled(threads, index)
        return means, variances

    def _pool(self, index: int) -> dict:
        pool, y = self.layers[index].pool, self.raw[index]
        fields = {"below": y, "rows": y.shape[1], "inputs": y.shape[2], **self.norms[index].fields()}
        return {**fields, "start": pool.start, "end": pool.end, "windows": len(pool.start)}

    def _pooled(self, threads: Threads, index: int) -> Tensor:
        fields = self._pool(index)
        out = torch.empty(self.clips, fields["windows"], fields["inputs"], dtype=self.dtype)
        self._run(threads, "pool_forward", y=out, **fields)
        return out

    def unpooled(self, threads: Threads, index: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient behind the pool of layer `index` -> dz and its sums, as `backward` takes them."""
        d, sums = torch.empty_like(self.raw[index]), self._sums(3, self.raw[index].shape[2])
        self._run(threads, "pool_backward", dz=gradient, d=d, sums=sums, **self._pool(index))
        return d, sums.sum(0)

    def _sums(self, kinds: int, channels: int) -> Tensor:
        return torch.empty(self.parts, kinds, channels, dtype=torch.float64)

    def backward(
        self, threads: Threads, dz: Tensor, sums: Tensor, below: dict | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]]:
        """Gradients of the weights, gammas, betas and slopes of all layers, float64.

        Parameters
        ----------
        threads : Threads
        dz : torch.Tensor
            (clips, rows, outputs) of the last layer, before its activation.
        sums : torch.Tensor
            (2 or 3, outputs), over all rows: dz (y - mean), dz and, with a PReLU, its gradient times z <= 0.
        below : dict, optional
            Fields that say where the gradient of the first layer's input goes; without, it is not computed.
        """
        n = len(self.layers)
        weights, gammas, betas, slopes = ([None] * n for _ in range(4))
        waiting: dict[int, Tensor] = {}  # gradients of shortcuts, by the layer where these begin
        for index in range(n - 1, -1, -1):
            layer, norm, y = self.layers[index], self.norms[index], self.raw.pop(index)
            if layer.shortcut:
                waiting[index - layer.shortcut] = dz
            gammas[index], betas[index] = sums[0] * norm.rstd, sums[1]
            slopes[index] = sums[2] if isinstance(layer.slope, Tensor) else None
            scale = norm.gamma * norm.rstd
            fields = self._input(index - 1)
            partial = torch.empty(self.parts, *layer.matrix().shape)
            matrix = layer.matrix() * scale
            if layer.kind == "product":
                matrix = matrix.flip(0).transpose(1, 2)
            to = below or {}
            if index:
                to = {"extra": waiting.pop(index - 1, None)}
                if self.layers[index - 1].pool:
                    to["d"] = torch.empty_like(fields["x"])
                else:
                    raw = self.raw[index - 1]
                    to |= {"d": torch.empty_like(raw), "sums": self._sums(3, raw.shape[2]), "below": raw}
                    fields |= self.norms[index - 1].fields()
            wanted = index > 0 or below is not None
            centring = norm.centring(gammas[index], betas[index], y[..., 0].numel())
            self._run(
                threads, layer.kind + "_backward", dz=dz, y=y, weight_gradient=partial,
                weight=self._weight(layer, matrix) if wanted else None,
                **layer.sizes(), **centring, **fields | to,
            )  # fmt: skip
            total = partial.sum(0) * scale
            weights[index] = total.permute(*range(total.dim() - 1, -1, -1))
            self.inputs.pop(index, None)
            if index and self.layers[index - 1].pool:
                dz, sums = self.unpooled(threads, index - 1, to["d"])
            elif index:
                dz, sums = to["d"], to["sums"].sum(0)
        return weights, gammas, betas, slopes


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
