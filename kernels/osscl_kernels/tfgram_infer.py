"""TFgram at inference: seven convolutions with folded batch normalisation, in five Triton launches.

Activations are channels-last, (clip, time, channel): a three-tap convolution is a matrix product. The front
kernel takes layers 0, 1, 2 and the pool by four together, so that activations at full rate, most of the
traffic, are never written. Layers 3 to 6 are one launch each. kernels/README.md says how.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import constants, expect, jit, resolve, tl, triton

PRECISIONS = ("auto", "ieee", "tf32", "bf16")
MIN_SAMPLES = 16  # the first pool needs four frames of layer 0
MAX_SAMPLES = 1 << 28  # 4.6 hours at 16 kHz; above it offsets inside a clip pass 32 bits


class Layer(NamedTuple):
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


def lengths(samples: int, count: int) -> list[int]:
    """Time steps of each layer's convolution output, before its pool, and of the last pool's output."""
    first = (samples + 2 * LAYERS[0].padding - LAYERS[0].kernel) // LAYERS[0].stride + 1
    return [first, first, first, first // 4, first // 4, 2 * count, 2 * count, count]


def widest_window(length: int, pooled: int) -> int:
    """Most steps in a window of an adaptive pool; with the arguments exchanged, most windows at a step."""
    return -(-length // pooled) + (length % pooled > 0)


def pool_ref(x: Tensor, layer: Layer, count: int) -> Tensor:
    """The layer's pool over the last dimension, for T = `count`."""
    if layer.pool == "max4":
        return F.max_pool2d(x, (1, 4))
    if layer.pool:
        return F.adaptive_max_pool2d(x, (None, 2 * count if layer.pool == "frames2" else count))
    return x


def auto_precision(wave: Tensor, accurate: str) -> str:
    """bf16 for a bfloat16 wave or under bfloat16 autocast, else tf32 if cuDNN may use it, or `accurate`."""
    device = wave.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    if autocast or wave.dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else accurate


class Folded(NamedTuple):
    """Convolutions with batch normalisation folded in, one entry per layer; see `fold_batchnorm`."""

    weights: tuple[Tensor, ...]  # (taps, inputs, outputs)
    biases: tuple[Tensor, ...]  # (outputs,)

    def to(self, *args, **kwargs) -> Folded:
        """`torch.Tensor.to` of every tensor."""
        return Folded(*(tuple(t.to(*args, **kwargs) for t in tensors) for tensors in self))


def fold_batchnorm(module: nn.Module, dtype: torch.dtype | None = None) -> Folded:
    """Fold batch normalisation into the convolutions, in float64; needed anew whenever the module changes.

    `module` has `conv` (Conv1d without bias) and `norm` (BatchNorm1d), one per layer. Weights get `dtype`, by
    default the parameters'; biases are at least float32.
    """
    dtype = dtype or module.conv[0].weight.dtype
    weights, biases = [], []
    for conv, norm in zip(module.conv, module.norm, strict=True):
        scale = norm.weight * (norm.running_var.double() + norm.eps).rsqrt()
        weights.append((conv.weight.permute(2, 1, 0) * scale).to(dtype).contiguous())
        biases.append((norm.bias - norm.running_mean * scale).to(torch.promote_types(dtype, torch.float32)))
    return Folded(tuple(weights), tuple(biases))


def tfgram_infer_ref(wave: Tensor, folded: Folded, *, hop: int = 512) -> Tensor:
    """`tfgram_infer` in plain PyTorch: conv1d, relu and the pools; any floating-point dtype."""
    _check(wave, folded, "auto")
    x = _floating(wave, folded.weights[0].dtype).unsqueeze(1)
    count = frames(wave.shape[1], hop)
    for layer, weight, bias in zip(LAYERS, folded.weights, folded.biases, strict=True):
        kernel = weight.permute(2, 1, 0)
        x = F.conv1d(x, kernel, bias.to(x.dtype), layer.stride, layer.padding, layer.dilation).relu()
        x = pool_ref(x, layer, count)
    return x


def tfgram_infer(
    wave: Tensor, folded: Folded, *, hop: int = 512, precision: str = "auto", backend: str = "auto"
) -> Tensor:
    """TFgram feature of a batch of waves at inference.

    Parameters
    ----------
    wave : Tensor, shape (B, samples), int16 (divided by 32768 here) or floating point in [-1, 1]
        At least 16 samples. float64 takes PyTorch's path and stays float64 throughout.
    folded : Folded
        From `fold_batchnorm`, on the wave's device.
    hop : int
        Samples per frame of the result, T = 1 + samples // hop.
    precision : {"auto", "ieee", "tf32", "bf16"}
        Of products and stored activations; sums are float32. "auto": bf16 for a bfloat16 wave or under bf16
        autocast; otherwise tf32, or ieee where `torch.backends.cudnn` does not allow tf32. To PyTorch's path
        both mean float32.
    backend : {"auto", "triton", "torch"}
        See `backend.resolve`. Where a gradient is wanted "auto" is "torch", and "triton" a RuntimeError.

    Returns
    -------
    Tensor, shape (B, 128, T)
        In the wave's dtype, float32 for int16.
    """
    _check(wave, folded, precision)
    if wave.dtype == torch.float64:
        precision = "ieee"
    elif precision == "auto":
        precision = auto_precision(wave, "ieee")
    count = frames(wave.shape[1], hop)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for group in ([wave], *folded) for t in group)
    choice = resolve(wave, backend, "the inference kernels have no backward" if wanted else "")
    if choice == "triton" and max(_slots(lengths(wave.shape[1], count))) <= 64:
        out = _infer(wave, list(folded.weights), list(folded.biases), count, precision)
    else:
        with torch.autocast(wave.device.type, enabled=False):
            out = _infer_torch(wave, folded, count, precision)
    return out.to(wave.dtype if wave.is_floating_point() else torch.float32)


def _check(wave: Tensor, folded: Folded, precision: str) -> None:
    expect("tfgram_infer", "precision", precision, PRECISIONS)
    if wave.dim() != 2 or not MIN_SAMPLES <= wave.shape[1] < MAX_SAMPLES:
        expected = f"(clips, samples) with {MIN_SAMPLES} <= samples < {MAX_SAMPLES}"
        raise ValueError(f"tfgram_infer: wave is {tuple(wave.shape)}; expected {expected}")
    if not (wave.is_floating_point() or wave.dtype == torch.int16):
        raise ValueError(f"tfgram_infer: wave is {wave.dtype}; expected int16 or floating point")
    shapes = [tuple(w.shape) for w in folded.weights]
    if shapes != [(layer.kernel, layer.inputs, layer.outputs) for layer in LAYERS]:
        raise ValueError(
            f"tfgram_infer: weights are {shapes}; expected fold_batchnorm's (taps, inputs, outputs)"
        )


def _floating(wave: Tensor, dtype: torch.dtype) -> Tensor:
    return wave.to(dtype) if wave.is_floating_point() else (wave.to(torch.float32) / 32768).to(dtype)


def _slots(size: list[int]) -> list[int]:
    """Slots for a window behind each of layers 3 to 6, a power of two; 1 without a pool."""
    return [1 << (widest_window(*pair) - 1).bit_length() for pair in zip(size[3:], size[4:], strict=False)]


def _infer_torch(wave: Tensor, folded: Folded, count: int, precision: str) -> Tensor:
    dtype = torch.bfloat16 if precision == "bf16" else torch.promote_types(wave.dtype, torch.float32)
    # Layer 0 as a three-tap convolution over blocks of five samples, a view of the wave: 15 >= 11 samples.
    first = F.pad(folded.weights[0], (0, 0, 0, 0, 0, 4)).view(3, 5, -1)
    kernels = [w.to(dtype).permute(2, 1, 0).unsqueeze(2) for w in (first, *folded.weights[1:])]
    kernels = [k.contiguous(memory_format=torch.channels_last) for k in kernels]
    biases = [b.to(dtype) for b in folded.biases]

    def run(x: Tensor) -> Tensor:
        x = F.pad(_floating(x, dtype), (0, -x.shape[1] % 5)).unflatten(1, (1, -1, 5)).permute(0, 3, 1, 2)
        for layer, kernel, bias in zip(LAYERS, kernels, biases, strict=True):
            x = F.conv2d(x, kernel, bias, padding=(0, layer.dilation), dilation=(1, layer.dilation))
            x = pool_ref(x, layer, count).relu_()  # ReLU after the pool: the same, on fewer frames
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
    size = lengths(samples, count)
    storage = torch.bfloat16 if precision == "bf16" else torch.float32
    out = wave.new_empty((clips, LAYERS[-1].outputs, count), dtype=torch.float32)
    if not clips:
        return out
    front, conv = constants("tfgram_front", precision, wave), constants("tfgram_layer", precision, wave)
    rows = front["P"] // 2  # segments that a program walks
    wave = wave if wave.dtype == torch.int16 else wave.float()
    if wave.stride(1) != 1 or wave.stride(0) * rows >= 1 << 31:  # offsets from its first clip are 32-bit
        wave = wave.contiguous()
    weights = [w.to(storage).contiguous() for w in weights[:3]] + [
        matrix_layout(w, storage, precision) for w in weights[3:]
    ]
    biases = [b.float().contiguous() for b in biases]
    with torch.cuda.device_of(wave):
        segment = _segment(clips, size[0], rows, wave)
        segments = triton.cdiv(size[3] * 4, segment)
        x = wave.new_empty((clips, size[3], 64), dtype=storage)
        front_kernel[(triton.cdiv(clips * segments, rows),)](
            wave, weights[0], biases[0], weights[1], biases[1], weights[2], biases[2], x,
            clips, wave.stride(0), samples, size[0], size[3], segments, segment, C=64, **front,
        )  # fmt: skip
        for i, slots in enumerate(_slots(size), 3):
            length, after, last = size[i], size[i + 1], i == 6
            y = out if last else wave.new_empty((clips, after, 128), dtype=storage)
            tiles = triton.cdiv(after, conv["BM"] // slots)
            conv_kernel[(clips * tiles, 128 // conv["BN"])](
                x, weights[i], biases[i], y, length, after, tiles,
                CI=LAYERS[i].inputs, CO=128, DILATION=LAYERS[i].dilation, SLOTS=slots, LAST=last, **conv,
            )  # fmt: skip
            x = y
    return out


def matrix_layout(weight: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    """(taps, inner, outer) as `matrix` reads it: tensor cores want the sum's index last."""
    weight = weight.flatten(0, 1)
    return (weight if precision == "ieee" else weight.T).to(dtype).contiguous()


@_infer.register_fake
def _(wave, weights, biases, count, precision):
    return wave.new_empty((wave.shape[0], LAYERS[-1].outputs, count), dtype=torch.float32)


def _segment(clips: int, length: int, rows: int, wave: Tensor) -> int:
    """Frames per segment: as many as keep the GPU full, since each repeats two steps of its neighbour."""
    if not wave.is_cuda:
        return 64
    programs = 2 * torch.cuda.get_device_properties(wave.device).multi_processor_count
    segments = max(programs * rows // clips, 1)
    return min(max(4 * triton.cdiv(length, 4 * segments), 32), 1024)


@jit
def front_kernel(
    X, W0, B0, W1, B1, W2, B2, OUT, clips, clip_stride, samples, length, pooled, segments, segment,
    P: tl.constexpr, C: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Layers 0, 1, 2 and the pool by four: X (clips, samples) -> OUT (clips, pooled, C).

    A clip is `segments` segments of `segment` frames, a multiple of 4. A program walks P / 2 segments: its
    rows 0 to 7 hold the even frames of eight segments, rows 8 to 15 the odd frames of the same eight, and so
    on, which puts both into the same thread. RELOAD keeps the weights out of shared memory.
    """
    top = tl.program_id(0) * (P // 2)  # offsets from the program's first segment fit into 32 bits
    row = tl.arange(0, P)
    part = top + row // 16 * 8 + row % 8
    begin = part % segments * segment + row // 8 % 2  # first frame of layer 2
    begin = tl.where(part < clips * segments, begin, 1 << 28)  # past the end of every clip
    X += (top // segments).to(tl.int64) * clip_stride
    wave = (part // segments - top // segments) * clip_stride
    c = tl.arange(0, C)
    # The 11 samples under frame s and the 11 under frame s + 1 lie in the same 16: one tile, two matrices.
    j = tl.arange(0, 16)
    w0 = tl.load(W0 + j[:, None] * C + c[None, :], mask=j[:, None] < 11, other=0.0).to(DT)
    w0_next = tl.load(W0 + (j[:, None] - 5) * C + c[None, :], mask=j[:, None] >= 5, other=0.0).to(DT)
    w10, w11, w12 = _matrices(W1, C, DT, RELOAD)
    w20, w21, w22 = _matrices(W2, C, DT, RELOAD)

    part = top + tl.arange(0, P // 2)
    first = part % segments * (segment // 4)  # frame of the pool's output
    last = tl.where(part // segments < clips, pooled - first, 0)
    first += (part // segments - top // segments) * pooled
    OUT += (top // segments).to(tl.int64) * pooled * C

    # Sums in progress. Each has zeros of its own: Triton drops the loop-carried slots of aliased tiles.
    one_tap = tl.zeros([P, C], tl.float32)  # layer 2, two steps ahead
    two_taps = tl.zeros([P, C], tl.float32)  # layer 2, one step ahead
    best = tl.zeros([P // 2, C], tl.float32)
    x = _samples(X, wave, begin - 4, j, samples)
    inside = _inside(begin - 3, length)
    layer0 = _relu(tl.dot(_as(x, DT), w0_next, input_precision=PRECISION), B0 + c, inside, DT)
    begun = _product(layer0, w10, None, DT, PRECISION, RELOAD)  # layer 1, one step ahead
    x = _samples(X, wave, begin - 2, j, samples)
    for step in range(-2, segment // 2):  # layer 2 at s - 2; the first two steps only begin its sums
        s = begin + 2 * step + 2
        coming = _samples(X, wave, s + 2, j, samples)
        inside = _inside(s, length)
        layer0 = _relu(tl.dot(_as(x, DT), w0, input_precision=PRECISION), B0 + c, inside, DT)
        sums = _product(layer0, w11, begun, DT, PRECISION, RELOAD)
        follows = _inside(s + 1, length)
        layer0 = _relu(tl.dot(_as(x, DT), w0_next, input_precision=PRECISION), B0 + c, follows, DT)
        sums = _product(layer0, w12, sums, DT, PRECISION, RELOAD)
        # A mask in this step makes Triton wait here for what is used in the next one only; otherwise it moves
        # unfinished products between registers, and ptxas then waits for each of their instructions.
        begun = tl.where(follows, _product(layer0, w10, None, DT, PRECISION, RELOAD), 0.0)
        layer1 = _relu(sums, B1 + c, inside, DT)
        layer2 = _product(layer1, w22, two_taps, DT, PRECISION, RELOAD)
        two_taps = tl.where(inside, _product(layer1, w21, one_tap, DT, PRECISION, RELOAD), 0.0)
        one_tap = tl.where(inside, _product(layer1, w20, None, DT, PRECISION, RELOAD), 0.0)
        x = coming
        # Not in the branch, for the same reason.
        pool = tl.reshape(tl.max(tl.reshape(layer2, (P // 16, 2, 8, C)), axis=1), (P // 2, C))
        best = tl.where(step % 2 == 0, pool, tl.maximum(best, pool))
        if step % 2 != 0:
            pool = tl.maximum(best + tl.load(B2 + c)[None, :], 0.0)
            to = OUT + ((first + step // 2) * C)[:, None] + c[None, :]
            tl.store(to, pool.to(OUT.dtype.element_ty), mask=((step > 0) & (step // 2 < last))[:, None])


@jit
def _matrices(W, C: tl.constexpr, DT: tl.constexpr, RELOAD: tl.constexpr):
    """The taps' (C, C) matrices, or where they are."""
    c = tl.arange(0, C)
    w = W + c[:, None] * C + c[None, :]
    if RELOAD:
        return w, w + C * C, w + 2 * C * C
    else:
        return tl.load(w).to(DT), tl.load(w + C * C).to(DT), tl.load(w + 2 * C * C).to(DT)


@jit
def _product(a, w, sums, DT: tl.constexpr, PRECISION: tl.constexpr, RELOAD: tl.constexpr):
    if RELOAD:
        w = tl.load(w).to(DT)
    return tl.dot(a, w, sums, input_precision=PRECISION)


@jit
def _samples(X, wave, frame, j, samples):
    """The 16 samples under layer-0 frames `frame` and `frame + 1`, zero outside the clip."""
    at = 5 * frame[:, None] - 5 + j[None, :]
    return tl.load(X + (wave[:, None] + at), mask=(at >= 0) & (at < samples), other=0)


@jit
def _as(x, DT: tl.constexpr):
    if x.dtype == tl.int16:
        x = x.to(tl.float32) * (1.0 / 32768.0)
    return x.to(DT)


@jit
def _inside(frame, length):
    return ((frame >= 0) & (frame < length))[:, None]


@jit
def _relu(y, bias, inside, DT: tl.constexpr):
    """ReLU(y + bias) where the frame exists, else the zero that the next convolution pads with."""
    return tl.where(inside, tl.maximum(y + tl.load(bias)[None, :], 0.0), 0.0).to(DT)


@jit
def matrix(
    W,
    k,
    n,
    BK: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    DT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows k to k + BK and columns n of the (INNER, OUTER) matrix that `matrix_layout` stored."""
    k += tl.arange(0, BK)
    if PRECISION == "ieee":
        at = W + k[:, None] * OUTER + n[None, :]
    else:
        at = W + n[None, :] * INNER + k[:, None]
    return tl.load(at).to(DT)


@jit
def conv_kernel(
    X, W, B, OUT, length, pooled, tiles,
    CI: tl.constexpr, CO: tl.constexpr, DILATION: tl.constexpr, SLOTS: tl.constexpr, LAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Three-tap convolution, bias, ReLU and adaptive maximum pool (SLOTS = 1: none).

    X (clips, length, CI) -> OUT (clips, pooled, CO), or (clips, CO, pooled) for the LAST layer. W is stored
    by `matrix_layout`. A window of the pool holds at most SLOTS frames.
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
    for k0 in range(0, 3 * CI, BK):
        at = t + (k0 // CI - 1) * DILATION
        inside = (at >= 0) & (at < length)
        c = tl.multiple_of(k0 % CI, BK) + tl.arange(0, BK)  # without the hint: loads of single elements
        x = tl.load(X + at[:, None] * CI + c[None, :], mask=inside[:, None], other=0.0)
        w = matrix(W, k0, n, BK, 3 * CI, CO, DT, PRECISION)
        acc = tl.dot(x.to(DT), w, acc, input_precision=PRECISION)
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
