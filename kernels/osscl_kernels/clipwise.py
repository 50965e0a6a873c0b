"""What training on a CPU shares: groups of clips side by side, batch statistics by blocks, weight gradients.

Tensors are (clips, channels, height, width) in channels_last memory format. A group of clips is small enough
for its activations to stay in a core's cache, and runs on one thread: groups need not wait for each other,
whereas the threads of one operation do, after every operation.

Source of the joined statistics: Chan, Golub and LeVeque (1983).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from . import native

STATISTICS_BLOCK = 2_000  # rows summed in float32 before float64 takes over; four times that in bfloat16
aten = torch.ops.aten


def combine_moments(
    counts: torch.Tensor, means: torch.Tensor, squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Join counts (n,), means (n, ...) and centred sums of squares (n, ...) of n parts, in float64.

    Returns
    -------
    count, mean, square : torch.Tensor
        Of the union of the parts.
    """
    weights = counts.double().view(-1, *[1] * (means.dim() - 1))
    means = means.double()
    mean = (weights * means).sum(0) / weights.sum()
    square = squares.double().sum(0) + (weights * (means - mean).square()).sum(0)
    return counts.sum(), mean, square


class SideBySide:
    """[function(0), ..., function(count - 1)], each on a single thread where they are enough for all.

    A context manager: the threads live as long as it does. Meanwhile the caller computes on one thread too,
    because the other threads of an operation go on waiting for its next one, busily, in the groups' way.
    """

    def __enter__(self) -> SideBySide:
        self.threads, self.pool = torch.get_num_threads(), None
        return self

    def __call__(self, function: Callable, count: int) -> list:
        if self.threads == 1 or count < self.threads:
            return [function(i) for i in range(count)]
        if self.pool is None:
            torch.set_num_threads(1)
            self.pool = ThreadPoolExecutor(self.threads)
        return list(self.pool.map(torch.no_grad()(function), range(count)))

    def share(self, clips: int, most: int) -> int:
        """How many clips, at most `most`, to put into a group so that all threads have equally much to do."""

        def longest(size: int) -> int:  # what one thread has to do, in clips
            groups = -(-clips // size)
            return -(-groups // self.threads) * size

        return min(range(max(1, min(most, clips)), 0, -1), key=longest)

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(self.threads)


def rows(x: torch.Tensor) -> torch.Tensor:
    """(n, C, H, W) in channels_last as its n H W rows of C values, without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def dense(x: torch.Tensor | None) -> torch.Tensor | None:
    """In channels_last memory, as the compiled functions take it; a copy only where it is not."""
    return x if x is None else x.contiguous(memory_format=torch.channels_last)


def _blocks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows as (1, C, 1, rows) blocks, without a copy."""
    block = STATISTICS_BLOCK * (4 if x.dtype == torch.bfloat16 else 1)
    return rows(x)[None, None].permute(0, 3, 1, 2).split(block, dim=-1)


def moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, mean and centred sum of squares of every channel, in float64."""
    if native.fits(y):
        y = dense(y)
        x = rows(y)
        about = x[:64].float().mean(0)  # near the mean, so that nothing cancels
        sums = torch.zeros(2, len(about), dtype=torch.float64)
        native.call("moments", y.dtype, y, about, sums, *x.shape)
        first, second = sums
        square = (second - first.square() / len(x)).clamp_(min=0)
        return torch.tensor(len(x)), about.double() + first / len(x), square
    blocks = _blocks(y)
    wide = torch.promote_types(y.dtype, torch.float32)
    unused = torch.zeros(2, y.shape[1], dtype=wide)  # running buffers, only to fix the result's dtype
    parts = [torch.batch_norm_update_stats(b, *unused.unbind(), 0.0) for b in blocks]
    counts = torch.tensor([b.shape[-1] for b in blocks])
    means, variances = (torch.stack(p) for p in zip(*parts, strict=True))
    return combine_moments(counts, means, variances * counts[:, None])


def weight_gradient(a: torch.Tensor, dy: torch.Tensor, taps: int = 1, dilation: int = 1) -> torch.Tensor:
    """Gradient (outputs, inputs, taps), float32 at least, of a convolution along the rows of every clip.

    Parameters
    ----------
    a, dy : torch.Tensor
        The layer's input (n, inputs, H, W) and its output's gradient (n, outputs, H, W).
    taps : {1, 3}
        With three, tap k sees H W rows from (k - 1) dilation before on, and zeros outside.
    dilation : int
    """
    wide, inputs, outputs = torch.promote_types(a.dtype, torch.float32), a.shape[1], dy.shape[1]
    if native.fits(a) and inputs % 32 == outputs % 32 == 0 and native.has("weight_gradient", a.dtype):
        a, dy = dense(a), dense(dy)
        total = torch.zeros(taps, outputs, inputs)
        clips = len(a) if taps > 1 else 1
        sizes = clips, len(rows(a)) // clips, inputs, outputs, taps, dilation
        native.call("weight_gradient", a.dtype, a, dy, total, *sizes)
        return total.permute(1, 2, 0)
    if taps == 1:
        return (rows(dy).T @ rows(a)).to(wide)[:, :, None]
    total, length = 0.0, a[0, 0].numel()
    for x, g in zip(a, dy, strict=True):  # one product a tap
        x, g, parts = rows(x[None]), rows(g[None]), []
        for shift in (-dilation, 0, dilation):
            first, last = max(0, -shift), min(length, length - shift)
            parts.append(g[first:last].T @ x[first + shift : last + shift])
        total = total + torch.stack(parts, -1).to(wide)
    return total


class Normalisation:
    """Between two convolutions: batch statistics' affine, then ReLU, PReLU or nothing; and its gradient.

    Every method makes one pass over the activations where `native` fits, and several by PyTorch elsewhere.
    With z = gamma xhat + beta, f(z) = z above 0 and slope z below, d the gradient behind f and P = d where
    z > 0, the latter takes, from the sums S0 over the rows and S1 of products with xhat that BatchNorm needs,

        dz = P + slope (d - P),    dslope = sum (d - P) z = gamma (S1 d - S1 P) + beta (S0 d - S0 P).

    Parameters
    ----------
    mean, variance, gamma, beta : torch.Tensor
        (C,).
    eps : float
    dtype : torch.dtype
        Of the activations; statistics are float32 at least.
    slope : torch.Tensor or float
        (C,), or 0 for ReLU, 1 for nothing.
    """

    def __init__(self, mean, variance, gamma, beta, eps, dtype, slope):
        wide = torch.promote_types(dtype, torch.float32)
        self.mean, self.variance, self.gamma, self.beta = (
            t.detach().to(wide).contiguous() for t in (mean, variance, gamma, beta)
        )
        self.eps, self.dtype, self.linear = eps, dtype, isinstance(slope, float) and slope == 1.0
        self.rstd = (self.variance + eps).rsqrt()
        self.scale = self.gamma * self.rstd
        self.shift = self.beta - self.mean * self.scale
        if not isinstance(slope, torch.Tensor):
            slope = torch.full_like(self.mean, slope)
        self.slope = slope.detach().to(wide).contiguous()

    def normalise(self, y):
        """z, before the activation."""
        return F.batch_norm(y, self.mean, self.variance, self.gamma, self.beta, False, 0.0, self.eps)

    def __call__(self, y, other=None):
        """f(z), plus `other` where given."""
        if native.fits(y):
            y, out = dense(y), torch.empty_like(y, memory_format=torch.channels_last)
            parameters = self.scale, self.shift, self.slope
            native.call("activate", y.dtype, y, *parameters, dense(other), out, *rows(y).shape)
            return out
        z = self.normalise(y)
        z = z if self.linear else self._activate(z)
        return z if other is None else z.add_(other)

    def _activate(self, z):
        return F.prelu(z, self.slope.to(z.dtype))

    def backward(self, d, y, keep):
        """d, which may be overwritten -> dz, f(z) if `keep`, (sum dz xhat, sum dz), dslope; in float64."""
        if native.fits(y):
            d, y = dense(d), dense(y)
            a = torch.empty_like(y, memory_format=torch.channels_last) if keep else None
            sums = torch.zeros(3, y.shape[1], dtype=torch.float64)
            parameters = self.mean, self.scale, self.shift, self.slope
            native.call("activate_backward", y.dtype, d, y, *parameters, a, sums, *rows(y).shape)
            sums[0] *= self.rstd
            return d, a, sums[:2], sums[2]
        z = self.normalise(y) if keep or not self.linear else None
        if self.linear:
            return d, z, self.sums(d, y), None
        positive = aten.threshold_backward(d, z, 0)
        slope = self.slope.to(z.dtype)
        all_sums, sums = self.sums(d, y), self.sums(positive, y)
        negative = all_sums - sums
        dz = torch.lerp(positive, d, slope.view(-1, 1, 1), out=positive)
        dslope = self.gamma * negative[0] + self.beta * negative[1]
        return dz, self._activate(z) if keep else None, sums + slope.double()[None] * negative, dslope

    def sums(self, dz, y):
        """Sums over the rows of dz xhat and of dz, in float64."""
        total = 0.0
        for d, x in zip(_blocks(dz), _blocks(y), strict=True):
            one, m, v = torch.ones_like(self.mean), self.mean, self.variance
            mask = (False, True, True)
            part = aten.native_batch_norm_backward(d, x, one, m, v, m, v, False, self.eps, mask)[1:]
            total = total + torch.stack(part).double()
        return total

    def centred(self, dz, y, dgamma, dbeta, count):
        """dy / (gamma rstd) = dz - mean(dz) - xhat mean(dz xhat); y may be overwritten."""
        scale = -dgamma / count * self.rstd
        shift = (-dbeta / count - self.mean * scale).to(self.mean.dtype)
        scale = scale.to(self.mean.dtype)
        if native.fits(y):
            dz, y = dense(dz), dense(y)
            native.call("centre", y.dtype, dz, y, scale, shift, y, *rows(y).shape)
            return y
        one, zero = torch.ones_like(scale), torch.zeros_like(scale)
        return F.batch_norm(y, zero, one, scale, shift, False, 0.0, 0.0).add_(dz)
