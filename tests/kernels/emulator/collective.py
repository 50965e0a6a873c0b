"""Instructions that touch memory or other threads: decoders of them."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .memory import VIEWS
from .numbers import f4, f8, from_bf16, i4, i8, read_tf32, towards_zero, u1, u2, u4, u8
from .ptx import EmulationError, Instruction, Operation, address, vector

SHUFFLES = {"bfly": np.bitwise_xor, "up": np.subtract, "idx": lambda lane, source: source}
READ = {"tf32": read_tf32, "bf16": from_bf16}
POINTERS = {"global": u8, "shared": u4}
SIZE = {"tf32": 4, "bf16": 2}


def _moved(addresses, offset):
    return addresses + addresses.dtype.type(offset % 2 ** (8 * addresses.itemsize))


def _access(i: Instruction) -> tuple[str, int, type]:
    """Of a load or a store: which memory, and bytes and type of an element."""
    size = int(i.modifiers[-1][1:]) // 8
    (space,) = {"global", "shared", "param"}.intersection(i.modifiers)
    return space, size, VIEWS[size]


def load(i: Instruction) -> Operation:
    targets, (base, offset) = vector(i.operands[0]), address(i.operands[1])
    space, size, t = _access(i)
    if space == "param":
        if i.modifiers[-1] == "s32" and targets[0].startswith("%rd"):  # widened on its way
            return Operation(lambda x: x.astype(i8), [(base, i4)], targets)
        return Operation(lambda x: x, [(base, t)], targets)

    def compute(m, addresses):
        memory = m.spaces[space]
        at = memory.reach(m, _moved(addresses, offset), size * len(targets), i) // size
        return [m.spread(memory.views[size][at + k]) for k in range(len(targets))]

    return Operation(compute, [(base, POINTERS[space])], targets, on_machine=True)


def store(i: Instruction) -> Operation:
    values, (base, offset) = vector(i.operands[1]), address(i.operands[0])
    space, size, t = _access(i)

    def compute(m, addresses, *values):
        memory = m.spaces[space]
        at = memory.reach(m, _moved(addresses, offset), size * len(values), i, write=True) // size
        view = memory.views[size]
        for k, value in enumerate(map(m.picked, values)):
            view[at + k] = value
            if (view[at + k] != value).any():
                m.findings[f"race threads write different values to one place: {i}"] += 1

    return Operation(compute, [(base, POINTERS[space]), *((x, t) for x in values)], on_machine=True)


def start_copy(i: Instruction) -> Operation:
    """cp.async."""
    (to, to_offset), (source, offset) = map(address, i.operands[:2])
    size = int(i.operands[2], 0)

    def compute(m, to, source, *source_size):
        to = m.shared.reach(m, _moved(to, to_offset), size, i, write=True, lands=True)
        active, warps = m.active, m.picked(m.warps)
        for part in source_size:  # nothing, which copies zeros, or all
            if not np.isin(part, (0, size)).all():
                raise EmulationError(f"cp.async of a part: {i}")
            m.active = active & (part > 0)
        data = np.zeros((*m.shape, size), u1)
        memory = m.spaces["global"]
        places = memory.reach(m, _moved(source, offset), size, i)
        data[m.active] = memory.bytes[places[:, None] + np.arange(size)]
        m.active = active
        m.copies.open.append(lambda: m.shared.land(to, warps, data[active]))

    sources = [(to, u4), (source, u8), *((x, u4) for x in i.operands[3:])]
    return Operation(compute, sources, on_machine=True)


def shuffle(i: Instruction) -> Operation:
    """Of whole warps; a lane whose source is outside keeps its value."""
    target, value, operand, limits, _ = i.operands
    source_lane = SHUFFLES[i.modifiers[1]]
    if limits != ("0" if i.modifiers[1] == "up" else "31"):
        raise KeyError("segments")

    def compute(m, values, operand):
        thread = np.arange(m.shape[1])
        lane = thread % 32
        source = source_lane(lane, operand.astype(int) % 32)
        index = thread - lane + np.where((source >= 0) & (source < 32), source, lane)
        return [np.take_along_axis(m.full(values), m.full(index), 1)]

    return Operation(compute, [(value, u4), (operand, u4)], [target], True, True)


def move_matrices(i: Instruction) -> Operation:
    """ldmatrix and stmatrix: 8 x 8 elements of 16 bits, in rows of 4 words, a word per thread."""
    loads = i.mnemonic == "ldmatrix"
    base, offset = address(i.operands[loads])
    registers = vector(i.operands[not loads])
    number = len(registers)

    def places(m, addresses):
        """Of the words in shared memory: (warps, matrices, 8, 4); the first threads give the rows."""
        m.active = m.full(np.arange(m.shape[1]) % 32 < 8 * number)
        at = m.shared.reach(m, _moved(addresses, offset), 16, i, write=not loads)
        m.active = m.everyone
        return at.reshape(-1, number, 8, 1) // 4 + np.arange(4)

    def turned(words):
        if "trans" not in i.modifiers:
            return words
        return np.ascontiguousarray(words.view(u2).swapaxes(2, 3)).view(u4)

    def compute(m, addresses, *values):
        words = m.shared.views[4]
        if loads:
            loaded = turned(words[places(m, addresses)]).swapaxes(0, 1)
            return list(loaded.reshape(number, *m.shape))
        stored = np.stack([m.full(x).reshape(-1, 8, 4) for x in values], 1)
        words[places(m, addresses)] = turned(stored)

    if loads:
        return Operation(compute, [(base, u4)], registers, True, True)
    return Operation(compute, [(base, u4), *((x, u4) for x in registers)], [], True, True)


# Tensor cores. A warp holds matrices in registers, eight rows at a time, one row in four threads.


def _operand(m, registers, element):
    """(warps, rows, K) from two registers per eight rows: the left and the right half."""
    words = np.stack([m.full(x) for x in registers], -1).reshape(-1, 8, 4, 2, len(registers) // 2)
    words = words.transpose(0, 4, 1, 3, 2).reshape(len(words), -1, 8)
    return READ[element](words if element == "tf32" else words.view(u2)).astype(f8)


def _accumulated(m, registers):
    """(warps, 16, columns) from four registers per eight columns: two columns of each half of the rows."""
    c = np.stack([m.full(x) for x in registers], -1).reshape(-1, 8, 4, len(registers) // 4, 2, 2)
    return c.transpose(0, 4, 1, 3, 2, 5).reshape(len(c), 16, -1)


def _accumulator(m, sums):
    """Registers, the inverse of `_accumulated`, of float64 sums."""
    d = towards_zero(sums).reshape(-1, 2, 8, sums.shape[-1] // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(np.ascontiguousarray(d).reshape(-1, *m.shape))


def multiply_matrices(i: Instruction) -> Operation:
    """mma."""
    shape, element = i.modifiers[2], i.modifiers[-2]
    if (shape, element) not in (("m16n8k8", "tf32"), ("m16n8k16", "bf16")) or i.modifiers[-1] != "f32":
        raise KeyError(shape)
    d, a, b, c = map(vector, i.operands)

    def compute(m, *registers):
        a, b = _operand(m, registers[:4], element), _operand(m, registers[4:6], element)
        return _accumulator(m, a @ b.swapaxes(1, 2) + _accumulated(m, registers[6:]))

    return Operation(compute, [*((x, u4) for x in a + b), *((x, f4) for x in c)], d, True, True)


def start_product(i: Instruction) -> Operation:
    """wgmma.mma_async: reads shared memory, and writes its accumulator, when it is waited for."""
    accumulator, a = vector(i.operands[0]), vector(i.operands[1])
    element, size = i.modifiers[-1], SIZE[i.modifiers[-1]]
    columns, depth = map(int, i.modifiers[3].removeprefix("m64n").split("k"))
    transposed = i.operands[6:]  # A unless it is in registers, and B
    if i.operands[4:6] != ["1", "1"] or i.modifiers[4] != "f32" or transposed[:-1] == ["1"]:
        raise KeyError("wgmma")

    def compute(m, *values):
        registers, b, keep = values[: len(a)], values[len(a)], values[len(a) + 1]
        if m.shape[1] % 128 or keep.any() != keep.all():
            raise EmulationError(f"wgmma: threads of a warpgroup differ: {i}")
        places = [_described(m, b, columns, depth, size, transposed[-1:] == ["1"], i)]
        if len(a) == 1:
            places.append(_described(m, registers[0], 64, depth, size, False, i))
        held = [m.shared.hold(size * at.reshape(-1), i) for at in places if m.shared.checks]

        def arrive():
            b, *a = (READ[element](m.shared.views[size][at]).astype(f8) for at in places)
            a = a[0] if a else _operand(m, registers, element).reshape(len(b), 64, depth)
            sums, at = a @ b.swapaxes(1, 2), [m.kernel.index[name] for name in accumulator]
            if keep.all():
                sums += _accumulated(m, [m.registers[x].view(f4) for x in at]).reshape(sums.shape)
            for x, value in zip(at, _accumulator(m, sums), strict=True):
                m.registers[x] = value
            for grains in held:
                m.shared.release(grains)
            m.accumulators -= Counter(accumulator)

        m.products.open.append(arrive)
        m.accumulators.update(accumulator)

    sources = [(x, u4 if len(a) > 1 else u8) for x in a]
    sources += [(i.operands[2], u8), (i.operands[3], np.bool_), *((x, f4) for x in accumulator)]
    return Operation(compute, sources, [], True, True)


def _described(m, descriptor, rows, depth, size, transposed, i):
    """Element offsets (warpgroups, rows, depth) of an operand that a matrix descriptor names."""
    groups = m.full(descriptor).reshape(-1, 128)
    first = groups[:, 0]
    if (groups != first[:, None]).any() or ((first ^ first[0]) >> u8(16)).any():
        raise EmulationError(f"wgmma: descriptors differ: {i}")
    low = int(first[0])
    leading, stride, swizzle = (low >> 16 & 0x3FFF) << 4, (low >> 32 & 0x3FFF) << 4, low >> 62 & 3
    if low >> 49 & 7 or not swizzle or (transposed and size != 2):
        raise EmulationError(f"wgmma: descriptor not emulated: {i}")
    span = {1: 128, 2: 64, 3: 32}[swizzle]  # bytes of a row of the swizzled pattern
    r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if transposed:
        chunk = span // size
        at = r % chunk * size + r // chunk * leading + k % 8 * span + k // 8 * stride
    else:
        at = r % 8 * span + r // 8 * stride + k * size
    at = ((first & u8(0x3FFF)) << u8(4)).astype(np.int64)[:, None, None] + at
    at = at ^ ((at >> 7 & span // 16 - 1) << 4)
    if at.max() + size > m.shared.size:
        raise EmulationError(f"wgmma: operand outside shared memory: {i}")
    programs = np.repeat(m.shared.base[:, 0], len(first) // len(m.shared.base))
    return (at + programs[:, None, None]) // size
