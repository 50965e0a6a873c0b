"""What the instructions compute, as numpy functions of whole registers (arrays over programs and threads)."""

from __future__ import annotations

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i2, i4, i8 = np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
TINY = np.finfo(f4).tiny
BITS = {t: 8 * np.dtype(t).itemsize for t in (u1, np.int8, u2, i2, f2, u4, i4, f4, u8, i8, f8)}


def from_bf16(bits):
    return (bits.astype(u4) << u4(16)).view(f4)


def to_bf16(x):
    """To the nearest, ties to even."""
    bits = x.view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def from_f16(bits):
    return bits.view(f2).astype(f4)


def to_f16(x):
    return x.astype(f2).view(u2)


def read_tf32(bits):
    """What a tensor core reads of a tf32 operand: it ignores the low 13 bits."""
    return (bits & u4(0xFFFFE000)).view(f4)


def round_tf32(x):
    """To the nearest tf32, ties away from zero."""
    bits = x.view(u4)
    return np.where(np.isfinite(x), (bits + u4(0x1000)) & u4(0xFFFFE000), bits)


def round_tf32_even(x):
    bits = x.view(u4)
    rounded = (bits + u4(0xFFF) + ((bits >> u4(13)) & u4(1))) & u4(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def pack(low, high):
    return low.astype(u4) | (high.astype(u4) << u4(16))


def unpack(x):
    return (x & u4(0xFFFF)).astype(u2), (x >> u4(16)).astype(u2)


def halves(function, decode, encode):
    """`function` of float32 for registers of one 16-bit float."""
    return lambda *xs: encode(np.asarray(function(*map(decode, xs)), f4))


def paired(function):
    """`function` of one 16-bit value for registers of two."""

    def both(*xs):
        low, high = zip(*map(unpack, xs), strict=True)
        return pack(function(*low), function(*high))

    return both


def towards_zero(x):
    """float64 to float32 as tensor cores accumulate: excess bits are cut off."""
    y = x.astype(f4)
    over = (np.abs(y.astype(f8)) > np.abs(x)) & np.isfinite(y)
    return (y.view(u4) - over).astype(u4).view(f4)


def flush(x):
    return np.where(np.abs(x) < TINY, f4(0), x)


def fma(a, b, c):
    """One rounding (but for rare double roundings of the float64 sum)."""
    return (a.astype(f8) * b + c).astype(f4)


def fma_double(a, b, c):
    return a * b + c


def multiply_add(a, b, c):
    return a * b + c


def exp2(x):
    return flush(np.exp2(x.astype(f8)).astype(f4))


def log2(x):
    return np.log2(x.astype(f8)).astype(f4)


def reciprocal(x):
    return x.dtype.type(1) / x


def reciprocal_root(x):
    return (1 / np.sqrt(x.astype(f8))).astype(x.dtype)


def divide(a, b):
    """Integer division as C does it: towards zero; by zero all bits are set."""
    safe = np.where(b != 0, b, b.dtype.type(1))
    quotient = a // safe
    inexact = (a != quotient * safe) & ((a < 0) != (safe < 0))
    return np.where(b != 0, quotient + inexact.astype(a.dtype), ~a.dtype.type(0)).astype(a.dtype)


def remainder(a, b):
    return a - divide(a, b) * b


def multiply_high(a, b):
    signed = a.dtype.kind == "i"
    if a.dtype.itemsize == 4:
        wide = i8 if signed else u8
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    x, y, low = a.view(u8), b.view(u8), u8(0xFFFFFFFF)
    crossed = (x >> u8(32)) * (y & low) + ((x & low) * (y & low) >> u8(32))
    other = (x & low) * (y >> u8(32)) + (crossed & low)
    high = (x >> u8(32)) * (y >> u8(32)) + (crossed >> u8(32)) + (other >> u8(32))
    if not signed:
        return high
    return high.view(i8) - np.where(a < 0, b, i8(0)) - np.where(b < 0, a, i8(0))


def shift_left(a, count):
    bits, t = BITS[a.dtype.type], a.dtype.type
    return np.where(count < bits, a << (count % u4(bits)).astype(t), t(0))


def shift_right(a, count):
    """Arithmetic for signed types; counts past the width shift everything out."""
    bits, t = BITS[a.dtype.type], a.dtype.type
    shifted = a >> np.minimum(count, u4(bits - 1)).astype(t)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, t(0))


def funnel(left, wrap):
    def shift(low, high, count):
        both = (high.astype(u8) << u8(32)) | low
        count = (count & u4(31) if wrap else np.minimum(count, u4(32))).astype(u8)
        return ((both << count) >> u8(32) if left else both >> count).astype(u4)

    return shift


def _ones(length, t):
    full = ~t(0)
    return np.where(length >= BITS[t], full, ~shift_left(np.full_like(length, full, dtype=t), length))


def bit_field(a, position, length):
    """bfe: signed types repeat the field's highest bit (for fields inside the register)."""
    unsigned = u4 if a.dtype.itemsize == 4 else u8
    position, length = position & u4(255), length & u4(255)
    value = shift_right(a.view(unsigned), position) & _ones(length, unsigned)
    if a.dtype.kind == "u":
        return value
    rest = np.uint32(BITS[unsigned]) - np.clip(length, 1, BITS[unsigned]).astype(u4)
    return shift_right(shift_left(value, rest).view(a.dtype), rest)


def insert_field(a, b, position, length):
    mask = shift_left(_ones(length & u4(255), b.dtype.type), position & u4(255))
    return (b & ~mask) | (shift_left(a, position & u4(255)) & mask)


def permute(a, b, selector):
    both = a.astype(u8) | (b.astype(u8) << u8(32))
    out = u4(0)
    for i in range(4):
        choice = (selector >> u4(4 * i)) & u4(15)
        byte = ((both >> ((choice & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        sign = np.where(byte & u4(128), u4(255), u4(0))
        out = out | (np.where(choice & u4(8), sign, byte) << u4(8 * i))
    return out


def logic(a, b, c, table):
    """lop3: bit 4 a + 2 b + c of the table, bit by bit."""
    table, out = int(table.flat[0]), u4(0)
    for i in range(8):
        if table >> i & 1:
            terms = (x if i & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            out = out | np.bitwise_and.reduce(np.broadcast_arrays(*terms))
    return out + np.zeros_like(a)


def count_bits(x):
    return np.bitwise_count(x).astype(u4)


def leading_zeros(x):
    return (u4(32) - np.ceil(np.log2(x.astype(f8) + 1)).astype(u4)).astype(u4)


def to_integer(target, rounding):
    """Rounded, clamped to the target's range, NaN to 0."""
    turn = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]
    low, high = np.iinfo(target).min, np.iinfo(target).max

    def convert(x):
        x = turn(x.astype(f8))
        inside = np.where(np.isnan(x), 0, np.clip(x, low, np.nextafter(float(high), 0)))
        return np.where(x >= high, target(high), inside.astype(target))

    return convert


def comparison(name, floating):
    """setp: ordered, unless the name ends in u."""
    base = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    }  # fmt: skip
    if not floating:
        return base[name]

    def unordered(a, b):
        return np.isnan(a) | np.isnan(b)

    if name in ("num", "nan"):
        return unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    if name == "ne":
        return lambda a, b: (a != b) & ~unordered(a, b)
    if name in base:
        return base[name]
    ordered = base[name.removesuffix("u")]
    return lambda a, b: ordered(a, b) | unordered(a, b)
