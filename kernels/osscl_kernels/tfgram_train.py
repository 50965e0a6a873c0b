"""TFgram in training: seven convolutions with exact batch statistics, one kernel per layer and direction.

Batch statistics stand between the layers, and only raw convolution outputs are kept, channels-last:

- BN + ReLU of the layer before are the kernel's prologue (zero padding comes after them), never stored.
- The first layer's mean and variance follow from those of the 11 samples under it (w.mu and w^T cov w, in
  float64), so that the layer itself runs inside its neighbours' prologues.
- Backward, with dz the gradient of the ReLU's input: dgamma = sum dz xhat and dbeta = sum dz are summed where
  dz is made; dy = gamma rstd (dz - dbeta / n - xhat dgamma / n) is the next kernel's prologue. The first
  layer needs only sum dz (x - mu) and the same covariance.
- There are no atomics: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import constants, expect, jit, resolve, tl, triton
from .tfgram_infer import (
    LAYERS,
    auto_precision,
    frames,
    lengths,
    matrix,
    matrix_layout,
    pool_ref,
    widest_window,
)

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
    """`tfgram_train` in plain PyTorch: convolution, batch_norm, pools and ReLU; any floating-point dtype."""
    _check(wave, weights, gammas, betas, "auto")
    count = frames(wave.shape[1], hop)
    # As conv2d: conv1d has no channels_last, in which a CPU is up to twice as fast.
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
        At least 40 samples.
    weights, gammas, betas : sequences of 7 tensors
        Of bias-free convolutions (C_out, C_in, kernel), as `LAYERS` lists them, and of BatchNorm (C_out,).
    eps : float
        Added to the variances.
    hop : int
        Samples per frame of the result, T = 1 + samples // hop.
    precision : {"auto", "ieee", "tf32x3", "tf32", "bf16"}
        Of Triton's matrix products; sums and statistics are float32 or wider. "bf16" also keeps activations
        in bfloat16. "auto": bf16 for a bfloat16 wave or under bf16 autocast; otherwise tf32, or tf32x3 where
        `torch.backends.cudnn` does not allow it. PyTorch's path: bf16, or the wave's own precision.
    backend : {"auto", "triton", "torch"}
        See `backend.resolve`. Where the wave wants a gradient "auto" is "torch", "triton" a RuntimeError.

    Returns
    -------
    output : Tensor, shape (B, 128, T)
        float32, or float64 from PyTorch's path for a float64 wave.
    means, variances : lists of 7 tensors, shapes (C_out,)
        Mean and biased variance of each convolution's output over clips and time, without gradient; see
        `update_running_statistics`.
    """
    _check(wave, weights, gammas, betas, precision)
    wanted = torch.is_grad_enabled() and wave.requires_grad
    choice = resolve(wave, backend, "the training kernels give the wave no gradient" if wanted else "")
    if precision == "auto":
        precision = auto_precision(wave, "tf32x3")
    half = choice == "torch" and precision == "bf16"
    with torch.autocast(wave.device.type, torch.bfloat16, enabled=half):
        if choice == "torch":
            output, means, variances = tfgram_train_ref(wave, weights, gammas, betas, eps=eps, hop=hop)
        else:
            groups = list(weights), list(gammas), list(betas)
            output, *moments, _ = forward(wave, *groups, eps, hop, precision)
            sizes = [layer.outputs for layer in LAYERS]
            means, variances = (moment.detach().split(sizes) for moment in moments)
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

    `means` and biased `variances` are the batch's, over `counts` values per channel (see `rows`).
    """
    for norm, mean, variance, count in zip(norms, means, variances, counts, strict=True):
        if norm.running_mean is None:  # track_running_stats=False
            continue
        norm.num_batches_tracked += 1
        momentum = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
        unbiased = variance * (count / (count - 1))
        for buffer, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            buffer.lerp_(value.to(buffer.dtype), momentum)


def rows(wave: Tensor, hop: int = 512) -> list[int]:
    """Values per channel under each layer's batch statistics, for a wave (B, samples)."""
    return [len(wave) * n for n in lengths(wave.shape[1], frames(wave.shape[1], hop))[: len(LAYERS)]]


def _check(wave, weights, gammas, betas, precision):
    if wave.dim() != 2 or not wave.is_floating_point() or wave.shape[1] < MIN_SAMPLES or not len(wave):
        wanted = f"(B, samples) in floating point, with at least {MIN_SAMPLES} samples"
        raise ValueError(f"tfgram_train: wave is {tuple(wave.shape)} {wave.dtype}; expected {wanted}")
    expect("tfgram_train", "precision", precision, PRECISIONS)
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
def _read(P, clip, t, length, c, live, C: tl.constexpr):
    """Channels c of P (clips, length, C) at time steps t; zero where not `live`."""
    at = (clip * length + t)[:, None] * C + c[None, :]
    return tl.load(P + at, mask=live[:, None], other=0)


@jit
def _write(P, values, clip, t, length, c, live, C: tl.constexpr):
    at = (clip * length + t)[:, None] * C + c[None, :]
    tl.store(P + at, values.to(P.dtype.element_ty), mask=live[:, None])


@jit
def _normalised(y, AFF, c, C: tl.constexpr):
    """xhat and z of raw values y."""
    xhat = (y - tl.load(AFF + c)[None, :]) * tl.load(AFF + C + c)[None, :]
    return xhat, xhat * tl.load(AFF + 2 * C + c)[None, :] + tl.load(AFF + 3 * C + c)[None, :]


@jit
def _before(
    X, MU, W0, AFF, clip, t, c, live, length, samples,
    C: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Windows or raw output, xhat and z of the layer before; FIRST: from the wave, computed again."""
    if FIRST:
        k = tl.arange(0, 16)
        at = 5 * t[:, None] - 5 + k[None, :]
        under = (k < 11)[None, :]
        x = tl.load(X + clip * samples + at, mask=under & (at >= 0) & (at < samples), other=0.0).to(
            tl.float32
        )
        x = tl.where(under, x - tl.load(MU + k)[None, :], 0.0)
        y = tl.dot(x, tl.load(W0 + k[:, None] * C + c[None, :]), input_precision=PRECISION)
    else:
        x = _read(X, clip, t, length, c, live, C).to(tl.float32)
        y = x
    xhat, z = _normalised(y, AFF, c, C)
    return x, xhat, z


@jit
def _activation(
    X, MU, W0, AFF, clip, t, c, length, samples, C: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr
):
    """ReLU(BN) of the layer before at time steps t, zero outside the clip."""
    inside = (t >= 0) & (t < length)
    _, _, z = _before(X, MU, W0, AFF, clip, t, c, inside, length, samples, C, FIRST, PRECISION)
    return tl.where(inside[:, None], tl.maximum(z, 0.0), 0.0)


@jit
def _dy(Y, DZ, IDX, AFF, GRAD, clip, t, c, length, pooled, count, C: tl.constexpr, BY4: tl.constexpr):
    """Gradient of the raw output at time steps t, zero outside; DZ and IDX are of the pool by four if BY4."""
    inside = (t >= 0) & (t < length)
    xhat, _ = _normalised(_read(Y, clip, t, length, c, inside, C).to(tl.float32), AFF, c, C)
    if BY4:
        dz = _routed(DZ, IDX, clip, t // 4, t % 4, c, inside, pooled, C)
    else:
        dz = _read(DZ, clip, t, length, c, inside, C).to(tl.float32)
    scale = tl.load(AFF + 2 * C + c) * tl.load(AFF + C + c)
    dz -= (tl.load(GRAD + C + c)[None, :] + xhat * tl.load(GRAD + c)[None, :]) / count
    return tl.where(inside[:, None], dz * scale[None, :], 0.0)


@jit
def _routed(DZ, IDX, clip, window, offset, c, inside, pooled, C: tl.constexpr):
    """Gradient of a window's maximum, for the step at `offset` in it if that step won."""
    live = inside & (window < pooled) & (offset >= 0)
    won = _read(IDX, clip, window, pooled, c, live, C).to(tl.int32) == offset.to(tl.int32)[:, None]
    return tl.where(won, _read(DZ, clip, window, pooled, c, live, C).to(tl.float32), 0.0)


@jit
def conv_kernel(
    X, MU, W0, AFF, W, Y, MEAN, SQUARE, length, samples, tiles,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, FIRST: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = conv(ReLU(BN(X))) raw, and the tile's mean and centred sum of squares per channel."""
    pid = tl.program_id(0)
    clip, t = _tile(tiles, BM)
    co = tl.arange(0, CO)
    acc = tl.zeros([BM, CO], tl.float32)
    for k0 in range(0, 3 * CI, BK):
        c = tl.multiple_of(k0 % CI, BK) + tl.arange(0, BK)  # without the hint: loads of single elements
        at = t + (k0 // CI - 1) * DILATION
        a = _activation(X, MU, W0, AFF, clip, at, c, length, samples, CI, FIRST, PRECISION)
        w = matrix(W, k0, co, BK, 3 * CI, CO, DT, PRECISION)
        acc = tl.dot(a.to(DT), w, acc, input_precision=PRECISION)
    inside = t < length
    _write(Y, acc, clip, t, length, co, inside, CO)
    n = tl.minimum(length - pid % tiles * BM, BM).to(tl.float32)
    mean = tl.sum(tl.where(inside[:, None], acc, 0.0), 0) / n
    off = tl.where(inside[:, None], acc - mean[None, :], 0.0)
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
    best = _read(Y, clip, start, length, c, inside, C).to(tl.float32)
    place = tl.zeros([BM, C], tl.int32)
    for step in range(1, width):
        live = inside & (start + step < end)
        y = _read(Y, clip, start + step, length, c, live, C).to(tl.float32)
        better = live[:, None] & (y * sign > best * sign)
        best = tl.where(better, y, best)
        place = tl.where(better, step, place)
    _write(P, best, clip, w, pooled, c, inside, C)
    _write(IDX, place, clip, w, pooled, c, inside, C)


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
    _write(OUT, dz, clip, t, length, c, inside, C)


@jit
def input_gradient_kernel(
    Y, DZ, IDX, AFF, GRAD, W, X, MU, W0, AFF_X, DX, SUMS, PRODUCTS, length, pooled, count, samples, tiles,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, BY4: tl.constexpr, FIRST: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz of the layer before, and the tile's sums of dz xhat and dz; FIRST: only sums, of dz and windows."""
    pid = tl.program_id(0)
    clip, t = _tile(tiles, BM)
    ci = tl.arange(0, CI)
    acc = tl.zeros([BM, CI], tl.float32)
    for k0 in range(0, 3 * CO, BK):
        c = tl.multiple_of(k0 % CO, BK) + tl.arange(0, BK)
        at = t - (k0 // CO - 1) * DILATION
        dy = _dy(Y, DZ, IDX, AFF, GRAD, clip, at, c, length, pooled, count, CO, BY4)
        w = matrix(W, k0, ci, BK, 3 * CO, CI, DT, PRECISION)
        acc = tl.dot(dy.to(DT), w, acc, input_precision=PRECISION)
    inside = t < length
    x, xhat, z = _before(X, MU, W0, AFF_X, clip, t, ci, inside, length, samples, CI, FIRST, PRECISION)
    dz = tl.where(inside[:, None] & (z > 0), acc, 0.0)
    if FIRST:
        k = tl.arange(0, 16)
        products = tl.dot(tl.trans(x), dz, input_precision=PRECISION)
        tl.store(PRODUCTS + pid.to(tl.int64) * 16 * CI + k[:, None] * CI + ci[None, :], products)
    else:
        _write(DX, dz, clip, t, length, ci, inside, CI)
        tl.store(SUMS + pid * 2 * CI + ci, tl.sum(dz * xhat, 0))
    tl.store(SUMS + pid * 2 * CI + CI + ci, tl.sum(dz, 0))


@jit
def weight_gradient_kernel(
    Y, DZ, IDX, AFF, GRAD, X, MU, W0, AFF_X, PART, length, pooled, count, samples, tiles, all_tiles, share,
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


POOL = {"BM": 16, "num_warps": 8, "num_stages": 1}
SHARES = 128  # partial sums of a weight gradient


def _options(kind: str, index: int, precision: str, x: Tensor, length: int, **more) -> tuple[int, dict]:
    """Tiles in a clip, and the compile-time arguments of a layer's kernel."""
    layer, first = LAYERS[index], index == 1
    shape = dict(CI=layer.inputs, CO=layer.outputs, DILATION=layer.dilation, FIRST=first) | more
    shape |= constants(f"tfgram_{kind}" + ("_first" if first else ""), precision, x)
    return triton.cdiv(length, shape["BM"]), shape


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
    """Mean, variance, AFF for centred windows; the kernels' MU and W0, and the windows' covariance."""
    windows = F.pad(x.double(), (5, 5)).unfold(1, 11, 5).flatten(0, 1)
    mu = windows.mean(0)
    windows = windows - mu
    covariance = windows.T @ windows / len(windows)
    w = weight[:, 0].double()
    variance = ((w @ covariance) * w).sum(1)
    affine = _affine(torch.zeros_like(variance), variance, gamma, beta, eps)
    padded = F.pad(mu.float(), (0, 5)), F.pad(w.float(), (0, 5)).T.contiguous()
    return w @ mu, variance, affine, padded, covariance


def _room(x: Tensor, precision: str, size: list[int]) -> list[list[Tensor]]:
    """For each layer from the second on: its raw output, then its pool's winners' places and values."""
    dtype, room = torch.bfloat16 if precision == "bf16" else torch.float32, []
    for layer, length, pooled in zip(LAYERS[1:], size[1:-1], size[2:], strict=True):
        room.append([x.new_empty(len(x), length, layer.outputs, dtype=dtype)])
        if layer.pool:
            places = torch.uint8 if widest_window(length, pooled) <= 256 else torch.int32
            room[-1] += [x.new_empty(len(x), pooled, layer.outputs, dtype=kind) for kind in (places, dtype)]
    return room


@torch.library.custom_op(
    "osscl_kernels::tfgram_train_forward",
    mutates_args=(),
    schema="(Tensor wave, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float eps, int hop, "
    "str precision) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def forward(wave, weights, gammas, betas, eps, hop, precision):
    """Output, means and variances of all layers in a row, and what the backward pass reads.

    Operators must not write to their inputs, so even the raw outputs are results.
    """
    x = source = wave.float().contiguous()
    clips, samples = x.shape
    size = lengths(samples, frames(samples, hop))
    room = _room(x, precision, size)
    with torch.cuda.device_of(wave):  # autograd sets the device by itself
        mean, variance, affine, first, covariance = _first_layer(x, weights[0], gammas[0], betas[0], eps)
        statistics, affines = [(mean, variance)], [affine]
        for index, (y, *pool) in enumerate(room, 1):
            layer, length, out = LAYERS[index], size[index], size[index + 1]
            tiles, options = _options("conv", index, precision, x, length)
            moments = x.new_empty(2, clips * tiles, layer.outputs)
            weight = matrix_layout(weights[index].permute(2, 1, 0), y.dtype, precision)
            conv_kernel[(clips * tiles,)](
                source, *first, affine, weight, y, *moments, length, samples, tiles, **options
            )
            mean, variance = _joined(*moments, clips, length, options["BM"])
            affine = _affine(mean, variance, gammas[index], betas[index], eps)
            statistics.append((mean, variance))
            affines.append(affine)
            source = y
            if pool:
                place, source = pool
                tiles, width = triton.cdiv(out, POOL["BM"]), widest_window(length, out)
                options = {"C": layer.outputs, "BY4": layer.pool == "max4"} | POOL
                pool_kernel[(clips * tiles,)](y, affine, source, place, length, out, tiles, width, **options)
        output = _normalised_ref(source, affine)[1].relu().transpose(1, 2).contiguous()
    means, variances = (torch.cat(each).float() for each in zip(*statistics, strict=True))
    return output, means, variances, [*first, covariance, *affines, *sum(room, [])]


def _normalised_ref(y: Tensor, affine: Tensor) -> tuple[Tensor, Tensor]:
    mean, rstd, gamma, beta = affine
    xhat = (y.float() - mean) * rstd
    return xhat, xhat * gamma + beta


@forward.register_fake
def _(wave, weights, gammas, betas, eps, hop, precision):
    x = torch.empty_like(wave, dtype=torch.float32)
    size = lengths(wave.shape[1], frames(wave.shape[1], hop))
    first = x.new_empty(16), x.new_empty(16, 64), x.new_empty(11, 11, dtype=torch.float64)
    affines = [x.new_empty(4, layer.outputs) for layer in LAYERS]
    statistics = [x.new_empty(sum(layer.outputs for layer in LAYERS)) for _ in range(2)]
    saved = [*first, *affines, *sum(_room(x, precision, size), [])]
    return x.new_empty(len(x), LAYERS[-1].outputs, size[-1]), *statistics, saved


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
    first, covariance, affines, stored = saved[:2], saved[2], saved[3:10], [x, *saved[10:]]
    matrices, vectors = [], []  # of the last layer first

    xhat, z = _normalised_ref(stored[-1], affines[-1])
    dz = torch.where(z > 0, gradient.float().transpose(1, 2), 0.0)
    sums = torch.stack([(dz * xhat).sum((0, 1), dtype=torch.float64), dz.sum((0, 1), dtype=torch.float64)])
    dz = dz.to(stored[-1].dtype).contiguous()
    for index in range(len(LAYERS) - 1, 0, -1):
        layer, length, out = LAYERS[index], size[index], size[index + 1]
        y = place = stored.pop()
        if layer.pool:
            place, y = stored.pop(), stored.pop()
        source = stored[-1]
        if layer.pool.startswith("frames"):
            tiles, options = triton.cdiv(length, POOL["BM"]), {"C": layer.outputs} | POOL
            pooled, dz, overlap = dz, torch.empty_like(y), widest_window(out, length)
            unpool_kernel[(clips * tiles,)](pooled, place, dz, length, out, tiles, overlap, **options)
        vectors.append(sums.float())
        before = (y, dz, place, affines[index], vectors[-1])
        behind = (source, *first, affines[index - 1])
        extent = (length, out, float(clips * length), samples)

        by4 = layer.pool == "max4"
        tiles, options = _options("weight", index, precision, x, length, BY4=by4)
        share = triton.cdiv(clips * tiles, SHARES)
        parts = triton.cdiv(clips * tiles, share)
        partial = x.new_empty(parts, 3, layer.inputs, layer.outputs)
        weight_gradient_kernel[(parts, layer.inputs // options["BCI"])](
            *before, *behind, partial, *extent, tiles, clips * tiles, share, **options
        )
        matrices.append(partial.sum(0, dtype=torch.float64).permute(2, 1, 0).float())

        tiles, options = _options("input", index, precision, x, length, BY4=by4)
        dz = torch.empty_like(source)
        sums = x.new_empty(clips * tiles, 2, layer.inputs)
        products = x.new_empty(clips * tiles, 16, layer.inputs) if index == 1 else sums
        weight = matrix_layout(weights[index].permute(2, 0, 1), y.dtype, precision)
        input_gradient_kernel[(clips * tiles,)](
            *before, weight, *behind, dz, sums, products, *extent, tiles, **options
        )
        sums = sums.sum(0, dtype=torch.float64)

    # The first layer's gradients from sum dz (x - mu), sum dz and the windows' covariance.
    w, rstd = weights[0][:, 0].double(), affines[0][1].double()
    products = products.sum(0, dtype=torch.float64)[:11].T
    dgamma, dbeta = (w * products).sum(1) * rstd, sums[1]
    scale = (affines[0][2].double() * rstd)[:, None]
    dw = scale * (products - (dgamma * rstd)[:, None] * (w @ covariance))
    matrices.append(dw[:, None].float())
    vectors.append(torch.stack([dgamma, dbeta]).float())
    return matrices[::-1] + vectors[::-1]


@_backward.register_fake
def _(gradient, wave, weights, *_):
    like = [torch.empty_like(w, dtype=torch.float32) for w in weights]
    return like + [w.new_empty(2, len(w), dtype=torch.float32) for w in weights]


def _setup_context(ctx, inputs, output):
    wave, weights, _, _, _, ctx.hop, ctx.precision = inputs
    ctx.save_for_backward(wave, *weights, *output[3])
    ctx.set_materialize_grads(False)


def _autograd(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 7
    wave, *rest = ctx.saved_tensors
    result = _backward(gradient, wave, rest[:7], rest[7:], ctx.hop, ctx.precision)
    return None, result[:7], [g[0] for g in result[7:]], [g[1] for g in result[7:]], None, None, None


forward.register_autograd(_autograd, setup_context=_setup_context)
