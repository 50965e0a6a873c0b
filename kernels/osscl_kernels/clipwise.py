"""What training on a CPU shares: groups of clips side by side, and batch statistics by blocks.

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

    A context manager: the threads live as long as it does.
    """

    def __enter__(self) -> SideBySide:
        self.threads, self.pool = torch.get_num_threads(), None
        return self

    def __call__(self, function: Callable, count: int) -> list:
        if self.threads == 1 or count < self.threads:
            return [function(i) for i in range(count)]
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return list(self.pool.map(torch.no_grad()(function), range(count)))

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(self.threads)  # the setting is shared by all threads


def rows(x: torch.Tensor) -> torch.Tensor:
    """(n, C, H, W) in channels_last as its n H W rows of C values, without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _blocks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The rows as (1, C, 1, rows) blocks, without a copy."""
    block = STATISTICS_BLOCK * (4 if x.dtype == torch.bfloat16 else 1)
    return rows(x)[None, None].permute(0, 3, 1, 2).split(block, dim=-1)


def moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, mean and centred sum of squares of every channel, in float64."""
    blocks = _blocks(y)
    wide = torch.promote_types(y.dtype, torch.float32)
    unused = torch.zeros(2, y.shape[1], dtype=wide)  # running buffers, only to fix the result's dtype
    parts = [torch.batch_norm_update_stats(b, *unused.unbind(), 0.0) for b in blocks]
    counts = torch.tensor([b.shape[-1] for b in blocks])
    means, variances = (torch.stack(p) for p in zip(*parts, strict=True))
    return combine_moments(counts, means, variances * counts[:, None])


class BatchNorm:
    """One layer's affine with its batch statistics, and the same statistics' part in the backward pass.

    Parameters
    ----------
    mean, variance, gamma, beta : torch.Tensor
        (C,).
    eps : float
    dtype : torch.dtype
        Of the activations; statistics are float32 at least.
    """

    def __init__(self, mean, variance, gamma, beta, eps, dtype):
        self.mean, self.variance, self.gamma, self.beta = (
            t.to(torch.promote_types(dtype, torch.float32)) for t in (mean, variance, gamma, beta)
        )
        self.eps = eps
        self.rstd = (self.variance + eps).rsqrt()

    def __call__(self, y):
        return F.batch_norm(y, self.mean, self.variance, self.gamma, self.beta, False, 0.0, self.eps)

    def sums(self, dz, y):
        """Sums over the rows of dz xhat and of dz, in float64."""
        total = 0.0
        for d, x in zip(_blocks(dz), _blocks(y), strict=True):
            one, m, v = torch.ones_like(self.mean), self.mean, self.variance
            mask = (False, True, True)
            part = aten.native_batch_norm_backward(d, x, one, m, v, m, v, False, self.eps, mask)[1:]
            total = total + torch.stack(part).double()
        return total

    def centred(self, dz, y, dgamma, dbeta, rows):
        """dy / (gamma rstd) = dz - mean(dz) - xhat mean(dz xhat)."""
        scale = (-dgamma / rows * self.rstd).to(self.mean.dtype)
        shift = (-dbeta / rows).to(self.mean.dtype)
        dy = F.batch_norm(y, self.mean, torch.ones_like(self.mean), scale, shift, False, 0.0, 0.0)
        return dy.add_(dz)
