"""Every function of layers.cpp against float64, as compiled for several kinds of processors."""

import ctypes
import os
import pathlib
import shutil

import pytest
import torch
from osscl_cpu import native
from torch.nn import functional as F

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = pathlib.Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
HEADER = str(pathlib.Path(__file__).with_name("software.h"))
SOFTWARE = ("-O1", "-march=x86-64-v3", "-Wno-psabi", "-include", HEADER)
KINDS = {  # the instructions that the processor must have, options of the compiler
    "this processor": ("", ()),
    "eight lanes": ("avx2", ("-march=x86-64-v3", "-mprefer-vector-width=256")),
    "four lanes": ("sse2", ("-march=x86-64",)),
    "bfloat16 pairs in software": ("avx2", SOFTWARE),
    "tiles in software": ("avx2", ("-DTILES", *SOFTWARE)),
}
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8}  # of an output, relative to the largest
PARTS = 2
both_types = pytest.mark.parametrize("dtype", ROUNDING)


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.exhaustive if KINDS[kind][1] else ()) for kind in KINDS],
)
def layers(request, tmp_path_factory):
    """The library compiled for a kind of processor, in place of this one's."""
    needs, options = KINDS[request.param]
    if COMPILER is None or needs not in FLAGS:
        pytest.skip(f"no C++ compiler, or a processor without {needs}")
    if not options:  # the library as training loads it
        assert native.load()[0] is not None, native.load()[1]
        yield
        return
    path = tmp_path_factory.mktemp("layers") / "layers.so"
    native.compile_library(COMPILER, path, *options)
    library = ctypes.CDLL(str(path))
    assert library.pairs() or "software" not in request.param
    assert library.tiles() or "tiles" not in request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load", lambda: (library, ""))
        yield


def close(actual, expected, bound):
    assert actual.isfinite().all()
    assert (actual.double() - expected).abs().max() <= bound * expected.abs().max()


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def run(name, dtype, clips, sums=None, **fields):
    """Call a function with sums of a shape for every part; returns these."""
    parts = min(PARTS, clips)
    partial = torch.full((parts, *sums), torch.nan, dtype=torch.float64) if sums else None
    native.run(name, dtype, clips=clips, parts=parts, threads=2, sums=partial, **fields)
    return partial


def affine(channels):
    """Scale, shift, slope and mean of the layer below."""
    return {name: draw(channels) for name in ("scale", "shift", "slope", "mean")}


def activation(below, a):
    z = below.double() * a["scale"] + a["shift"]
    return torch.where(z > 0, z, z * a["slope"].double())


def as_operand(x, dtype):
    """What a product reads of an input: rounded where inputs come in pairs."""
    paired = dtype == torch.bfloat16 and native.load()[0].pairs()
    return x.bfloat16().double() if paired else x.double()


def forward(kind, dtype, clips, size, **fields):
    """The raw output, whose moments are those that the parts hold."""
    parts, (rows, outputs) = min(PARTS, clips), size
    y, centre = torch.empty(clips, *size, dtype=dtype), torch.empty(parts, outputs)
    sums = run(f"{kind}_forward", dtype, clips, (2, outputs), y=y, centre=centre, **fields)
    values, sums = y.double().flatten(0, 1), sums / (clips * rows / parts)
    means = centre.double() + sums[:, 0]
    squares = sums[:, 1] - sums[:, 0].square()
    close(means.mean(0), values.mean(0), 1e-6)
    if len(values) > 1:
        close((squares + means.square()).mean(0) - means.mean(0).square(), values.var(0, correction=0), 2e-6)
    return y


def backward(kind, dtype, y, below, shape, **fields):
    """dy, the gradients that a layer passes down and takes, and the sums for the layer below."""
    clips, channels = y.shape[0], y.shape[2]
    dz, scale, shift = draw(*y.shape, dtype=dtype), draw(channels), draw(channels)
    d, partial = torch.empty_like(below), torch.empty(min(PARTS, clips), *shape)
    fields |= {"dz": dz, "y": y, "centre_scale": scale, "centre_shift": shift, "below": below, "d": d}
    sums = run(f"{kind}_backward", dtype, clips, (3, below.shape[2]), weight_gradient=partial, **fields)
    return dz.double() + y.double() * scale + shift, d, partial.sum(0), sums.sum(0)


def check_descent(d, sums, gradient, below, a):
    """`gradient` of the activation below, taken through it."""
    z = below.double() * a["scale"] + a["shift"]
    expected = torch.where(z > 0, gradient, gradient * a["slope"].double())
    close(d, expected, 2 * ROUNDING[d.dtype])
    close(sums[0], (expected * (below.double() - a["mean"])).sum((0, 1)), 1e-5)
    close(sums[1], expected.sum((0, 1)), 1e-5)
    close(sums[2], (gradient * z).where(z <= 0, 0.0).sum((0, 1)), 1e-5)


def convolve(x, weight, dilation):
    """x (clips, rows, inputs), weight (outputs, inputs, taps), along the rows."""
    padding = weight.shape[2] // 2 * dilation
    return F.conv1d(x.transpose(1, 2), weight, padding=padding, dilation=dilation).transpose(1, 2)


@both_types
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize(
    ("clips", "rows", "inputs", "outputs"),
    [(1, 1, 32, 64), (2, 7, 64, 32), (4, 96, 64, 64), (1, 97, 96, 32), (4, 211, 32, 128)],
)
def test_products(layers, clips, rows, inputs, outputs, taps, dilation, dtype):
    torch.manual_seed(rows)
    below, other, extra = (draw(clips, rows, inputs, dtype=dtype) for _ in range(3))
    a, weight, kept = affine(inputs), draw(taps, inputs, outputs) / inputs**0.5, torch.empty_like(below)
    sizes = {"rows": rows, "inputs": inputs, "outputs": outputs, "taps": taps, "dilation": dilation, **a}
    fields = {"below": below, "other": other, "weight": native.pack(weight, dtype), "kept": kept, **sizes}
    y = forward("product", dtype, clips, (rows, outputs), **fields)
    x, kernel = activation(below, a) + other.double(), as_operand(weight, dtype).permute(2, 1, 0)
    close(kept, x, ROUNDING[dtype])
    close(y, convolve(as_operand(x, dtype), kernel, dilation), ROUNDING[dtype])

    turned = native.pack(weight.flip(0).transpose(1, 2), dtype)
    for stored in (kept, None):  # the input is stored, or computed again
        fields = {"x": stored, "extra": extra, "weight": turned, **sizes}
        dy, d, to_weight, sums = backward("product", dtype, y, below, weight.shape, **fields)
        x = (activation(below, a) if stored is None else kept.double()).requires_grad_()
        g, w = as_operand(dy, dtype), kernel.clone().requires_grad_()
        expected = torch.autograd.grad(convolve(as_operand(x.detach(), dtype), w, dilation), w, g)[0]
        close(to_weight, expected.permute(2, 1, 0), 1e-4 if dtype == torch.bfloat16 else 4e-6)
        gradient = torch.autograd.grad(convolve(x, kernel, dilation), x, g)[0] + extra.double()
        check_descent(d, sums, gradient, below, a)


@both_types
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (13, 10), (6, 157)])
@pytest.mark.parametrize("stride", [1, 2])
def test_channel_by_channel(layers, stride, size, dtype):
    torch.manual_seed(size[1])
    clips, n, rows = 4, 48, size[0] * size[1]
    out = tuple((length - 1) // stride + 1 for length in size)
    below, a, weight = draw(clips, rows, n, dtype=dtype), affine(n), draw(9, n)
    sizes = {"height": size[0], "width": size[1], "out_height": out[0], "out_width": out[1], **a}
    fields = {"rows": rows, "inputs": n, "outputs": n, "stride": stride, "weight": weight, **sizes}
    y = forward("depthwise", dtype, clips, (out[0] * out[1], n), below=below, **fields)
    x = activation(below, a).requires_grad_()
    kernel = weight.double().T.reshape(n, 1, 3, 3).requires_grad_()
    exact = F.conv2d(x.transpose(1, 2).unflatten(2, size), kernel, None, stride, 1, 1, n)
    exact = exact.flatten(2).transpose(1, 2)
    close(y, exact.detach(), 2 * ROUNDING[dtype])
    dy, d, to_weight, sums = backward("depthwise", dtype, y, below, weight.shape, **fields)
    gradient, expected = torch.autograd.grad(exact, (x, kernel), dy)
    close(to_weight, expected.flatten(1).T, 4e-6)
    check_descent(d, sums, gradient, below, a)


@both_types
def test_stores_round_to_nearest_and_keep_what_is_not_finite(layers, dtype):
    """With shift 0 and slope 1 f(x) is x scale: x itself, and x times 1.00390625 rounded to even."""
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf"), -0.0, 1e-30, 1.7, -5.0] * 4)
    factor = 1.0 if dtype == torch.float32 else 1.00390625
    below = x.to(dtype).view(1, 1, 32)
    kept, y, centre = torch.empty_like(below), torch.empty_like(below), torch.empty(1, 32)
    a = {"scale": torch.full((32,), factor), "shift": torch.zeros(32), "slope": torch.ones(32)}
    fields = {"weight": native.pack(torch.zeros(1, 32, 32), dtype), "taps": 1, "inputs": 32, "outputs": 32}
    run(
        "product_forward",
        dtype,
        1,
        (2, 32),
        below=below,
        kept=kept,
        y=y,
        centre=centre,
        rows=1,
        **fields,
        **a,
    )
    expected = (below.float() * factor).to(dtype)
    assert torch.equal(kept.nan_to_num(9.0), expected.nan_to_num(9.0))


@both_types
@pytest.mark.parametrize(("rows", "windows"), [(200, 50), (203, 50), (700, 210), (9, 9), (7, 12), (1, 1)])
def test_maximum_pools(layers, rows, windows, dtype):
    """Windows of four rows with some left over, and adaptive ones of unequal width, which overlap."""
    torch.manual_seed(rows)
    clips, n, number = 4, 48, torch.arange(windows)
    start, end = number * rows // windows, -((number + 1) * -rows // windows)
    if rows // 4 == windows:
        start, end = 4 * number, 4 * number + 4
    below, a = draw(clips, rows, n, dtype=dtype), affine(n)
    below[:, 1::3] = below[:, : len(below[0, 1::3])]  # ties
    a["scale"][:3] = torch.tensor([0.0, -1.0, -2.0])
    fields = {"below": below, "rows": rows, "inputs": n, "windows": windows, **a}
    fields |= {"start": start.int(), "end": end.int()}
    z = (below.double() * a["scale"] + a["shift"]).transpose(1, 2).requires_grad_()
    pooled = F.max_pool1d(z, 4) if rows // 4 == windows else F.adaptive_max_pool1d(z, windows)
    y, dz = torch.empty(clips, windows, n, dtype=dtype), draw(clips, windows, n, dtype=dtype)
    run("pool_forward", dtype, clips, y=y, **fields)
    close(y.transpose(1, 2), pooled.relu().detach(), ROUNDING[dtype])
    d = torch.full_like(below, torch.nan)
    sums = run("pool_backward", dtype, clips, (3, n), dz=dz, d=d, **fields).sum(0)
    gradient = torch.autograd.grad(pooled.relu(), z, dz.double().transpose(1, 2))[0].transpose(1, 2)
    close(d, gradient, 2 * ROUNDING[dtype])
    close(sums[1], gradient.sum((0, 1)), 1e-5)
    close(sums[0], (gradient * (below.double() - a["mean"])).sum((0, 1)), 1e-5)


def test_moments_of_the_first_windows(layers):
    rows, wave = 1000, draw(4, 5 * 999 + 16)
    sizes = {"samples": wave.shape[1], "rows": rows}
    sums = run("window_moments", torch.float32, 4, (12, 16), wave=wave, **sizes).sum(0)
    windows = wave.double().unfold(1, 11, 5)[:, :rows].flatten(0, 1)
    close(sums[:11, :11], windows.T @ windows, 1e-12)
    close(sums[11, :11], windows.sum(0), 1e-12)
