"""TFgram at inference: seven convolutions with folded batch normalisation, in five Triton launches.

Every activation is channels-last, (clip, time, channel), so a three-tap convolution is a matrix product.

- Front kernel: layers 0, 1, 2 and the pool by four. A row of the product is (clip, time segment, parity); it
  walks its segment two frames a step, and the taps of a convolution are a ring of tiles in registers. So the
  activations at full rate, most of the memory traffic, are never written.
- Convolution kernel: layers 3 to 6, one launch each. A row of the product is (pooled frame, slot in its
  window), so an adaptive maximum pool, overlapping windows included, is a maximum over neighbouring rows.

The PyTorch path, for the CPU above all: convolutions as conv2d of height one in channels_last, clip by clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import INTERPRETED, jit, launching_on, resolve, tile, tl, triton

PRECISIONS = ("auto", "ieee", "tf32", "bf16")
MIN_SAMPLES = 16  # the first pool needs four frames of layer 0
MAX_SAMPLES = 1 << 28  # 4.6 hours at 16 kHz; above it offsets inside a clip pass 32 bits


@dataclass(frozen=True)
class Layer:
    """One TFgram layer: bias-free convolution, batch normalisation, ReLU, then maybe a maximum pool."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    padding: int
    pool: str  # "", "max4" (by four), "frames2" (adaptive to 2 T) or "frames" (adaptive to T)


LAYERS = (
    Layer(1, 64, 11, 5, 1, 5, ""),
    Layer(64, 64, 3, 1, 1, 1, ""),
    Layer(64, 64, 3, 1, 2, 2, "max4"),
    Layer(64, 128, 3, 1, 1, 1, ""),
    Layer(128, 128, 3, 1, 2, 2, "frames2"),
    Layer(128, 128, 3, 1, 1, 1, ""),
    Layer(128, 128, 3, 1, 2, 2, "frames"),
)


def frames(samples: int, hop: int = 512) -> int:
    """T, the number of log-mel frames of a wave of `samples` samples (centred STFT)."""
    return 1 + samples // hop


@dataclass(frozen=True)
class Folded:
    """Convolutions with batch normalisation folded in, one entry a layer; see `fold_batchnorm`."""

    weights: tuple[Tensor, ...]  # (taps, inputs, outputs)
    biases: tuple[Tensor, ...]  # (outputs,)

    def to(self, *args, **kwargs) -> Folded:
        """`torch.Tensor.to` of every tensor."""
        return Folded(
            tuple(w.to(*args, **kwargs) for w in self.weights),
            tuple(b.to(*args, **kwargs) for b in self.biases),
        )


def fold_batchnorm(module: nn.Module, dtype: torch.dtype | None = None) -> Folded:
    """Fold running statistics and affine of batch normalisation into weights and biases.

    w' = w gamma / sqrt(variance + eps) and b' = beta - mean gamma / sqrt(variance + eps), in float64. Nothing
    is cached: fold on every evaluation call, or once and keep the result while the module does not change.

    Parameters
    ----------
    module : nn.Module
        With `conv` (seven Conv1d without bias) and `norm` (seven BatchNorm1d), shaped as `LAYERS` says.
    dtype : torch.dtype, optional
        Of the result; default: the parameters'. Biases stay at least float32.

    Raises
    ------
    ValueError
        If the layers' eps differ.
    """
    convs, norms = module.conv, module.norm
    if len({norm.eps for norm in norms}) != 1:
        raise ValueError("fold_batchnorm: the layers' eps differ; expected one for all")
    to = dtype or convs[0].weight.dtype
    # All layers' vectors at once: on a GPU the launches are what this costs.
    gamma, beta = (torch.cat(p).double() for p in ([n.weight for n in norms], [n.bias for n in norms]))
    mean, variance = (
        torch.cat([getattr(n, k) for n in norms]).double() for k in ("running_mean", "running_var")
    )
    scale = gamma * (variance + norms[0].eps).rsqrt()
    bias = (beta - mean * scale).to(torch.promote_types(to, torch.float32))
    sizes = [layer.outputs for layer in LAYERS]
    weights = (c.weight.permute(2, 1, 0) * s for c, s in zip(convs, scale.split(sizes), strict=True))
    return Folded(tuple(w.to(to).contiguous() for w in weights), tuple(bias.split(sizes)))


def tfgram_infer_ref(wave: Tensor, folded: Folded, *, hop: int = 512) -> Tensor:
    """TFgram feature at inference in plain PyTorch: conv1d, relu and the pools; any floating-point dtype.

    Parameters and result as of `tfgram_infer`, without the choice of precision and backend.
    """
    _check(wave, folded, "auto")
    x = _floating(wave, folded.weights[0].dtype).unsqueeze(1)
    count = frames(wave.shape[1], hop)
    for layer, weight, bias in zip(LAYERS, folded.weights, folded.biases, strict=True):
        kernel = weight.permute(2, 1, 0)
        x = F.conv1d(x, kernel, bias.to(x.dtype), layer.stride, layer.padding, layer.dilation).relu()
        if layer.pool == "max4":
            x = F.max_pool1d(x, 4)
        elif layer.pool:
            x = F.adaptive_max_pool1d(x, 2 * count if layer.pool == "frames2" else count)
    return x


def tfgram_infer(
    wave: Tensor, folded: Folded, *, hop: int = 512, precision: str = "auto", backend: str = "auto"
) -> Tensor:
    """TFgram feature of a batch of waves at inference.

    Parameters
    ----------
    wave : torch.Tensor
        (clips, samples), samples >= 16; int16 (divided by 32768 here) or floating point in [-1, 1]. float64
        takes the PyTorch path and stays float64 throughout.
    folded : Folded
        From `fold_batchnorm`, on the wave's device.
    hop : int
        Samples between frames of the log-mel that the feature is stacked with.
    precision : {"auto", "ieee", "tf32", "bf16"}
        Of products and stored activations; sums are float32. "auto" is "bf16" under bfloat16 autocast or for
        a bfloat16 wave, else what a convolution would take: "tf32" on a GPU where `torch.backends.cudnn`
        allows it (its default), "ieee" elsewhere. To the PyTorch path both mean float32.
    backend : {"auto", "triton", "torch"}
        See `osscl_kernels.backend.resolve`. Where a gradient is wanted "auto" is "torch".

    Returns
    -------
    torch.Tensor
        (clips, 128, 1 + samples // hop), in the wave's dtype, float32 for int16.

    Raises
    ------
    ValueError
        If wave, weights or an option do not fit.
    RuntimeError
        If Triton is asked for where it cannot run, or where a gradient is wanted.

    References
    ----------
    Huang, Fang and He (2025), arXiv:2509.13853: the layers. Ioffe and Szegedy (2015): batch normalisation.
    """
    _check(wave, folded, precision)
    if wave.dtype == torch.float64:
        precision = "ieee"
    elif precision == "auto":
        precision = _precision(wave)
    choice = resolve(wave, backend)
    count = frames(wave.shape[1], hop)
    differentiated = torch.is_grad_enabled() and any(
        t.requires_grad for t in (wave, *folded.weights, *folded.biases)
    )
    if choice == "triton" and differentiated:
        if backend == "triton":
            raise RuntimeError(
                "the TFgram inference kernels have no backward: use no_grad or backend='torch'"
            )
        choice = "torch"
    if choice == "triton" and max(_pools(wave.shape[1], count)[2:]) <= 64:
        out = _infer(wave, list(folded.weights), list(folded.biases), count, precision)
    else:
        with torch.autocast(wave.device.type, enabled=False):
            out = _infer_torch(wave, folded, count, precision)
    return out.to(wave.dtype if wave.is_floating_point() else torch.float32)


def _check(wave: Tensor, folded: Folded, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"tfgram: unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if wave.dim() != 2 or not MIN_SAMPLES <= wave.shape[1] < MAX_SAMPLES:
        limits = f"{MIN_SAMPLES} <= samples < {MAX_SAMPLES}"
        raise ValueError(f"tfgram: wave is {tuple(wave.shape)}; expected (clips, samples) with {limits}")
    if not (wave.is_floating_point() or wave.dtype == torch.int16):
        raise ValueError(f"tfgram: wave is {wave.dtype}; expected int16 or floating point")
    shapes = [tuple(w.shape) for w in folded.weights]
    if shapes != [(layer.kernel, layer.inputs, layer.outputs) for layer in LAYERS]:
        raise ValueError(f"tfgram: weights are {shapes}; expected fold_batchnorm's (taps, inputs, outputs)")


def _precision(wave: Tensor) -> str:
    device = wave.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    if half or wave.dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if wave.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _floating(wave: Tensor, dtype: torch.dtype) -> Tensor:
    return wave.to(dtype) if wave.is_floating_point() else (wave.to(torch.float32) / 32768).to(dtype)


def _pools(samples: int, count: int) -> tuple[int, int, int, int]:
    """Frames of layer 0, frames after the pool by four, slots of the windows of layers 4 and 6."""
    length = (samples + 2 * LAYERS[0].padding - LAYERS[0].kernel) // LAYERS[0].stride + 1
    pooled = length // 4
    slots = []
    for before, after in ((pooled, 2 * count), (2 * count, count)):
        widest = before // after if before % after == 0 else -(-before // after) + 1
        slots.append(1 << (widest - 1).bit_length())
    return length, pooled, *slots


def _infer_torch(wave: Tensor, folded: Folded, count: int, precision: str) -> Tensor:
    dtype = folded.weights[0].dtype if wave.dtype == torch.float64 else torch.float32
    dtype = torch.bfloat16 if precision == "bf16" else torch.promote_types(dtype, torch.float32)
    # Layer 0 as a three-tap convolution over blocks of five samples, a view of the wave: 15 >= 11 samples.
    first = F.pad(folded.weights[0], (0, 0, 0, 0, 0, 4)).view(3, 5, -1)
    kernels = [w.to(dtype).permute(2, 1, 0).unsqueeze(2) for w in (first, *folded.weights[1:])]
    kernels = [k.contiguous(memory_format=torch.channels_last) for k in kernels]
    biases = [b.to(dtype) for b in folded.biases]

    def run(x: Tensor) -> Tensor:
        x = F.pad(_floating(x, dtype), (0, -x.shape[1] % 5)).unflatten(1, (1, -1, 5)).permute(0, 3, 1, 2)
        for layer, kernel, bias in zip(LAYERS, kernels, biases, strict=True):
            x = F.conv2d(x, kernel, bias, padding=(0, layer.dilation), dilation=(1, layer.dilation))
            if layer.pool == "max4":
                x = F.max_pool2d(x, (1, 4))
            elif layer.pool:
                x = F.adaptive_max_pool2d(x, (1, 2 * count if layer.pool == "frames2" else count))
            x = x.relu_()  # after the pool: the same, on fewer frames
        return x[:, :, 0]

    if wave.device.type != "cpu" or len(wave) < 2:
        return run(wave)
    return torch.cat([run(clip) for clip in wave.split(1)])  # one clip's activations stay in the cache


@torch.library.custom_op(
    "osscl_kernels::tfgram_infer",
    mutates_args=(),
    schema="(Tensor wave, Tensor[] weights, Tensor[] biases, int count, str precision) -> Tensor",
)
def _infer(wave, weights, biases, count, precision):
    clips, samples = wave.shape
    length, pooled, *slots = _pools(samples, count)
    storage = torch.bfloat16 if precision == "bf16" else torch.float32
    out = wave.new_empty((clips, LAYERS[-1].outputs, count), dtype=torch.float32)
    if not clips:
        return out
    if wave.stride(1) != 1 or wave.dtype not in (torch.int16, torch.float32):
        wave = wave.to(wave.dtype if wave.dtype == torch.int16 else torch.float32).contiguous()
    weights = [w.to(storage).contiguous() for w in weights]
    biases = [b.float().contiguous() for b in biases]
    front, conv = tile("tfgram_front", precision, wave), tile("tfgram_layer", precision, wave)
    # bfloat16 products are wrong in the interpreter: there they are taken in float32.
    shared = {"DT": tl.bfloat16 if precision == "bf16" and not INTERPRETED else tl.float32}
    shared["PRECISION"] = "ieee" if precision == "ieee" else "tf32"
    with launching_on(wave):
        rows = front["P"] // 2  # segments a program walks
        segment = _segment(clips, length, rows, wave)
        segments = triton.cdiv(pooled * 4, segment)
        x = wave.new_empty((clips, pooled, 64), dtype=storage)
        front_kernel[(triton.cdiv(clips * segments, rows),)](
            wave, weights[0], biases[0], weights[1], biases[1], weights[2], biases[2], x,
            clips, wave.stride(0), samples, length, pooled, segments, segment,
            C=64, **shared, **front,
        )  # fmt: skip
        for i, slot in zip(range(3, 7), (1, slots[0], 1, slots[1]), strict=True):
            before, after = x.shape[1], {3: pooled, 4: 2 * count, 5: 2 * count, 6: count}[i]
            y = out if i == 6 else wave.new_empty((clips, after, 128), dtype=storage)
            tiles = triton.cdiv(after, conv["BM"] // slot)
            weight = weights[i].flatten(0, 1)
            if precision != "ieee":  # tensor cores want the sum's index last
                weight = weight.T.contiguous()
            conv_kernel[(clips * tiles, 128 // conv["BN"])](
                x, weight, biases[i], y, before, after, tiles,
                CI=LAYERS[i].inputs, CO=128, DILATION=LAYERS[i].dilation, SLOTS=slot, LAST=i == 6,
                **shared, **conv,
            )  # fmt: skip
            x = y
    return out


@_infer.register_fake
def _(wave, weights, biases, count, precision):
    return wave.new_empty((wave.shape[0], LAYERS[-1].outputs, count), dtype=torch.float32)


def _segment(clips: int, length: int, rows: int, wave: Tensor) -> int:
    """Frames a segment: as long as fills the GPU once, for each repeats two steps of its neighbour."""
    if not wave.is_cuda:
        return 64
    programs = 2 * torch.cuda.get_device_properties(wave.device).multi_processor_count
    segments = max(programs * rows // clips, 1)
    return min(max(4 * triton.cdiv(length, 4 * segments), 32), 1024)


@jit
def front_kernel(
    X, W0, B0, W1, B1, W2, B2, OUT,
    clips, clip_stride, samples, length, pooled, segments, segment,
    P: tl.constexpr, C: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Layers 0, 1, 2 and the pool by four: X (clips, samples) -> OUT (clips, pooled, C).

    A clip is `segments` segments of `segment` frames, a multiple of 4. A program walks P / 2 segments: its
    rows 0 to 7 hold the even frames of eight segments, rows 8 to 15 the odd frames of the same eight, and so
    on, which puts both into the same thread. RELOAD keeps the weights out of shared memory.
    """
    row = tl.arange(0, P)
    part = tl.program_id(0) * (P // 2) + row // 16 * 8 + row % 8
    clip = part // segments
    begin = part % segments * segment + row // 8 % 2  # first frame of layer 2
    live = clip < clips
    wave = X + clip.to(tl.int64) * clip_stride
    c = tl.arange(0, C)
    # The 11 samples under frame s and the 11 under frame s + 1 lie in the same 16: one tile, two matrices.
    j = tl.arange(0, 16)
    w0 = tl.load(W0 + j[:, None] * C + c[None, :], mask=j[:, None] < 11, other=0.0).to(DT)
    w0_next = tl.load(W0 + (j[:, None] - 5) * C + c[None, :], mask=j[:, None] >= 5, other=0.0).to(DT)
    w10 = _weights(W1, 0, C, DT, RELOAD)
    w11 = _weights(W1, 1, C, DT, RELOAD)
    w12 = _weights(W1, 2, C, DT, RELOAD)
    w20 = _weights(W2, 0, C, DT, RELOAD)
    w21 = _weights(W2, 1, C, DT, RELOAD)
    w22 = _weights(W2, 2, C, DT, RELOAD)

    top = tl.program_id(0) * (P // 2)  # offsets from the program's first segment fit into 32 bits
    part = top + tl.arange(0, P // 2)
    place = part // segments * pooled + part % segments * (segment // 4)
    origin = top // segments * pooled + top % segments * (segment // 4)
    last = tl.where(part // segments < clips, pooled - part % segments * (segment // 4), 0)
    OUT += ((top // segments).to(tl.int64) * pooled + top % segments * (segment // 4)) * C

    # Every carried tile has zeros of its own: Triton drops the loop-carried slots of aliased ones.
    older = tl.zeros([P, C], DT)  # layer 1 at s - 4
    old = tl.zeros([P, C], DT)  # layer 1 at s - 2
    best = tl.zeros([P, C], tl.float32)
    x = _samples(wave, begin - 4, j, samples, live)
    before = _relu(tl.dot(_as(x, DT), w0_next, input_precision=PRECISION), B0 + c, begin - 3, length, DT)
    x = _samples(wave, begin - 2, j, samples, live)
    for step in range(-2, segment // 2):  # layer 2 at s - 2; the first two steps only fill the ring
        s = begin + 2 * step + 2
        coming = _samples(wave, s + 2, j, samples, live)
        here = _relu(tl.dot(_as(x, DT), w0, input_precision=PRECISION), B0 + c, s, length, DT)
        after = _relu(tl.dot(_as(x, DT), w0_next, input_precision=PRECISION), B0 + c, s + 1, length, DT)
        new = _relu(_taps(before, here, after, w10, w11, w12, DT, PRECISION, RELOAD), B1 + c, s, length, DT)
        y = _taps(older, old, new, w20, w21, w22, DT, PRECISION, RELOAD)
        x = coming
        before = after
        older = old
        old = new
        if step % 2 == 0:
            best = y
        else:
            best = tl.maximum(best, y)
            pool = tl.reshape(tl.max(tl.reshape(best, (P // 16, 2, 8, C)), axis=1), (P // 2, C))
            pool = tl.maximum(pool + tl.load(B2 + c)[None, :], 0.0)
            to = OUT + ((place - origin + step // 2) * C)[:, None] + c[None, :]
            tl.store(to, pool.to(OUT.dtype.element_ty), mask=((step > 0) & (step // 2 < last))[:, None])


@jit
def _weights(W, tap: tl.constexpr, C: tl.constexpr, DT: tl.constexpr, RELOAD: tl.constexpr):
    """One tap's (C, C) matrix, or where it is."""
    c = tl.arange(0, C)
    w = W + tap * C * C + c[:, None] * C + c[None, :]
    if not RELOAD:
        w = tl.load(w).to(DT)
    return w


@jit
def _samples(wave, frame, j, samples, live):
    """The 16 samples under layer-0 frames `frame` and `frame + 1`, zero outside the clip."""
    at = 5 * frame[:, None] - 5 + j[None, :]
    return tl.load(wave[:, None] + at, mask=live[:, None] & (at >= 0) & (at < samples), other=0)


@jit
def _as(x, DT: tl.constexpr):
    if x.dtype == tl.int16:
        x = x.to(tl.float32) * (1.0 / 32768.0)
    return x.to(DT)


@jit
def _taps(a, b, c, w0, w1, w2, DT: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr):
    if RELOAD:
        y = tl.dot(a, tl.load(w0).to(DT), input_precision=PRECISION)
        y = tl.dot(b, tl.load(w1).to(DT), y, input_precision=PRECISION)
        y = tl.dot(c, tl.load(w2).to(DT), y, input_precision=PRECISION)
    else:
        y = tl.dot(a, w0, input_precision=PRECISION)
        y = tl.dot(b, w1, y, input_precision=PRECISION)
        y = tl.dot(c, w2, y, input_precision=PRECISION)
    return y


@jit
def _relu(y, bias, frame, length, DT: tl.constexpr):
    """ReLU(y + bias) where the frame exists, else the zero that the next convolution pads with."""
    inside = (frame >= 0) & (frame < length)
    return tl.where(inside[:, None], tl.maximum(y + tl.load(bias)[None, :], 0.0), 0.0).to(DT)


@jit
def conv_kernel(
    X, W, B, OUT,
    length, pooled, tiles,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, SLOTS: tl.constexpr, LAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Three-tap convolution, bias, ReLU and adaptive maximum pool (SLOTS = 1: none).

    X (clips, length, CI) -> OUT (clips, pooled, CO), or (clips, CO, pooled) for the LAST layer. W is
    (3 CI, CO), transposed for tensor cores. Every window
    of the pool holds at most SLOTS frames.
    """
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles * (BM // SLOTS)
    row = tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    # Rows past the end of a window, and of the clip, repeat the last one: a maximum does not notice.
    t = tl.minimum(tile + row // SLOTS, pooled - 1)
    if SLOTS > 1:
        p = t.to(tl.int64)
        end = ((p + 1) * length + pooled - 1) // pooled
        t = tl.minimum(p * length // pooled + row % SLOTS, end - 1).to(tl.int32)
    X += clip * length * CI
    acc = tl.zeros([BM, BN], tl.float32)
    k = tl.arange(0, BK)
    for k0 in range(0, 3 * CI, BK):
        at = t + (k0 // CI - 1) * DILATION
        inside = (at >= 0) & (at < length)
        c = tl.multiple_of(k0 % CI, BK) + k  # without the hint: loads of single elements
        x = tl.load(X + at[:, None] * CI + c[None, :], mask=inside[:, None], other=0.0)
        if PRECISION == "ieee":
            w = tl.load(W + (k0 + k)[:, None] * CO + n[None, :])
        else:
            w = tl.load(W + n[None, :] * (3 * CI) + (k0 + k)[:, None])
        acc = tl.dot(x.to(DT), w.to(DT), acc, input_precision=PRECISION)
    if SLOTS > 1:
        acc = tl.max(tl.reshape(acc, (BM // SLOTS, SLOTS, BN)), axis=1)
    y = tl.maximum(acc + tl.load(B + n)[None, :], 0.0)
    q = tile + tl.arange(0, BM // SLOTS)
    OUT += clip * pooled * CO
    if LAST:
        to = OUT + n[None, :] * pooled + q[:, None]
    else:
        to = OUT + q[:, None] * CO + n[None, :]
    tl.store(to, y.to(OUT.dtype.element_ty), mask=(q < pooled)[:, None])
