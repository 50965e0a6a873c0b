"""TFgram in training: seven convolutions with exact batch statistics, forward and backward.

`tfgram_train_ref` is the definition and the path without Triton, `tfgram_train_triton` the fused kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import resolve
from .tfgram_infer import LAYERS, frames
from .tfgram_train_triton import compile_cases, forward, lengths

__all__ = [
    "compile_cases", "lengths", "rows", "tfgram_train", "tfgram_train_ref", "update_running_statistics",
]  # fmt: skip

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

    Parameters and results as there, without the choice of precision and backend. Convolutions are conv2d of
    height one, because conv1d has no channels_last format, in which a CPU is up to twice as fast.
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
        if layer.pool == "max4":
            x = F.max_pool2d(x, (1, 4))
        elif layer.pool:
            x = F.adaptive_max_pool2d(x, (1, 2 * count if layer.pool == "frames2" else count))
        x = F.relu(x)  # after the pool: the same values and gradients, on fewer frames
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
    """TFgram feature with the batch's own statistics, differentiable in weights, gammas, betas and wave.

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
        See `backend.resolve`. "torch" is `tfgram_train_ref`.

    Returns
    -------
    output : Tensor, shape (B, 128, T)
        float32; float64 for a float64 wave on the CPU.
    means, variances : lists of 7 tensors, shapes (C_out,)
        Mean and biased variance of each convolution's output over clips and time, without gradient; see
        `update_running_statistics`.

    Raises
    ------
    ValueError
        If a shape or choice is not one of the above, or a layer has one value per channel only.
    RuntimeError
        If Triton is asked for where it cannot run.

    References
    ----------
    Huang et al., arXiv 2509.13853, the TFgram branch as its authors' code runs it; Ioffe and Szegedy,
    "Batch Normalization", ICML 2015; Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance",
    1983.
    """
    _check(wave, weights, gammas, betas, precision)
    choice, _ = resolve(wave, backend)
    device = wave.device.type
    if precision == "auto":
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        if autocast or wave.dtype == torch.bfloat16:
            precision = "bf16"
        else:
            precision = "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"
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

    Parameters
    ----------
    norms : iterable of torch.nn.BatchNorm1d
        Their running_mean, running_var and num_batches_tracked change in place; a module without buffers
        (track_running_stats=False) is left alone. `momentum=None` is the cumulative average.
    means, variances : sequences of tensors, shapes (C,)
        Batch mean and biased variance; the running variance takes the unbiased one.
    counts : sequence of int
        Values per channel that they were taken over; see `rows`.
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
    return [len(wave) * length for length in lengths(wave.shape[1], hop)]


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
    for name, given in (("weights", weights), ("gammas", gammas), ("betas", betas)):
        expected = [
            (layer.outputs, layer.inputs, layer.kernel) if name == "weights" else (layer.outputs,)
            for layer in LAYERS
        ]
        shapes = [tuple(t.shape) for t in given]
        if shapes != expected:
            raise ValueError(f"tfgram_train: {name} of shapes {shapes}; expected {expected}")
