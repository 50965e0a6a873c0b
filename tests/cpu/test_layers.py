"""Every function of layers.cpp against float64, as compiled for several kinds of processors."""

import ctypes
import os
import pathlib
import shutil

import pytest
import torch
from osscl_kernels import chain_cpu, native
from osscl_kernels.chain_cpu import Threads, part_count
from torch.nn import functional as F

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FLAGS = pathlib.Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
SOFTWARE = pathlib.Path(__file__).with_name("tiles.h")
KINDS = {  # what is asked of the processor, options of the compiler
    "this processor": ("", ()),
    "eight lanes": ("avx2", ("-march=x86-64-v3", "-mprefer-vector-width=256")),
    "four lanes": ("sse2", ("-march=x86-64",)),
    "tiles": ("avx512_bf16", ("-include", str(SOFTWARE))),
}
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8}  # of an output, relative to the largest
SUMS = 1e-6  # of what is added up in float32


@pytest.fixture(scope="module", params=KINDS)
def layers(request, tmp_path_factory):
    """The library for a kind of processor in the place of this one's."""
    needs, options = KINDS[request.param]
    if COMPILER is None or needs not in FLAGS:
        pytest.skip(f"no C++ compiler, or a processor without {needs}")
    path = tmp_path_factory.mktemp("layers") / "layers.so"
    native.compile_library(COMPILER, path, *options)
    with pytest.MonkeyPatch.context() as patch:
        found = ctypes.CDLL(str(path))
        assert found.tiles() or request.param != "tiles"
        patch.setattr(native, "library", lambda: found)
        yield request.param


@pytest.fixture(autouse=True)
def _parts_of_several_clips(monkeypatch):
    monkeypatch.setattr(chain_cpu, "PARTS", 2)


def close(found, expected, bound):
    assert found.isfinite().all()
    assert (found.double() - expected).abs().max() <= bound * expected.abs().max()


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def calls(name, dtype, clips, **fields):
    with Threads() as threads:
        threads.run(name, dtype, clips, **fields)


def affine(channels):
    """Scale, shift, slope and mean of the layer below."""
    return {k: draw(channels) for k in ("scale", "shift", "slope", "mean")}


def activation(below, a, other=0.0):
    z = below.double() * a["scale"] + a["shift"]
    return torch.where(z > 0, z, z * a["slope"].double()) + other


def as_operand(x, dtype):
    """What a product reads of an input: rounded where inputs come in pairs."""
    paired = dtype == torch.bfloat16 and native.library().pairs()
    return x.bfloat16().double() if paired else x.double()


def moments(centre, sums, rows):
    """Of all rows, from the parts'; parts of equal size."""
    n = rows // len(centre)
    means = centre.double() + sums[:, 0] / n
    squares = sums[:, 1] - sums[:, 0].square() / n
    mean = means.mean(0)
    return mean, (squares.sum(0) + n * (means - mean).square().sum(0)) / rows


def convolve(x, weight, dilation):
    """x (clips, rows, inputs), weight (outputs, inputs, taps), along the rows."""
    padding = weight.shape[2] // 2 * dilation
    return F.conv1d(x.transpose(1, 2), weight, padding=padding, dilation=dilation).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize(
    ("clips", "rows", "inputs", "outputs"),
    [(1, 1, 32, 64), (2, 7, 64, 32), (4, 96, 64, 64), (1, 97, 96, 32), (4, 211, 32, 128)],
)
def test_products(layers, clips, rows, inputs, outputs, taps, dilation, dtype):
    torch.manual_seed(rows)
    below, other = draw(clips, rows, inputs, dtype=dtype), draw(clips, rows, inputs, dtype=dtype)
    a, weight = affine(inputs), draw(taps, inputs, outputs) / inputs**0.5
    x = activation(below, a, other.double())
    sizes = {"rows": rows, "inputs": inputs, "outputs": outputs, "taps": taps, "dilation": dilation}
    y, kept = torch.empty(clips, rows, outputs, dtype=dtype), torch.empty_like(below)
    centre, sums = (
        torch.empty(part_count(clips), outputs),
        torch.empty(part_count(clips), 2, outputs, dtype=torch.float64),
    )
    calls("product_forward", dtype, clips, below=below, other=other, weight=native.pack(weight, dtype), y=y,
          centre=centre, sums=sums, kept=kept, **sizes, **a)  # fmt: skip
    kernel = as_operand(weight, dtype).permute(2, 1, 0)
    close(kept, x, ROUNDING[dtype])
    close(y, convolve(as_operand(x, dtype), kernel, dilation), ROUNDING[dtype])
    mean, variance = moments(centre, sums, clips * rows)
    flat = y.double().flatten(0, 1)
    close(mean, flat.mean(0), 1e-6)
    if clips * rows > 1:
        close(variance, flat.var(0, correction=0), 1e-6)

    # backward, with the input stored and computed again
    dz, y, extra = (draw(clips, rows, n, dtype=dtype) for n in (outputs, outputs, inputs))
    centring = {"centre_scale": draw(outputs), "centre_shift": draw(outputs)}
    dy = dz.double() + y.double() * centring["centre_scale"] + centring["centre_shift"]
    for stored in (kept, None):
        d, sums = torch.empty_like(below), torch.empty(part_count(clips), 3, inputs, dtype=torch.float64)
        partial = torch.empty(part_count(clips), taps, inputs, outputs)
        calls("product_backward", dtype, clips, dz=dz, y=y, x=stored, below=below, extra=extra, d=d,
              sums=sums, weight=native.pack(weight.flip(0).transpose(1, 2), dtype), weight_gradient=partial,
              **sizes, **centring, **a)  # fmt: skip
        x = (kept.double() if stored is not None else activation(below, a)).requires_grad_()
        g, w = as_operand(dy, dtype), kernel.clone().requires_grad_()
        to_w = torch.autograd.grad(convolve(as_operand(x.detach(), dtype), w, dilation), w, g)[0]
        close(partial.sum(0), to_w.permute(2, 1, 0), 1e-4 if dtype == torch.bfloat16 else 4 * SUMS)
        to_x = torch.autograd.grad(convolve(x, kernel, dilation), x, g)[0] + extra.double()
        z = below.double() * a["scale"] + a["shift"]
        expected = torch.where(z > 0, to_x, to_x * a["slope"].double())
        close(d, expected, ROUNDING[dtype])
        close(sums.sum(0)[0], (expected * (below.double() - a["mean"])).sum((0, 1)), 1e-5)
        close(sums.sum(0)[1], expected.sum((0, 1)), 1e-5)
        close(sums.sum(0)[2], (to_x * z).where(z <= 0, 0.0).sum((0, 1)), 1e-5)


def maps(x, size):
    return x.double().transpose(1, 2).unflatten(2, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (13, 10), (6, 157)])
@pytest.mark.parametrize("kind", ["stride 1", "stride 2", "whole"])
def test_channel_by_channel(layers, kind, size, dtype):
    torch.manual_seed(size[1])
    clips, n, stride = 4, 48, 2 if kind == "stride 2" else 1
    rows, whole = size[0] * size[1], kind == "whole"
    out = (1, 1) if whole else tuple((s - 1) // stride + 1 for s in size)
    below, a = draw(clips, rows, n, dtype=dtype), affine(n)
    weight = draw(rows if whole else 9, n)
    name = "whole" if whole else "depthwise"
    sizes = {
        "rows": rows, "inputs": n, "outputs": n, "height": size[0], "width": size[1], "out_height": out[0],
        "out_width": out[1], "stride": stride,
    }  # fmt: skip
    y = torch.empty(clips, out[0] * out[1], n, dtype=dtype)
    centre, sums = (
        torch.empty(part_count(clips), n),
        torch.empty(part_count(clips), 2, n, dtype=torch.float64),
    )
    calls(name + "_forward", dtype, clips, below=below, weight=weight, y=y, centre=centre, sums=sums,
          **sizes, **a)  # fmt: skip
    x = maps(activation(below, a), size).requires_grad_()
    kernel = weight.double().T.reshape(n, 1, *(size if whole else (3, 3))).requires_grad_()
    exact = F.conv2d(x, kernel, None, stride, 0 if whole else 1, 1, n)
    close(maps(y, out), exact.detach(), 2 * ROUNDING[dtype])
    mean, _ = moments(centre, sums, clips * out[0] * out[1])
    close(mean, y.double().mean((0, 1)), 1e-6)

    dz = draw(*y.shape, dtype=dtype)
    centring = {"centre_scale": draw(n), "centre_shift": draw(n)}
    dy = dz.double() + y.double() * centring["centre_scale"] + centring["centre_shift"]
    to_x, to_w = torch.autograd.grad(exact, (x, kernel), maps(dy, out))
    d, partial = torch.empty_like(below), torch.empty(part_count(clips), *weight.shape)
    sums = torch.empty(part_count(clips), 3, n, dtype=torch.float64)
    calls(name + "_backward", dtype, clips, dz=dz, y=y, below=below, weight=weight, d=d, sums=sums,
          weight_gradient=partial, **sizes, **centring, **a)  # fmt: skip
    z = below.double() * a["scale"] + a["shift"]
    to_x = to_x.flatten(2).transpose(1, 2)
    expected = torch.where(z > 0, to_x, to_x * a["slope"].double())
    close(d, expected, 2 * ROUNDING[dtype])
    close(partial.sum(0), to_w.flatten(1).T, 4 * SUMS)
    close(sums.sum(0)[1], expected.sum((0, 1)), 1e-5)
    close(sums.sum(0)[2], (to_x * z).where(z <= 0, 0.0).sum((0, 1)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("number", "size", "stride"), [(3, (13, 10), 2), (1, (1, 1), 2), (2, (5, 4), 1)])
def test_patches_of_an_image(layers, number, size, stride, dtype):
    clips, outputs, inputs = 4, 64, native.CHANNELS
    out = tuple((s - 1) // stride + 1 for s in size)
    image, weight = draw(clips, *size, number, dtype=dtype), draw(9 * number, outputs) / 5
    padded = F.pad(weight, (0, 0, 0, inputs - len(weight)))[None]
    sizes = {
        "rows": out[0] * out[1], "inputs": inputs, "outputs": outputs, "taps": 1, "dilation": 1,
        "height": size[0], "width": size[1], "out_height": out[0], "out_width": out[1], "stride": stride,
        "maps": number,
    }  # fmt: skip
    y = torch.empty(clips, out[0] * out[1], outputs, dtype=dtype)
    centre, sums = (
        torch.empty(part_count(clips), outputs),
        torch.empty(part_count(clips), 2, outputs, dtype=torch.float64),
    )
    calls("product_forward", dtype, clips, x=image, weight=native.pack(padded, dtype), y=y, centre=centre,
          sums=sums, **sizes)  # fmt: skip
    x = image.double().permute(0, 3, 1, 2).requires_grad_()
    kernel = as_operand(weight, dtype).view(3, 3, number, outputs).permute(3, 2, 0, 1).requires_grad_()
    exact = F.conv2d(x, kernel, None, stride, 1)
    close(maps(y, out), exact.detach(), ROUNDING[dtype])

    dz, nothing = draw(*y.shape, dtype=dtype), torch.zeros(outputs)
    to_x, to_w = torch.autograd.grad(exact, (x, kernel), maps(dz, out))
    d, partial = torch.zeros(clips, *size, number), torch.empty(part_count(clips), 1, inputs, outputs)
    calls("product_backward", dtype, clips, dz=dz, y=y, x=image, d=d, weight_gradient=partial,
          weight=native.pack(padded.transpose(1, 2), dtype), centre_scale=nothing, centre_shift=nothing,
          **sizes)  # fmt: skip
    close(d, to_x.permute(0, 2, 3, 1), SUMS)
    close(partial.sum((0, 1))[: 9 * number], to_w.permute(2, 3, 1, 0).flatten(0, 2), SUMS)
    assert not partial[:, :, 9 * number :].any()


def test_stores_round_to_nearest_and_keep_what_is_not_finite(layers):
    """With shift 0 and slope 1 f(x) is x scale: x itself, and x times 1.00390625 rounded to even."""
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf"), -0.0, 1e-30, 1.7, -5.0] * 4)
    weight = native.pack(torch.zeros(1, 32, 32), torch.bfloat16)
    for dtype, factor in ((torch.float32, 1.0), (torch.bfloat16, 1.00390625)):
        below = x.to(dtype).view(1, 1, 32)
        kept, y = torch.empty_like(below), torch.empty_like(below)
        calls("product_forward", dtype, 1, below=below, kept=kept, y=y, scale=torch.full((32,), factor),
              shift=torch.zeros(32), slope=torch.ones(32), centre=torch.empty(1, 32),
              sums=torch.empty(1, 2, 32, dtype=torch.float64), rows=1, inputs=32, outputs=32, taps=1,
              weight=weight if dtype == torch.bfloat16 else native.pack(torch.zeros(1, 32, 32), dtype),
              )  # fmt: skip
        expected = (below.float() * factor).to(dtype)
        assert torch.equal(kept.nan_to_num(9.0), expected.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "windows"), [(200, 50), (203, 50), (700, 210), (9, 9), (7, 12), (1, 1)])
def test_maximum_pools(layers, rows, windows, dtype):
    """Windows of four rows with some left over, and adaptive ones of unequal width, which overlap."""
    torch.manual_seed(rows)
    clips, n, number = 4, 48, torch.arange(windows)
    if rows // 4 == windows:
        start, end = 4 * number, 4 * number + 4
    else:
        start, end = number * rows // windows, -((number + 1) * -rows // windows)
    below, a = draw(clips, rows, n, dtype=dtype), affine(n)
    below[:, 1::3] = below[:, : len(below[0, 1::3])]  # ties
    a["scale"][:3] = torch.tensor([0.0, -1.0, -2.0])
    fields = {
        "below": below, "rows": rows, "inputs": n, "windows": windows, "start": start.int(), "end": end.int(),
        **a,
    }  # fmt: skip
    y, dz = torch.empty(clips, windows, n, dtype=dtype), draw(clips, windows, n, dtype=dtype)
    calls("pool_forward", dtype, clips, y=y, **fields)
    z = (below.double() * a["scale"] + a["shift"]).requires_grad_()
    exact = torch.stack([z[:, i:j].max(1).values for i, j in zip(start, end, strict=True)], 1).relu()
    close(y, exact.detach(), ROUNDING[dtype])

    d, sums = torch.full_like(below, float("nan")), torch.empty(part_count(clips), 3, n, dtype=torch.float64)
    calls("pool_backward", dtype, clips, dz=dz, d=d, sums=sums, **fields)
    first = z.detach()
    expected = torch.zeros_like(first)
    for w, (i, j) in enumerate(zip(start, end, strict=True)):
        place = i + (first[:, i:j] == first[:, i:j].max(1, keepdim=True).values).int().argmax(1)
        gradient = dz[:, w].double().where(exact[:, w] > 0, 0.0)
        expected.scatter_add_(1, place[:, None], gradient[:, None])
    close(d, expected, 2 * ROUNDING[dtype])
    close(sums.sum(0)[1], expected.sum((0, 1)), 1e-5)
    close(sums.sum(0)[0], (expected * (below.double() - a["mean"])).sum((0, 1)), 1e-5)


def test_moments_of_the_first_windows(layers):
    clips, rows = 4, 1000
    wave = draw(clips, 5 * (rows - 1) + 16)
    sums = torch.empty(part_count(clips), 12, 16, dtype=torch.float64)
    calls("window_moments", torch.float32, clips, wave=wave, samples=wave.shape[1], rows=rows, sums=sums)
    windows = wave.double().unfold(1, 11, 5)[:, :rows].flatten(0, 1)
    close(sums.sum(0)[:11, :11], windows.T @ windows, 1e-12)
    close(sums.sum(0)[11, :11], windows.sum(0), 1e-12)
