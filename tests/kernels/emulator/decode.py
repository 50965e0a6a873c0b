"""The tables of instructions: what each reads, writes and computes."""

from __future__ import annotations

import numpy as np

from . import collective as warp
from . import numbers as n
from .numbers import f4, f8, i2, i4, i8, u2, u4, u8
from .ptx import EmulationError, Instruction, Operation, vector

TYPES = {
    "b16": u2, "u16": u2, "s16": i2, "b32": u4, "u32": u4, "s32": i4, "f32": f4, "b64": u8, "u64": u8,
    "s64": i8, "f64": f8, "pred": np.bool_,
}  # fmt: skip
UNSIGNED = {i2: u2, i4: u4, i8: u8}
WIDE = {i2: i4, u2: u4, i4: i8, u4: u8}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "num": n.both_numbers,
}  # fmt: skip
CONVERSIONS = {
    "rna.tf32.f32": (n.round_tf32, f4), "rzi.s32.f32": (n.to_int32, f4), "f32.bf16": (n.from_bf16, u2),
    "rn.bf16.f32": (n.to_bf16, f4), "rn.bf16x2.f32": (n.pack_bf16, f4, f4),
    "s8.s32": (n.to_int8, i4), "s8.s64": (n.to_int8, i8), "s16.s8": (n.to_int8, i2),
    "s32.s8": (lambda x: n.to_int8(x).astype(i4), i4),
}  # fmt: skip

# Pure instructions: rules (type, modifiers) -> (function, *types of its sources).


def _same(function, floating=None, any_sign=False):
    """All operands have one type; `any_sign` allows unsigned, which saves views of registers."""

    def rule(t, modifiers):
        if set(modifiers[:-1]) - {"rn", "approx", "full", "ftz"}:
            raise KeyError("modifier")
        t = UNSIGNED.get(t, t) if any_sign else t
        compute = floating if floating and t in (f4, f8) else function
        if "ftz" in modifiers:
            return (lambda *x: n.flush(compute(*x))), t, t, t
        return compute, t, t, t

    return rule


def _multiply(t, modifiers):
    """mul and mad."""
    if "wide" in modifiers:
        w = WIDE[t]
        return lambda a, b, *c: sum(c, a.astype(w) * b.astype(w)), t, t, w
    if "hi" in modifiers:
        return n.multiply_high, t, t
    if t in (f4, f8):
        return np.multiply, t, t
    return lambda a, b, *c: sum(c, a * b), t, t, t


def _compare(t, modifiers):
    """setp."""
    name, _ = modifiers
    if name == "ne" and t in (f4, f8):
        raise KeyError("false for NaN")
    return COMPARISONS[name], t, t


RULES = {
    "add": _same(np.add, any_sign=True), "sub": _same(np.subtract, any_sign=True),
    "and": _same(np.bitwise_and), "or": _same(np.bitwise_or), "xor": _same(np.bitwise_xor),
    "not": _same(np.invert), "neg": _same(np.negative), "abs": _same(np.abs), "sqrt": _same(np.sqrt),
    "div": _same(n.divide, np.divide), "rem": _same(np.fmod), "min": _same(np.minimum, np.fmin),
    "max": _same(np.maximum, np.fmax), "fma": _same(n.fma), "ex2": _same(n.exp2),
    "mul": _multiply, "mad": _multiply, "setp": _compare, "mov": lambda t, m: (lambda x: x, t),
    "selp": lambda t, m: (lambda a, b, p: np.where(p, a, b), t, t, np.bool_),
    "shl": lambda t, m: (n.shift_left, t, u4), "shr": lambda t, m: (n.shift_right, t, u4),
    "bfe": lambda t, m: (n.bit_field, t, u4, u4), "prmt": lambda t, m: (n.permute, u4, u4, u4),
}  # fmt: skip


def _pure(i: Instruction) -> Operation:
    compute, *types = RULES[i.mnemonic](TYPES[i.modifiers[-1]], i.modifiers)
    return Operation(compute, list(zip(i.operands[1:], types, strict=False)), i.operands[:1])


def _convert(i: Instruction) -> Operation:
    """cvt."""
    compute, *types = CONVERSIONS.get(i.opcode.removeprefix("cvt."), [None])
    if not compute:
        t, *types = (TYPES[m] for m in i.modifiers if m != "rn")
        compute = lambda x: x.astype(t)  # noqa: E731
    return Operation(compute, list(zip(i.operands[1:], types, strict=True)), i.operands[:1])


def _move(i: Instruction) -> Operation:
    """mov; {a, b} are the halves of a register."""
    target, source = i.operands
    if "{" not in target + source:
        return _pure(i)
    t = TYPES[i.modifiers[-1]]
    part, bits = {u4: (u2, u4(16)), u8: (u4, u8(32))}[t]
    if target.startswith("{"):
        split = lambda x: (x.astype(part), (x >> bits).astype(part))  # noqa: E731
        return Operation(split, [(source, t)], vector(target))
    join = lambda low, high: low.astype(t) | (high.astype(t) << bits)  # noqa: E731
    return Operation(join, [(half, part) for half in vector(source)], [target])


HANDLERS = {
    "mov": _move, "cvt": _convert, "ld": warp.load, "st": warp.store, "cp": warp.start_copy,
    "shfl": warp.shuffle, "ldmatrix": warp.move_matrices, "stmatrix": warp.move_matrices,
    "mma": warp.multiply_matrices, "wgmma": warp.start_product,
}  # fmt: skip


# Control: beginnings of opcodes, and what they do to the machine given their numbers.


CONTROL = {
    "bar.sync": lambda m, number: m.shared.barrier(),
    "cp.async.commit_group": lambda m: m.copies.commit(),
    "cp.async.wait_group": lambda m, pending: m.copies.wait(pending),
    "wgmma.commit_group": lambda m: m.products.commit(),
    "wgmma.wait_group": lambda m, pending: m.products.wait(pending),
    "fence.proxy.async": lambda m: m.shared.unfenced.fill(0),
    # threads of a warp run in step, and memory is always seen in order
    **dict.fromkeys(("bar.warp", "fence", "membar", "griddepcontrol", "wgmma.fence"), lambda m, *_: None),
}  # fmt: skip


def decode(i: Instruction) -> Operation:
    """Look an instruction up."""
    effect = next((CONTROL[start] for start in CONTROL if i.opcode.startswith(start)), None)
    try:
        if effect:
            numbers = [int(x, 0) for x in i.operands]
            return Operation(lambda m: effect(m, *numbers), on_machine=True, collective=True)
        return HANDLERS.get(i.mnemonic, _pure)(i)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise EmulationError(f"not emulated: {i} ({error!r})") from None
