"""What instructions compute, as numpy functions of whole registers (arrays over programs and threads)."""

from __future__ import annotations

import numpy as np

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i2, i4, i8 = np.int16, np.int32, np.int64
f4, f8 = np.float32, np.float64


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
    return (a.astype(f8) * b + c).astype(f4)


def exp2(x):
    return flush(np.exp2(x.astype(f8)).astype(f4))


def divide(a, b):
    """Integer division as C does it: towards zero."""
    return (a - np.fmod(a, b)) // b


def multiply_high(a, b):
    """The upper half of products."""
    product = a.astype(object) * b.astype(object)
    return (product >> 8 * a.itemsize).astype(a.dtype)


def shift_left(a, count):
    """Counts past the width shift everything out."""
    return a << np.minimum(count, u4(8 * a.itemsize)).astype(a.dtype)


def shift_right(a, count):
    """Arithmetic for signed types."""
    return a >> np.minimum(count, u4(8 * a.itemsize)).astype(a.dtype)


def bit_field(a, position, length):
    """bfe of a field inside the register: signed types repeat its highest bit."""
    unused = u4(8 * a.itemsize) - length
    return shift_right(shift_left(a, unused - position), unused)


def permute(a, b, selector):
    """Bytes of (a, b) that the digits of the selector name; from 8 on, their highest bit repeated."""
    both, out = a.astype(u8) | (b.astype(u8) << u8(32)), u4(0)
    for place in map(u4, (0, 4, 8, 12)):
        digit = selector >> place
        byte = (both >> ((digit & u4(7)) * u4(8)).astype(u8)).astype(u4) & u4(255)
        byte = np.where(digit & u4(8), (byte >> u4(7)) * u4(255), byte)
        out = out | byte << place * u4(2)
    return out


def to_int8(x):
    """The lowest byte, signed, as a register of 16 bits holds it."""
    return x.astype(np.int8).astype(i2)


def to_int32(x):
    """Cut off, clamped to the target's range, NaN to 0."""
    limits = np.iinfo(i4)
    return np.clip(np.nan_to_num(x.astype(f8)), limits.min, limits.max).astype(i4)


def both_numbers(a, b):
    """setp.num: neither is NaN."""
    return (a == a) & (b == b)
