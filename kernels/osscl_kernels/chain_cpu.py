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
            centre, sums = torch.empty(self.parts, outputs), self._sums(2, outputs)
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
