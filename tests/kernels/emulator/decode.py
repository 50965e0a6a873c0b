"""The table of instructions: what each reads, writes and computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import collective as warp
from . import numbers as n
from .numbers import f4, f8, i2, i4, i8, u1, u2, u4, u8
from .ptx import EmulationError, Instruction, address, vector

TYPES = {
    "b8": u1, "u8": u1, "s8": np.int8, "b16": u2, "u16": u2, "s16": i2, "f16": u2, "bf16": u2, "b32": u4,
    "u32": u4, "s32": i4, "f32": f4, "tf32": u4, "f16x2": u4, "bf16x2": u4, "b64": u8, "u64": u8, "s64": i8,
    "f64": f8, "pred": np.bool_,
}  # fmt: skip
UNSIGNED = {i2: u2, i4: u4, i8: u8, f4: u4, f8: u8, np.int8: u1}
WIDE = {i2: i4, u2: u4, i4: i8, u4: u8}
HALF = {"f16": (n.from_f16, n.to_f16), "bf16": (n.from_bf16, n.to_bf16)}

# Every operand and the result have the instruction's type; integers may be taken as unsigned in the first.
ANY_SIGN = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
ANY_SIGN |= {"not": np.invert}
SAME_TYPE = {
    "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs, "rem": n.remainder,
    "sqrt": np.sqrt, "rcp": n.reciprocal, "rsqrt": n.reciprocal_root, "ex2": n.exp2, "lg2": n.log2,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip
FLOATING = SAME_TYPE | ANY_SIGN | {"mul": np.multiply, "div": np.divide, "min": np.fmin, "max": np.fmax}


@dataclass(slots=True)
class Operation:
    """A decoded instruction: `compute` maps the sources to the targets' values.

    With `on_machine` it also takes the machine first. A `collective` one must be run by every thread.
    """

    instruction: Instruction
    compute: Callable
    sources: list[tuple[str, type]] = field(default_factory=list)
    targets: list[tuple[str, type]] = field(default_factory=list)
    on_machine: bool = False
    collective: bool = False
    forgets: bool = False  # writes registers that are not its targets


def decode(instruction: Instruction, register_type: Callable[[str], type]) -> Operation:
    """Look the instruction up; `register_type` says how a register is kept (for mov, which has no type)."""
    mnemonic, modifiers = instruction.mnemonic, instruction.modifiers
    handler = HANDLERS.get(mnemonic)
    try:
        if handler:
            return handler(instruction, modifiers, instruction.operands, register_type)
        return _arithmetic(instruction, modifiers, instruction.operands)
    except (KeyError, IndexError, ValueError) as error:
        raise EmulationError(f"not emulated: {instruction} ({error!r})") from None


def result_types(instruction: Instruction) -> list[tuple[str, type]]:
    """Targets of an instruction that has a type of its own."""
    if instruction.mnemonic == "mov" and not instruction.operands[0].startswith("{"):
        return []
    return decode(instruction, lambda _: u4).targets


def _pure(instruction, compute, result, *types, targets=None, operands=None):
    operands = operands or instruction.operands[1:]
    names = targets or vector(instruction.operands[0])
    sources = list(zip(operands, types, strict=True))
    return Operation(instruction, compute, sources, [(name, result) for name in names])


def _arithmetic(instruction, modifiers, operands):
    mnemonic, kind = instruction.mnemonic, modifiers[-1]
    t = TYPES[kind]
    arity = len(operands) - 1
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        function = n.halves(n.fma if mnemonic == "fma" else FLOATING[mnemonic], *HALF[kind.removesuffix("x2")])
        return _pure(instruction, n.paired(function) if kind.endswith("x2") else function, t, *[t] * arity)
    if t in (f4, f8):
        function = n.fma_double if t is f8 else n.fma
        function = function if mnemonic == "fma" else FLOATING[mnemonic]
        if "NaN" in modifiers:
            function = {"min": np.minimum, "max": np.maximum}[mnemonic]
        if "ftz" in modifiers and t is f4:
            exact = function
            return _pure(instruction, lambda *x: n.flush(exact(*x)), t, *[t] * arity)
        return _pure(instruction, function, t, *[t] * arity)
    if mnemonic in ANY_SIGN:
        t = np.bool_ if kind == "pred" else UNSIGNED.get(t, t)
        function = np.logical_not if mnemonic == "not" and kind == "pred" else ANY_SIGN[mnemonic]
        return _pure(instruction, function, t, *[t] * arity)
    return _pure(instruction, SAME_TYPE[mnemonic], t, *[t] * arity)


def _multiply(instruction, modifiers, operands, _):
    """mul and mad."""
    t = TYPES[modifiers[-1]]
    more = [] if instruction.mnemonic == "mul" else [None]
    if t in (f4, f8):
        return _arithmetic(instruction, modifiers, operands)
    if "wide" in modifiers:
        w = WIDE[t]

        def compute(a, b, *c):
            product = a.astype(w) * b.astype(w)
            return product + c[0] if c else product

        return _pure(instruction, compute, w, t, t, *[w for _ in more])
    if "hi" in modifiers:
        return _pure(
            instruction,
            lambda a, b, *c: n.multiply_high(a, b) + (c[0] if c else t(0)),
            t, t, t, *[t for _ in more],
        )  # fmt: skip
    t = UNSIGNED.get(t, t)
    return _pure(instruction, n.multiply_add if more else np.multiply, t, t, t, *[t for _ in more])


def _divide(instruction, modifiers, operands, _):
    t = TYPES[modifiers[-1]]
    return _pure(instruction, np.divide if t in (f4, f8) else n.divide, t, t, t)


def _shift(instruction, modifiers, operands, _):
    t = TYPES[modifiers[-1]]
    return _pure(instruction, n.shift_left if instruction.mnemonic == "shl" else n.shift_right, t, t, u4)


def _bits(instruction, modifiers, operands, _):
    """bfe, bfi, prmt, lop3, shf, popc, clz."""
    t = TYPES[modifiers[-1]]
    compute, types = {
        "bfe": (n.bit_field, (t, u4, u4)), "bfi": (n.insert_field, (t, t, u4, u4)),
        "prmt": (n.permute, (u4, u4, u4)), "lop3": (n.logic, (u4, u4, u4, u4)),
        "shf": (n.funnel("l" in modifiers, "wrap" in modifiers), (u4, u4, u4)),
        "popc": (n.count_bits, (t,)), "clz": (n.leading_zeros, (u4,)),
    }[instruction.mnemonic]  # fmt: skip
    return _pure(instruction, compute, t if instruction.mnemonic in ("bfe", "bfi") else u4, *types)


def _compare(instruction, modifiers, operands, _):
    """setp, with a second target for the opposite and a predicate to combine with."""
    t = TYPES[modifiers[-1]]
    compare = n.comparison(modifiers[0], t in (f4, f8))
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(modifiers[1])
    targets = [name.strip() for name in operands[0].split("|")]

    def compute(a, b, *other):
        results = [compare(a, b)]
        if len(targets) > 1:
            results.append(~results[0])
        if combine:
            results = [combine(r, other[0]) for r in results]
        return results if len(targets) > 1 else results[0]

    return _pure(instruction, compute, np.bool_, t, t, *[np.bool_] * bool(combine), targets=targets)


def _select(instruction, modifiers, operands, _):
    t = TYPES[modifiers[-1]]
    return _pure(instruction, lambda a, b, p: np.where(p, a, b), t, t, t, np.bool_)


def _move(instruction, modifiers, operands, register_type):
    target, source = operands
    wide = {"b32": (u2, u4, 16), "b64": (u4, u8, 32)}.get(modifiers[-1])
    if target.startswith("{"):
        part, whole, bits = wide
        return _pure(
            instruction, lambda x: (x.astype(part), (x >> whole(bits)).astype(part)), part, whole
        )
    if source.startswith("{"):
        part, whole, bits = wide
        return _pure(
            instruction,
            lambda low, high: low.astype(whole) | (high.astype(whole) << whole(bits)),
            whole, part, part, operands=vector(source),
        )  # fmt: skip
    t = register_type(target)
    return _pure(instruction, lambda x: x, t, t)


def _convert(instruction, modifiers, operands, _):
    to, source = [m for m in modifiers if m in TYPES][:2]
    t, s = TYPES[to], TYPES[source]
    if to == "tf32":
        return _pure(instruction, n.round_tf32 if "rna" in modifiers else n.round_tf32_even, u4, f4)
    if to in ("bf16x2", "f16x2"):
        encode = HALF[to[:-2]][1]
        return _pure(instruction, lambda high, low: n.pack(encode(low), encode(high)), u4, f4, f4)
    if to in HALF or source in HALF:
        steps = [HALF[source][0]] if source in HALF else []
        steps += [HALF[to][1]] if to in HALF else []
        if not (source in HALF or s is f4) or not (to in HALF or t is f4):
            raise KeyError(to)
        return _pure(instruction, lambda x: steps[-1](steps[0](x)) if len(steps) > 1 else steps[0](x), t, s)
    rounding = next((m for m in modifiers if m in ("rzi", "rni", "rmi", "rpi")), None)
    if rounding and t not in (f4, f8):
        return _pure(instruction, n.to_integer(t, rounding), t, s)
    if rounding:
        turn = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding]
        return _pure(instruction, lambda x: turn(x).astype(t), t, s)
    return _pure(instruction, lambda x: x.astype(t), t, s)


def _load(instruction, modifiers, operands, _):
    t = TYPES[modifiers[-1]]
    names = vector(operands[0])
    targets = [(name, t) for name in names]
    base, offset = address(operands[1])
    if "param" in modifiers:
        return Operation(instruction, lambda x: x, [(base, t)], targets)
    where, reach = _space(modifiers)
    compute = warp.load(where, t, len(names), offset, instruction)
    return Operation(instruction, compute, [(base, reach)], targets, on_machine=True)


def _store(instruction, modifiers, operands, _):
    t = TYPES[modifiers[-1]]
    base, offset = address(operands[0])
    where, reach = _space(modifiers)
    sources = [(base, reach), *((value, t) for value in vector(operands[1]))]
    return Operation(instruction, warp.store(where, t, offset, instruction), sources, on_machine=True)


def _space(modifiers):
    shared = any(m.startswith("shared") for m in modifiers)
    if not shared and "global" not in modifiers:
        raise KeyError("address space")
    return ("shared", u4) if shared else ("global", u8)


def _atomic(instruction, modifiers, operands, _):
    """atom and red, of global memory."""
    t = TYPES[modifiers[-1]]
    targets = [(operands[0], t)] if instruction.mnemonic == "atom" else []
    place, *values = operands[len(targets) :]
    base, offset = address(place)
    if "global" not in modifiers:
        raise KeyError("address space")
    name = next(m for m in modifiers if m in warp.ATOMIC)
    compute = warp.atomic(name, t, offset, instruction, bool(targets))
    return Operation(instruction, compute, [(base, u8), *((v, t) for v in values)], targets, on_machine=True)


def _shuffle(instruction, modifiers, operands, _):
    targets = [name.strip() for name in operands[0].split("|")]
    compute = warp.shuffle(modifiers[1], len(targets) > 1)
    types = [(targets[0], u4), *((name, np.bool_) for name in targets[1:])]
    sources = [(operand, u4) for operand in operands[1:4]]
    return Operation(instruction, compute, sources, types, on_machine=True, collective=True)


def _vote(instruction, modifiers, operands, _):
    ballot = modifiers[1] == "ballot"
    compute = warp.vote(modifiers[1])
    targets = [(operands[0], u4 if ballot else np.bool_)]
    return Operation(instruction, compute, [(operands[1], np.bool_)], targets, True, True)


def _matrix(instruction, modifiers, operands, _):
    """ldmatrix and stmatrix."""
    load = instruction.mnemonic == "ldmatrix"
    base, offset = address(operands[int(load)])
    registers = [(name, u4) for name in vector(operands[0 if load else 1])]
    move = warp.load_matrix if load else warp.store_matrix
    compute = move(len(registers), "trans" in modifiers, offset, instruction)
    sources, targets = ([], registers) if load else (registers, [])
    return Operation(instruction, compute, [(base, u4), *sources], targets, True, True)


def _multiply_matrices(instruction, modifiers, operands, _):
    shape, element = modifiers[2], modifiers[-2]
    if shape not in ("m16n8k8", "m16n8k16") or modifiers[-1] != "f32" or element not in warp.READ:
        raise KeyError(shape)
    if (shape == "m16n8k8") != (element == "tf32"):
        raise KeyError(element)
    a, b, c = (vector(operand) for operand in operands[1:])
    sources = [(x, u4) for x in a + b] + [(x, f4) for x in c]
    targets = [(x, f4) for x in vector(operands[0])]
    return Operation(instruction, warp.multiply_matrices(element), sources, targets, True, True)


def _warpgroup(instruction, modifiers, operands, _):
    action = modifiers[0]
    if action in ("fence", "commit_group", "wait_group"):
        compute = {
            "fence": lambda m: None,
            "commit_group": lambda m: m.commit_products(),
            "wait_group": lambda m: m.wait_products(int(operands[0], 0)),
        }[action]
        return Operation(
            instruction, compute, on_machine=True, collective=True, forgets=action == "wait_group"
        )
    columns, depth = map(int, modifiers[3][len("m64n") :].split("k"))
    element = modifiers[-1]
    scales, transposes = operands[4:6], [int(x) for x in operands[6:]]
    if scales != ["1", "1"] or element not in warp.READ or modifiers[4] != "f32":
        raise KeyError(scales)
    accumulator, a = vector(operands[0]), vector(operands[1])
    in_registers = operands[1].startswith("{")
    sources = [(x, u4 if in_registers else u8) for x in a]
    sources += [(operands[2], u8), (operands[3], np.bool_), *((x, f4) for x in accumulator)]
    transposes = [0] * (2 - len(transposes)) + transposes
    compute = warp.start_product(
        accumulator, in_registers, columns, depth, element, transposes, instruction
    )
    targets = [(x, f4) for x in accumulator]
    return Operation(instruction, compute, sources, targets, True, True)


def _copy(instruction, modifiers, operands, _):
    """cp.async: lands at its wait."""
    if modifiers[0] != "async":
        raise KeyError(modifiers[0])
    if modifiers[1] in ("commit_group", "wait_group", "wait_all"):
        compute = {
            "commit_group": lambda m: m.commit_copies(),
            "wait_group": lambda m: m.wait_copies(int(operands[0], 0)),
            "wait_all": lambda m: (m.commit_copies(), m.wait_copies(0)),
        }[modifiers[1]]
        return Operation(instruction, compute, on_machine=True, collective=True)
    (to, to_offset), (source, offset) = address(operands[0]), address(operands[1])
    sources = [(to, u4), (source, u8), *((size, u4) for size in operands[3:4])]
    compute = warp.start_copy(int(operands[2], 0), to_offset, offset, instruction)
    return Operation(instruction, compute, sources, on_machine=True)


def _barrier(instruction, modifiers, operands, _):
    if modifiers[:2] == ["warp", "sync"]:
        return Operation(instruction, lambda m: None, on_machine=True)
    if modifiers[0] not in ("sync", "cta") or "red" in modifiers:
        raise KeyError(modifiers[0])

    def compute(m):
        if len(operands) > 1 and int(operands[1], 0) != m.shape[1]:
            raise EmulationError(f"barrier of a part of the threads: {instruction}")
        m.shared.epoch += 1

    return Operation(instruction, compute, on_machine=True, collective=True)


def _fence(instruction, modifiers, operands, _):
    """Only the fence between ordinary stores and the tensor cores' reads has an effect here."""
    proxy = "proxy" in modifiers and "async" in ".".join(modifiers)
    compute = (lambda m: m.shared.fence()) if proxy else (lambda m: None)
    return Operation(instruction, compute, on_machine=True)


HANDLERS = {
    "mul": _multiply, "mad": _multiply, "div": _divide, "shl": _shift, "shr": _shift, "setp": _compare,
    "selp": _select, "mov": _move, "cvt": _convert, "ld": _load, "st": _store, "atom": _atomic,
    "red": _atomic, "shfl": _shuffle, "vote": _vote, "ldmatrix": _matrix, "stmatrix": _matrix,
    "mma": _multiply_matrices, "wgmma": _warpgroup, "cp": _copy, "bar": _barrier, "barrier": _barrier,
    "fence": _fence, "membar": _fence, "griddepcontrol": _fence, "nanosleep": _fence,
    **dict.fromkeys(("bfe", "bfi", "prmt", "lop3", "shf", "popc", "clz"), _bits),
}  # fmt: skip
