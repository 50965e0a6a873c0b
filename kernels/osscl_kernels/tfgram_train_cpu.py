"""TFgram training on the CPU, in float32 and bfloat16: `Chain` from the second layer on.

The first layer has one input channel and would fill a third of the memory: its output is never stored, but
computed from the wave wherever the second layer reads it, and its batch statistics follow from the mean and
the covariance of the windows of eleven samples that it sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import native
from .chain_cpu import Chain, Layer, Pool, Threads, part_count
from .tfgram_infer import LAYERS, frames

FIRST = LAYERS[0]
LANES = 16  # samples that are read at once where a window of 11 begins


def _pool(kind: str, length: int, frame_count: int) -> tuple[Pool | None, int]:
    """The pool of a layer over `length` rows, and how many rows it leaves."""
    if not kind:
        return None, length
    count = {"max4": length // 4, "frames2": 2 * frame_count, "frames": frame_count}[kind]
    out = torch.arange(count)
    if kind == "max4":
        return Pool((4 * out).int(), (4 * out + 4).int()), count
    # adaptive windows may be of unequal width, and overlap
    return Pool((out * length // count).int(), (-((out + 1) * -length // count)).int()), count


@torch.compiler.disable
def train_on_cpu(wave, eps, hop, dtype, *parameters):
    """Output, means and variances as of `tfgram_train`; None where the compiled functions are not there."""
    if native.library() is None:
        return None
    output, *statistics = _TFgram.apply(wave, eps, hop, dtype, *parameters)
    return output, statistics[:7], statistics[7:]


class _TFgram(torch.autograd.Function):
    """output, *means, *variances = f(wave, eps, hop, dtype, *weights, *gammas, *betas): `tfgram_train`."""

    @staticmethod
    def forward(ctx, wave, eps, hop, dtype, *parameters):
        weights, gammas, betas = parameters[:7], parameters[7:14], parameters[14:]
        length, layers = (wave.shape[1] + 2 * FIRST.padding - FIRST.kernel) // FIRST.stride + 1, []
        for spec, weight in zip(LAYERS[1:], weights[1:], strict=True):
            pool, after = _pool(spec.pool, length, frames(wave.shape[1], hop))
            layers.append(
                Layer("product", weight, (1, length), (1, length), 0.0, dilation=spec.dilation, pool=pool)
            )
            length = after
        with Threads() as threads:
            first = _First(threads, wave, weights[0], gammas[0], betas[0], eps)
            chain = Chain(layers, gammas[1:], betas[1:], eps, dtype, len(wave), first.source())
            means, variances = chain.forward(threads)
        ctx.state, ctx.like = (first, chain), (wave, parameters)
        statistics = [t.float() for t in (first.mean, *means, first.variance, *variances)]
        ctx.mark_non_differentiable(*statistics)
        return chain.inputs[5].float().transpose(1, 2).contiguous(), *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, *_):
        if ctx.state is None:
            raise RuntimeError("tfgram_train: the backward pass ran a second time; its buffers are freed")
        (first, chain), ctx.state = ctx.state, None
        wave, parameters = ctx.like
        with torch.autocast("cpu", enabled=False), Threads() as threads:
            gradient = gradient.transpose(1, 2).to(chain.dtype).contiguous()
            sums = torch.empty(chain.parts, FIRST.kernel + 1, FIRST.outputs, dtype=torch.float64)
            below = {"sums": sums, "mean": first.window_mean.float()}
            if ctx.needs_input_grad[0]:
                below["d"] = torch.empty(len(wave), chain.raw[0].shape[1], FIRST.outputs, dtype=chain.dtype)
            found = chain.backward(threads, *chain.unpooled(threads, 5, gradient), below)[:3]
            ours = first.gradients(sums.sum(0).T)
            d = first.wave_gradient(below["d"].float()).to(wave.dtype) if "d" in below else None
        found = [g for one, rest in zip(ours, found, strict=True) for g in (one, *rest)]
        return d, None, None, None, *(g.to(p.dtype) for g, p in zip(found, parameters, strict=True))


class _First:
    """The first layer's statistics and gradients, in float64."""

    def __init__(self, threads, wave, weight, gamma, beta, eps):
        # BatchNorm ignores a constant of the wave: without it nothing cancels. Padding becomes -offset.
        x, pad = wave.detach().float(), FIRST.padding
        offset = x.mean(dtype=torch.float64).float()
        self.rows = (x.shape[1] + 2 * pad - FIRST.kernel) // FIRST.stride + 1
        self.x = F.pad(x - offset, (pad, pad + LANES - FIRST.kernel))
        self.x[:, :pad] = self.x[:, pad + x.shape[1] :] = -offset
        sums = torch.empty(part_count(len(x)), FIRST.kernel + 1, LANES, dtype=torch.float64)
        fields = {"wave": self.x, "samples": self.x.shape[1], "rows": self.rows, "sums": sums}
        threads.run("window_moments", torch.float32, len(x), **fields)
        sums, self.count = sums.sum(0)[:, : FIRST.kernel], len(x) * self.rows
        self.window_mean = sums[-1] / self.count
        self.covariance = sums[:-1] / self.count - torch.outer(self.window_mean, self.window_mean)
        self.weight = weight.detach()[:, 0].double()
        centred = self.weight @ self.window_mean
        self.mean = centred + self.weight.sum(1) * offset
        self.variance = ((self.weight @ self.covariance) * self.weight).sum(1)
        self.gamma, self.rstd = gamma.detach().double(), (self.variance + eps).rsqrt()
        self.scale = self.gamma * self.rstd
        self.shift = beta.detach() - centred * self.scale

    def source(self) -> dict:
        """Fields of a step that computes the layer's output: windows @ weight + shift, then ReLU."""
        weight = (self.weight * self.scale[:, None]).T.float().contiguous()
        return {
            "wave": self.x,
            "first_weight": weight,
            "shift": self.shift.float(),
            "samples": self.x.shape[1],
        }

    def gradients(self, products):
        """Of weight, gamma and beta, from sums of dz (window - mean window) and, last, of dz: (64, 12)."""
        products, beta = products[:, :-1], products[:, -1]
        gamma = (self.weight * products).sum(1) * self.rstd
        correction = (gamma * self.rstd)[:, None] * (self.weight @ self.covariance)
        self.dgamma, self.dbeta = gamma, beta
        return (self.scale[:, None] * (products - correction))[:, None], gamma, beta

    def wave_gradient(self, dz):
        """(B, samples), from dz (B, rows, 64)."""
        centred = self.weight @ self.window_mean
        kernel, waves = (self.weight * self.scale[:, None])[:, None].float(), []
        for clip, d in enumerate(dz):
            windows = self.x[clip].unfold(0, FIRST.kernel, FIRST.stride)[: self.rows]
            y = windows @ self.weight.T.float()
            xhat = (y - centred.float()) * self.rstd.float()
            dy = d - ((self.dbeta + self.dgamma * xhat) / self.count).float()
            waves.append(F.conv_transpose1d(dy.T, kernel, stride=FIRST.stride)[0, FIRST.padding :])
        length = self.x.shape[1] - FIRST.padding - (FIRST.padding + LANES - FIRST.kernel)
        return torch.stack([F.pad(wave, (0, length - len(wave))) for wave in waves])
