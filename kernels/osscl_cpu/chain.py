"""A chain of convolution, BatchNorm and ReLU or PReLU layers, trained on a CPU by functions of `layers.cpp`.

The forward pass stores the raw output of every convolution and little else; normalisation and activation are
recomputed in the cache wherever they are read. Clips meet only in a layer's batch statistics. With
z = gamma xhat + beta, f(z) = z above 0 and slope z below, and d the gradient of f(z):

    dz = d where z > 0, else slope d,    dslope = sum of d z where z <= 0,
    dy = gamma rstd (dz - mean(dz) - xhat mean(dz xhat)),

where the factor gamma rstd is folded into the weights that dy is multiplied by. Clips are divided into parts
independently of the number of threads, so results do not depend on it.

Sources: Ioffe and Szegedy, "Batch Normalization", ICML 2015; He et al., "Delving Deep into Rectifiers", ICCV
2015; Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from osscl_kernels import update_running_statistics
from torch import Tensor, nn

from . import native

PARTS = 32  # each part has its own sums and weight gradients


@dataclass
class Layer:
    """A convolution, its BatchNorm and its activation in one step of training.

    Convolutions are 1 x 1, 3 x 3 depthwise, along the rows of a map of height 1, or over an image's patches.
    """

    conv: nn.Module
    norm: nn.Module
    slope: Tensor | float  # (outputs,) of a PReLU; 0 for ReLU, 1 without activation
    size: tuple[int, int]  # height and width of the input
    shortcut: Layer | None = None  # its output is added
    pool: tuple[Tensor, Tensor] | None = None  # maximum over rows start[w] <= r < end[w] for each window w
    output: Tensor | None = None  # (clips, rows or windows, outputs), if stored
    extra: Tensor | None = None  # gradient of the output that came through a shortcut

    def __post_init__(self):
        slopes = [self.slope] if isinstance(self.slope, Tensor) else []
        self.parameters = [self.conv.weight, self.norm.weight, self.norm.bias, *slopes]
        self.linear = not slopes and self.slope == 1.0
        weight, self.out_size, self.stride = self.conv.weight.detach(), self.size, 1
        if self.conv.groups > 1:
            self.kind, weight, self.stride = "depthwise", weight.flatten(1), self.conv.stride[0]
            self.out_size = tuple((length - 1) // self.stride + 1 for length in self.size)
        else:
            self.kind, weight = "product", weight.flatten(1)[..., None] if weight.dim() == 4 else weight
            weight = F.pad(weight, (0, 0, 0, -weight.shape[1] % native.CHANNELS))
        self.matrix = weight.transpose(0, -1)  # (taps, inputs, outputs) or (9, channels)

    def forward(self, chain: Chain, below: Layer | Patches) -> None:
        """Compute the raw output from the layer below, and its statistics."""
        outputs, fields = self.matrix.shape[-1], below.fields()
        self.y = torch.empty(chain.clips, math.prod(self.out_size), outputs, dtype=chain.dtype)
        centre, sums = torch.empty(chain.parts, outputs), chain.sums(2, outputs)
        if "below" in fields and below.linear:  # a shortcut may begin here
            below.output = fields["kept"] = torch.empty_like(fields["below"])
        fields |= {"y": self.y, "centre": centre, "sums": sums, **self._sizes()}
        chain.run(self.kind + "_forward", weight=self._packed(chain, self.matrix), **fields)
        clips = (torch.arange(chain.parts + 1) * chain.clips // chain.parts).diff()
        counts = clips[:, None] * self.y.shape[1]
        first, second = sums.unbind(1)
        means = centre + first / counts
        mean = (counts * means).sum(0) / counts.sum()
        squares = (second - first.square() / counts).clamp(min=0) + counts * (means - mean).square()
        variance = squares.sum(0) / counts.sum()
        self.mean, self.variance = mean.float(), variance.float()
        self.rstd = (variance + self.norm.eps).rsqrt()
        self.gain = self.norm.weight.detach() * self.rstd
        self.affine = {
            "scale": self.gain.float(),
            "shift": (self.norm.bias.detach() - mean * self.gain).float(),
            "slope": torch.zeros_like(self.mean) + torch.as_tensor(self.slope).detach(),
            "mean": self.mean,
        }
        if self.pool:
            self.output = torch.empty(chain.clips, len(self.pool[0]), outputs, dtype=chain.dtype)
            chain.run("pool_forward", y=self.output, **self._pool_fields())

    def fields(self) -> dict[str, Tensor | None]:
        """Fields of a step that reads the output."""
        if self.output is not None:
            return {"x": self.output}
        return {"below": self.y, "other": self.shortcut and self.shortcut.output, **self.affine}

    def gradient_fields(self, chain: Chain) -> dict[str, Tensor | None]:
        """Fields of a step that computes the gradient of the output."""
        if self.pool:
            return {"d": torch.empty_like(self.output)}
        fields = {"d": torch.empty_like(self.y), "sums": chain.sums(3, self.y.shape[2])}
        return {**fields, "below": self.y, "extra": self.extra, **self.affine}

    def receive(self, chain: Chain, d: Tensor, sums: Tensor | None = None, **_) -> None:
        """Take dz (clips, rows, outputs) and, over all rows, the sums (3, outputs) that the parts have.

        The sums are of dz (y - mean), of dz, and of the gradient times z where z <= 0.
        """
        if self.pool:  # `d` is the gradient behind the pool
            gradient, d, sums = d, torch.empty_like(self.y), chain.sums(3, self.y.shape[2])
            chain.run("pool_backward", dz=gradient, d=d, sums=sums, **self._pool_fields())
        self.dz, self.sums = d, sums.sum(0)

    def backward(self, chain: Chain, below: Layer | Patches) -> list[Tensor]:
        """Gradients of `parameters`; the layer below receives its own."""
        if self.shortcut:
            self.shortcut.extra = self.dz
        dgamma, dbeta, count = self.sums[0] * self.rstd, self.sums[1], self.y[..., 0].numel()
        scale = -dgamma / count * self.rstd  # dy / (gamma rstd) = dz + y scale + shift
        shift = -dbeta / count - self.mean * scale
        to, matrix = below.gradient_fields(chain), self.matrix * self.gain
        if self.kind == "product":
            matrix = matrix.flip(0).transpose(1, 2)
        gradient = torch.empty(chain.parts, *self.matrix.shape)
        fields = {"dz": self.dz, "y": self.y, "weight_gradient": gradient, **self._sizes(), **below.fields()}
        fields |= {"centre_scale": scale.float(), "centre_shift": shift.float(), **to}
        chain.run(self.kind + "_backward", weight=self._packed(chain, matrix) if to else None, **fields)
        below.receive(chain, **to)
        weight = (gradient.sum(0) * self.gain).transpose(0, -1)
        if self.conv.weight.dim() == 4:
            weight = weight.flatten(1)[:, : self.conv.weight[0].numel()]
        self.y = self.dz = self.output = self.extra = None  # frees memory
        return [weight, dgamma, dbeta, self.sums[2]][: len(self.parameters)]

    def normalised(self) -> Tensor:
        """z, the output before the activation."""
        return self.y * self.affine["scale"] + self.affine["shift"]

    def _packed(self, chain: Chain, matrix: Tensor) -> Tensor:
        return native.pack(matrix, chain.dtype) if self.kind == "product" else matrix.float().contiguous()

    def _pool_fields(self) -> dict[str, Tensor | int]:
        (_, rows, inputs), (start, end) = self.y.shape, self.pool
        sizes = {"rows": rows, "inputs": inputs, "windows": len(start)}
        return {"below": self.y, "start": start, "end": end, **sizes, **self.affine}

    def _sizes(self) -> dict[str, int]:
        taps, inputs, outputs = (1, *self.matrix.shape)[-3:]
        inputs = inputs if self.kind == "product" else outputs
        values = math.prod(self.size), inputs, outputs, taps, self.conv.dilation[0]
        return dict(zip(native.LAYER_SIZES, (*values, *self.size, *self.out_size, self.stride), strict=True))


class Patches:
    """Input of a chain below a 3 x 3 convolution over an image: maps (B, C, H, W), a row per patch."""

    def __init__(self, maps: Tensor, stride: int):
        self.parameters, self.unfolding = [maps], {"kernel_size": 3, "padding": 1, "stride": stride}

    def start(self, chain: Chain) -> None:
        """Prepare to be read."""
        rows = F.unfold(self.parameters[0].detach().float(), **self.unfolding).transpose(1, 2)
        self.values = rows.shape[2]
        padded = F.pad(rows, (0, -self.values % native.CHANNELS))
        self.x = padded.to(chain.dtype, memory_format=torch.contiguous_format)

    def fields(self) -> dict[str, Tensor]:
        """Fields of a step that reads the patches."""
        return {"x": self.x}

    def gradient_fields(self, chain: Chain) -> dict[str, Tensor]:
        """Fields of a step that computes their gradient; empty if none is needed."""
        return {"d": torch.empty_like(self.x)} if self.parameters[0].requires_grad else {}

    def receive(self, chain: Chain, d: Tensor | None = None) -> None:
        """Take the gradient; that of a pixel is the sum over its places in the patches."""
        self.gradients = [None]
        if d is not None:
            rows, size = d[..., : self.values].float(), self.parameters[0].shape[2:]
            self.gradients = [F.fold(rows.transpose(1, 2), size, **self.unfolding)]


class Chain:
    """Layers over an input, for one step of training with activations stored in `dtype`."""

    def __init__(self, source: Patches, layers: list[Layer], dtype: torch.dtype, clips: int):
        self.source, self.layers, self.dtype = source, layers, dtype
        self.clips, self.parts = clips, min(PARTS, clips)

    def __call__(self) -> Tensor:
        """The output (clips, rows, channels) in float32; updates BatchNorm's running statistics."""
        parameters = [p for node in (self.source, *self.layers) for p in node.parameters]
        output = _Train.apply(self, *parameters)
        for node in (self.source, *self.layers):
            if hasattr(node, "norm"):
                count = self.clips * math.prod(node.out_size)
                update_running_statistics([node.norm], [node.mean], [node.variance], [count])
        return output

    def run(self, name: str, **fields: Tensor | int | None) -> None:
        """Call a function of `layers.cpp` for all parts."""
        sizes = {"clips": self.clips, "parts": self.parts, "threads": self.threads}
        native.run(name, self.dtype, **sizes, **fields)

    def sums(self, kinds: int, channels: int) -> Tensor:
        """Uninitialised sums of every part, in float64."""
        return torch.empty(self.parts, kinds, channels, dtype=torch.float64)


class _Train(torch.autograd.Function):
    """A chain's output, differentiable in the parameters of its source and layers."""

    @staticmethod
    def forward(ctx, chain: Chain, *parameters: Tensor):
        ctx.chain, ctx.parameters = chain, parameters
        with native.threads() as chain.threads:
            chain.source.start(chain)
            for below, layer in pairwise((chain.source, *chain.layers)):
                layer.forward(chain, below)
            if layer.pool:
                return layer.output.float()
            z = layer.normalised()
            return torch.where(z > 0, z, z * layer.affine["slope"])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        chain, ctx.chain = ctx.chain, None
        if chain is None:
            raise RuntimeError("the compiled layers' backward pass ran a second time; its buffers are freed")
        results, layer = [], chain.layers[-1]
        with native.threads() as chain.threads:
            if layer.pool:
                layer.receive(chain, gradient.to(chain.dtype).contiguous())
            else:
                z = layer.normalised()
                dz = torch.where(z > 0, gradient, gradient * layer.affine["slope"])
                products = dz * (layer.y - layer.mean), dz, (gradient * z).where(z <= 0, 0.0)
                sums = torch.stack([x.sum((0, 1), dtype=torch.float64) for x in products])
                layer.receive(chain, dz.to(chain.dtype).contiguous(), sums[None])
            for below, layer in reversed([*pairwise((chain.source, *chain.layers))]):
                results = layer.backward(chain, below) + results
        pairs = zip(chain.source.gradients + results, ctx.parameters, strict=True)
        return None, *(None if g is None else g.reshape(p.shape).to(p.dtype) for g, p in pairs)
