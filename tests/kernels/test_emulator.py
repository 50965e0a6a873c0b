"""The emulator against numpy on kernels of its own, and faults that it must see."""

import re

import pytest
import torch
from compiled import only_compiled as compiled
from compiled import test_in_a_process_that_compiles  # noqa: F401
from hardware import error

triton = pytest.importorskip("triton")
from emulator import EmulationError, emulated  # noqa: E402
from triton import language as tl  # noqa: E402

ARCHITECTURES = (80, 90)


@triton.jit
def add_kernel(X, Y, OUT, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(X + i, mask=i < n)
    tl.store(OUT + i, x + tl.load(Y + i, mask=i < n), mask=i < n)


@triton.jit
def elementwise_kernel(X, N, OUT, B: tl.constexpr):
    """A row of results each: functions of floats X, and of integers N (positive and negative)."""
    i = tl.arange(0, B)
    x = tl.load(X + i)
    n = tl.load(N + i)
    tl.store(OUT + i, tl.exp(x))
    tl.store(OUT + B + i, tl.log(tl.abs(x) + 1.0))
    tl.store(OUT + 2 * B + i, tl.sqrt(tl.abs(x)) / (x * x + 1.0))
    tl.store(OUT + 3 * B + i, tl.where((x > 0) & (n < 5), tl.maximum(x, 0.5), tl.minimum(x, -0.5)))
    tl.store(OUT + 4 * B + i, (n // 7).to(tl.float32))
    tl.store(OUT + 5 * B + i, (n % 7).to(tl.float32))
    tl.store(OUT + 6 * B + i, ((n * 3 - (n >> 2)) ^ (n & 12)).to(tl.float32))
    tl.store(OUT + 7 * B + i, (x * 100).to(tl.int32).to(tl.float32))
    tl.store(OUT + 8 * B + i, x.to(tl.bfloat16).to(tl.float32))
    tl.store(OUT + 9 * B + i, (n.to(tl.int64) * 123456789012 // 1000003).to(tl.float32))
    tl.store(OUT + 10 * B + i, (x.to(tl.float64) * x.to(tl.float64) / 3.0).to(tl.float32))


@triton.jit
def reduce_kernel(X, OUT, R: tl.constexpr, C: tl.constexpr):
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    x = tl.load(X + r[:, None] * C + c[None, :])
    tl.store(OUT + c, tl.sum(x, 0))
    tl.store(OUT + C + r, tl.max(x, 1))
    tl.store(OUT + C + R + r, tl.cumsum(tl.sum(x, 1), 0))


@triton.jit
def softmax_kernel(X, OUT, n, stride, B: tl.constexpr):
    c = tl.arange(0, B)
    x = tl.load(X + tl.program_id(0) * stride + c, mask=c < n, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(OUT + tl.program_id(0) * n + c, e / tl.sum(e, 0), mask=c < n)


@triton.jit
def transpose_kernel(X, OUT, B: tl.constexpr):
    i = tl.arange(0, B)
    x = tl.load(X + i[:, None] * B + i[None, :])
    tl.store(OUT + i[:, None] * B + i[None, :], tl.trans(x))


@triton.jit
def ways_kernel(N, OUT, B: tl.constexpr):
    """Programs take loops of different lengths; int64 division branches per thread."""
    i = tl.arange(0, B)
    rounds = tl.load(N + tl.program_id(0))
    total = tl.zeros([B], tl.int64)
    for k in range(rounds):
        total += (i.to(tl.int64) << (i % 2 * 33)) // (k + 3)
    if rounds > 2:
        total = -total
    tl.store(OUT + tl.program_id(0) * B + i, total)


@triton.jit
def matmul_kernel(
    A, B, C, M, N, K, sa, sb, sc,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    c = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(A + m[:, None] * sa + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(B + k[:, None] * sb + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        c = tl.dot(a, b, c, input_precision=PRECISION)
    tl.store(C + m[:, None] * sc + n[None, :], c, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def carry_kernel(X, OUT, n, B: tl.constexpr, ALIASED: tl.constexpr):
    """Sums x two rounds late. Triton drops carried values that begin as aliases of one tensor."""
    i = tl.arange(0, B)
    old = tl.zeros([B], tl.float32)
    new = tl.zeros([B], tl.float32)
    if ALIASED:
        new = old
    total = tl.zeros([B], tl.float32)
    for k in range(n):
        x = tl.load(X + k * B + i)
        total += old * (k + 1)
        old = new
        new = x
    tl.store(OUT + i, total)


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def gpu(request):
    """This module's kernels run on it; nothing may be wrong in the end."""
    with emulated(request.param, count=True) as emulation:
        yield emulation
        assert not emulation.findings()


def nan(*shape):
    return torch.full(shape, float("nan"))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@compiled
def test_masked_programs_and_their_counted_work(gpu):
    x, y, out = normal(1008), normal(1008, seed=1), nan(1008)
    add_kernel[(4,)](x, y, out, 1008, B=256)
    assert torch.equal(out, x + y)
    work = gpu.launches[0].work()
    for name, arrays in (("load", 2), ("store", 1)):  # whole sectors
        assert 4 * work[f"{name} useful bytes"] == 4 * work[f"{name} sector bytes"] == arrays * 4 * 1008


@compiled
def test_elementwise(gpu):
    x, n, out = 4 * normal(256), torch.arange(-128, 128, dtype=torch.int32) * 7919, nan(11, 256)
    elementwise_kernel[(1,)](x, n, out, B=256)
    exact, n64 = x.double(), n.long()
    quotient = torch.div(n64, 7, rounding_mode="trunc")
    chosen = torch.where((x > 0) & (n < 5), x.clamp(min=0.5), x.clamp(max=-0.5))
    large = torch.div(n64 * 123456789012, 1000003, rounding_mode="trunc")
    rows = (
        exact.exp(), (exact.abs() + 1).log(), exact.abs().sqrt() / (exact**2 + 1), chosen,
        quotient, n64 - 7 * quotient, (n64 * 3 - (n64 >> 2)) ^ (n64 & 12), (x * 100).trunc(),
        x.bfloat16(), large, exact**2 / 3,
    )  # fmt: skip
    for row, (value, truth) in enumerate(zip(out, rows, strict=True)):
        assert error(value, truth) < 3e-7, row


@compiled
def test_reductions_and_transposes(gpu):
    x, out = normal(64, 32), nan(32 + 128)
    reduce_kernel[(1,)](x, out, R=64, C=32)
    exact = x.double()
    assert error(out, torch.cat([exact.sum(0), exact.amax(1), exact.sum(1).cumsum(0)])) < 1e-6
    wide, out = normal(5, 400), nan(5, 300)
    softmax_kernel[(5,)](wide, out, 300, 400, B=512)
    assert error(out, wide[:, :300].double().softmax(1)) < 1e-6
    square, out = normal(64, 64), nan(64, 64)
    transpose_kernel[(1,)](square, out, B=64)
    assert torch.equal(out, square.T)


@compiled
def test_programs_and_threads_that_go_different_ways(gpu):
    rounds = torch.tensor([2, 5, 0, 2, 5], dtype=torch.int32)
    out = torch.zeros(5, 128, dtype=torch.int64)
    ways_kernel[(5,)](rounds, out, B=128)
    i = torch.arange(128)
    for row, n in zip(out, rounds.tolist(), strict=True):
        total = sum(((i << (i % 2 * 33)) // (k + 3) for k in range(n)), torch.zeros_like(i))
        assert torch.equal(row, -total if n > 2 else total)


# Elements, precision, tolerance: tensor cores cut tf32 operands to 10 bits.
PRECISIONS = (("float32", "tf32", 2e-3), ("float32", "tf32x3", 1e-6), ("float32", "ieee", 1e-6))
PRECISIONS += (("bfloat16", "tf32", 1e-6),)
TILES = ((64, 64, 32, 4), (128, 64, 32, 8))  # rows, columns, depth, warps


def multiply(dtype, precision, tile=TILES[0], stages=3, size=(70, 90, 100)):
    (m, n, k), (bm, bn, bk, warps) = size, tile
    a, b = normal(m, k).to(getattr(torch, dtype)), normal(k, n, seed=1).to(getattr(torch, dtype))
    c = nan(m, n)
    matmul_kernel[(-(-m // bm), -(-n // bn))](
        a, b, c, m, n, k, k, n, n, BM=bm, BN=bn, BK=bk, PRECISION=precision, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return error(c, a.double() @ b.double())


@compiled
@pytest.mark.parametrize("dtype, precision, tolerance", PRECISIONS, ids=lambda x: str(x))
def test_products(gpu, dtype, precision, tolerance):
    assert multiply(dtype, precision) <= tolerance
    work = gpu.launches[0].work()
    if precision == "ieee":
        assert work["FMA"] == 64 * 64 * 128  # four rounds of 32
    else:
        assert work["tensor FLOP"] == 2 * 64 * 64 * 128 * (3 if precision == "tf32x3" else 1)
    assert work["wavefronts"] >= work["least wavefronts"] > 0


@compiled
@pytest.mark.exhaustive
@pytest.mark.parametrize("stages", range(1, 5))
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype, precision, tolerance", PRECISIONS, ids=lambda x: str(x))
def test_pipelined_products(gpu, dtype, precision, tolerance, tile, stages):
    assert multiply(dtype, precision, tile, stages, (130, 70, 160)) <= tolerance


# Planted faults.


def without(pattern, number=None):
    """The edit that drops the first `number` instructions that match."""
    return lambda ptx: re.sub(pattern + r"[^;\n]*;", "", ptx, count=number or 0)


WEAKER_WAIT = lambda ptx: re.sub(  # noqa: E731
    r"(cp\.async\.wait_group\s+)(\d+)", lambda m: m[1] + str(int(m[2]) + 2), ptx
)
FAULTS = {
    "every barrier missing": (without(r"bar\.sync"), ARCHITECTURES),
    "copies waited for too little": (WEAKER_WAIT, ARCHITECTURES),
    "proxy fences missing": (without(r"fence\.proxy\.async"), (90,)),
    "wgmma not waited for": (without(r"wgmma\.wait_group"), (90,)),
}


@compiled
@pytest.mark.parametrize(
    "fault, capability", [(name, c) for name, (_, where) in FAULTS.items() for c in where]
)
def test_planted_faults_are_seen(fault, capability):
    with emulated(capability, edit=FAULTS[fault][0]) as emulation:
        wrong = (
            not multiply("bfloat16", "tf32", size=(70, 96, 160)) < 1e-6
        )  # aligned rows: copied asynchronously
    if "wgmma" in fault:
        assert "used before its wait" in str(emulation.findings(notes=True))
    else:
        assert emulation.findings()
    if "copies" in fault:
        assert wrong


@compiled
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_one_missing_barrier_is_seen(capability):
    with emulated(capability, edit=without(r"bar\.sync", 1)) as emulation:
        transpose_kernel[(1,)](normal(64, 64), nan(64, 64), B=64)
    assert any("without a barrier" in finding for finding in emulation.findings())


@compiled
def test_accesses_out_of_bounds_raise():
    with emulated(90):
        with pytest.raises(EmulationError, match="out of bounds.*ld.global|ld.global"):
            add_kernel[(1,)](normal(100), normal(100), nan(100), 101, B=256)
        inside = normal(300)[100:200]  # the storage goes on, the tensor does not
        with pytest.raises(EmulationError, match="out of bounds"):
            add_kernel[(1,)](inside, normal(256), nan(256), 256, B=256)


@compiled
@pytest.mark.parametrize("aliased", [True, False])
def test_the_loop_carry_miscompilation_is_seen(gpu, aliased):
    x, out = normal(6, 128), nan(128)
    carry_kernel[(1,)](x, out, 6, B=128, ALIASED=aliased)
    exact = sum(x[k - 2].double() * (k + 1) for k in range(2, 6))
    assert (error(out, exact) < 1e-6) is not aliased
