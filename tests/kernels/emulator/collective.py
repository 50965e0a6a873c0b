"""Instructions that touch memory or other threads, as functions of the machine and whole registers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .numbers import f4, f8, from_bf16, read_tf32, towards_zero, u2, u4, u8
from .ptx import EmulationError

READ = {"tf32": read_tf32, "bf16": from_bf16}
NAN = np.full((1, 1), np.nan, f4)


def _memory(m, space):
    return m.shared if space == "shared" else m.memory


def _moved(m, addresses, offset):
    return m.full(addresses) + addresses.dtype.type(offset % 2 ** (8 * addresses.itemsize))


def _spread(m, values):
    """Values of the active threads, zero for the others."""
    out = np.zeros(m.shape, values.dtype)
    out[m.active] = values
    return out


def load(instruction, space, t, elements, offset):
    size = np.dtype(t).itemsize

    def compute(m, addresses):
        memory = _memory(m, space)
        at = memory.reach(m, _moved(m, addresses, offset), size * elements, instruction) // size
        values = [_spread(m, memory.views[size][at + i]).view(t) for i in range(elements)]
        return values if elements > 1 else values[0]

    return compute


def store(instruction, space, t, offset):
    size = np.dtype(t).itemsize

    def compute(m, addresses, *values):
        memory = _memory(m, space)
        addresses = _moved(m, addresses, offset)
        at = memory.reach(m, addresses, size * len(values), instruction, write=True) // size
        view = memory.views[size]
        for i, value in enumerate(values):
            value = m.full(value)[m.active].view(view.dtype)
            view[at + i] = value
            if (view[at + i] != value).any():
                m.findings[f"race threads write different values to one place: {instruction}"] += 1

    return compute


def start_copy(instruction, size, to_offset, offset):
    def compute(m, to, source, source_size=None):
        to = m.shared.reach(m, _moved(m, to, to_offset), size, instruction, write=True, lands=True)
        active, warps = m.active, m.warps[m.active]
        if source_size is not None:  # the rest is zero
            if not np.isin(source_size, (0, size)).all():
                raise EmulationError(f"cp.async of a part: {instruction}")
            m.active = active & (source_size > 0)
        places = m.memory.reach(m, _moved(m, source, offset), size, instruction)
        data = np.zeros((*m.shape, size), np.uint8)
        data[m.active] = m.memory.bytes[places[:, None] + np.arange(size)]
        m.active = active
        m.copies.append((to, warps, data[active]))

    return compute


def shuffle(mode, results):
    def compute(m, values, operand, clamp):
        lane = np.arange(m.shape[1], dtype=u4)[None] % u4(32)
        segment, operand = (clamp >> u4(8)) & u4(31), operand & u4(31)
        first = lane & segment
        limit = first | (clamp & u4(31) & ~segment)
        source = {"bfly": lane ^ operand, "idx": first | (operand & ~segment)}
        source = (source | {"up": lane - operand, "down": lane + operand})[mode]
        valid = source.view(np.int32) >= limit.view(np.int32) if mode == "up" else source <= limit
        index = (np.arange(m.shape[1]) // 32 * 32 + np.where(valid, source, lane)).astype(int)
        result = np.take_along_axis(m.full(values), m.full(index), 1)
        return (result, m.full(valid)) if results > 1 else result

    return compute


def _rows(m, addresses, number, offset, instruction, write):
    """Offsets of the 16-byte rows of ldmatrix and stmatrix: (warps, matrices, 8)."""
    m.active = m.full(np.arange(m.shape[1]) % 32 < 8 * number)
    at = m.shared.reach(m, _moved(m, addresses, offset), 16, instruction, write)
    m.active = m.everyone
    return at.reshape(-1, number, 8)


def load_matrix(instruction, number, transposed, offset):
    def compute(m, addresses):
        rows = _rows(m, addresses, number, offset, instruction, write=False)
        if transposed:
            values = m.shared.views[2][(rows >> 1)[..., None] + np.arange(8)].swapaxes(2, 3)
            values = np.ascontiguousarray(values).view(u4)
        else:
            values = m.shared.views[4][(rows >> 2)[..., None] + np.arange(4)]
        values = values.reshape(-1, number, 32)
        out = [values[:, i].reshape(m.shape) for i in range(number)]
        return out if number > 1 else out[0]

    return compute


def store_matrix(instruction, number, transposed, offset):
    def compute(m, addresses, *values):
        rows = _rows(m, addresses, number, offset, instruction, write=True)
        for i, value in enumerate(values):
            value = np.ascontiguousarray(m.full(value)).reshape(-1, 8, 4)
            if transposed:
                value = np.ascontiguousarray(value.view(u2).swapaxes(1, 2)).view(u4)
            m.shared.views[4][(rows[:, i] >> 2)[..., None] + np.arange(4)] = value

    return compute


def _operand_a(registers, groups, element):
    """(groups, 16, K) from the four registers of each thread of a warp."""
    words = np.empty((groups, 16, 8), u4)
    for register, (row, column) in zip(registers, ((0, 0), (8, 0), (0, 4), (8, 4)), strict=True):
        words[:, row : row + 8, column : column + 4] = register.reshape(groups, 8, 4)
    return READ[element](words if element == "tf32" else words.view(u2)).astype(f8)


def multiply_matrices(element):
    def compute(m, *registers):
        registers = [m.full(r) for r in registers]
        groups = registers[0].size // 32
        a = _operand_a(registers[:4], groups, element)
        words = np.empty((groups, 8, 8), u4)
        words[:, :, :4] = registers[4].reshape(groups, 8, 4)
        words[:, :, 4:] = registers[5].reshape(groups, 8, 4)
        b = READ[element](words if element == "tf32" else words.view(u2)).astype(f8)
        c = np.stack([r.reshape(groups, 8, 4) for r in registers[6:]], -1).reshape(groups, 8, 4, 2, 2)
        c = c.transpose(0, 3, 1, 2, 4).reshape(groups, 16, 8)  # (half, row, pair, element)
        d = towards_zero(a @ b.swapaxes(1, 2) + c).reshape(groups, 2, 8, 4, 2)
        return [d[:, half, :, :, i].reshape(m.shape) for half in range(2) for i in range(2)]

    return compute


# wgmma. A product runs from its issue to its wait: it reads shared memory at the wait, and until then its
# accumulator holds NaN.


@dataclass(eq=False)
class Product:
    accumulator: list[str]
    a: list[np.ndarray]  # registers, or the descriptor
    b: np.ndarray
    start: list[np.ndarray]  # accumulator; empty for zero
    before: Product | None  # in flight itself: its result is the accumulator
    held: list[np.ndarray]
    run: object
    result: list[np.ndarray] = field(default_factory=list)


def start_product(instruction, accumulator, registers, columns, depth, element, transposed):
    """`registers` of A: four, or one for a descriptor."""
    size = 4 if element == "tf32" else 2

    def places(m, a, b):
        """Of the operands in shared memory: B, then A unless it is in registers."""
        operands = [(b, columns, transposed[1])] + [(a[0], 64, transposed[0])] * (registers == 1)
        return [_shared_operand(m, d, rows, depth, size, t, instruction) for d, rows, t in operands]

    def run(m, product):
        groups = m.shape[0] * m.shape[1] // 128
        b, *a = (m.shared.views[size][at] for at in places(m, product.a, product.b))
        a = READ[element](a[0]).astype(f8) if a else _operand_a(product.a, 4 * groups, element)
        d = a.reshape(groups, 64, depth) @ READ[element](b).astype(f8).swapaxes(1, 2)
        start = product.before.result if product.before else product.start
        if start:  # (group, warp, row, pair | column block, half, element) to (group, row, column)
            c = np.stack(start, -1).reshape(groups, 4, 8, 4, columns // 8, 2, 2)
            d += c.transpose(0, 1, 5, 2, 4, 3, 6).reshape(groups, 64, columns)
        d = towards_zero(d).reshape(groups, 4, 2, 8, columns // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
        product.result = list(np.ascontiguousarray(np.moveaxis(d.reshape(*m.shape, columns // 2), -1, 0)))

    def compute(m, *values):
        a, (b, keep, *start) = values[:registers], values[registers:]
        if m.shape[1] % 128 or keep.any() != keep.all():
            raise EmulationError(f"wgmma: threads of a warpgroup differ: {instruction}")
        a, b = [m.full(x) for x in a], m.full(b)
        before = m.flying.get(accumulator[0]) if keep.all() else None
        start = [m.full(x) for x in start] if keep.all() and not before else []
        held = []
        if m.shared.checks:
            held = [m.shared.hold(size * at.reshape(-1), instruction) for at in places(m, a, b)]
        product = Product(accumulator, a, b, start, before, held, run)
        m.products.append(product)
        m.flying.update(dict.fromkeys(accumulator, product))
        return [NAN] * len(accumulator)

    return compute


def _shared_operand(m, descriptor, rows, depth, size, transposed, instruction):
    """Element offsets (warpgroups, rows, depth) of an operand that a matrix descriptor names."""
    groups = descriptor.reshape(-1, 128)
    first = groups[:, 0]
    if (groups != first[:, None]).any() or ((first ^ first[0]) >> u8(16)).any():
        raise EmulationError(f"wgmma: descriptors differ: {instruction}")
    low = int(first[0])
    leading, stride = (low >> 16 & 0x3FFF) << 4, (low >> 32 & 0x3FFF) << 4
    swizzle = low >> 62 & 3
    if low >> 49 & 7 or (transposed and size != 2):
        raise EmulationError(f"wgmma: descriptor not emulated: {instruction}")
    span = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]  # bytes of a row of the swizzled pattern
    r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if transposed:
        chunk = span // size
        across, down = (stride, leading) if swizzle == 0 else (leading, stride)
        at = r % chunk * size + r // chunk * across + k % 8 * span + k // 8 * down
    elif swizzle:
        at = r % 8 * span + r // 8 * stride + k * size
    else:
        at = r % 8 * 16 + r // 8 * stride + k * size // 16 * leading + k * size % 16
    at = ((first & u8(0x3FFF)) << u8(4)).astype(np.int64)[:, None, None] + at
    at = at ^ ((at >> 7 & span // 16 - 1) << 4) if swizzle else at
    if at.max() + size > m.shared.size:
        raise EmulationError(f"wgmma: operand outside shared memory: {instruction}")
    programs = np.repeat(m.shared.base[:, 0], len(first) // len(m.shared.base))
    return (at + programs[:, None, None]) // size
