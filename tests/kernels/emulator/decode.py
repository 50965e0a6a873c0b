"""The tables of instructions: what each reads, writes and computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import collective as warp
from . import numbers as n
from .numbers import f4, f8, i1, i2, i4, i8, u1, u2, u4, u8
from .ptx import EmulationError, Instruction, address, vector

TYPES = {
    "b8": u1, "u8": u1, "s8": i1, "b16": u2, "u16": u2, "s16": i2, "bf16": u2, "b32": u4, "u32": u4,
    "s32": i4, "f32": f4, "tf32": u4, "bf16x2": u4, "b64": u8, "u64": u8, "s64": i8, "f64": f8,
    "pred": np.bool_,
}  # fmt: skip
UNSIGNED = {i1: u1, i2: u2, i4: u4, i8: u8, f4: u4, f8: u8}
WIDE = {i2: i4, u2: u4, i4: i8, u4: u8}
FLOATING = (f4, f8)


@dataclass(slots=True)
class Operation:
    """A decoded instruction: `compute` maps the sources to the targets' values.

    With `on_machine` it takes the machine first. A `collective` one must be run by every thread. Sources and
    targets are pairs of an operand and the type that it is taken as.
    """

    instruction: Instruction
    compute: Callable
    sources: list[tuple[str, type]] = field(default_factory=list)
    targets: list[tuple[str, type]] = field(default_factory=list)
    on_machine: bool = False
    collective: bool = False


# Pure instructions: rules (type, modifiers) -> (function, result type, *source types).


def _same(function, floating=None):
    """All operands have the result's type; `floating` replaces the function for floating-point types."""

    def rule(t, modifiers):
        compute = floating if floating and t in FLOATING else function
        if "NaN" in modifiers:
            compute = function
        if "ftz" in modifiers and t is f4:
            exact = compute
            compute = lambda *x: n.flush(exact(*x))  # noqa: E731
        return compute, t, t, t, t

    return rule


def _multiply(t, modifiers):
    """mul and mad."""
    if "wide" in modifiers:
        w = WIDE[t]
        return lambda a, b, *c: sum(c, a.astype(w) * b.astype(w)), w, t, t, w
    if "hi" in modifiers:
        return lambda a, b, *c: sum(c, n.multiply_high(a, b)), t, t, t, t
    if t in FLOATING:
        return np.multiply, t, t, t
    return lambda a, b, *c: sum(c, a * b), t, t, t, t


def _compare(t, modifiers):
    """setp: with another predicate to combine with, and the opposite for a second target."""
    compare = n.comparison(modifiers[0], t in FLOATING)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(modifiers[1])
    if not combine:
        return compare, np.bool_, t, t
    return lambda a, b, p: combine(compare(a, b), p), np.bool_, t, t, np.bool_


def _convert(_, modifiers):
    to, source = [m for m in modifiers if m in TYPES][:2]
    t, s = TYPES[to], TYPES[source]
    rounding = next((m for m in modifiers if m in n.ROUNDINGS), None)
    if to == "tf32" and "rna" in modifiers:
        return n.round_tf32, u4, f4
    if to == "bf16x2":
        return n.pack_bf16, u4, f4, f4
    if to == "bf16" and s is f4:
        return n.to_bf16, u2, f4
    if source == "bf16" and t is f4:
        return n.from_bf16, f4, u2
    if {to, source} & {"tf32", "bf16", "f16", "f16x2"}:
        raise KeyError(to)
    if rounding and t not in FLOATING:
        return n.to_integer(t, rounding), t, s
    turn = n.ROUNDINGS.get(rounding, lambda x: x)
    return lambda x: turn(x).astype(t), t, s


RULES = {
    "add": _same(np.add), "sub": _same(np.subtract), "and": _same(np.bitwise_and), "or": _same(np.bitwise_or),
    "xor": _same(np.bitwise_xor), "neg": _same(np.negative), "abs": _same(np.abs), "sqrt": _same(np.sqrt),
    "div": _same(n.divide, np.divide), "rem": _same(n.remainder), "min": _same(np.minimum, np.fmin),
    "max": _same(np.maximum, np.fmax), "fma": _same(n.fma), "ex2": _same(n.exp2), "lg2": _same(n.log2),
    "not": lambda t, m: (np.logical_not if t is np.bool_ else np.invert, t, t),
    "mul": _multiply, "mad": _multiply, "setp": _compare, "cvt": _convert,
    "selp": lambda t, m: (lambda a, b, p: np.where(p, a, b), t, t, t, np.bool_),
    "shl": lambda t, m: (n.shift_left, t, t, u4), "shr": lambda t, m: (n.shift_right, t, t, u4),
    "bfe": lambda t, m: (n.bit_field, t, t, u4, u4), "prmt": lambda t, m: (n.permute, u4, u4, u4, u4),
}  # fmt: skip
ANY_SIGN = ("add", "sub", "and", "or", "xor", "not")  # taken as unsigned: fewer conversions of registers


def _pure(i: Instruction, t: type) -> Operation:
    t = UNSIGNED.get(t, t) if i.mnemonic in ANY_SIGN and t not in FLOATING else t
    compute, result, *types = RULES[i.mnemonic](t, i.modifiers)
    names, sources = vector(i.operands[0]), i.operands[1:]
    if len(names) > 1:  # setp p|q
        if len(types) > 2:
            raise KeyError("two results and a combination")
        once = compute
        compute = lambda *x: (lambda p: (p, ~p))(once(*x))  # noqa: E731
    return Operation(i, compute, list(zip(sources, types, strict=False)), [(name, result) for name in names])


def _move(i: Instruction, kept: Callable[[str], type]) -> Operation:
    """mov has no type of its own; {a, b} are the halves of a register."""
    target, source = i.operands
    if not (target + source).count("{"):
        t = kept(target)
        return Operation(i, lambda x: x, [(source, t)], [(target, t)])
    part, whole = {"b32": (u2, u4), "b64": (u4, u8)}[i.modifiers[-1]]
    bits = whole(n.BITS[part])
    if target.startswith("{"):
        halves = [(name, part) for name in vector(target)]
        return Operation(i, lambda x: (x.astype(part), (x >> bits).astype(part)), [(source, whole)], halves)
    halves = [(name, part) for name in vector(source)]
    join = lambda low, high: low.astype(whole) | (high.astype(whole) << bits)  # noqa: E731
    return Operation(i, join, halves, [(target, whole)])


# Memory and other threads: handlers (instruction, type) -> operation.


def _space(i: Instruction) -> tuple[str, type]:
    if any(m.startswith("shared") for m in i.modifiers):
        return "shared", u4
    if "global" in i.modifiers:
        return "global", u8
    raise KeyError("address space")


def _load(i, t):
    targets = [(name, t) for name in vector(i.operands[0])]
    base, offset = address(i.operands[1])
    if "param" in i.modifiers:
        return Operation(i, lambda x: x, [(base, t)], targets)
    space, reach = _space(i)
    return Operation(i, warp.load(i, space, t, len(targets), offset), [(base, reach)], targets, True)


def _store(i, t):
    base, offset = address(i.operands[0])
    space, reach = _space(i)
    values = [(value, t) for value in vector(i.operands[1])]
    return Operation(i, warp.store(i, space, t, offset), [(base, reach), *values], on_machine=True)


def _shuffle(i, t):
    targets = list(zip(vector(i.operands[0]), (u4, np.bool_), strict=False))
    sources = [(operand, u4) for operand in i.operands[1:4]]
    return Operation(i, warp.shuffle(i.modifiers[1], len(targets)), sources, targets, True, True)


def _matrix(i, t):
    """ldmatrix and stmatrix."""
    loads = i.mnemonic == "ldmatrix"
    base, offset = address(i.operands[loads])
    registers = [(name, u4) for name in vector(i.operands[not loads])]
    move = warp.load_matrix if loads else warp.store_matrix
    compute = move(i, len(registers), "trans" in i.modifiers, offset)
    sources, targets = ([], registers) if loads else (registers, [])
    return Operation(i, compute, [(base, u4), *sources], targets, True, True)


def _multiply_matrices(i, t):
    shape, element = i.modifiers[2], i.modifiers[-2]
    if (shape, element) not in (("m16n8k8", "tf32"), ("m16n8k16", "bf16")) or t is not f4:
        raise KeyError(shape)
    d, a, b, c = map(vector, i.operands)
    sources = [(x, u4) for x in a + b] + [(x, f4) for x in c]
    return Operation(i, warp.multiply_matrices(element), sources, [(x, f4) for x in d], True, True)


def _start_product(i, t):
    """wgmma.mma_async."""
    columns, depth = map(int, i.modifiers[3].removeprefix("m64n").split("k"))
    if i.operands[4:6] != ["1", "1"] or i.modifiers[-1] not in warp.READ or i.modifiers[4] != "f32":
        raise KeyError("wgmma")
    d, a = vector(i.operands[0]), vector(i.operands[1])
    accumulator = [(x, f4) for x in d]
    sources = [(x, u4 if len(a) > 1 else u8) for x in a]
    sources += [(i.operands[2], u8), (i.operands[3], np.bool_), *accumulator]
    transposed = [0, 0, *map(int, i.operands[6:])][-2:]
    compute = warp.start_product(i, d, len(a), columns, depth, i.modifiers[-1], transposed)
    return Operation(i, compute, sources, accumulator, True, True)


def _start_copy(i, t):
    """cp.async."""
    (to, to_offset), (source, offset) = map(address, i.operands[:2])
    sources = [(to, u4), (source, u8), *((size, u4) for size in i.operands[3:4])]
    compute = warp.start_copy(i, int(i.operands[2], 0), to_offset, offset)
    return Operation(i, compute, sources, on_machine=True)


HANDLERS = {
    "ld": _load, "st": _store, "shfl": _shuffle, "ldmatrix": _matrix,
    "stmatrix": _matrix, "mma": _multiply_matrices, "wgmma": _start_product, "cp": _start_copy,
}  # fmt: skip


# Control: beginnings of opcodes, and what they do to the machine given their numbers.


def _nothing(m, *_):
    pass


def _barrier(m, number, threads=None):
    if threads not in (None, m.shape[1]):
        raise EmulationError("barrier of a part of the threads")
    m.shared.epoch += 1


CONTROL = {
    "bar.sync": _barrier, "barrier.sync": _barrier,
    "cp.async.commit_group": lambda m: m.commit_copies(),
    "cp.async.wait_group": lambda m, pending: m.wait_copies(pending),
    "cp.async.wait_all": lambda m: (m.commit_copies(), m.wait_copies(0)),
    "wgmma.commit_group": lambda m: m.commit_products(),
    "wgmma.wait_group": lambda m, pending: m.wait_products(pending),
    "fence.proxy.async": lambda m: m.shared.unfenced.fill(0),
    **dict.fromkeys(("bar.warp", "fence", "membar", "griddepcontrol", "wgmma.fence"), _nothing),
}  # fmt: skip


def decode(i: Instruction, kept: Callable[[str], type]) -> Operation:
    """Look an instruction up; `kept` gives the type that a register is kept in (mov has none of its own)."""
    effect = next((CONTROL[start] for start in CONTROL if i.opcode.startswith(start)), None)
    try:
        if effect:
            numbers = [] if effect is _nothing else [int(x, 0) for x in i.operands]
            collective = effect is not _nothing
            return Operation(i, lambda m: effect(m, *numbers), on_machine=True, collective=collective)
        if i.mnemonic == "mov":
            return _move(i, kept)
        t = TYPES.get(i.modifiers[-1]) if i.modifiers else None
        return HANDLERS.get(i.mnemonic, _pure)(i, t)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise EmulationError(f"not emulated: {i} ({error!r})") from None
