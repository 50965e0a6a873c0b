"""TFgram's training forward: a chain from its second layer on.

The first layer has one input channel and a third of all activations. Its output is never stored but computed
from the wave where the second layer reads it; its batch statistics follow from the mean and the covariance of
the windows of 11 samples under its kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from osscl_kernels import LAYERS, frames
from torch import Tensor, nn

from .chain import Chain, Layer

LANES = 16  # samples that are loaded at once from the start of a window


def forward(module: nn.Module, wave: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, samples) -> (B, 128, frames), with the batch's own statistics."""
    source = Wave(module.conv[0], module.norm[0], wave)
    length, layers = source.out_size[1], []
    for spec, conv, norm in zip(LAYERS[1:], module.conv[1:], module.norm[1:], strict=True):
        pool = _windows(spec.pool, length, frames(wave.shape[1], module.hop)) if spec.pool else None
        layers.append(Layer(conv, norm, 0.0, (1, length), pool=pool))
        length = len(pool[0]) if pool else length
    return Chain(source, layers, dtype, len(wave))().transpose(1, 2)


def _windows(pool: str, length: int, frame_count: int) -> tuple[Tensor, Tensor]:
    """First and end row of every window of a pool over `length` rows."""
    if pool == "max4":
        start = 4 * torch.arange(length // 4)
        return start.int(), (start + 4).int()
    count = 2 * frame_count if pool == "frames2" else frame_count
    window = torch.arange(count)  # of an adaptive pool: windows overlap and differ in length
    return (window * length // count).int(), (-((window + 1) * -length // count)).int()


class Wave:
    """Input of a chain below TFgram's second layer: a wave and the first layer, with sums in float64."""

    def __init__(self, conv: nn.Conv1d, norm: nn.BatchNorm1d, wave: Tensor):
        self.conv, self.norm, self.wave = conv, norm, wave
        self.parameters = [conv.weight, norm.weight, norm.bias]
        self.out_size = 1, (wave.shape[1] + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1

    def start(self, chain: Chain) -> None:
        """Compute the first layer's statistics."""
        pad, width = self.conv.padding[0], self.conv.kernel_size[0]
        self.x = F.pad(self.wave.float(), (pad, pad + LANES - width))
        sums, count = chain.sums(width + 1, LANES), len(self.x) * self.out_size[1]
        sizes = {"rows": self.out_size[1], "samples": self.x.shape[1]}
        chain.run("window_moments", wave=self.x, sums=sums, **sizes)
        sums = sums.sum(0)[:, :width] / count
        self.window_mean = sums[-1]
        self.covariance = sums[:-1] - torch.outer(self.window_mean, self.window_mean)
        self.weight = self.conv.weight.detach()[:, 0].double()
        self.mean = self.weight @ self.window_mean
        self.variance = ((self.weight @ self.covariance) * self.weight).sum(1)
        self.rstd = (self.variance + self.norm.eps).rsqrt()
        self.gain = self.norm.weight.detach() * self.rstd

    def fields(self) -> dict[str, Tensor | int]:
        """Fields of a step that computes ReLU(windows @ first_weight + shift)."""
        weight = (self.weight * self.gain[:, None]).T.float().contiguous()
        shift = (self.norm.bias.detach() - self.mean * self.gain).float()
        return {"wave": self.x, "samples": self.x.shape[1], "first_weight": weight, "shift": shift}

    def gradient_fields(self, chain: Chain) -> dict[str, Tensor]:
        """Fields of a step that sums dz times the window and, last, dz, over all windows."""
        return {"sums": chain.sums(len(self.window_mean) + 1, len(self.weight))}

    def receive(self, chain: Chain, sums: Tensor) -> None:
        """Compute the gradients of weight, gamma and beta."""
        sums = sums.sum(0).T
        beta = sums[:, -1]
        products = sums[:, :-1] - torch.outer(beta, self.window_mean)
        gamma = (self.weight * products).sum(1) * self.rstd
        correction = (gamma * self.rstd)[:, None] * (self.weight @ self.covariance)
        self.gradients = [self.gain[:, None] * (products - correction), gamma, beta]
