"""TFgram in training against float64: an error of at most twice plain float32 PyTorch's, plus FLOOR."""

import functools
import importlib

import pytest
import torch
from hardware import DEVICE, Modules, python
from hardware import error as largest_error
from osscl_kernels import backend
from osscl_kernels.tfgram_infer import LAYERS, widest_window
from osscl_kernels.tfgram_train import rows, tfgram_train, tfgram_train_ref, update_running_statistics
from torch import nn

fused = importlib.import_module("osscl_kernels.tfgram_train")  # the package's name is the function
error = functools.partial(largest_error, norm=True)
FLOOR = 2e-6  # relative, in the Euclidean norm of each result
ZERO, ZERO_DEAD = 1, 4  # channels with gamma = 0 and a positive or a negative beta
NAMES = (
    ["output"]
    + [f"{kind} {i}" for kind in ("mean", "variance") for i in range(7)]
    + [f"{kind} gradient {i}" for kind in ("weight", "gamma", "beta") for i in range(7)]
)
pytestmark = pytest.mark.usefixtures("poisoned")
triton_only = pytest.mark.skipif(backend.triton is None, reason="triton is not installed")
cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path")


def parameters(seed=0):
    """Xavier weights; gammas of both signs and exactly 0, betas of both signs; float64."""
    torch.manual_seed(seed)
    weights, gammas, betas = [], [], []
    for layer in LAYERS:
        shape = (layer.outputs, layer.inputs, layer.kernel)
        weights.append(nn.init.xavier_uniform_(torch.empty(shape, dtype=torch.float64)))
        gamma = 1 + 0.3 * torch.randn(layer.outputs, dtype=torch.float64)
        beta = 0.3 * torch.randn(layer.outputs, dtype=torch.float64)
        gamma[::3] *= -1
        gamma[[ZERO, ZERO_DEAD]] = 0
        beta[ZERO], beta[ZERO_DEAD] = 0.5, -0.5
        gammas.append(gamma)
        betas.append(beta)
    return weights, gammas, betas


def noise(clips, samples):
    generator = torch.Generator().manual_seed(samples)
    return 0.1 * torch.randn(clips, samples, generator=generator, dtype=torch.float64) + 0.05


def run(function, wave, dtype=torch.float32, device=DEVICE, **options):
    """Output, statistics and every gradient under a random output gradient, in the order of NAMES."""
    wave = wave.to(device, dtype)
    groups = [[p.to(device, dtype, copy=True).requires_grad_() for p in g] for g in parameters()]
    output, means, variances = function(wave, *groups, **options)
    assert not any(s.requires_grad for s in (*means, *variances))
    generator = torch.Generator().manual_seed(7)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(gradient.to(output))
    gradients = [p.grad for group in groups for p in group]
    results = [output.detach(), *means, *variances, *gradients]
    return dict(zip(NAMES, (r.cpu() for r in results), strict=True))


@functools.cache
def truth(clips, samples):
    wave = noise(clips, samples)
    exact = run(tfgram_train_ref, wave, torch.float64, "cpu")
    plain = run(tfgram_train_ref, wave, device="cpu")
    return wave, exact, plain


def assert_close(results, exact, plain, floor=FLOOR):
    for name in NAMES:
        assert error(results[name], exact[name]) <= 2 * error(plain[name], exact[name]) + floor, name


@triton_only
@pytest.mark.parametrize(
    "clips, samples",
    [
        (1, 331),
        pytest.param(2, 667, marks=pytest.mark.slow),
        pytest.param(2, 1237, marks=pytest.mark.exhaustive),
    ],
)
def test_triton_forward_and_backward(clips, samples):
    wave, exact, plain = truth(clips, samples)
    results = run(tfgram_train, wave, backend="triton", precision="ieee")
    # one clip of 331 samples leaves two frames: their statistics cancel nearly all of a gradient
    assert_close(results, exact, plain, floor=3e-5 if clips == 1 else FLOOR)
    assert results["gamma gradient 2"][ZERO].abs() > 0
    for i in range(7):  # where gamma is 0 every value of a window ties, and the first one gets the gradient
        expected = exact[f"gamma gradient {i}"][ZERO]
        assert results[f"gamma gradient {i}"][ZERO] == pytest.approx(float(expected), rel=1e-3)
        assert results[f"gamma gradient {i}"][ZERO_DEAD] == 0


@triton_only
@pytest.mark.parametrize(
    "samples, hop",
    [
        pytest.param(200, 20, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((799, 30), (12_040, 12_000))),
    ],
)
def test_triton_takes_any_hop(samples, hop):
    """Steps that lie in more than two windows of an adaptive pool, and windows of more than 256 steps."""
    wave = noise(2, samples)
    exact = run(tfgram_train_ref, wave, torch.float64, "cpu", hop=hop)
    plain = run(tfgram_train_ref, wave, device="cpu", hop=hop)
    results = run(tfgram_train, wave, backend="triton", precision="ieee", hop=hop)
    assert_close(results, exact, plain)


@triton_only
@pytest.mark.parametrize("length, pooled", [(10, 22), (39, 54), (7, 7), (50, 8), (602, 2)])
def test_adaptive_pool_of_any_window(length, pooled):
    """The winners' places, and the gradients of every window that a step lies in."""
    g = torch.Generator().manual_seed(length)
    y = torch.randn(2, length, 128, generator=g).to(DEVICE)
    gradient = torch.randn(2, pooled, 128, generator=g).to(DEVICE)
    affine = torch.ones(4, 128, device=DEVICE)
    values, back = torch.empty_like(gradient), torch.empty_like(y)
    width, overlap = widest_window(length, pooled), widest_window(pooled, length)
    place = torch.empty_like(values, dtype=torch.uint8 if width < 256 else torch.int32)
    tiles = [-(-n // fused.POOL["BM"]) for n in (pooled, length)]
    options = {"C": 128} | fused.POOL
    fused.pool_kernel[(2 * tiles[0],)](
        y, affine, values, place, length, pooled, tiles[0], width, BY4=False, **options
    )
    fused.unpool_kernel[(2 * tiles[1],)](gradient, place, back, length, pooled, tiles[1], overlap, **options)
    x = y.transpose(1, 2).clone().requires_grad_()
    out = nn.functional.adaptive_max_pool1d(x, pooled)
    out.backward(gradient.transpose(1, 2))
    assert torch.equal(values, out.detach().transpose(1, 2))
    torch.testing.assert_close(back, x.grad.transpose(1, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@triton_only
@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
def test_triton_precisions(precision):
    """tf32x3 is as good as float32, the others as plain modules under bfloat16 autocast."""
    wave, exact, plain = truth(2, 667)
    floor = 1e-5
    if precision != "tf32x3":
        floor = 1e-3
        with torch.autocast("cpu", torch.bfloat16):
            plain = run(tfgram_train_ref, wave, device="cpu")
    results = run(tfgram_train, wave, backend="triton", precision=precision)
    assert_close(results, exact, plain, floor)
    assert all(result.dtype == torch.float32 for result in results.values())


@pytest.mark.slow
@triton_only
def test_triton_is_the_same_bit_for_bit_run_to_run():
    wave = noise(1, 331)
    one, two = (run(tfgram_train, wave, backend="triton", precision="ieee") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in NAMES)


@triton_only
def test_operators_pass_opcheck():
    wave = noise(1, 60).to(DEVICE, torch.float32)
    groups = [[p.to(DEVICE, torch.float32).requires_grad_() for p in g] for g in parameters()]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused.forward, (wave, *groups, 1e-5, 512, "ieee"), test_utils=tests)


def test_moments_of_tiles_are_joined():
    values = 500 + torch.randn(3, 37, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tiles = [part for clip in values for part in clip.split(16)]  # the last one of a clip is shorter
    mean = torch.stack([part.mean(0) for part in tiles])
    square = torch.stack([part.var(0, correction=0) * len(part) for part in tiles])
    joint, variance = fused._joined(mean, square, 3, 37, 16)
    torch.testing.assert_close(joint, values.flatten(0, 1).mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(variance, values.flatten(0, 1).var(0, correction=0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("choice", [pytest.param("triton", marks=[triton_only, pytest.mark.slow]), "torch"])
def test_low_tone_with_an_offset(choice):
    """A tone far below the first filters' band leaves variances that float32 moments lose."""
    samples = 331 if choice == "triton" else 16_000
    time = torch.arange(samples, dtype=torch.float64) / 16_000
    wave = (0.3 + 0.1 * torch.sin(2 * torch.pi * 60 * time)).float()[None]
    exact = run(tfgram_train_ref, wave, torch.float64, "cpu")
    plain = run(tfgram_train_ref, wave, device="cpu")
    options = {"precision": "ieee"} if choice == "triton" else {}
    device = DEVICE if choice == "triton" else "cpu"
    results = run(tfgram_train, wave, device=device, backend=choice, **options)
    assert error(results["variance 0"], exact["variance 0"]) < 1e-6
    assert error(results["mean 0"], exact["mean 0"]) < 1e-6
    assert error(results["output"], exact["output"]) <= 2 * error(plain["output"], exact["output"]) + 1e-5


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_batch_norm(momentum):
    plain, ours = (Modules(momentum).double().train() for _ in range(2))
    for step in range(2):
        wave = noise(2, 700 + step)
        expected = plain(wave)
        affine = [[getattr(n, k) for n in ours.norm] for k in ("weight", "bias")]
        output, means, variances = tfgram_train(wave, [c.weight for c in ours.conv], *affine, backend="torch")
        update_running_statistics(ours.norm, means, variances, rows(wave))
        torch.testing.assert_close(output, expected)
    for (name, value), other in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, msg=name)
    wave = noise(1, 600)
    torch.testing.assert_close(ours.eval()(wave), plain.eval()(wave))


def test_frozen_parameters_get_no_gradient():
    wave, groups = noise(1, 331).float(), [[p.float() for p in g] for g in parameters()]
    groups[0][3].requires_grad_()
    output, _, _ = tfgram_train(wave, *groups, backend="torch")
    output.sum().backward()
    assert groups[0][3].grad.abs().sum() > 0 and groups[0][2].grad is None


def test_what_it_refuses():
    wave, groups = noise(1, 331), parameters()
    with pytest.raises(ValueError, match="expected .B, samples."):
        tfgram_train(wave[:, None], *groups)
    with pytest.raises(ValueError, match="at least 40 samples"):
        tfgram_train(wave[:, :39], *groups)
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        tfgram_train(wave, *groups, precision="fp8")
    with pytest.raises(ValueError, match="weights of shapes"):
        tfgram_train(wave, groups[0][::-1], *groups[1:])
    with pytest.raises(RuntimeError, match="float64 has no Triton path|not installed"):
        tfgram_train(wave, *groups, backend="triton")
    if backend.triton:
        with pytest.raises(RuntimeError, match="give the wave no gradient"):
            tfgram_train(wave.float().requires_grad_(), *groups, backend="triton")


@pytest.mark.slow
@cpu_only
def test_freed_memory_is_kept_in_a_process_of_its_own():
    """A freed block of 64 MiB stays resident after the call, and goes back to the system without it."""
    program = """
import sys, torch
from osscl_kernels import keep_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(print("no mallopt"))
before = resident()
blocks = [torch.ones(4 * 2**20) for _ in range(4)]
del blocks
print(resident() - before)
"""
    kept = python("-c", program, "keep")
    if "no mallopt" in kept:
        pytest.skip("this C library has no mallopt")
    assert float(kept) > 48 > 32 > float(python("-c", program, "return"))
