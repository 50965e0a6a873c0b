"""TFgram in training: seven convolutions with exact batch statistics, one kernel per layer and direction.

Batch statistics stand between the layers, and only raw convolution outputs are kept:

- BN + ReLU of the layer before are the kernel's prologue (zero padding comes after them), never stored.
- The first layer's mean and variance follow from those of the 11 samples under it, gathered in float64:
  mean = w.mu, variance = w^T cov w. So that layer itself runs inside its neighbours' prologues.
- Further layers store one (mean, centred sum of squares) per program; Chan's formula joins them in float64.
  There are no atomics: the same input gives the same bits.
- Backward, with dz the gradient of the ReLU's input: dgamma = sum dz xhat and dbeta = sum dz are summed where
  dz is made; dy = gamma rstd (dz - dbeta / n - xhat dgamma / n) is the next kernel's prologue. The first
  layer needs only sum dz (x - mu) and the same covariance.

Activations are channels-last (clip, time, channel).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import INTERPRETED, jit, launching_on, resolve, tile, tl, triton
from .tfgram_infer import LAYERS, Layer, frames, half_wanted, lengths, pool_ref, widest_window

PRECISIONS = ("auto", "ieee", "tf32x3", "tf32", "bf16")
MIN_SAMPLES = 40  # below it the adaptive pools would have to repeat frames


def tfgram_train_ref(
    wave: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    hop: int = 512,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`tfgram_train` in plain PyTorch: convolution, batch_norm, the pools and ReLU; any floating-point dtype.

    Convolutions are conv2d of height one: conv1d has no channels_last, in which a CPU is up to twice as fast.
    """
    _check(wave, weights, gammas, betas, "auto")
    count = frames(wave.shape[1], hop)
    x, means, variances = wave[:, None, None], [], []
    for layer, weight, gamma, beta in zip(LAYERS, weights, gammas, betas, strict=True):
        kernel = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, kernel, None, (1, layer.stride), (0, layer.padding), (1, layer.dilation))
        mean, variance = torch.zeros_like(gamma.detach()), torch.zeros_like(gamma.detach())
        x = F.batch_norm(y, mean, variance, gamma, beta, training=True, momentum=1.0, eps=eps)
        means.append(mean)
        variances.append(variance * (1 - gamma.numel() / y.numel()))  # batch_norm gives the unbiased variance
        x = F.relu(pool_ref(x, layer, count))  # ReLU last: the same values and gradients, on fewer frames
    return x[:, :, 0], means, variances


def tfgram_train(
    wave: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    hop: int = 512,
    precision: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """TFgram feature with the batch's own statistics, differentiable in weights, gammas and betas.

    Parameters
    ----------
    wave : Tensor, shape (B, samples), floating point
        16 kHz in the paper; at least 40 samples.
    weights : sequence of 7 tensors, shapes (C_out, C_in, kernel)
        Bias-free convolution weights, as `LAYERS` lists them.
    gammas, betas : sequences of 7 tensors, shapes (C_out,)
        BatchNorm weights and biases.
    eps : float
        Added to the variances.
    hop : int
        Samples per frame of the result, T = 1 + samples // hop.
    precision : {"auto", "ieee", "tf32x3", "tf32", "bf16"}
        Of the matrix products in Triton; sums and statistics are float32 or wider in all. "bf16" also keeps
        activations in bfloat16. "auto": bf16 for a bfloat16 wave or under bf16 autocast; otherwise tf32, or
        tf32x3 where `torch.backends.cudnn.allow_tf32` is off. On the CPU: bf16, or the wave's own precision.
    backend : {"auto", "triton", "torch"}
        See `backend.resolve`. "torch" is `tfgram_train_ref`. Where the wave's gradient is wanted "auto" is
        "torch", and "triton" a RuntimeError.

    Returns
    -------
    output : Tensor, shape (B, 128, T)
        float32; float64 for a float64 wave on the CPU.
    means, variances : lists of 7 tensors, shapes (C_out,)
        Mean and biased variance of each convolution's output over clips and time, without gradient; see
        `update_running_statistics`.

    References
    ----------
    Huang et al., arXiv 2509.13853, the TFgram branch as its authors' code runs it; Ioffe and Szegedy,
    "Batch Normalization", ICML 2015; Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance",
    1983.
    """
    _check(wave, weights, gammas, betas, precision)
    choice = resolve(wave, backend)
    if torch.is_grad_enabled() and wave.requires_grad:
        if backend == "triton":
            raise RuntimeError("the TFgram training kernels give the wave no gradient: use backend='torch'")
        choice = "torch"
    device = wave.device.type
    if precision == "auto":
        full = "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"
        precision = "bf16" if half_wanted(wave) else full
    with torch.autocast(device, enabled=False):
        if choice == "triton":
            output, means, variances, _ = forward(
                wave, list(weights), list(gammas), list(betas), eps, hop, precision
            )
            sizes = [layer.outputs for layer in LAYERS]
            return output, list(means.detach().split(sizes)), list(variances.detach().split(sizes))
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        output, means, variances = tfgram_train_ref(wave, weights, gammas, betas, eps=eps, hop=hop)
    wide = torch.promote_types(wave.dtype, torch.float32)
    return output.to(wide), [m.to(wide) for m in means], [v.to(wide) for v in variances]


@torch.no_grad()
def update_running_statistics(
    norms: Iterable[nn.BatchNorm1d],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    counts: Sequence[int],
) -> None:
    """Do to BatchNorm buffers what their own forward pass in training mode does.

    `means` and biased `variances` are the batch's, over `counts` values per channel (see `rows`). A module
    without buffers (track_running_stats=False) is left alone; `momentum=None` is the cumulative average.
    """
    for norm, mean, variance, count in zip(norms, means, variances, counts, strict=True):
        if norm.running_mean is None:
            continue
        norm.num_batches_tracked += 1
        momentum = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        unbiased = variance.to(norm.running_var.dtype) * (count / (count - 1))
        norm.running_var.lerp_(unbiased, momentum)


def rows(wave: Tensor, hop: int = 512) -> list[int]:
    """Values per channel under each layer's batch statistics, for a wave (B, samples)."""
    return [len(wave) * n for n in lengths(wave.shape[1], frames(wave.shape[1], hop))[: len(LAYERS)]]


def _check(wave, weights, gammas, betas, precision):
    if wave.dim() != 2 or not wave.is_floating_point() or wave.shape[1] < MIN_SAMPLES or not len(wave):
        raise ValueError(
            f"tfgram_train: wave {tuple(wave.shape)} {wave.dtype}; expected (B, samples) in floating point, "
            f"with at least {MIN_SAMPLES} samples"
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"tfgram_train: unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}"
        )
    matrices = [(layer.outputs, layer.inputs, layer.kernel) for layer in LAYERS]
    vectors = [shape[:1] for shape in matrices]
    given = (("weights", weights, matrices), ("gammas", gammas, vectors), ("betas", betas, vectors))
    for name, tensors, expected in given:
        shapes = [tuple(t.shape) for t in tensors]
        if shapes != expected:
            raise ValueError(f"tfgram_train: {name} of shapes {shapes}; expected {expected}")


# Kernels. AFF (4, C) float32: a layer's mean, rstd, gamma, beta. GRAD (2, C) float32: its dgamma, dbeta.
# A window of the first layer is a row of 16 samples, 11 of them live and less their means MU.


@jit
def _tile(tiles, BM: tl.constexpr):
    """Clip and time steps of a program, of which each clip has `tiles`."""
    pid = tl.program_id(0)
    return (pid // tiles).to(tl.int64), pid % tiles * BM + tl.arange(0, BM)


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
def _first(X, MU, W0, AFF, t, c, samples, PRECISION: tl.constexpr):
    """Windows, xhat and z of the first layer, computed again wherever they are needed."""
    x = _windows(X, MU, t, samples)
    w = tl.load(W0 + tl.arange(0, 16)[:, None] * 64 + c[None, :])
    xhat, z = _normalised(tl.dot(x, w, input_precision=PRECISION), AFF, c, 64)
    return x, xhat, z


@jit
def _activation(
    X, MU, W0, AFF, clip, t, c, length, samples, C: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr
):
    """ReLU(BN) of the layer before at time steps t, from its stored raw output or from the wave."""
    inside = (t >= 0) & (t < length)
    if FIRST:
        _, _, z = _first(X + clip * samples, MU, W0, AFF, t, c, samples, PRECISION)
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
def _weight_at(W, k, n, BK: tl.constexpr, TAPS: tl.constexpr, OUTPUTS: tl.constexpr, PRECISION: tl.constexpr):
    """Rows k to k + BK, columns n of the (TAPS, OUTPUTS) weights, stored as `_weight_layout` says."""
    k += tl.arange(0, BK)
    if PRECISION == "ieee":
        at = W + k[:, None] * OUTPUTS + n[None, :]
    else:
        at = W + n[None, :] * TAPS + k[:, None]
    return at


@jit
def conv_kernel(
    X, MU, W0, AFF, W, Y, MEAN, SQUARE,
    length, samples, tiles,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, FIRST: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = conv(ReLU(BN(X))) raw, and the tile's mean and centred sum of squares per channel."""
    pid = tl.program_id(0)
    clip, t = _tile(tiles, BM)
    co = tl.arange(0, CO)
    acc = tl.zeros([BM, CO], tl.float32)
    for k0 in range(0, 3 * CI, BK):
        tap = k0 // CI
        c = tl.multiple_of(k0 % CI, BK) + tl.arange(0, BK)  # without the hint: loads of single elements
        a = _activation(
            X, MU, W0, AFF, clip, t + (tap - 1) * DILATION, c, length, samples, CI, FIRST, PRECISION
        )  # fmt: skip
        w = tl.load(_weight_at(W, k0, co, BK, 3 * CI, CO, PRECISION))
        acc = tl.dot(a.to(DT), w.to(DT), acc, input_precision=PRECISION)
    inside = (t < length)[:, None]
    at = (clip * length + t)[:, None] * CO + co[None, :]
    tl.store(Y + at, acc.to(Y.dtype.element_ty), mask=inside)
    n = tl.minimum(length - pid % tiles * BM, BM).to(tl.float32)
    mean = tl.sum(tl.where(inside, acc, 0.0), 0) / n
    off = tl.where(inside, acc - mean[None, :], 0.0)
    tl.store(MEAN + pid * CO + co, mean)
    tl.store(SQUARE + pid * CO + co, tl.sum(off * off, 0))


@jit
def pool_kernel(
    Y, AFF, P, IDX, length, pooled, tiles, width, C: tl.constexpr, BY4: tl.constexpr, BM: tl.constexpr
):
    """Raw value P of each window's maximum after BN, and its place IDX in the window: the first of equals."""
    clip, w = _tile(tiles, BM)
    w = w.to(tl.int64)
    c = tl.arange(0, C)
    inside = w < pooled
    if BY4:
        start = w * 4
        end = start + 4
    else:
        start = w * length // pooled
        end = ((w + 1) * length + pooled - 1) // pooled
    gamma = tl.load(AFF + 2 * C + c)[None, :]
    sign = tl.where(gamma > 0, 1.0, tl.where(gamma < 0, -1.0, 0.0))
    at = (clip * length + start)[:, None] * C + c[None, :]
    best = tl.load(Y + at, mask=inside[:, None], other=0.0).to(tl.float32)
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
def unpool_kernel(DZ, IDX, OUT, length, pooled, tiles, overlap, C: tl.constexpr, BM: tl.constexpr):
    """Gradients of adaptive windows, added to the steps that won; at most `overlap` windows meet."""
    clip, t = _tile(tiles, BM)
    t = t.to(tl.int64)
    c = tl.arange(0, C)
    inside = t < length
    first = t * pooled // length
    dz = tl.zeros([BM, C], tl.float32)
    for i in range(overlap):
        w = first + i
        dz += _routed(DZ, IDX, clip, w, t - w * length // pooled, c, inside, pooled, C)
    at = (clip * length + t)[:, None] * C + c[None, :]
    tl.store(OUT + at, dz.to(OUT.dtype.element_ty), mask=inside[:, None])


@jit
def input_gradient_kernel(
    Y, DZ, IDX, AFF, GRAD, W, X, MU, W0, AFF_X, DX, SUMS, PRODUCTS,
    length, pooled, count, samples, tiles,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, BY4: tl.constexpr, FIRST: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz of the layer before, and the tile's sums of dz xhat and dz; FIRST: only sums, of dz and windows."""
    pid = tl.program_id(0)
    clip, t = _tile(tiles, BM)
    ci = tl.arange(0, CI)
    acc = tl.zeros([BM, CI], tl.float32)
    for k0 in range(0, 3 * CO, BK):
        tap = k0 // CO
        c = tl.multiple_of(k0 % CO, BK) + tl.arange(0, BK)
        dy = _dy(Y, DZ, IDX, AFF, GRAD, clip, t - (tap - 1) * DILATION, c, length, pooled, count, CO, BY4)
        w = tl.load(_weight_at(W, k0, ci, BK, 3 * CO, CI, PRECISION))
        acc = tl.dot(dy.to(DT), w.to(DT), acc, input_precision=PRECISION)
    inside = (t < length)[:, None]
    at = (clip * length + t)[:, None] * CI + ci[None, :]
    if FIRST:
        x, xhat, z = _first(X + clip * samples, MU, W0, AFF_X, t, ci, samples, PRECISION)
    else:
        xhat, z = _normalised(tl.load(X + at, mask=inside, other=0.0).to(tl.float32), AFF_X, ci, CI)
    dz = tl.where(inside & (z > 0), acc, 0.0)
    if FIRST:
        k = tl.arange(0, 16)
        products = tl.dot(tl.trans(x), dz, input_precision=PRECISION)
        tl.store(PRODUCTS + pid.to(tl.int64) * 16 * CI + k[:, None] * CI + ci[None, :], products)
    else:
        tl.store(DX + at, dz.to(DX.dtype.element_ty), mask=inside)
        tl.store(SUMS + pid * 2 * CI + ci, tl.sum(dz * xhat, 0))
    tl.store(SUMS + pid * 2 * CI + CI + ci, tl.sum(dz, 0))


@jit
def weight_gradient_kernel(
    Y, DZ, IDX, AFF, GRAD, X, MU, W0, AFF_X, PART,
    length, pooled, count, samples, tiles, all_tiles, share,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, BY4: tl.constexpr, FIRST: tl.constexpr,
    BM: tl.constexpr, BCI: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over `share` tiles of time of activation x dy, for the three taps: PART (programs, 3, CI, CO)."""
    part = tl.program_id(0)
    ci = tl.program_id(1) * BCI + tl.arange(0, BCI)
    co = tl.arange(0, CO)
    left = tl.zeros([BCI, CO], tl.float32)
    middle = tl.zeros([BCI, CO], tl.float32)
    right = tl.zeros([BCI, CO], tl.float32)
    for block in range(part * share, tl.minimum((part + 1) * share, all_tiles)):
        clip = (block // tiles).to(tl.int64)
        t = block % tiles * BM + tl.arange(0, BM)
        dy = _dy(Y, DZ, IDX, AFF, GRAD, clip, t, co, length, pooled, count, CO, BY4).to(DT)
        a = _activation(X, MU, W0, AFF_X, clip, t - DILATION, ci, length, samples, CI, FIRST, PRECISION)
        left = tl.dot(tl.trans(a.to(DT)), dy, left, input_precision=PRECISION)
        a = _activation(X, MU, W0, AFF_X, clip, t, ci, length, samples, CI, FIRST, PRECISION)
        middle = tl.dot(tl.trans(a.to(DT)), dy, middle, input_precision=PRECISION)
        a = _activation(X, MU, W0, AFF_X, clip, t + DILATION, ci, length, samples, CI, FIRST, PRECISION)
        right = tl.dot(tl.trans(a.to(DT)), dy, right, input_precision=PRECISION)
    to = PART + part.to(tl.int64) * 3 * CI * CO + ci[:, None] * CO + co[None, :]
    tl.store(to, left)
    tl.store(to + CI * CO, middle)
    tl.store(to + 2 * CI * CO, right)


# Host side. The operators are functional: what the backward pass reads is a result of the forward pass.


POOL = {"BM": 16, "num_warps": 8, "num_stages": 1}
SHARES = 128  # partial sums of a weight gradient


def _options(kind: str, index: int, precision: str, x: Tensor) -> dict:
    """The compile-time arguments of a layer's kernel."""
    layer, bf16 = LAYERS[index], precision == "bf16"
    options = dict(
        CI=layer.inputs, CO=layer.outputs, DILATION=layer.dilation, FIRST=index == 1,
        DT=tl.bfloat16 if bf16 and not INTERPRETED else tl.float32, PRECISION="tf32" if bf16 else precision,
    )  # fmt: skip
    if kind != "conv":
        options["BY4"] = layer.pool == "max4"
    return options | tile(f"tfgram_{kind}" + ("_first" if index == 1 else ""), precision, x)


def _share(parts: int, programs: int) -> tuple[int, int]:
    """Parts each of at most `programs` programs takes, and how many programs that makes."""
    share = triton.cdiv(parts, programs)
    return share, triton.cdiv(parts, share)


def _joined(mean: Tensor, square: Tensor, clips: int, length: int, rows: int):
    """Mean and variance of `clips` times `length` values from their tiles', by Chan's formula in float64."""
    tiles = len(mean) // clips
    count = (length - torch.arange(tiles, device=mean.device) * rows).clamp(max=rows)
    count, mean = count.repeat(clips)[:, None].double(), mean.double()
    total = (count * mean).sum(0) / (clips * length)
    between = (count * (mean - total).square()).sum(0)
    return total, (square.sum(0, dtype=torch.float64) + between) / (clips * length)


def _affine(mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return torch.stack([mean, (variance + eps).rsqrt(), gamma.double(), beta.double()]).float()


def _first_layer(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, eps: float):
    """Mean, variance and AFF (for centred windows); the windows' mean (11,) and covariance (11, 11)."""
    windows = F.pad(x.double(), (5, 5)).unfold(1, 11, 5).flatten(0, 1)
    mu = windows.mean(0)
    windows = windows - mu
    covariance = windows.T @ windows / len(windows)
    w = weight[:, 0].double()
    variance = ((w @ covariance) * w).sum(1)
    affine = _affine(torch.zeros_like(variance), variance, gamma, beta, eps)
    return w @ mu, variance, affine, mu, covariance


@torch.library.custom_op(
    "osscl_kernels::tfgram_train_forward",
    mutates_args=(),
    schema="(Tensor wave, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float eps, int hop, "
    "str precision) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def forward(wave, weights, gammas, betas, eps, hop, precision):
    """Output, means and variances of all layers in a row, and what the backward pass reads."""
    x = wave.float().contiguous()
    clips, samples = x.shape
    size = lengths(samples, frames(samples, hop))
    stored, source = [], x
    with launching_on(wave):  # autograd sets the device by itself
        mean, variance, affine, mu, covariance = _first_layer(x, weights[0], gammas[0], betas[0], eps)
        means, variances, affines = [mean], [variance], [affine]
        first = _first_operands(mu, weights[0])
        for index in range(1, len(LAYERS)):
            layer, length = LAYERS[index], size[index]
            options = _options("conv", index, precision, x)
            tiles = triton.cdiv(length, options["BM"])
            y = _raw(x, precision, clips, length, layer.outputs)
            moments = [x.new_empty(clips * tiles, layer.outputs) for _ in range(2)]
            weight = _weight_layout(weights[index].permute(2, 1, 0), y.dtype, precision)
            conv_kernel[(clips * tiles,)](
                source, *first, affine, weight, y, *moments, length, samples, tiles, **options
            )
            mean, variance = _joined(*moments, clips, length, options["BM"])
            affine = _affine(mean, variance, gammas[index], betas[index], eps)
            means.append(mean)
            variances.append(variance)
            affines.append(affine)
            stored.append(y)
            source = y
            if layer.pool:
                out = size[index + 1]
                source, place = _pool_results(x, precision, clips, layer, length, out)
                tiles, width = triton.cdiv(out, POOL["BM"]), widest_window(length, out)
                options = {"C": layer.outputs, "BY4": layer.pool == "max4"} | POOL
                pool_kernel[(clips * tiles,)](y, affine, source, place, length, out, tiles, width, **options)
                stored += [source, place]
        output = _normalised_ref(source, affine)[1].relu().transpose(1, 2).contiguous()
    return output, torch.cat(means).float(), torch.cat(variances).float(), [mu, covariance, *affines, *stored]


def _raw(x: Tensor, precision: str, clips: int, length: int, channels: int) -> Tensor:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return x.new_empty(clips, length, channels, dtype=dtype)


def _pool_results(x: Tensor, precision: str, clips: int, layer: Layer, length: int, pooled: int):
    """Room for a pool's values, and for the winners' places in their windows."""
    values = _raw(x, precision, clips, pooled, layer.outputs)
    dtype = torch.uint8 if widest_window(length, pooled) <= 256 else torch.int32
    return values, torch.empty_like(values, dtype=dtype)


def _weight_layout(weight: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    """(taps, inner, outputs) as the product wants it: the sum's index last for tensor cores."""
    weight = weight.flatten(0, 1)
    return (weight if precision == "ieee" else weight.T).to(dtype).contiguous()


def _first_operands(mu: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (16,) and weights (16, 64) of the first layer, padded with zeros."""
    return F.pad(mu.float(), (0, 5)), F.pad(weight[:, 0].float(), (0, 5)).T.contiguous()


def _normalised_ref(y: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd, gamma, beta = affine
    xhat = (y.float() - mean) * rstd
    return xhat, xhat * gamma + beta


@forward.register_fake
def _(wave, weights, gammas, betas, eps, hop, precision):
    clips, samples = wave.shape
    x = wave.new_empty(0, dtype=torch.float32)
    size = lengths(samples, frames(samples, hop))
    saved = [x.new_empty(shape, dtype=torch.float64) for shape in ((11,), (11, 11))]
    saved += [x.new_empty(4, layer.outputs) for layer in LAYERS]
    for layer, length, out in zip(LAYERS[1:], size[1:], size[2:], strict=False):
        saved.append(_raw(x, precision, clips, length, layer.outputs))
        if layer.pool:
            saved += _pool_results(x, precision, clips, layer, length, out)
    channels = sum(layer.outputs for layer in LAYERS)
    statistics = [x.new_empty(channels) for _ in range(2)]
    return x.new_empty(clips, LAYERS[-1].outputs, size[-1]), *statistics, saved


@torch.library.custom_op(
    "osscl_kernels::tfgram_train_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor wave, Tensor[] weights, Tensor[] saved, int hop, str precision)"
    " -> Tensor[]",
)
def _backward(gradient, wave, weights, saved, hop, precision):
    """Gradients of the weights, and of (gamma, beta) as (2, C)."""
    x = wave.float().contiguous()
    clips, samples = x.shape
    size = lengths(samples, frames(samples, hop))
    (mu, covariance), affines, stored = saved[:2], saved[2:9], list(saved[9:])
    first = _first_operands(mu, weights[0])
    gradients: list[list[Tensor]] = [[], []]  # last layer first

    xhat, z = _normalised_ref(stored[-2], affines[-1])
    dz = torch.where(z > 0, gradient.float().transpose(1, 2), 0.0)
    sums = torch.stack([(dz * xhat).sum((0, 1), dtype=torch.float64), dz.sum((0, 1), dtype=torch.float64)])
    dz = dz.to(stored[-2].dtype).contiguous()
    for index in range(len(LAYERS) - 1, 0, -1):
        layer, length, out = LAYERS[index], size[index], size[index + 1]
        place = dz
        if layer.pool:
            place = stored.pop()
            stored.pop()
        if layer.pool.startswith("frames"):
            full = _raw(x, precision, clips, length, layer.outputs)
            tiles, overlap = triton.cdiv(length, POOL["BM"]), widest_window(out, length)
            unpool_kernel[(clips * tiles,)](
                dz, place, full, length, out, tiles, overlap, C=layer.outputs, **POOL
            )
            dz = full
        y = stored.pop()
        source = x if index == 1 else stored[-2] if LAYERS[index - 1].pool else stored[-1]
        sums = sums.float()
        gradients[1].append(sums)
        before = (y, dz, place, affines[index], sums)
        behind = (source, *first, affines[index - 1])
        extent = (length, out, float(clips * length), samples)

        options = _options("weight", index, precision, x)
        tiles = triton.cdiv(length, options["BM"])
        share, parts = _share(clips * tiles, SHARES)
        partial = x.new_empty(parts, 3, layer.inputs, layer.outputs)
        weight_gradient_kernel[(parts, layer.inputs // options["BCI"])](
            *before, *behind, partial, *extent, tiles, clips * tiles, share, **options
        )
        gradients[0].append(partial.sum(0, dtype=torch.float64).permute(2, 1, 0).float())

        options = _options("input", index, precision, x)
        tiles = triton.cdiv(length, options["BM"])
        dx = _raw(x, precision, clips, length, layer.inputs) if index > 1 else dz
        sums = x.new_empty(clips * tiles, 2, layer.inputs)
        products = x.new_empty(clips * tiles, 16, layer.inputs) if index == 1 else sums
        weight = _weight_layout(weights[index].permute(2, 0, 1), y.dtype, precision)
        input_gradient_kernel[(clips * tiles,)](
            *before, weight, *behind, dx, sums, products, *extent, tiles, **options
        )
        dz = dx
        if index > 1:
            sums = sums.sum(0, dtype=torch.float64)

    # The first layer's gradients from sum dz (x - mu), sum dz and the windows' covariance.
    w, rstd = weights[0][:, 0].double(), affines[0][1].double()
    products = products.sum(0, dtype=torch.float64)[:11].T
    dgamma, dbeta = (w * products).sum(1) * rstd, sums[:, 1].sum(0, dtype=torch.float64)
    scale = (affines[0][2].double() * rstd)[:, None]
    dw = scale * (products - (dgamma * rstd)[:, None] * (w @ covariance))
    gradients[0].append(dw[:, None].float())
    gradients[1].append(torch.stack([dgamma, dbeta]).float())
    return [g for kind in gradients for g in reversed(kind)]


@_backward.register_fake
def _(gradient, wave, weights, *_):
    like = [torch.empty_like(w, dtype=torch.float32) for w in weights]
    return like + [w.new_empty(2, len(w), dtype=torch.float32) for w in weights]


def _setup_context(ctx, inputs, output):
    wave, weights, gammas, betas, _, ctx.hop, ctx.precision = inputs
    ctx.save_for_backward(wave, *weights, *output[3])
    ctx.dtypes = [t.dtype for t in (*weights, *gammas, *betas)]
    ctx.set_materialize_grads(False)


def _autograd(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 7
    wave, *rest = ctx.saved_tensors
    result = _backward(gradient, wave, rest[:7], rest[7:], ctx.hop, ctx.precision)
    result = result[:7] + [g[0] for g in result[7:]] + [g[1] for g in result[7:]]
    result = [g.to(dtype) for g, dtype in zip(result, ctx.dtypes, strict=True)]
    return None, result[:7], result[7:14], result[14:], None, None, None


forward.register_autograd(_autograd, setup_context=_setup_context)
