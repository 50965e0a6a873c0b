"""The package's kernels through its own host functions: cases, errors against float64, and their budgets.

On a GPU the kernels run there; elsewhere, `emulated` executes what Triton compiles for one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hardware import DEVICE, error, python
from osscl_kernels import backend, supcon_loss, supcon_loss_ref
from osscl_kernels.tfgram_infer import LAYERS, Folded, tfgram_infer, tfgram_infer_ref
from osscl_kernels.tfgram_train import tfgram_train, tfgram_train_ref

# Triton chooses between its compiler and its interpreter when it is imported, for the whole process.
only_compiled = pytest.mark.skipif(backend.INTERPRETED, reason="run by test_in_a_process_that_compiles")
KERNELS = ("supcon", "tfgram_infer", "tfgram_train")
# Sizes of a case; the first is the one of the ordinary suite.
SIZES = {
    "supcon": ((65, 100), (1, 128), (2, 8), (17, 128), (130, 120), (300, 128)),  # rows, features
    "tfgram_infer": ((2, 777, 160), (1, 16, 512), (3, 2777, 160), (9, 640, 512)),  # clips, samples, hop
    "tfgram_train": ((2, 331, 100), (2, 2000, 512), (3, 661, 100), (2, 200, 20)),
}
# Above twice the error of plain PyTorch in the same precision, of the largest entry (training: of the norm).
FLOOR = {"supcon": 2e-6, "tfgram_infer": 1e-6, "tfgram_train": 2e-5}
# What the hardware's products cost where plain PyTorch on a CPU has no such precision. SupCon's logits are
# cosines times 50; tensor cores cut tf32 operands to 10 bits, which a variance squares, and take bf16
# weights of 8.
ROUNDING = {
    ("supcon", "tf32"): 2**-8, ("supcon", "bf16"): 2**-8, ("tfgram_infer", "tf32"): 2**-8,
    ("tfgram_train", "tf32"): 2e-3, ("tfgram_train", "bf16"): 1e-3,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of a host function, backward pass included where it has one."""

    kernel: str
    precision: str
    size: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kernel} {self.precision} {'x'.join(map(str, self.size))}"

    def errors(self) -> dict[str, tuple[float, float]]:
        """Error and budget of each result."""
        results, exact, plain = RUNNERS[self.kernel](self.precision, *self.size)
        rounding = FLOOR[self.kernel] + ROUNDING.get((self.kernel, self.precision), 0.0)
        ours, theirs = (
            {name: error(values[name], exact[name], norm=self.kernel == "tfgram_train") for name in exact}
            for values in (results, plain)
        )
        return {name: (ours[name], 2 * theirs[name] + rounding) for name in exact}


def cases(small: bool = False) -> Iterator[Case]:
    """Every kernel in every precision that it ships; `small`: one size of each."""
    for kernel in KERNELS:
        precisions = importlib.import_module(f"osscl_kernels.{kernel}").PRECISIONS
        for precision in precisions[1:]:  # the first is "auto"
            for size in SIZES[kernel][: 1 if small else None]:
                yield Case(kernel, precision, size)


def _supcon(precision, rows, width):
    generator = torch.Generator().manual_seed(1000 * rows + width)
    z = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)
    labels = torch.randint(-2, max(rows // 4, 2), (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator) + 0.5

    def run(function: Callable, z: torch.Tensor, device="cpu", **options):
        z = z.to(device, copy=True).requires_grad_()
        losses = function(z, labels.to(device), reduction="none", **options)
        (gradient,) = torch.autograd.grad(losses, z, weights.to(losses))
        mean = function(z, labels.to(device), **options)
        scale = torch.ones_like(losses) / 0.07  # of a term: a loss can be 0
        return {"losses": losses.detach() + scale, "gradient": gradient, "mean": mean.detach() + scale[0]}

    seen = z.bfloat16().float() if precision == "bf16" else z
    results = run(supcon_loss, z, DEVICE, precision=precision, backend="triton")
    return results, run(supcon_loss_ref, seen.double()), run(supcon_loss_ref, seen)


def _infer(precision, clips, samples, hop):
    generator = torch.Generator().manual_seed(samples + clips)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator)

    wave = normal(clips, samples + 13, scale=0.3)[:, :samples]  # rows with a gap between them
    weights = [normal(x.kernel, x.inputs, x.outputs, scale=(x.inputs * x.kernel) ** -0.5) for x in LAYERS]
    folded = Folded(tuple(weights), tuple(normal(x.outputs, scale=0.3) for x in LAYERS))
    with torch.no_grad():
        options = {"hop": hop, "precision": precision, "backend": "triton"}
        out = tfgram_infer(wave.to(DEVICE), folded.to(DEVICE), **options)
        exact = tfgram_infer_ref(wave.double(), folded.to(torch.float64), hop=hop)
        half = torch.bfloat16 if precision == "bf16" else torch.float32
        plain = tfgram_infer_ref(wave.to(half), folded.to(half), hop=hop)
    return {"output": out}, {"output": exact}, {"output": plain}


def _train(precision, clips, samples, hop):
    generator = torch.Generator().manual_seed(samples + clips)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    wave = normal(clips, samples, scale=0.1) + 0.05
    shapes = [(x.outputs, x.inputs, x.kernel) for x in LAYERS]
    weights = [normal(*shape, scale=(shape[1] * shape[2]) ** -0.5) for shape in shapes]
    gammas, betas = ([normal(x.outputs, scale=0.3) + bias for x in LAYERS] for bias in (1.0, 0.0))
    for gamma in gammas:
        gamma[::3] *= -1

    def run(function: Callable, dtype=torch.float32, device="cpu", **options):
        groups = [
            [p.to(device, dtype, copy=True).requires_grad_() for p in group]
            for group in (weights, gammas, betas)
        ]
        output, means, variances = function(wave.to(device, dtype), *groups, hop=hop, **options)
        above = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        output.backward(above.to(output))
        results = {"output": output.detach()}
        for i in range(7):
            results |= {f"mean {i}": means[i].detach(), f"variance {i}": variances[i].detach()}
            for name, group in zip(("weight", "gamma", "beta"), groups, strict=True):
                results[f"{name} gradient {i}"] = group[i].grad
        return results

    results = run(tfgram_train, device=DEVICE, precision=precision, backend="triton")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision in ("bf16", "tf32")):
        plain = run(tfgram_train_ref)
    return results, run(tfgram_train_ref, torch.float64), plain


RUNNERS = {"supcon": _supcon, "tfgram_infer": _infer, "tfgram_train": _train}


@pytest.mark.skipif(not backend.INTERPRETED, reason="this process compiles")
@pytest.mark.parametrize(
    "which",
    [
        pytest.param("not exhaustive", marks=pytest.mark.slow),
        pytest.param("exhaustive", marks=pytest.mark.exhaustive),
    ],
)
def test_in_a_process_that_compiles(which, request):
    """The file of tests that imports this."""
    python("-m", "pytest", "-q", "-x", "-m", which, request.path)
