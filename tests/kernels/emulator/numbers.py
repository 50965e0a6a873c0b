"""What instructions compute, as numpy functions of whole registers (arrays over programs and threads)."""

from __future__ import annotations

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f4, f8 = np.float32, np.float64
BITS = {t: 8 * np.dtype(t).itemsize for t in (u1, u2, u4, u8, i1, i2, i4, i8, f4, f8, np.bool_)}
ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def from_bf16(bits):
    return (bits.astype(u4) << u4(16)).view(f4)


def to_bf16(x):
    """To the nearest, ties to even."""
    bits = x.view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def pack_bf16(high, low):
    return to_bf16(low).astype(u4) | (to_bf16(high).astype(u4) << u4(16))


def read_tf32(bits):
    """What a tensor core reads of a tf32 operand: it ignores the low 13 bits."""
    return (bits & u4(0xFFFFE000)).view(f4)


def round_tf32(x):
    """To the nearest tf32, ties away from zero."""
    bits = x.view(u4)
    return np.where(np.isfinite(x), (bits + u4(0x1000)) & u4(0xFFFFE000), bits)


def towards_zero(x):
    """float64 to float32 as tensor cores accumulate: excess bits are cut off."""
    y = x.astype(f4)
    over = (np.abs(y.astype(f8)) > np.abs(x)) & np.isfinite(y)
    return (y.view(u4) - over).view(f4)


def flush(x):
    """Subnormal numbers to zero."""
    return np.where(np.abs(x) < np.finfo(f4).tiny, f4(0), x)


def fma(a, b, c):
    """One rounding, except for rare double roundings of the float64 sum."""
    return (a.astype(f8) * b + c).astype(a.dtype)


def exp2(x):
    return flush(np.exp2(x.astype(f8)).astype(f4))


def log2(x):
    return np.log2(x.astype(f8)).astype(f4)


def divide(a, b):
    """Integer division as C does it: towards zero; by zero all bits are set."""
    safe = np.where(b != 0, b, b.dtype.type(1))
    quotient = a // safe
    inexact = (a != quotient * safe) & ((a < 0) != (safe < 0))
    return np.where(b != 0, quotient + inexact, ~a.dtype.type(0)).astype(a.dtype)


def remainder(a, b):
    return a - divide(a, b) * b


def multiply_high(a, b):
    """The upper half of products."""
    half = {4: 16, 8: 32}[a.itemsize]
    t, low = a.dtype.type, a.dtype.type((1 << half) - 1)
    ah, al, bh, bl = a >> t(half), a & low, b >> t(half), b & low  # signed types keep the sign above
    carried = (al.view(f"u{a.itemsize}") * bl.view(f"u{a.itemsize}") >> half).astype(t)
    middle = ah * bl + carried
    return ah * bh + (middle >> t(half)) + ((al * bh + (middle & low)) >> t(half))


def shift_left(a, count):
    bits, t = BITS[a.dtype.type], a.dtype.type
    return np.where(count < bits, a << (count % u4(bits)).astype(t), t(0))


def shift_right(a, count):
    """Arithmetic for signed types; counts past the width shift everything out."""
    bits, t = BITS[a.dtype.type], a.dtype.type
    shifted = a >> np.minimum(count, u4(bits - 1)).astype(t)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, t(0))


def bit_field(a, position, length):
    """bfe, for fields inside the register: signed types repeat the highest bit."""
    bits = u4(BITS[a.dtype.type])
    up = shift_left(a, bits - position - length)
    return np.where(length > 0, shift_right(up, bits - length), a.dtype.type(0))


def permute(a, b, selector):
    both, out = a.astype(u8) | (b.astype(u8) << u8(32)), u4(0)
    for i in range(4):
        choice = (selector >> u4(4 * i)) & u4(15)
        byte = ((both >> ((choice & u4(7)).astype(u8) * u8(8))) & u8(255)).astype(u4)
        sign = np.where(byte & u4(128), u4(255), u4(0))
        out = out | (np.where(choice & u4(8), sign, byte) << u4(8 * i))
    return out


def to_integer(target, rounding):
    """Rounded, clamped to the target's range, NaN to 0."""
    low, high = np.iinfo(target).min, np.iinfo(target).max

    def convert(x):
        x = ROUNDINGS[rounding](x.astype(f8))
        inside = np.where(np.isnan(x), 0, np.clip(x, low, np.nextafter(float(high), 0)))
        return np.where(x >= high, target(high), inside.astype(target))

    return convert


def comparison(name, floating):
    """setp: false for NaN, unless the name ends in u."""
    if not floating or name in COMPARISONS and name != "ne":
        return COMPARISONS[name]

    def unordered(a, b):
        return np.isnan(a) | np.isnan(b)

    if name in ("nan", "num"):
        return unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    if name == "ne":
        return lambda a, b: (a != b) & ~unordered(a, b)
    return lambda a, b: COMPARISONS[name[:-1]](a, b) | unordered(a, b)
