"""TFgram training in Triton: one kernel a layer and direction.

Batch statistics stand between the layers, and only raw convolution outputs are kept:

- BN + ReLU of the layer before are the kernel's prologue (zero padding comes after them), never stored.
- The first layer's mean and variance follow from those of the 11 samples under it, gathered in float64:
  mean = w.mu, variance = w^T cov w. So that layer itself runs inside its neighbours' prologues.
- Further layers store one (count, mean, centred sum of squares) per program; Chan's formula joins them in a
  fixed order. No atomics: the same input gives the same bits.
- Backward, with dz the gradient behind the ReLU: dgamma = sum dz xhat and dbeta = sum dz are summed where dz
  is made; dy = gamma rstd (dz - dbeta / n - xhat dgamma / n) is the next kernel's prologue. The first layer
  needs only sum dz (x - mu) and the same covariance.

Activations are channels-last (clip, time, channel).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import INTERPRETED, CompileCase, jit, tl, triton
from .tfgram_infer import LAYERS, frames

# Kernels. AFF (4, C) float32: a layer's mean, rstd, gamma, beta. GRAD (2, C) float32: its dgamma, dbeta.
# A window of the first layer is a row of 16 samples, 11 of them live and less their means MU.


@jit
def _normalised(y, AFF, c, C: tl.constexpr):
    """xhat and z of raw values y."""
    xhat = (y - tl.load(AFF + c)[None, :]) * tl.load(AFF + C + c)[None, :]
    return xhat, xhat * tl.load(AFF + 2 * C + c)[None, :] + tl.load(AFF + 3 * C + c)[None, :]


@jit
def _windows(X, MU, t, samples):
    k = tl.arange(0, 16)
    at = 5 * t[:, None] - 5 + k[None, :]
    live = (k < 11)[None, :]
    x = tl.load(X + at, mask=live & (at >= 0) & (at < samples), other=0.0).to(tl.float32)
    return tl.where(live, x - tl.load(MU + k)[None, :], 0.0)


@jit
def _first(X, MU, W0, AFF, t, c, samples, PREC: tl.constexpr):
    """Windows, xhat and z of the first layer, computed again wherever they are needed."""
    x = _windows(X, MU, t, samples)
    w = tl.load(W0 + tl.arange(0, 16)[:, None] * 64 + c[None, :])
    xhat, z = _normalised(tl.dot(x, w, input_precision=PREC), AFF, c, 64)
    return x, xhat, z


@jit
def _activation(
    X, MU, W0, AFF, clip, t, c, length, samples, C: tl.constexpr, FIRST: tl.constexpr, PREC: tl.constexpr
):
    """ReLU(BN) of the layer before at time steps t, from its stored raw output or from the wave."""
    inside = (t >= 0) & (t < length)
    if FIRST:
        _, _, z = _first(X + clip * samples, MU, W0, AFF, t, c, samples, PREC)
    else:
        at = (clip * length + t)[:, None] * C + c[None, :]
        _, z = _normalised(tl.load(X + at, mask=inside[:, None], other=0.0).to(tl.float32), AFF, c, C)
    return tl.where(inside[:, None], tl.maximum(z, 0.0), 0.0)


@jit
def _dy(Y, DZ, IDX, AFF, GRAD, clip, t, c, length, pooled, count, C: tl.constexpr, BY4: tl.constexpr):
    """Gradient of the raw output at time steps t, zero outside; DZ and IDX are of the pool by four if BY4."""
    inside = (t >= 0) & (t < length)
    at = (clip * length + t)[:, None] * C + c[None, :]
    xhat, _ = _normalised(tl.load(Y + at, mask=inside[:, None], other=0.0).to(tl.float32), AFF, c, C)
    if BY4:
        dz = _routed(DZ, IDX, clip, t // 4, t % 4, c, inside, pooled, C)
    else:
        dz = tl.load(DZ + at, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = tl.load(AFF + 2 * C + c) * tl.load(AFF + C + c)
    dz -= (tl.load(GRAD + C + c)[None, :] + xhat * tl.load(GRAD + c)[None, :]) / count
    return tl.where(inside[:, None], dz * scale[None, :], 0.0)


@jit
def _routed(DZ, IDX, clip, window, offset, c, inside, pooled, C: tl.constexpr):
    """Gradient of a window's maximum, for the step at `offset` in it if that step won."""
    at = (clip * pooled + window)[:, None] * C + c[None, :]
    live = (inside & (window < pooled) & (offset >= 0))[:, None]
    won = tl.load(IDX + at, mask=live, other=0).to(tl.int32) == offset.to(tl.int32)[:, None]
    return tl.where(won, tl.load(DZ + at, mask=live, other=0.0).to(tl.float32), 0.0)


@jit
def window_moments_kernel(X, MEAN, SQUARE, samples, length, tiles, BM: tl.constexpr):
    """Mean (16,) and centred products (16, 16) of a tile of the first layer's windows, in float64."""
    pid = tl.program_id(0)
    clip = (pid // tiles).to(tl.int64)
    t = pid % tiles * BM + tl.arange(0, BM)
    k = tl.arange(0, 16)
    inside = t < length
    n = tl.minimum(length - pid % tiles * BM, BM).to(tl.float64)
    at = 5 * t[:, None] - 5 + k[None, :]
    live = inside[:, None] & (k < 11)[None, :] & (at >= 0) & (at < samples)
    x = tl.load(X + clip * samples + at, mask=live, other=0.0).to(tl.float64)
    mean = tl.sum(x, 0) / n
    x = tl.where(inside[:, None], x - mean[None, :], 0.0)
    tl.store(MEAN + pid * 16 + k, mean)
    for j in tl.static_range(11):
        column = tl.sum(tl.where((k == j)[None, :], x, 0.0), 1)
        tl.store(SQUARE + pid * 256 + j * 16 + k, tl.sum(x * column[:, None], 0))


@jit
def conv_kernel(
    X, MU, W0, AFF, W, Y, COUNT, MEAN, SQUARE,
    length, samples, tiles,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, FIRST: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Y = conv(ReLU(BN(X))) raw, and the tile's count, mean and centred sum of squares per channel."""
    pid = tl.program_id(0)
    clip = (pid // tiles).to(tl.int64)
    t = pid % tiles * BM + tl.arange(0, BM)
    co = tl.arange(0, CO)
    acc = tl.zeros([BM, CO], tl.float32)
    for k0 in range(0, 3 * CI, BK):
        tap = k0 // CI
        c = k0 % CI + tl.arange(0, BK)
        a = _activation(
            X, MU, W0, AFF, clip, t + (tap - 1) * DILATION, c, length, samples, CI, FIRST, PREC
        )  # fmt: skip
        w = tl.load(W + (tap * CI + c)[:, None] * CO + co[None, :])
        acc = tl.dot(a.to(DT), w.to(DT), acc, input_precision=PREC)
    inside = (t < length)[:, None]
    at = (clip * length + t)[:, None] * CO + co[None, :]
    tl.store(Y + at, acc.to(Y.dtype.element_ty), mask=inside)
    n = tl.minimum(length - pid % tiles * BM, BM).to(tl.float32)
    mean = tl.sum(tl.where(inside, acc, 0.0), 0) / n
    off = tl.where(inside, acc - mean[None, :], 0.0)
    tl.store(COUNT + pid, n)
    tl.store(MEAN + pid * CO + co, mean)
    tl.store(SQUARE + pid * CO + co, tl.sum(off * off, 0))


@jit
def combine_kernel(
    COUNT, MEAN, SQUARE, COUNT_OUT, MEAN_OUT, SQUARE_OUT, GAMMA, BETA, AFF, parts, share, eps,
    C: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Chan's formula over `share` parts a program; the LAST level writes mean, variance and AFF."""
    group = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    count = tl.zeros([BC], tl.float64)
    mean = tl.zeros([BC], tl.float64)
    square = tl.zeros([BC], tl.float64)
    for first in range(group * share, tl.minimum((group + 1) * share, parts), BP):
        p = first + tl.arange(0, BP)
        live = p < tl.minimum((group + 1) * share, parts)
        n = tl.load(COUNT + p, mask=live, other=0.0).to(tl.float64)[:, None]
        at = p[:, None] * C + c[None, :]
        m = tl.load(MEAN + at, mask=live[:, None], other=0.0).to(tl.float64)
        s = tl.load(SQUARE + at, mask=live[:, None], other=0.0).to(tl.float64)
        total = count + tl.sum(n, 0)
        joint = (count * mean + tl.sum(n * m, 0)) / total
        apart = m - joint[None, :]
        square += tl.sum(s + n * apart * apart, 0) + count * (mean - joint) * (mean - joint)
        mean = joint
        count = total
    if LAST:
        variance = square / count
        tl.store(MEAN_OUT + c, mean.to(tl.float32))
        tl.store(SQUARE_OUT + c, variance.to(tl.float32))
        tl.store(AFF + c, mean.to(tl.float32))
        tl.store(AFF + C + c, (1.0 / tl.sqrt(variance + eps)).to(tl.float32))
        tl.store(AFF + 2 * C + c, tl.load(GAMMA + c).to(tl.float32))
        tl.store(AFF + 3 * C + c, tl.load(BETA + c).to(tl.float32))
    else:
        tl.store(COUNT_OUT + group + c * 0, count)  # the same number from every channel
        tl.store(MEAN_OUT + group * C + c, mean)
        tl.store(SQUARE_OUT + group * C + c, square)


@jit
def pool_kernel(
    Y, AFF, P, IDX, length, pooled, tiles, width, C: tl.constexpr, BY4: tl.constexpr, BM: tl.constexpr
):
    """Raw value P of each window's maximum after BN, and its place IDX in the window: the first of equals."""
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    w = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    c = tl.arange(0, C)
    inside = w < pooled
    if BY4:
        start = w * 4
        end = start + 4
    else:  # w length // pooled and its ceiling for w + 1, without products past 2^31
        whole = length // pooled
        rest = length % pooled
        start = w * whole + w * rest // pooled
        end = (w + 1) * whole + ((w + 1) * rest + pooled - 1) // pooled
    gamma = tl.load(AFF + 2 * C + c)[None, :]
    sign = tl.where(gamma > 0, 1.0, tl.where(gamma < 0, -1.0, 0.0))
    best = tl.load(Y + (clip * length + start)[:, None] * C + c[None, :], mask=inside[:, None], other=0.0).to(
        tl.float32
    )
    place = tl.zeros([BM, C], tl.int32)
    for step in range(1, width):
        live = (inside & (start + step < end))[:, None]
        at = (clip * length + start + step)[:, None] * C + c[None, :]
        y = tl.load(Y + at, mask=live, other=0.0).to(tl.float32)
        better = live & (y * sign > best * sign)
        best = tl.where(better, y, best)
        place = tl.where(better, step, place)
    at = (clip * pooled + w)[:, None] * C + c[None, :]
    tl.store(P + at, best.to(P.dtype.element_ty), mask=inside[:, None])
    tl.store(IDX + at, place.to(IDX.dtype.element_ty), mask=inside[:, None])


@jit
def unpool_kernel(DZ, IDX, OUT, length, pooled, tiles, C: tl.constexpr, BM: tl.constexpr):
    """Gradients of adaptive windows, added to the steps that won; a step lies in at most two windows."""
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * BM + tl.arange(0, BM).to(tl.int64)
    c = tl.arange(0, C)
    inside = t < length
    w = t * pooled // length
    dz = _routed(DZ, IDX, clip, w, t - w * length // pooled, c, inside, pooled, C)
    dz += _routed(DZ, IDX, clip, w + 1, t - (w + 1) * length // pooled, c, inside, pooled, C)
    tl.store(
        OUT + (clip * length + t)[:, None] * C + c[None, :], dz.to(OUT.dtype.element_ty), mask=inside[:, None]
    )


@jit
def input_gradient_kernel(
    Y, DZ, IDX, AFF, GRAD, W, X, MU, W0, AFF_X, DX, SUMS, PRODUCTS,
    length, pooled, count, samples, tiles,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, BY4: tl.constexpr, FIRST: tl.constexpr,
    STORE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dz of the layer before, and the tile's sums of dz xhat and dz (FIRST: of dz and dz windows)."""
    pid = tl.program_id(0)
    clip = (pid // tiles).to(tl.int64)
    t = pid % tiles * BM + tl.arange(0, BM)
    ci = tl.arange(0, CI)
    acc = tl.zeros([BM, CI], tl.float32)
    for k0 in range(0, 3 * CO, BK):
        tap = k0 // CO
        c = k0 % CO + tl.arange(0, BK)
        dy = _dy(Y, DZ, IDX, AFF, GRAD, clip, t - (tap - 1) * DILATION, c, length, pooled, count, CO, BY4)
        w = tl.load(W + (tap * CO + c)[:, None] * CI + ci[None, :])
        acc = tl.dot(dy.to(DT), w.to(DT), acc, input_precision=PREC)
    inside = (t < length)[:, None]
    at = (clip * length + t)[:, None] * CI + ci[None, :]
    if FIRST:
        x, xhat, z = _first(X + clip * samples, MU, W0, AFF_X, t, ci, samples, PREC)
    else:
        xhat, z = _normalised(tl.load(X + at, mask=inside, other=0.0).to(tl.float32), AFF_X, ci, CI)
    dz = tl.where(inside & (z > 0), acc, 0.0)
    if STORE:
        tl.store(DX + at, dz.to(DX.dtype.element_ty), mask=inside)
    if FIRST:
        k = tl.arange(0, 16)
        products = tl.dot(tl.trans(x), dz, input_precision=PREC)
        tl.store(PRODUCTS + pid.to(tl.int64) * 16 * CI + k[:, None] * CI + ci[None, :], products)
    else:
        tl.store(SUMS + pid * 2 * CI + ci, tl.sum(dz * xhat, 0))
    tl.store(SUMS + pid * 2 * CI + CI + ci, tl.sum(dz, 0))


@jit
def weight_gradient_kernel(
    Y, DZ, IDX, AFF, GRAD, X, MU, W0, AFF_X, PART,
    length, pooled, count, samples, tiles, all_tiles, share,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, BY4: tl.constexpr, FIRST: tl.constexpr,
    BM: tl.constexpr, BCI: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Sum over `share` tiles of time of activation x dy, for the three taps: PART (programs, 3, CI, CO)."""
    part = tl.program_id(0)
    ci = tl.program_id(1) * BCI + tl.arange(0, BCI)
    co = tl.arange(0, CO)
    left = tl.zeros([BCI, CO], tl.float32)
    middle = tl.zeros([BCI, CO], tl.float32)
    right = tl.zeros([BCI, CO], tl.float32)
    for tile in range(part * share, tl.minimum((part + 1) * share, all_tiles)):
        clip = (tile // tiles).to(tl.int64)
        t = tile % tiles * BM + tl.arange(0, BM)
        dy = _dy(Y, DZ, IDX, AFF, GRAD, clip, t, co, length, pooled, count, CO, BY4).to(DT)
        a = _activation(X, MU, W0, AFF_X, clip, t - DILATION, ci, length, samples, CI, FIRST, PREC).to(DT)
        left = tl.dot(tl.trans(a), dy, left, input_precision=PREC)
        a = _activation(X, MU, W0, AFF_X, clip, t, ci, length, samples, CI, FIRST, PREC).to(DT)
        middle = tl.dot(tl.trans(a), dy, middle, input_precision=PREC)
        a = _activation(X, MU, W0, AFF_X, clip, t + DILATION, ci, length, samples, CI, FIRST, PREC).to(DT)
        right = tl.dot(tl.trans(a), dy, right, input_precision=PREC)
    to = PART + part.to(tl.int64) * 3 * CI * CO + ci[:, None] * CO + co[None, :]
    tl.store(to, left)
    tl.store(to + CI * CO, middle)
    tl.store(to + 2 * CI * CO, right)


# Host side. The operators are functional: what the backward pass reads is a result of the forward pass.


def lengths(samples: int, hop: int = 512) -> list[int]:
    """Time steps of each layer's convolution output, before its pool."""
    first = (samples + 2 * LAYERS[0].padding - LAYERS[0].kernel) // LAYERS[0].stride + 1
    wide = 2 * frames(samples, hop)
    return [first, first, first, first // 4, first // 4, wide, wide]


MOMENTS_ROWS = 128
POOL = {"BM": 16, "num_warps": 8, "num_stages": 1}
SHARES = 128  # partial sums of a weight gradient
# (rows, chunk of the inner or input channels, warps, stages) for layer 1, layer 2 and the others: the largest
# tiles that compile without spills within the shared memory of sm_90 and sm_100, and of sm_80 and sm_86.
# Chosen by resources ahead of time, not by timing.
TILES = {
    "conv": {
        90: {
            "bf16": ((64, 64, 8, 2), (64, 64, 8, 2), (128, 64, 8, 2)),
            "tf32": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
            "tf32x3": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
            "ieee": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
        },
        80: {
            "bf16": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
            "tf32": ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
            "tf32x3": ((32, 32, 4, 1), (64, 32, 4, 2), (32, 32, 4, 2)),
            "ieee": ((64, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
        },
    },
    "weight": {
        90: {
            "bf16": ((32, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 2)),
            "tf32": ((64, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
            "tf32x3": ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
            "ieee": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        },
        80: {
            "bf16": ((32, 32, 8, 1), (32, 64, 8, 2), (32, 64, 8, 2)),
            "tf32": ((32, 32, 8, 1), (32, 64, 8, 2), (32, 64, 8, 1)),
            "tf32x3": ((16, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
            "ieee": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        },
    },
    "input": {
        90: {
            "bf16": ((64, 64, 8, 2), (64, 64, 8, 2), (128, 64, 8, 2)),
            "tf32": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
            "tf32x3": ((64, 32, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
            "ieee": ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        },
        80: {
            "bf16": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
            "tf32": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
            "tf32x3": ((64, 32, 4, 2), (64, 32, 4, 1), (64, 32, 8, 2)),
            "ieee": ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
        },
    },
}


def _tile(kind: str, index: int, precision: str, capability: int) -> dict[str, int]:
    rows, chunk, warps, stages = TILES[kind][90 if capability >= 90 else 80][precision][min(index, 3) - 1]
    name = "BCI" if kind == "weight" else "BK"
    return {"BM": rows, name: chunk, "num_warps": warps, "num_stages": stages}


def _options(kind: str, index: int, precision: str, capability: int) -> dict:
    """The compile-time arguments of a layer's kernel."""
    layer = LAYERS[index]
    tile = _tile(kind, index, precision, capability)
    bf16 = precision == "bf16"
    options = dict(
        CI=layer.inputs, CO=layer.outputs, DILATION=layer.dilation, FIRST=index == 1,
        DT=tl.bfloat16 if bf16 and not INTERPRETED else tl.float32, PREC="tf32" if bf16 else precision,
    )  # fmt: skip
    if kind != "conv":
        options["BY4"] = layer.pool == "max4"
    return options | tile


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90  # the interpreter takes any
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _share(parts: int, programs: int) -> tuple[int, int]:
    """Parts each of at most `programs` programs takes, and how many programs that makes."""
    share = triton.cdiv(parts, programs)
    return share, triton.cdiv(parts, share)


def _combine(count: Tensor, mean: Tensor, square: Tensor, gamma: Tensor, beta: Tensor, eps: float):
    """Mean, variance and AFF from the programs' moments."""
    parts, channels = mean.shape
    blocks = channels // 16

    def run(last, groups, share, *out):
        combine_kernel[(groups, blocks)](
            count, mean, square, *out, parts, share, eps, C=channels, BC=16, BP=32, LAST=last
        )

    affine = mean.new_empty(4, channels, dtype=torch.float32)
    if parts > 128:
        share, groups = _share(parts, 128)
        out = [mean.new_empty(shape, dtype=torch.float64) for shape in ((groups,), *[(groups, channels)] * 2)]
        run(False, groups, share, *out, gamma, beta, affine)
        count, mean, square = out
        parts = groups
    out = [mean.new_empty(channels, dtype=torch.float32) for _ in range(3)]
    run(True, 1, parts, *out, gamma, beta, affine)
    return out[1], out[2], affine


def _first_layer(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float, length: int):
    """Mean, variance and AFF (for centred windows); the windows' mean (16,) and covariance (16, 16)."""
    clips, samples = x.shape
    tiles = triton.cdiv(length, MOMENTS_ROWS)
    means = x.new_empty(clips * tiles, 16, dtype=torch.float64)
    squares = x.new_zeros(clips * tiles, 16, 16, dtype=torch.float64)
    window_moments_kernel[(clips * tiles,)](
        x, means, squares, samples, length, tiles, BM=MOMENTS_ROWS, num_warps=4
    )
    counts = (length - torch.arange(tiles, device=x.device) * MOMENTS_ROWS).clamp(max=MOMENTS_ROWS)
    counts = counts.repeat(clips)[:, None].double()
    mu = (means * counts).sum(0) / (clips * length)
    apart = means - mu
    covariance = (squares.sum(0) + apart.T @ (counts * apart)) / (clips * length)
    w = F.pad(weight[:, 0].double(), (0, 5))
    variance = ((w @ covariance) * w).sum(1)
    affine = torch.stack(
        [torch.zeros_like(variance), (variance + eps).rsqrt(), gamma.double(), beta.double()]
    )
    return (w @ mu).float(), variance.float(), affine.float(), mu, covariance


@torch.library.custom_op("osscl_kernels::tfgram_train_forward", mutates_args=())
def forward(
    wave: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    eps: float,
    hop: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Output, means and variances of all layers in a row, and what the backward pass reads (see `_saved`)."""
    with torch.cuda.device_of(wave):  # Triton launches on the current device; autograd sets its own
        return _forward(wave, weights, gammas, betas, eps, hop, precision)


def _forward(wave, weights, gammas, betas, eps, hop, precision):
    x = wave.float().contiguous()
    clips, samples = x.shape
    size, capability = lengths(samples, hop), _capability(x.device)
    pooled = [*size[1:], frames(samples, hop)]
    mean, variance, affine, mu, covariance = _first_layer(x, weights[0], gammas[0], betas[0], eps, size[0])
    means, variances, affines, stored = [mean], [variance], [affine], []
    first = (mu.float(), _first_weight(weights[0]))
    source = x
    for index in range(1, len(LAYERS)):
        layer, length = LAYERS[index], size[index]
        options = _options("conv", index, precision, capability)
        tiles = triton.cdiv(length, options["BM"])
        y = _raw(x, precision, clips, length, layer.outputs)
        count = x.new_empty(clips * tiles)
        moments = [x.new_empty(clips * tiles, layer.outputs) for _ in range(2)]
        weight = weights[index].permute(2, 1, 0).to(y.dtype).contiguous()
        conv_kernel[(clips * tiles,)](
            source, *first, affines[-1], weight, y, count, *moments, length, samples, tiles, **options
        )
        mean, variance, affine = _combine(count, *moments, gammas[index], betas[index], eps)
        means.append(mean)
        variances.append(variance)
        affines.append(affine)
        stored.append(y)
        source = y
        if layer.pool:
            out = pooled[index]
            source = _raw(x, precision, clips, out, layer.outputs)
            place = torch.empty_like(source, dtype=torch.uint8)
            by4 = layer.pool == "max4"
            width = 4 if by4 else -(-length // out) + (length % out > 0)
            tiles = triton.cdiv(out, POOL["BM"])
            pool_kernel[(clips * tiles,)](
                y, affine, source, place, length, out, tiles, width, C=layer.outputs, BY4=by4, **POOL
            )
            stored += [source, place]
    z = _normalised_ref(source, affine)[1]
    output = z.relu().transpose(1, 2).contiguous()
    return output, torch.cat(means), torch.cat(variances), [mu, covariance, *affines, *stored]


def _raw(x: Tensor, precision: str, clips: int, length: int, channels: int) -> Tensor:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return x.new_empty(clips, length, channels, dtype=dtype)


def _first_weight(weight: Tensor) -> Tensor:
    """(64, 1, 11) -> (16, 64) float32, padded with zeros."""
    return F.pad(weight[:, 0].float(), (0, 5)).T.contiguous()


def _normalised_ref(y: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd, gamma, beta = affine
    xhat = (y.float() - mean) * rstd
    return xhat, xhat * gamma + beta


@forward.register_fake
def _(wave, weights, gammas, betas, eps, hop, precision):
    clips, samples = wave.shape
    x = wave.new_empty(0, dtype=torch.float32)
    size, count = lengths(samples, hop), frames(samples, hop)
    pooled = [*size[1:], count]
    channels = [layer.outputs for layer in LAYERS]
    saved = [x.new_empty(16, dtype=torch.float64), x.new_empty(16, 16, dtype=torch.float64)]
    saved += [x.new_empty(4, c) for c in channels]
    for index in range(1, len(LAYERS)):
        saved.append(_raw(x, precision, clips, size[index], channels[index]))
        if LAYERS[index].pool:
            source = _raw(x, precision, clips, pooled[index], channels[index])
            saved += [source, torch.empty_like(source, dtype=torch.uint8)]
    return x.new_empty(clips, channels[-1], count), *[x.new_empty(sum(channels)) for _ in range(2)], saved


@torch.library.custom_op("osscl_kernels::tfgram_train_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    wave: Tensor,
    weights: list[Tensor],
    saved: list[Tensor],
    hop: int,
    precision: str,
    wave_needed: bool,
) -> list[Tensor]:
    """Gradients of the wave (empty where not needed), of the weights, and of (gamma, beta) as (2, C)."""
    x = wave.float().contiguous()
    clips, samples = x.shape
    size, capability = lengths(samples, hop), _capability(x.device)
    pooled = [*size[1:], frames(samples, hop)]
    (mu, covariance), affines, stored = saved[:2], saved[2:9], list(saved[9:])
    first = (mu.float(), _first_weight(weights[0]))
    gradients: list[list[Tensor]] = [[], []]  # last layer first

    xhat, z = _normalised_ref(stored[-2], affines[-1])
    dz = torch.where(z > 0, gradient.float().transpose(1, 2), 0.0)
    sums = torch.stack([(dz * xhat).sum((0, 1), dtype=torch.float64), dz.sum((0, 1), dtype=torch.float64)])
    dz = dz.to(stored[-2].dtype).contiguous()
    for index in range(len(LAYERS) - 1, 0, -1):
        layer, length = LAYERS[index], size[index]
        place = dz
        if layer.pool:
            place = stored.pop()
            stored.pop()
        if layer.pool not in ("", "max4"):
            full = _raw(x, precision, clips, length, layer.outputs)
            tiles = triton.cdiv(length, POOL["BM"])
            unpool_kernel[(clips * tiles,)](
                dz, place, full, length, pooled[index], tiles, C=layer.outputs, **POOL
            )
            dz = full
        y = stored.pop()
        source = x if index == 1 else stored[-2] if LAYERS[index - 1].pool else stored[-1]
        sums = sums.float()
        gradients[1].append(sums)
        before = (y, dz, place, affines[index], sums)
        behind = (source, *first, affines[index - 1])
        extent = (length, pooled[index], float(clips * length), samples)

        options = _options("weight", index, precision, capability)
        tiles = triton.cdiv(length, options["BM"])
        share, parts = _share(clips * tiles, SHARES)
        partial = x.new_empty(parts, 3, layer.inputs, layer.outputs)
        weight_gradient_kernel[(parts, layer.inputs // options["BCI"])](
            *before, *behind, partial, *extent, tiles, clips * tiles, share, **options
        )
        gradients[0].append(partial.sum(0, dtype=torch.float64).permute(2, 1, 0).float())

        options = _options("input", index, precision, capability)
        tiles = triton.cdiv(length, options["BM"])
        store = index > 1 or wave_needed
        dx = _raw(x, precision, clips, length, layer.inputs) if store else dz
        sums = x.new_empty(clips * tiles, 2, layer.inputs)
        products = x.new_empty(clips * tiles, 16, layer.inputs) if index == 1 else sums
        weight = weights[index].permute(2, 0, 1).to(y.dtype).contiguous()
        input_gradient_kernel[(clips * tiles,)](
            *before, weight, *behind, dx, sums, products, *extent, tiles, STORE=store, **options
        )
        dz = dx
        if index > 1:
            sums = sums.sum(0, dtype=torch.float64)

    # The first layer's gradients from sum dz (x - mu), sum dz and the windows' covariance.
    w, rstd = F.pad(weights[0][:, 0].double(), (0, 5)), affines[0][1].double()
    products = products.sum(0, dtype=torch.float64).T
    dgamma, dbeta = (w * products).sum(1) * rstd, sums[:, 1].sum(0, dtype=torch.float64)
    scale = (affines[0][2].double() * rstd)[:, None]
    dw = scale * (products - (dgamma * rstd)[:, None] * (w @ covariance))
    gradients[0].append(dw[:, None, :11].float())
    gradients[1].append(torch.stack([dgamma, dbeta]).float())
    dwave = x.new_empty(0)
    if wave_needed:
        xhat = (
            F.conv1d(x[:, None], weights[0].float(), stride=5, padding=5).double() - (w @ mu)[:, None]
        ) * rstd[:, None]
        dy = dz.double().transpose(1, 2) - (dbeta[:, None] + dgamma[:, None] * xhat) / (clips * size[0])
        dy = (dy * scale).float()
        extra = samples - 5 * (size[0] - 1) - 1
        dwave = F.conv_transpose1d(dy, weights[0].float(), stride=5, padding=5, output_padding=extra)[:, 0]
    return [dwave, *[g for kind in gradients for g in reversed(kind)]]


@_backward.register_fake
def _(gradient, wave, weights, saved, hop, precision, wave_needed):
    like = [wave.new_empty(wave.shape if wave_needed else 0, dtype=torch.float32)]
    like += [torch.empty_like(w, dtype=torch.float32) for w in weights]
    return like + [w.new_empty(2, len(w), dtype=torch.float32) for w in weights]


def _setup_context(ctx, inputs, output):
    wave, weights, gammas, betas, _, ctx.hop, ctx.precision = inputs
    ctx.save_for_backward(wave, *weights, *output[3])
    ctx.dtypes = [t.dtype for t in (wave, *weights, *gammas, *betas)]
    ctx.set_materialize_grads(False)


def _autograd(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 7
    wave, *rest = ctx.saved_tensors
    result = _backward(gradient, wave, rest[:7], rest[7:], ctx.hop, ctx.precision, ctx.needs_input_grad[0])
    result = result[:8] + [g[0] for g in result[8:]] + [g[1] for g in result[8:]]
    result = [g.to(dtype) for g, dtype in zip(result, ctx.dtypes, strict=True)]
    dwave = result[0] if ctx.needs_input_grad[0] else None
    return dwave, result[1:8], result[8:15], result[15:], None, None, None


forward.register_autograd(_autograd, setup_context=_setup_context)


INTEGERS = ("length", "pooled", "samples", "tiles", "all_tiles", "share", "parts", "width")
FLOATS = (
    "MU",
    "W0",
    "AFF",
    "AFF_X",
    "GRAD",
    "SUMS",
    "PRODUCTS",
    "PART",
    "COUNT",
    "MEAN",
    "SQUARE",
    "GAMMA",
    "BETA",
)


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every shipped kernel configuration: each precision and distinct layer, then the small kernels."""
    for precision in ("bf16", "tf32", "tf32x3", "ieee"):
        stored = "*bf16" if precision == "bf16" else "*fp32"
        for kind, kernel in (
            ("conv", conv_kernel), ("weight", weight_gradient_kernel), ("input", input_gradient_kernel)
        ):  # fmt: skip
            for index in range(1, 5):  # layers 5 and 6 are layer 4 with other lengths and dilations
                constants = _options(kind, index, precision, capability)
                if kind == "input":
                    constants["STORE"] = index > 1
                types = {"X": "*fp32"} if index == 1 else {}
                types |= {"IDX": "*u8"} if constants.get("BY4") else {}
                carried = 3 if kind == "weight" else 1
                yield _case(f"{kind} {precision} layer {index}", kernel, constants, stored, types, carried)
    moments = {"MEAN": "*fp64", "SQUARE": "*fp64"}
    yield _case("window moments", window_moments_kernel, {"BM": MOMENTS_ROWS}, "*fp32", moments)
    for last in (False, True):
        types = {name: "*fp32" if last else "*fp64" for name in ("COUNT_OUT", "MEAN_OUT", "SQUARE_OUT")}
        types |= {"eps": "fp32"} | (moments | {"COUNT": "*fp64"} if last else {})
        constants = {"C": 128, "BC": 16, "BP": 32, "LAST": last}
        yield _case(f"combine {'last' if last else 'first'}", combine_kernel, constants, "*fp32", types, 3)
    for stored in ("*bf16", "*fp32"):
        for by4 in (True, False):
            constants = {"C": 64 if by4 else 128, "BY4": by4} | POOL
            name = f"pool {stored[1:]} {'by four' if by4 else 'adaptive'}"
            yield _case(name, pool_kernel, constants, stored, {"IDX": "*u8"}, 2)
        yield _case(f"unpool {stored[1:]}", unpool_kernel, {"C": 128} | POOL, stored, {"IDX": "*u8"})


def _case(name, kernel, constants, stored, types, carried=0) -> CompileCase:
    """Argument types by name: integers, float32 side tables, `types`, and `stored` for the activations."""
    constants = dict(constants)
    warps, stages = constants.pop("num_warps", 4), constants.pop("num_stages", 3)
    signature = {
        key: "i32" if key in INTEGERS else "fp32" if key == "count" else "*fp32" if key in FLOATS else stored
        for key in kernel.arg_names
        if key not in constants
    } | types
    return CompileCase(
        name, kernel, signature, constants, warps, stages,
        aligned=tuple(key for key, kind in signature.items() if kind.startswith("*")),
        tensor_cores=constants.get("PREC", "ieee") != "ieee" and "DT" in constants,
        loop_carried=min(carried, 1), carried_values=carried,
    )  # fmt: skip
