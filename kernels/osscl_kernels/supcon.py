"""Supervised contrastive loss without the N x N matrix: Triton kernels and a chunked PyTorch path.

With s_ij = z_i . z_j / temperature, P_i the other rows with row i's label, c_i = |P_i|, g_i the gradient of
row i's loss, w_i = g_i / base_temperature (0 where c_i = 0), v_i = w_i / c_i and p_ij = exp(s_ij - lse_i),

    dL/dz_i = sum_{j != i} (w_i p_ij + w_j p_ji) z_j - sum_{j in P_i} (v_i + v_j) z_j.

As s is symmetric, one tile of it, computed again, gives both weights: two products per tile, no atomics.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .backend import BACKENDS, constants, expect, jit, resolve, tl, triton

PRECISIONS = ("auto", "ieee", "tf32x3", "bf16")
WIDTH = 128  # features per row in a tile, zero-padded; wider rows take the PyTorch path
# Similarities that the PyTorch path holds at a time: what fits a core's cache, what fills a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def supcon_loss_ref(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.02,
    base_temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """`supcon_loss` as the dense formula in plain PyTorch, which holds several N x N matrices."""
    _check(features, labels, temperature, base_temperature, "auto", reduction)
    with torch.autocast(features.device.type, enabled=False):
        z = features.to(_wide(features))
        similarity = z @ z.T / temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = (labels[:, None] == labels[None, :]) & ~itself
        count = positive.sum(1)
        lse = similarity.masked_fill(itself, -math.inf).logsumexp(1)
        mean_positive = (similarity * positive).sum(1) / count.clamp(min=1)
        losses = (temperature / base_temperature) * torch.where(count > 0, lse - mean_positive, 0.0)
    return losses.sum() / max(len(z), 1) if reduction == "mean" else losses


def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.02,
    base_temperature: float = 0.07,
    precision: str = "auto",
    backend: str = "auto",
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Supervised contrastive loss of single-view features, in O(N D) memory at any batch size.

    Parameters
    ----------
    features : Tensor, shape (N, D), any floating-point type and strides
        Embeddings, usually of unit length; the loss does not normalise them.
    labels : Tensor, shape (N,), any integer type
        Rows with equal labels are positives of each other.
    temperature, base_temperature : float
        Similarities are divided by `temperature`, the loss is multiplied by temperature / base_temperature.
    precision : {"auto", "ieee", "tf32x3", "bf16"}
        Of Triton's matrix products. "ieee": float32 multiply-adds. "tf32x3": three products on tensor cores,
        as exact in practice. "bf16": features are rounded to 8 bits, so logits at temperature 0.02 are off by
        up to 0.2. "auto": bf16 for bfloat16 features, else tf32x3. All else is float32, or wider.
    backend : {"auto", "triton", "torch"}
        See `backend.resolve`. float64 and D > 128 always take the PyTorch path.
    reduction : {"mean", "none"}
        "mean" divides by N, rows without a positive included; "none" gives the loss of each row.
    group : torch.distributed.ProcessGroup, optional
        Every rank passes its own rows and gets the loss over the rows of all ranks ("none": of its own rows
        against all). DistributedDataParallel averages gradients: multiply by the world size.

    Returns
    -------
    Tensor, shape () or (N,)
        float32, or float64 for float64 features. The loss of a row without a positive is 0.
    """
    _check(features, labels, temperature, base_temperature, precision, reduction)
    torch_only = features.dtype == torch.float64 or features.shape[1] > WIDTH
    if resolve(features, "torch" if torch_only and backend in BACKENDS else backend) == "torch":
        precision = "torch"
    elif precision == "auto":
        precision = "bf16" if features.dtype == torch.bfloat16 else "tf32x3"
    labels, mean = labels.to(torch.int64).contiguous(), reduction == "mean"
    return _Loss.apply(features, labels, group, mean, temperature, base_temperature, precision)


def _check(features, labels, temperature, base_temperature, precision, reduction) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        given = f"features {tuple(features.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"supcon_loss: {given}; expected (N, D) and (N,)")
    if not features.is_floating_point():
        raise ValueError(f"supcon_loss: features are {features.dtype}; expected a floating-point type")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"supcon_loss: labels are {labels.dtype}; expected an integer type")
    if labels.device != features.device:
        raise ValueError(f"supcon_loss: labels on {labels.device}, features on {features.device}; move one")
    if not (temperature > 0 and base_temperature > 0):
        given = f"temperatures {temperature} and {base_temperature}"
        raise ValueError(f"supcon_loss: {given}; expected positive numbers")
    expect("supcon_loss", "precision", precision, PRECISIONS)
    expect("supcon_loss", "reduction", reduction, ("mean", "none"))


# The operators work on rows `start` to `start + rows` of the features against all of them, so that a rank can
# finish its own rows; a single process takes all. Precision "torch" is the PyTorch path.
SETTINGS = "int start, int rows, bool mean, float temperature, float base_temperature, str precision"


@torch.library.custom_op(
    "osscl_kernels::supcon_forward",
    mutates_args=(),
    schema=f"(Tensor features, Tensor labels, {SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def _forward(features, labels, start, rows, mean, temperature, base_temperature, precision):
    """Loss, the rows' log-sum-exp (base e in PyTorch, 2 in Triton) and counts of positives."""
    z, zt = _operands(features, precision, ("ieee",))
    losses = z.new_empty(rows, dtype=_wide(z))
    lse, count, total = torch.empty_like(losses), torch.empty_like(losses), losses.new_empty(())
    scale = temperature / base_temperature
    single = False  # whether one program has all rows, and writes the mean
    if precision == "torch":
        for part, _, s, positive in _similarities(z, labels, start, rows, temperature):
            count[part] = positive.sum(1)
            losses[part] = torch.where(positive, s, 0.0).sum(1).div_(count[part].clamp(min=1))
            lse[part] = torch.where(s.isneginf().all(1), math.inf, s.logsumexp(1))
        losses = torch.where(count > 0, lse - losses, 0.0).mul_(scale)
    elif rows:
        options = constants("supcon_forward", precision, z, len(z))
        single = rows <= options["BM"]
        with torch.cuda.device_of(z):
            _forward_kernel[(triton.cdiv(rows, options["BM"]),)](
                z, zt, labels, count, losses, lse, total, len(z), start, rows, z.shape[1], zt.shape[1],
                math.log2(math.e) / temperature, math.log(2) * scale, D=WIDTH, **options,
            )  # fmt: skip
    if mean:
        losses = total if single else losses.sum() / max(rows, 1)
    return losses, lse, count


@torch.library.custom_op(
    "osscl_kernels::supcon_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor features, Tensor labels, Tensor lse, Tensor count, {SETTINGS})"
    " -> Tensor",
)
def _backward(
    gradient, features, labels, lse, count, start, rows, mean, temperature, base_temperature, precision
):
    """Gradient of the rows' features, from `gradient` (`mean`: a scalar), `lse` and `count` of all rows."""
    z, zt = _operands(features, precision, ("ieee", "tf32x3"))
    gradient = gradient.contiguous()
    factor = 1 / (base_temperature * (max(len(z), 1) if mean else 1))
    dz = z.new_empty((rows, z.shape[1]), dtype=lse.dtype)
    if precision == "torch":
        w = torch.where(count > 0, gradient * factor, 0.0)
        v = w / count.clamp(min=1)
        for part, own, s, positive in _similarities(z, labels, start, rows, temperature):
            g = (s - lse).exp_().mul_(w)
            g += s.sub_(lse[own, None]).exp_().mul_(w[own, None])
            g -= torch.where(positive, v[own, None] + v, 0.0)
            torch.mm(g, z, out=dz[part])
    elif rows:
        options = constants("supcon_backward", precision, z, len(z))
        with torch.cuda.device_of(z):
            _backward_kernel[(triton.cdiv(rows, options["BM"]),)](
                z, zt, labels, lse, count, gradient, dz, len(z), start, rows, z.shape[1], zt.shape[1],
                0 if mean else 1, math.log2(math.e) / temperature, factor, D=WIDTH, **options,
            )  # fmt: skip
    return dz[:, : features.shape[1]].to(features.dtype).contiguous()


@_forward.register_fake
def _(features, labels, start, rows, mean, *_):
    row = features.new_empty(rows, dtype=_wide(features))
    return row.new_empty(()) if mean else torch.empty_like(row), row, torch.empty_like(row)


@_backward.register_fake
def _(gradient, features, labels, lse, count, start, rows, *_):
    return features.new_empty((rows, features.shape[1]))


class _Loss(torch.autograd.Function):
    """The loss, over all ranks' rows with a group, which cannot be an operator's argument."""

    @staticmethod
    def forward(ctx, features, labels, group, mean, *settings):
        start, rows, sizes = 0, len(labels), None
        if group:
            sizes = torch.tensor([rows], device=labels.device)
            sizes = [int(size) for size in _gather(sizes, [1] * dist.get_world_size(group), group)]
            start = sum(sizes[: dist.get_rank(group)])
            features, labels = _gather(features, sizes, group), _gather(labels, sizes, group)
        loss, lse, count = _forward(features, labels, start, rows, mean and not group, *settings)
        if group:
            losses, lse, count = _gather(torch.stack([loss, lse, count], 1), sizes, group).T.contiguous()
            loss = losses.sum() / max(len(labels), 1) if mean else loss
        ctx.save_for_backward(features, labels, lse, count)
        ctx.group, ctx.sizes, ctx.settings = group, sizes, (start, rows, mean, *settings)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        if ctx.group and gradient.ndim:  # each rank knows the gradient of its own rows' losses only
            gradient = _gather(gradient, ctx.sizes, ctx.group)
        return _backward(gradient, *ctx.saved_tensors, *ctx.settings), *[None] * 6


def _gather(rows: Tensor, sizes: list[int], group) -> Tensor:
    """The rows of all ranks in rank order; `sizes` says how many each has."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _operands(features: Tensor, precision: str, transposing: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The features as the products take them, and for some precisions as (D, N)."""
    z = features.to(torch.bfloat16 if precision == "bf16" else _wide(features)).contiguous()
    if precision != "torch" and z.shape[1] % 16:  # Triton wants rows of whole 16-byte words
        z = F.pad(z, (0, -z.shape[1] % 16))
    # Tensor cores take 32-bit operands along the sum, multiply-adds across it.
    return z, F.pad(z, (0, 0, 0, -len(z) % 16)).T.contiguous() if precision in transposing else z


def _similarities(z: Tensor, labels: Tensor, start: int, rows: int, temperature: float):
    """Chunks of rows: their places here and in z, z z^T / temperature (-inf at a row itself), positives."""
    step = min(max(CHUNK_ELEMENTS[z.device.type] // max(len(z), 1), 16), max(rows, 1))
    buffer = z.new_empty((step, len(z)))
    for a in range(0, rows, step):
        b = min(a + step, rows)
        own, s = slice(start + a, start + b), buffer[: b - a]
        torch.mm(z[own], z.T, out=s)  # autocast leaves products with `out` alone
        s.div_(temperature).diagonal(start + a).fill_(-math.inf)
        positive = labels[own, None] == labels
        positive.diagonal(start + a).fill_(False)
        yield slice(a, b), own, s, positive


# The kernels. Logits are in base 2: exp2 is what the hardware has.
@jit
def _rows(
    Z, ZT, i, n, width, pitch, k,
    ROWS: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """ROWS rows from row i, features k to k + BK, of Z (n, width) or ZT (width, pitch); zeros outside."""
    row = tl.arange(0, ROWS)[:, None]
    column = k + tl.arange(0, BK)[None, :]
    if TRANSPOSED:
        at = ZT + column * pitch + (i + row)
    else:
        at = Z + tl.cast(i, tl.int64) * width + (row * width + column)  # only the start needs 64 bits
    return tl.load(at, mask=(row < n - i) & (column < width), other=0.0).to(DT)


@jit
def _cosines(
    Z, ZT, own, i, j, n, width, pitch,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Products of BM rows from row i with BN rows from row j; zeros in columns past the end."""
    s = tl.zeros([BM, BN], tl.float32)
    for k in tl.static_range(0, D, BK):
        if BK < D:
            own = _rows(Z, ZT, i, n, width, pitch, k, BM, BK, DT, False)
        other = _rows(Z, ZT, j, n, width, pitch, k, BN, BK, DT, PRECISION == "ieee")
        s = tl.dot(own, tl.trans(other), s, input_precision=PRECISION)
    return s


@jit
def _forward_kernel(
    Z, ZT, LABELS, COUNT, LOSSES, LSE, MEAN, n, start, rows, width, pitch, scale, loss_scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp and loss of BM rows, with a running maximum over tiles of columns."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i = start + tl.program_id(0) * BM
    row = start + m
    own = _rows(Z, ZT, i, n, width, pitch, 0, BM, BK, DT, False)
    label = tl.load(LABELS + row, mask=row < n, other=0)
    # Each carried value has a tensor of its own: aliases are dropped by the compiler.
    peak = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    positive = tl.zeros([BM], tl.float32)
    own_logit = tl.zeros([BM], tl.float32)
    count = tl.full([BM], -1, tl.float32)
    for j in range(0, n, BN):
        column = j + tl.arange(0, BN)
        s = _cosines(Z, ZT, own, i, j, n, width, pitch, BM, BN, BK, D, PRECISION, DT)
        # Own columns, and those past the end (cosine 0, label 0), are taken back after the loop.
        same = label[:, None] == tl.load(LABELS + column, mask=column < n, other=0)[None, :]
        positive += tl.sum(tl.where(same, s, 0.0), 1)
        count += tl.sum(tl.where(same, s * 0.0 + 1.0, 0.0), 1)  # of s: so it is counted in its registers
        s = s * scale + tl.where(column < n, 0.0, -float("inf"))[None, :]
        if (j < i + BM) & (i < j + BN):
            itself = column[None, :] == row[:, None]
            own_logit += tl.sum(tl.where(itself, s, 0.0), 1)
            s = tl.where(itself, -float("inf"), s)
        highest = tl.maximum(peak, tl.max(s, 1))
        finite = tl.where(highest == -float("inf"), 0.0, highest)  # a tile can hold nothing but the row
        total = total * tl.exp2(peak - finite) + tl.sum(tl.exp2(s - finite[:, None]), 1)
        peak = highest
    count -= tl.where(label == 0, tl.cdiv(n, BN) * BN - n, 0)
    lse = tl.where(total > 0, peak + tl.log2(total), float("inf"))  # of nothing: exp2(s - inf) is then 0
    losses = (lse - (positive * scale - own_logit) / tl.maximum(count, 1.0)) * loss_scale
    losses = tl.where((count > 0) & (m < rows), losses, 0.0)
    tl.store(COUNT + m, count, mask=m < rows)
    tl.store(LSE + m, lse, mask=m < rows)
    tl.store(LOSSES + m, losses, mask=m < rows)
    if rows <= BM:  # a single program has all rows
        tl.store(MEAN, tl.sum(losses, 0) / rows)


@jit
def _backward_kernel(
    Z, ZT, LABELS, LSE, COUNT, GRADIENT, DZ, n, start, rows, width, pitch, gradient_stride, scale, factor,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Gradient of BM rows."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i = start + tl.program_id(0) * BM
    row = start + m
    own = _rows(Z, ZT, i, n, width, pitch, 0, BM, BK, DT, False)
    label = tl.load(LABELS + row, mask=row < n, other=0)
    lse, w, v = _weights(LSE, COUNT, GRADIENT, row, n, gradient_stride, factor)
    dz = tl.zeros([BM, D], tl.float32)
    for j in range(0, n, BN):
        column = j + tl.arange(0, BN)
        s = _cosines(Z, ZT, own, i, j, n, width, pitch, BM, BN, BK, D, PRECISION, DT)
        s = s * scale + tl.where(column < n, 0.0, -float("inf"))[None, :]
        other_lse, other_w, other_v = _weights(LSE, COUNT, GRADIENT, column, n, gradient_stride, factor)
        g = w[:, None] * tl.exp2(s - lse[:, None]) + other_w[None, :] * tl.exp2(s - other_lse[None, :])
        same = label[:, None] == tl.load(LABELS + column, mask=column < n, other=0)[None, :]
        g -= tl.where(same, v[:, None] + other_v[None, :], 0.0)  # past the end it meets rows of zeros
        if (j < i + BM) & (i < j + BN):  # the rows' own columns are among these
            g = tl.where(column[None, :] == row[:, None], 0.0, g)
        other = _rows(Z, ZT, j, n, width, pitch, 0, BN, D, DT, PRECISION == "tf32x3")
        g = g.to(Z.dtype.element_ty).to(other.dtype)
        dz = tl.dot(g, other, dz, input_precision=PRECISION)
    feature = tl.arange(0, D)
    at = DZ + tl.cast(tl.program_id(0) * BM, tl.int64) * width
    at += tl.arange(0, BM)[:, None] * width + feature[None, :]
    tl.store(at, dz, mask=(m < rows)[:, None] & (feature < width)[None, :])


@jit
def _weights(LSE, COUNT, GRADIENT, row, n, gradient_stride, factor):
    """lse, w and v of rows; outside inf, 0 and 0."""
    count = tl.load(COUNT + row, mask=row < n, other=0.0)
    lse = tl.load(LSE + row, mask=row < n, other=float("inf"))
    w = tl.load(GRADIENT + row * gradient_stride, mask=row < n, other=0.0) * factor
    w = tl.where(count > 0, w, 0.0)
    return lse, w, w / tl.maximum(count, 1.0)
