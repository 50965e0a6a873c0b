"""Supervised contrastive loss without the N x N matrix: Triton kernels and a chunked PyTorch path.

With s_ij = z_i . z_j / temperature, P_i the other rows with row i's label and c_i = |P_i|, row i's loss is

    l_i = (temperature / base_temperature) (log sum_{j != i} exp s_ij - (1 / c_i) sum_{p in P_i} s_ip),

and 0 where c_i = 0. The gradient uses that s is symmetric: with w_i = dL/dl_i / base_temperature where
c_i > 0 (0 elsewhere), v_i = w_i / c_i and p_ij = exp(s_ij - lse_i),

    dL/dz_i = sum_{j != i} (w_i p_ij + w_j p_ji) z_j - sum_{j in P_i} (v_i + v_j) z_j,

so a tile of s, computed again, serves both of its rows and its columns: two products a tile, no atomics.
Up to IN_TILE_ROWS rows the tiles compare labels; above it the positive terms come from class sums, O(N D).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .backend import BACKENDS, INTERPRETED, CompileCase, jit, resolve, tl, triton

PRECISIONS = ("auto", "ieee", "tf32x3", "tf32", "bf16")
MAX_WIDTH = 256  # features a row; the backward's accumulator fits nowhere above it
IN_TILE_ROWS = 4096  # up to here comparing labels in the tile is cheaper than the launches of a sort
CHUNK_ELEMENTS = 1 << 20  # similarities held at a time by the PyTorch path: stays in a core's cache
SEGMENT = 64  # sorted rows summed by one program of the class sums
SUM_WARPS = 4


def supcon_loss_ref(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.02,
    base_temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrastive loss of single-view features: the dense formula in plain PyTorch.

    Holds several N x N matrices. The reference that `supcon_loss` is tested against; parameters, result and
    source as there, without the choice of precision, backend and group.
    """
    _check(features, labels, temperature, base_temperature, "auto", reduction)
    with torch.autocast(features.device.type, enabled=False):
        z = features if features.dtype == torch.float64 else features.float()
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
    features : Tensor, shape (N, D), float32, bfloat16, float16 or float64, any strides
        Embeddings, usually of unit length; the loss does not normalise them.
    labels : Tensor, shape (N,), any integer type
        Equal values are positives of each other; any values, negative and unused ones included.
    temperature, base_temperature : float
        Similarities are divided by `temperature`, the loss is multiplied by temperature / base_temperature.
    precision : {"auto", "ieee", "tf32x3", "tf32", "bf16"}
        Arithmetic of the matrix products in Triton; everything else is float32. At temperature 0.02 an error
        in a cosine is multiplied by 50. "ieee": float32 multiply-adds, no tensor cores. "tf32x3": three tf32
        products, as exact as float32 in practice. "tf32": cosines are off by up to 2^-10, logits by up
        to 0.05. "bf16": features are rounded to 8 bits, logits are off by up to 0.2. Measured:
        results/supcon_accuracy.md. "auto": tf32x3 for float32, tf32 for float16 (which it holds exactly),
        bf16 for bfloat16. The PyTorch path computes in float32 whatever is asked, and in float64 for float64.
    backend : {"auto", "triton", "torch"}
        See `backend.resolve`. float64 and D > 256 always take the chunked PyTorch path.
    reduction : {"mean", "none"}
        "mean" divides by N, rows without a positive included; "none" gives the loss of each row.
    group : torch.distributed.ProcessGroup, optional
        Every rank passes its own rows, as many as it has. Each returns the loss over all rows of all ranks
        ("none": of its own rows against all), and its rows' gradient of it. A DistributedDataParallel step
        multiplies the loss by the world size, because it averages gradients over ranks. The row counts are
        exchanged through the host, once per call.

    Returns
    -------
    Tensor, shape () or (N,)
        float32, or float64 for float64 features. Rows without a positive give 0 and get gradient only as
        other rows' negatives.

    Raises
    ------
    ValueError
        If a shape, type, temperature or choice is not one of the above.
    RuntimeError
        If Triton is asked for where it cannot run.

    References
    ----------
    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2 (L_out), one view per sample;
    temperatures and the handling of rows without positives: Huang et al., arXiv 2509.13853, authors' code.
    """
    _check(features, labels, temperature, base_temperature, precision, reduction)
    torch_only = features.dtype == torch.float64 or features.shape[1] > MAX_WIDTH
    choice, _ = resolve(features, "torch" if torch_only and backend in BACKENDS else backend)
    if precision == "auto":
        precision = {torch.bfloat16: "bf16", torch.float16: "tf32"}.get(features.dtype, "tf32x3")
    settings = (temperature, base_temperature, precision, choice)
    labels = labels.to(torch.int64).contiguous()
    if group is not None:
        return _Gathered.apply(features, labels, group, reduction == "mean", *settings)
    return _forward(features, labels, 0, len(labels), reduction == "mean", *settings)[0]


def _check(features, labels, temperature, base_temperature, precision, reduction) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"supcon_loss: features {tuple(features.shape)} and labels {tuple(labels.shape)}; "
            "expected (N, D) and (N,)"
        )
    if not features.is_floating_point():
        raise ValueError(f"supcon_loss: features are {features.dtype}; expected a floating-point type")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"supcon_loss: labels are {labels.dtype}; expected an integer type")
    if labels.device != features.device:
        raise ValueError(f"supcon_loss: labels on {labels.device}, features on {features.device}; move one")
    if not (temperature > 0 and base_temperature > 0):
        raise ValueError(
            f"supcon_loss: temperatures {temperature}, {base_temperature}; expected positive ones"
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"supcon_loss: unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"supcon_loss: unknown reduction {reduction!r}; expected mean or none")


# The operators work on rows `start` to `start + rows` of the features against all of them, so that a rank can
# finish its own rows; a single process takes all. `choice` is the backend that `resolve` chose.


@torch.library.custom_op("osscl_kernels::supcon_forward", mutates_args=())
def _forward(
    features: Tensor,
    labels: Tensor,
    start: int,
    rows: int,
    mean: bool,
    temperature: float,
    base_temperature: float,
    precision: str,
    choice: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, the rows' log-sum-exp (base e in PyTorch, 2 in Triton), counts of positives, and `_classes`."""
    z = _operand(features, precision, choice)
    losses = z.new_empty(rows, dtype=_accurate(z))
    lse, count, total = torch.empty_like(losses), torch.empty_like(losses), losses.new_empty(())
    order, first = labels.new_empty(0), labels.new_empty(0)
    in_tile = _in_tile(labels, choice)
    mean_positive = losses  # not read where the tiles compare labels
    if not in_tile:
        order, first, counts = classes = _classes(labels)
        mine = slice(start, start + rows)
        count.copy_(counts[mine])
        others = _class_sums(z, None, classes, choice)[first[mine]].sub_(z[mine])
        mean_positive = others.mul_(z[mine]).sum(1).div_(count.clamp(min=1))
        del others
    scale = temperature / base_temperature
    single = False
    if choice == "torch":
        for a, b, s in _similarities(z, start, rows, temperature):
            peak = s.amax(1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
            sums = s.sub_(peak).exp_().sum(1)
            lse[a:b] = torch.where(sums > 0, sums.log().add_(peak[:, 0]), math.inf)
        losses = torch.where(count > 0, lse - mean_positive / temperature, 0.0).mul_(scale)
    elif rows:
        tile = _tile("forward", in_tile, rows, precision, z)
        single = rows <= tile["BM"]
        with torch.cuda.device_of(z):  # Triton launches on the current device
            _forward_kernel[(triton.cdiv(rows, tile["BM"]),)](
                z, labels, mean_positive, count, losses, lse, total, len(z), start, rows, z.shape[1],
                math.log2(math.e) / temperature, math.log(2) * scale, UPCAST=INTERPRETED, **tile,
            )  # fmt: skip
    if mean:
        losses = total if single else losses.sum() / max(rows, 1)
    return losses, lse, count, order, first


@torch.library.custom_op("osscl_kernels::supcon_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    features: Tensor,
    labels: Tensor,
    lse: Tensor,
    count: Tensor,
    order: Tensor,
    first: Tensor,
    start: int,
    rows: int,
    mean: bool,
    temperature: float,
    base_temperature: float,
    precision: str,
    choice: str,
) -> Tensor:
    """Gradient of the rows' features, from `gradient` (`mean`: a scalar), `lse` and `count` of all rows."""
    z = _operand(features, precision, choice)
    gradient = gradient.contiguous()
    factor = 1 / (base_temperature * (max(len(z), 1) if mean else 1))
    dz = z.new_empty((rows, z.shape[1]), dtype=lse.dtype)
    mine = slice(start, start + rows)
    if len(order):  # what the positives take away; its minus sign is applied below
        v = torch.where(count > 0, gradient * factor / count, 0.0)
        classes = (order, first, count)
        dz = _class_sums(z, None, classes, choice)[first[mine]].sub_(z[mine], alpha=2)
        dz.mul_(v[mine, None]).add_(_class_sums(z, v, classes, choice)[first[mine]])
    if choice == "torch":
        w = torch.where(count > 0, gradient * factor, 0.0)
        other = None
        for a, b, s in _similarities(z, start, rows, temperature):
            own = slice(start + a, start + b)
            other = torch.empty_like(s) if other is None else other[: b - a]
            torch.sub(s, lse, out=other).exp_().mul_(w)
            s.sub_(lse[own, None]).exp_().mul_(w[own, None]).add_(other)
            dz[a:b].addmm_(s, z, beta=-1)  # in place: autocast leaves it alone
    elif rows:
        tile = _tile("backward", not len(order), rows, precision, z)
        with torch.cuda.device_of(z):  # Triton launches on the current device
            _backward_kernel[(triton.cdiv(rows, tile["BM"]), triton.cdiv(z.shape[1], tile["BD"]))](
                z, labels, lse, count, gradient, dz, len(z), start, rows, z.shape[1], 0 if mean else 1,
                math.log2(math.e) / temperature, factor, UPCAST=INTERPRETED, **tile,
            )  # fmt: skip
    return dz[:, : features.shape[1]].to(features.dtype).contiguous()


@_forward.register_fake
def _(features, labels, start, rows, mean, temperature, base_temperature, precision, choice):
    row = features.new_empty(rows, dtype=_accurate(features))
    order = labels.new_empty(0 if _in_tile(labels, choice) else len(labels))
    loss = row.new_empty(()) if mean else torch.empty_like(row)
    return loss, row, torch.empty_like(row), order, torch.empty_like(order)


@_backward.register_fake
def _(gradient, features, labels, lse, count, order, first, start, rows, *_):
    return features.new_empty((rows, features.shape[1]))


def _setup_context(ctx, inputs, output) -> None:
    features, labels, *ctx.settings = inputs
    ctx.save_for_backward(features, labels, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradient, *_):
    given = None if gradient is None else _backward(gradient, *ctx.saved_tensors, *ctx.settings)
    return given, *[None] * (1 + len(ctx.settings))


_forward.register_autograd(_differentiate, setup_context=_setup_context)


class _Gathered(torch.autograd.Function):
    """The loss over all ranks' rows. A process group cannot be an operator's argument: it stays here."""

    @staticmethod
    def forward(ctx, features, labels, group, mean, *settings):
        sizes = torch.tensor([len(labels)], device=labels.device)
        sizes = [int(size) for size in _gather(sizes, [1] * dist.get_world_size(group), group)]
        start, rows = sum(sizes[: dist.get_rank(group)]), len(labels)
        features, labels = _gather(features, sizes, group), _gather(labels, sizes, group)
        losses, lse, count, *classes = _forward(features, labels, start, rows, False, *settings)
        per_row = _gather(torch.stack([losses, lse, count], 1), sizes, group)
        ctx.save_for_backward(
            features, labels, per_row[:, 1].contiguous(), per_row[:, 2].contiguous(), *classes
        )
        ctx.group, ctx.sizes, ctx.settings = group, sizes, (start, rows, mean, *settings)
        return per_row[:, 0].sum() / max(len(labels), 1) if mean else losses

    @staticmethod
    def backward(ctx, gradient):
        if gradient.ndim:  # each rank knows the gradient of its own rows' losses only
            gradient = _gather(gradient, ctx.sizes, ctx.group)
        return _backward(gradient, *ctx.saved_tensors, *ctx.settings), *[None] * 7


def _gather(rows: Tensor, sizes: list[int], group) -> Tensor:
    """The rows of all ranks in rank order; `sizes` says how many each has."""
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _accurate(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _in_tile(labels: Tensor, choice: str) -> bool:
    return choice == "triton" and len(labels) <= IN_TILE_ROWS


def _operand(features: Tensor, precision: str, choice: str) -> Tensor:
    """The features as the products take them; Triton wants rows of whole 16-byte words."""
    dtype = torch.bfloat16 if choice == "triton" and precision == "bf16" else _accurate(features)
    z = features.to(dtype).contiguous()
    missing = -z.shape[1] % 16 if choice == "triton" else 0
    return torch.nn.functional.pad(z, (0, missing)) if missing else z


def _classes(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by label, where each row's class begins in that order, how many positives each row has.

    The beginning serves as the class index. Nothing here waits for the device.
    """
    values, order = labels.contiguous().sort(stable=True)
    first = torch.searchsorted(values, labels)
    return order, first, torch.searchsorted(values, labels, right=True) - first - 1


def _class_sums(z: Tensor, weight: Tensor | None, classes: tuple[Tensor, ...], choice: str) -> Tensor:
    """Sum of each class's rows, weighted, at the row of its class index; other rows are not to be read."""
    n, width = z.shape
    order, first, count = classes
    if choice == "torch":
        terms = z.double() if weight is None else z.double() * weight[:, None]
        sums = torch.zeros_like(terms)
        if z.is_cuda:  # index_add_ is not deterministic there
            return sums.index_put_((first,), terms, accumulate=True).to(_accurate(z))
        return sums.index_add_(0, first, terms).to(_accurate(z))
    partial = z.new_empty((triton.cdiv(n, SEGMENT), width), dtype=torch.float32)
    sums = z.new_empty((n, width), dtype=torch.float32)
    shape = {"SEGMENT": SEGMENT, "DEPTH": _depth(width), "WEIGHTED": weight is not None}
    weight = partial if weight is None else weight
    shape |= {"num_warps": SUM_WARPS, "num_stages": 2}
    with torch.cuda.device_of(z):  # Triton launches on the current device
        _segment_kernel[(len(partial),)](z, weight, order, first, partial, n, width, **shape)
        _class_kernel[(n,)](z, weight, order, first, count, partial, sums, n, width, **shape)
    return sums


def _similarities(z: Tensor, start: int, rows: int, temperature: float) -> Iterator[tuple[int, int, Tensor]]:
    """Chunks of rows of z z^T / temperature with -inf at each row's own column, all in one buffer."""
    step = min(max(CHUNK_ELEMENTS // max(len(z), 1), 16), max(rows, 1))
    buffer = z.new_empty((step, len(z)))
    for a in range(0, rows, step):
        b = min(a + step, rows)
        s = torch.mm(z[start + a : start + b], z.T, out=buffer[: b - a]).div_(temperature)
        s.diagonal(start + a).fill_(-math.inf)
        yield a, b, s


# The kernels. Logits are in base 2: exp2 is what the hardware has.


@jit
def _rows(Z, i, n, width, k, ROWS: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr):
    """ROWS rows of Z from row i, features k to k + BK; zeros outside. Only the base needs 64 bits."""
    row = tl.arange(0, ROWS)
    column = k + tl.arange(0, BK)
    mask = (row < n - i)[:, None] & (column < width)[None, :]
    tile = tl.load(
        Z + tl.cast(i, tl.int64) * width + (row[:, None] * width + column[None, :]), mask=mask, other=0.0
    )
    if UPCAST:  # the interpreter multiplies the bit patterns of bfloat16
        tile = tile.to(tl.float32)
    return tile


@jit
def _logits(
    Z, own, i, j, n, width, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of BM rows from row i with BN rows from row j; -inf in columns past the end."""
    s = tl.zeros([BM, BN], tl.float32)
    for k in tl.static_range(0, DEPTH, BK):
        if BK < DEPTH:
            own = _rows(Z, i, n, width, k, BM, BK, UPCAST)
        other = _rows(Z, j, n, width, k, BN, BK, UPCAST)
        s = tl.dot(own, tl.trans(other), s, input_precision=PRECISION)
    outside = tl.where(j + tl.arange(0, BN) < n, 0.0, -float("inf"))
    return s * scale + outside[None, :]


@jit
def _forward_kernel(
    Z, LABELS, MEAN_POSITIVE, COUNT, LOSSES, LSE, MEAN, n, start, rows, width, scale, loss_scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, IN_TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp and loss of BM rows, with a running maximum over tiles of columns."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i = start + tl.program_id(0) * BM
    row = start + m
    own = _rows(Z, i, n, width, 0, BM, BK, UPCAST)
    label = tl.load(LABELS + row, mask=row < n, other=0)
    # Each carried value has a tensor of its own: aliases are dropped by the compiler.
    peak = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    positive = tl.zeros([BM], tl.float32)
    count = tl.zeros([BM], tl.float32)
    for j in range(0, n, BN):
        column = j + tl.arange(0, BN)
        s = _logits(Z, own, i, j, n, width, scale, BM, BN, BK, DEPTH, PRECISION, UPCAST)
        itself = column[None, :] == row[:, None]
        if IN_TILE:
            same = label[:, None] == tl.load(LABELS + column, mask=column < n, other=0)[None, :]
            same = same & (column < n)[None, :] & (column[None, :] != row[:, None])
            positive += tl.sum(tl.where(same, s, 0.0), 1)
            count += tl.sum(tl.where(same, 1.0, 0.0), 1)
        s = tl.where(itself, -float("inf"), s)
        highest = tl.maximum(peak, tl.max(s, 1))
        finite = tl.where(highest == -float("inf"), 0.0, highest)  # a tile can hold nothing but the row
        total = total * tl.exp2(peak - finite) + tl.sum(tl.exp2(s - finite[:, None]), 1)
        peak = highest
    lse = tl.where(total > 0, peak + tl.log2(total), float("inf"))  # of nothing: exp2(s - inf) is then 0
    if IN_TILE:
        tl.store(COUNT + m, count, mask=m < rows)
        positive = positive / tl.maximum(count, 1.0)
    else:
        count = tl.load(COUNT + m, mask=m < rows, other=0.0)
        positive = tl.load(MEAN_POSITIVE + m, mask=m < rows, other=0.0) * scale
    losses = tl.where((count > 0) & (m < rows), (lse - positive) * loss_scale, 0.0)
    tl.store(LSE + m, lse, mask=m < rows)
    tl.store(LOSSES + m, losses, mask=m < rows)
    if rows <= BM:  # a single program has all rows
        tl.store(MEAN, tl.sum(losses, 0) / rows)


@jit
def _backward_kernel(
    Z, LABELS, LSE, COUNT, GRADIENT, DZ, n, start, rows, width, gradient_stride, scale, factor,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, IN_TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of BM rows, BD features; with class sums, DZ holds what the positives take away."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i = start + tl.program_id(0) * BM
    row = start + m
    own = _rows(Z, i, n, width, 0, BM, BK, UPCAST)
    label = tl.load(LABELS + row, mask=row < n, other=0)
    count = tl.load(COUNT + row, mask=row < n, other=0.0)
    lse = tl.load(LSE + row, mask=row < n, other=float("inf"))
    w = tl.load(GRADIENT + row * gradient_stride, mask=row < n, other=0.0) * factor
    w = tl.where(count > 0, w, 0.0)
    v = w / tl.maximum(count, 1.0)
    d = tl.program_id(1) * BD
    dz = tl.zeros([BM, BD], tl.float32)
    for j in range(0, n, BN):
        column = j + tl.arange(0, BN)
        inside = column < n
        s = _logits(Z, own, i, j, n, width, scale, BM, BN, BK, DEPTH, PRECISION, UPCAST)
        other_count = tl.load(COUNT + column, mask=inside, other=0.0)
        other_lse = tl.load(LSE + column, mask=inside, other=float("inf"))
        other_w = tl.load(GRADIENT + column * gradient_stride, mask=inside, other=0.0) * factor
        other_w = tl.where(other_count > 0, other_w, 0.0)
        g = w[:, None] * tl.exp2(s - lse[:, None]) + other_w[None, :] * tl.exp2(s - other_lse[None, :])
        if IN_TILE:
            other_v = other_w / tl.maximum(other_count, 1.0)
            same = label[:, None] == tl.load(LABELS + column, mask=inside, other=0)[None, :]
            g -= tl.where(same & inside[None, :], v[:, None] + other_v[None, :], 0.0)
        g = tl.where(column[None, :] == row[:, None], 0.0, g)
        other = _rows(Z, j, n, width, d, BN, BD, UPCAST)
        g = g.to(Z.dtype.element_ty).to(other.dtype)
        dz = tl.dot(g, other, dz, input_precision=PRECISION)
    feature = d + tl.arange(0, BD)
    DZ += tl.cast(tl.program_id(0) * BM, tl.int64) * width
    at = tl.arange(0, BM)[:, None] * width + feature[None, :]
    mask = (m < rows)[:, None] & (feature < width)[None, :]
    if not IN_TILE:
        dz -= tl.load(DZ + at, mask=mask, other=0.0)
    tl.store(DZ + at, dz, mask=mask)


@jit
def _sorted_rows(Z, WEIGHT, index, mask, width, DEPTH: tl.constexpr, WEIGHTED: tl.constexpr):
    """Sum of the rows of Z at `index` where `mask`."""
    feature = tl.arange(0, DEPTH)
    z = tl.load(
        Z + index[:, None] * width + feature[None, :],
        mask=mask[:, None] & (feature < width)[None, :],
        other=0.0,
    ).to(tl.float32)
    if WEIGHTED:
        z *= tl.load(WEIGHT + index, mask=mask, other=0.0)[:, None]
    return tl.sum(z, 0)


@jit
def _segment_kernel(
    Z, WEIGHT, ORDER, FIRST, PARTIAL, n, width,
    SEGMENT: tl.constexpr, DEPTH: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Of SEGMENT rows in sorted order: the sum of those in the class of the first."""
    at = tl.program_id(0) * SEGMENT + tl.arange(0, SEGMENT)
    index = tl.load(ORDER + at, mask=at < n, other=0)
    head = tl.load(FIRST + tl.load(ORDER + tl.program_id(0) * SEGMENT))
    mask = (at < n) & (tl.load(FIRST + index) == head)
    feature = tl.arange(0, DEPTH)
    total = _sorted_rows(Z, WEIGHT, index, mask, width, DEPTH, WEIGHTED)
    tl.store(PARTIAL + tl.program_id(0) * width + feature, total, mask=feature < width)


@jit
def _class_kernel(
    Z, WEIGHT, ORDER, FIRST, COUNT, PARTIAL, SUMS, n, width,
    SEGMENT: tl.constexpr, DEPTH: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Where a class begins in sorted order: its rows up to the next segment, then the partial sums."""
    begin = tl.program_id(0)
    head = tl.load(ORDER + begin)
    if tl.load(FIRST + head) == begin:
        end = begin + 1 + tl.load(COUNT + head).to(tl.int32)
        next_segment = begin // SEGMENT + 1
        at = begin + tl.arange(0, SEGMENT)
        mask = (at < end) & (at < next_segment * SEGMENT)
        index = tl.load(ORDER + at, mask=mask, other=0)
        total = _sorted_rows(Z, WEIGHT, index, mask, width, DEPTH, WEIGHTED)
        feature = tl.arange(0, DEPTH)
        for segment in range(next_segment, tl.cdiv(end, SEGMENT), SEGMENT):
            more = segment + tl.arange(0, SEGMENT)
            total += _sorted_rows(PARTIAL, WEIGHT, more, more * SEGMENT < end, width, DEPTH, False)
        tl.store(SUMS + tl.cast(begin, tl.int64) * width + feature, total, mask=feature < width)


# Tiles: rows, columns, features that a product takes, warps, stages. Of the candidates in the order of their
# arithmetic intensity, the first that the ahead-of-time check passes: no spills, within shared memory.
KERNELS = ("forward sums", "backward sums", "forward labels", "backward labels", "forward small")
TILES = {
    (80, "ieee", 128): (
        (64, 64, 32, 8, 2), (32, 32, 32, 4, 2), (32, 128, 32, 8, 2),
        (32, 32, 32, 4, 2), (64, 64, 32, 8, 2),
    ),
    (80, "ieee", 256): (
        (64, 64, 32, 8, 1), (32, 32, 32, 4, 2), (32, 128, 16, 8, 2),
        (32, 32, 32, 4, 2), (64, 64, 32, 8, 1),
    ),
    (80, "tf32x3", 128): (
        (64, 64, 32, 4, 2), (64, 32, 32, 8, 1), (32, 128, 32, 8, 2),
        (32, 32, 32, 4, 2), (64, 64, 32, 8, 1),
    ),
    (80, "tf32x3", 256): (
        (64, 64, 32, 4, 1), (64, 32, 32, 8, 1), (32, 128, 32, 8, 1),
        (32, 32, 32, 8, 2), (64, 32, 32, 4, 2),
    ),
    (80, "tf32", 128): (
        (128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (32, 128, 64, 8, 2),
        (32, 64, 64, 4, 2), (64, 64, 64, 8, 2),
    ),
    (80, "tf32", 256): (
        (128, 64, 64, 8, 1), (64, 64, 32, 8, 1), (32, 128, 64, 8, 2),
        (32, 64, 64, 4, 2), (64, 64, 64, 8, 2),
    ),
    (80, "bf16", 128): (
        (128, 128, 128, 8, 2), (128, 64, 128, 8, 2), (32, 128, 128, 8, 2),
        (32, 64, 128, 4, 2), (64, 64, 128, 8, 2),
    ),
    (80, "bf16", 256): (
        (128, 128, 256, 8, 2), (128, 64, 256, 8, 2), (32, 128, 256, 8, 2),
        (32, 64, 256, 4, 2), (64, 64, 256, 8, 2),
    ),
    (86, "ieee", 128): (
        (64, 64, 32, 8, 1), (32, 32, 32, 4, 2), (32, 32, 32, 4, 1),
        (32, 32, 32, 4, 2), (64, 64, 32, 8, 1),
    ),
    (86, "ieee", 256): (
        (64, 64, 32, 8, 1), (32, 32, 32, 4, 2), (32, 64, 32, 8, 1),
        (32, 32, 32, 4, 2), (64, 32, 32, 8, 1),
    ),
    (86, "tf32x3", 128): (
        (64, 64, 32, 8, 1), (64, 32, 32, 8, 1), (32, 128, 32, 8, 1),
        (32, 32, 32, 4, 2), (64, 32, 32, 8, 1),
    ),
    (86, "tf32x3", 256): (
        (32, 32, 32, 4, 1), (32, 32, 32, 4, 1), (32, 64, 32, 8, 1),
        (32, 32, 32, 4, 1), (32, 32, 32, 4, 1),
    ),
    (86, "tf32", 128): (
        (64, 64, 64, 8, 1), (64, 32, 64, 8, 1), (32, 64, 64, 8, 1),
        (32, 32, 64, 4, 1), (64, 64, 64, 8, 1),
    ),
    (86, "tf32", 256): (
        (64, 64, 64, 8, 1), (64, 32, 64, 8, 1), (32, 64, 64, 8, 1),
        (32, 32, 64, 4, 1), (64, 64, 32, 8, 1),
    ),
    (86, "bf16", 128): (
        (128, 64, 128, 8, 1), (64, 64, 128, 8, 1), (32, 64, 128, 8, 1),
        (32, 32, 128, 4, 1), (64, 64, 128, 8, 1),
    ),
    (86, "bf16", 256): (
        (128, 64, 128, 8, 1), (64, 64, 128, 8, 1), (32, 64, 128, 8, 1),
        (32, 32, 128, 4, 1), (64, 64, 128, 8, 1),
    ),
    (90, "ieee", 128): (
        (64, 64, 32, 8, 2), (32, 32, 32, 4, 2), (32, 128, 32, 8, 2),
        (32, 32, 32, 4, 2), (64, 64, 32, 8, 2),
    ),
    (90, "ieee", 256): (
        (64, 64, 32, 8, 1), (32, 32, 32, 4, 2), (32, 128, 16, 8, 2),
        (32, 32, 32, 8, 2), (64, 64, 32, 8, 1),
    ),
    (90, "tf32x3", 128): (
        (64, 64, 32, 8, 2), (64, 32, 32, 4, 2), (32, 64, 32, 8, 2),
        (32, 32, 32, 4, 2), (64, 64, 32, 8, 2),
    ),
    (90, "tf32x3", 256): (
        (64, 64, 32, 8, 2), (32, 32, 32, 8, 2), (32, 128, 32, 8, 1),
        (32, 32, 32, 8, 2), (64, 64, 32, 8, 2),
    ),
    (90, "tf32", 128): (
        (128, 64, 64, 8, 2), (128, 64, 64, 8, 2), (32, 128, 64, 8, 2),
        (32, 64, 64, 4, 2), (64, 64, 64, 8, 2),
    ),
    (90, "tf32", 256): (
        (128, 64, 64, 8, 1), (64, 32, 64, 4, 2), (32, 128, 64, 8, 2),
        (32, 64, 64, 4, 2), (64, 64, 64, 8, 2),
    ),
    (90, "bf16", 128): (
        (128, 128, 128, 8, 2), (128, 64, 128, 8, 2), (32, 128, 128, 8, 2),
        (32, 64, 128, 4, 2), (64, 64, 128, 8, 2),
    ),
    (90, "bf16", 256): (
        (128, 128, 256, 8, 2), (128, 64, 256, 8, 2), (32, 128, 256, 8, 2),
        (32, 64, 256, 4, 2), (64, 64, 256, 8, 2),
    ),
    (100, "ieee", 128): (
        (64, 64, 32, 8, 2), (32, 32, 32, 4, 2), (32, 128, 16, 8, 2),
        (32, 32, 32, 4, 2), (64, 64, 16, 8, 2),
    ),
    (100, "ieee", 256): (
        (64, 64, 32, 8, 1), (32, 32, 32, 4, 2), (32, 32, 32, 4, 1),
        (32, 32, 32, 8, 2), (32, 32, 32, 4, 1),
    ),
    (100, "tf32x3", 128): (
        (64, 64, 32, 8, 2), (64, 32, 32, 8, 2), (32, 64, 32, 8, 2),
        (32, 32, 32, 8, 2), (64, 64, 32, 8, 2),
    ),
    (100, "tf32x3", 256): (
        (64, 32, 32, 4, 2), (32, 32, 32, 8, 2), (32, 32, 32, 8, 1),
        (32, 32, 32, 8, 2), (64, 32, 32, 8, 2),
    ),
    (100, "tf32", 128): (
        (128, 64, 64, 8, 2), (64, 64, 64, 8, 2), (32, 64, 64, 4, 2),
        (32, 64, 64, 4, 2), (64, 64, 64, 8, 2),
    ),
    (100, "tf32", 256): (
        (128, 64, 64, 8, 1), (64, 64, 64, 8, 1), (32, 128, 32, 8, 2),
        (32, 64, 64, 8, 2), (64, 64, 64, 8, 1),
    ),
    (100, "bf16", 128): (
        (128, 128, 128, 8, 2), (128, 64, 128, 8, 2), (32, 128, 128, 8, 2),
        (32, 64, 128, 4, 2), (64, 64, 128, 8, 2),
    ),
    (100, "bf16", 256): (
        (128, 64, 256, 8, 2), (128, 64, 256, 8, 2), (32, 64, 256, 4, 2),
        (32, 64, 256, 8, 2), (64, 64, 256, 8, 2),
    ),
}  # fmt: skip


def _family(tensor: Tensor) -> int:
    """The architecture whose tiles to use; one that is not known takes the smallest."""
    if not tensor.is_cuda:
        return 90  # the interpreter
    capability = torch.cuda.get_device_capability(tensor.device)
    return {(8, 0): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}.get(capability, 86)


def _depth(width: int) -> int:
    """Features as the tiles take them, zero-padded."""
    return 128 if width <= 128 else MAX_WIDTH


def _tile(kernel: str, in_tile: bool, rows: int, precision: str, z: Tensor) -> dict:
    """Launch constants of a kernel; a forward pass that fits one program writes the mean itself."""
    family, depth = _family(z), _depth(z.shape[1])
    if kernel == "forward" and in_tile:
        small = _constants("forward small", precision, depth, family)
        if rows <= small["BM"]:
            return small
    return _constants(f"{kernel} {'labels' if in_tile else 'sums'}", precision, depth, family)


def _constants(kernel: str, precision: str, depth: int, family: int) -> dict:
    rows, columns, features, warps, stages = TILES[family, precision, depth][KERNELS.index(kernel)]
    output = {"BD": 128} if kernel.startswith("backward") else {}
    return output | {
        "BM": rows, "BN": columns, "BK": features, "DEPTH": depth, "IN_TILE": not kernel.endswith("sums"),
        "PRECISION": "tf32" if precision == "bf16" else precision, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every configuration that `supcon_loss` launches on an architecture, for the ahead-of-time check."""
    integers = dict.fromkeys(("n", "start", "rows", "width"), "i32")
    arguments = {
        "forward": dict.fromkeys(("MEAN_POSITIVE", "COUNT", "LOSSES", "LSE", "MEAN"), "*fp32")
        | integers
        | {"scale": "fp32", "loss_scale": "fp32"},
        "backward": dict.fromkeys(("LSE", "COUNT", "GRADIENT", "DZ"), "*fp32")
        | integers
        | {"gradient_stride": "i32", "scale": "fp32", "factor": "fp32"},
    }
    for precision in PRECISIONS[1:]:
        element = "*bf16" if precision == "bf16" else "*fp32"
        for depth in (128, MAX_WIDTH):
            for name in KERNELS:
                constants = _constants(name, precision, depth, capability) | {"UPCAST": False}
                warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
                forward = name.startswith("forward")
                signature = {
                    "Z": element,
                    "LABELS": "*i64",
                    **arguments["forward" if forward else "backward"],
                }
                yield CompileCase(
                    name=f"{name} {precision} D={depth}",
                    kernel=_forward_kernel if forward else _backward_kernel,
                    signature=signature,
                    constants=constants,
                    num_warps=warps,
                    num_stages=stages,
                    aligned=(*(a for a, kind in signature.items() if kind[0] == "*"), "width"),
                    tensor_cores=precision != "ieee",
                    loop_carried=1,
                    carried_values=(4 if constants["IN_TILE"] else 2) if forward else 1,
                )
    order = dict.fromkeys(("ORDER", "FIRST"), "*i64")
    sizes = {"n": "i32", "width": "i32"}
    for element, depth, weighted in itertools.product(("*fp32", "*bf16"), (128, MAX_WIDTH), (False, True)):
        for name, kernel, own in (
            ("segment", _segment_kernel, {"PARTIAL": "*fp32"}),
            ("class", _class_kernel, dict.fromkeys(("COUNT", "PARTIAL", "SUMS"), "*fp32")),
        ):
            signature = {"Z": element, "WEIGHT": "*fp32"} | order | own | sizes
            yield CompileCase(
                name=f"{name} {element[1:]} D={depth}{' weighted' if weighted else ''}",
                kernel=kernel,
                signature=signature,
                constants={"SEGMENT": SEGMENT, "DEPTH": depth, "WEIGHTED": weighted},
                num_warps=SUM_WARPS,
                num_stages=2,
                aligned=(*(a for a, kind in signature.items() if kind[0] == "*"), "width"),
                loop_carried=int(name == "class"),
                carried_values=int(name == "class"),
            )
