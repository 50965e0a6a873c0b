"""A compiled kernel as numpy closures, and the machine that runs bundles of its programs in step.

A register is an array (programs, threads); what is equal in all of them is kept as (1, 1). Programs that take
different ways are split into two bundles. Threads of a program that do are run block by block under a mask
until they meet again.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from itertools import product

import numpy as np

from .decode import TYPES, UNSIGNED, Operation, decode, result_types
from .memory import Counts, GlobalMemory, SharedMemory
from .numbers import u4
from .ptx import EmulationError, Instruction, parse

BUNDLE = 2048  # threads that run in step: enough that numpy's overhead does not dominate
AXES = "xyz"
SPECIAL = ("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid", "%cluster")
POISON = 0xFFBADBADBADBADBAD
NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?")
FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]{8,16})")


class Step:
    """One closure of a block; `guard` is a register or -1."""

    __slots__ = ("run", "targets", "guard", "negated", "collective", "instruction")

    def __init__(self, run, targets=(), guard=-1, negated=False, operation: Operation | None = None):
        self.run, self.targets, self.guard, self.negated = run, targets, guard, negated
        self.collective = operation is not None and operation.collective
        self.instruction = operation and operation.instruction


class Block:
    """Straight-line code; `jump` is (guard, negated, block) or None."""

    def __init__(self):
        self.steps: list[Step] = []
        self.jump = None
        self.opcodes = Counter()


class Kernel:
    """A kernel translated from PTX.

    Parameters
    ----------
    ptx : str
        A module with one entry, as Triton writes it.
    warps : int
        Per program.
    shared_bytes : int
        Dynamic shared memory of a program.
    """

    def __init__(self, ptx: str, warps: int, shared_bytes: int):
        self.entry = parse(ptx)
        self.threads, self.shared_bytes = 32 * warps, shared_bytes
        self.index: dict[str, int] = {}
        self.types: list[type] = []
        self.initial: list[np.ndarray] = []
        self.kept = {}
        for block in self.entry.blocks:
            for instruction in block:
                if instruction.mnemonic not in ("bra", "ret", "exit"):
                    for name, t in result_types(instruction):
                        self.kept.setdefault(name, t)
        self.blocks = [self._block(instructions) for instructions in self.entry.blocks]
        self.grain = min([4, *map(_element_size, sum(self.entry.blocks, []))])

    # Translation

    def _register_type(self, name: str) -> type:
        """How a register is kept: as its first instruction with a type gives it, at its declared width."""
        declared = TYPES[self.entry.banks.get(name.rstrip("0123456789"), "b32")]
        t = self.kept.get(name, UNSIGNED.get(declared, declared))
        return t if np.dtype(t).itemsize == np.dtype(declared).itemsize else UNSIGNED.get(declared, declared)

    def _new(self, name: str, t: type, value) -> int:
        self.index[name] = len(self.types)
        self.types.append(t)
        self.initial.append(value)
        return self.index[name]

    def register(self, name: str) -> int:
        if name not in self.index:
            t = self._register_type(name)
            self._new(name, t, np.zeros((1, 1), bool) if t is np.bool_ else _bits(POISON, t))
        return self.index[name]

    def _operand(self, text: str, t: type, views: dict, steps: list[Step]) -> int:
        """The register that holds an operand as type `t`; adds the step that converts it where needed."""
        number = FLOAT.fullmatch(text) or NUMBER.fullmatch(text)
        if text in self.entry.parameters:
            name = f"[{text}] {t.__name__}"
            return self.index[name] if name in self.index else self._new(name, t, None)
        if number or text == "global_smem":
            name = f"{text} {t.__name__}"
            value = 0 if not number else int(number[1], 16) if FLOAT.fullmatch(text) else _integer(text)
            return self.index[name] if name in self.index else self._new(name, t, _bits(value, t))
        if text.startswith("!"):
            at = self._operand(text[1:], t, views, steps)
            return self._converted((at, "!"), t, np.logical_not, at, views, steps)
        if text.startswith(SPECIAL):
            at = self.index[text] if text in self.index else self._new(text, u4, None)
        else:
            at = self.register(text)
        kept = self.types[at]
        if kept is t:
            return at
        small, large = np.dtype(t).itemsize, np.dtype(kept).itemsize
        if small > large or np.bool_ in (kept, t):
            raise EmulationError(f"register {text} of {kept.__name__} read as {t.__name__}")
        unsigned = UNSIGNED.get(t, t)
        if small == large:
            return self._converted((at, t), t, lambda x: x.view(t), at, views, steps)
        whole = UNSIGNED.get(kept, kept)
        narrow = lambda x: x.view(whole).astype(unsigned).view(t)  # noqa: E731
        return self._converted((at, t), t, narrow, at, views, steps)

    def _converted(self, key, t, function, at, views, steps) -> int:
        if key not in views:
            name = f"view {key[0]} {key[1]}"
            views[key] = self.index[name] if name in self.index else self._new(name, t, None)
            steps.append(Step(_closure(function, [views[key]], [at], False)))
        return views[key]

    def _block(self, instructions: list[Instruction]) -> Block:
        block, views = Block(), {}
        for instruction in instructions:
            block.opcodes[instruction.opcode] += 1
            guard = self.register(instruction.guard) if instruction.guard else -1
            if instruction.mnemonic in ("bra", "ret", "exit"):
                ends = instruction.mnemonic != "bra"
                to = len(self.entry.blocks) if ends else self.entry.labels[instruction.operands[0]]
                block.jump = (guard, instruction.negated, to)
                continue
            operation = decode(instruction, self._register_type)
            sources = [self._operand(text, t, views, block.steps) for text, t in operation.sources]
            targets = [self.register(name) for name, _ in operation.targets if name != "_"]
            compute = self._fitted(operation)
            run = _closure(compute, targets, sources, operation.on_machine)
            block.steps.append(Step(run, targets, guard, instruction.negated, operation))
            for key in [k for k in views if operation.forgets or k[0] in targets]:
                del views[key]
        return block

    def _fitted(self, operation: Operation):
        """The operation's function with its results in the types that their registers are kept in."""
        kept = [self._register_type(name) for name, _ in operation.targets]
        given = [t for _, t in operation.targets]
        if kept == given and all(name != "_" for name, _ in operation.targets):
            return operation.compute
        compute = operation.compute

        def fitted(*sources):
            values = compute(*sources)
            values = values if len(kept) > 1 else [values]
            values = [
                x.view(k) if x.itemsize == np.dtype(k).itemsize else x.astype(k)
                for x, k, (name, _) in zip(values, kept, operation.targets, strict=True)
                if name != "_"
            ]
            return values if len(values) > 1 else values[0]

        return fitted

    # Execution

    def launch(
        self, memory: GlobalMemory, parameters: list, grid: tuple[int, ...], checks=True, count=True
    ) -> tuple[Counter, Counts]:
        """Run all programs of a grid; returns findings and counts.

        `parameters` are integers and floats in the order of the entry's. Races are looked for in the first
        bundle of programs: the others run the same code.
        """
        grid = (*grid, 1, 1)[:3]
        programs = np.array([p[::-1] for p in product(*map(range, grid[::-1]))])
        findings, counts = Counter(), Counts(len(self.blocks))
        size = max(BUNDLE // self.threads, 1)
        with np.errstate(all="ignore"):
            for first in range(0, len(programs), size):
                bundle = programs[first : first + size]
                machine = Machine(self, memory, bundle, grid, parameters, findings)
                machine.shared = SharedMemory(
                    len(bundle), self.shared_bytes, self.grain, checks and not first, findings
                )
                machine.counts = counts if count else None
                counts.programs += len(bundle)
                self._run(machine, counts)
        return findings, counts

    def _run(self, machine: Machine, counts: Counts) -> None:
        waiting, end = [(machine, 0)], len(self.blocks)
        while waiting:
            m, at = waiting.pop()
            while at < end:
                block = self.blocks[at]
                counts.blocks[at] += m.shape[0]
                registers = m.registers
                for step in block.steps:
                    if step.guard < 0:
                        step.run(m, registers)
                    else:
                        m.run_where(registers[step.guard] ^ step.negated, step)
                at, taken = at + 1, m.taken(block)
                if taken is None or not taken.any():
                    continue
                if taken.all():
                    at = block.jump[2]
                    continue
                ways = taken.any(1)
                if len(taken) == m.shape[0] and (ways == taken.all(1)).all():
                    waiting.append((m.select(ways), block.jump[2]))
                    m = m.select(~ways)
                else:
                    at = self._run_apart(m, np.where(m.full(taken), block.jump[2], at), counts)
            m.finish()

    def _run_apart(self, m: Machine, at: np.ndarray, counts: Counts) -> int:
        """Run threads that went different ways until they meet; returns the block where they do."""
        while True:
            first = int(at.min())
            mask = at == first
            if mask.all():
                return first
            block = self.blocks[first]
            counts.blocks[first] += int(mask.any(1).sum())
            for step in block.steps:
                if step.collective:
                    raise EmulationError(f"run by a part of the threads: {step.instruction}")
                if step.instruction is None:
                    step.run(m, m.registers)
                else:
                    guard = True if step.guard < 0 else m.registers[step.guard] ^ step.negated
                    m.run_where(mask & guard, step)
            taken = m.taken(block)
            following = first + 1 if taken is None else np.where(taken, block.jump[2], first + 1)
            at = np.where(mask, following, at)


class Machine:
    """Registers, memories and everything in flight of a bundle of programs."""

    def __init__(self, kernel: Kernel, memory: GlobalMemory, programs, grid, parameters, findings: Counter):
        self.kernel, self.memory, self.findings = kernel, memory, findings
        self.shared: SharedMemory | None = None
        self.counts: Counts | None = None
        self.shape = (len(programs), kernel.threads)
        self.active = None
        self.copies, self.copy_groups = [], []
        self.products, self.product_groups, self.flying = [], [], {}
        self._lanes()
        self.registers = list(kernel.initial)
        thread = np.arange(kernel.threads, dtype=u4)[None]
        values = {"%laneid": thread % u4(32), "%warpid": thread // u4(32)}
        for i, axis in enumerate(AXES):
            values[f"%tid.{axis}"] = thread if i == 0 else np.zeros((1, 1), u4)
            values[f"%ntid.{axis}"] = _bits(kernel.threads if i == 0 else 1, u4)
            values[f"%ctaid.{axis}"] = programs[:, i : i + 1].astype(u4)
            values[f"%nctaid.{axis}"] = _bits(grid[i], u4)
        given = dict(zip(kernel.entry.parameters, parameters, strict=True))
        for name, at in kernel.index.items():
            if name in values:
                self.registers[at] = values[name]
            elif name.startswith("["):
                value, t = given[name[1:].split("]")[0]], kernel.types[at]
                if isinstance(value, float):
                    value = int(np.float32(value).view(u4))
                self.registers[at] = _bits(value, t)

    def _lanes(self) -> None:
        self.warps = np.broadcast_to(np.arange(self.shape[1]) // 32, self.shape)
        self.everywhere = np.ones(self.shape, bool)

    def every_lane(self, lanes: int) -> np.ndarray:
        """The first lanes of every warp."""
        return np.broadcast_to(np.arange(self.shape[1]) % 32 < lanes, self.shape)

    def full(self, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, self.shape)

    def taken(self, block: Block) -> np.ndarray | None:
        """Which threads take the block's jump; None where it has none."""
        if block.jump is None:
            return None
        guard, negated, _ = block.jump
        return np.ones((1, 1), bool) if guard < 0 else self.registers[guard] ^ negated

    def run_where(self, active: np.ndarray, step: Step) -> None:
        """Run a step for some threads; the others keep their registers."""
        registers = self.registers
        if active.all():
            step.run(self, registers)
        elif active.any():
            old = [registers[t] for t in step.targets]
            self.active = self.full(active)
            step.run(self, registers)
            self.active = None
            for target, before in zip(step.targets, old, strict=True):
                registers[target] = np.where(active, registers[target], before)

    def select(self, ways: np.ndarray) -> Machine:
        """The machine of some of the programs; what is in flight goes with them."""
        other = copy.copy(self)
        count = self.shape[0]

        def pick(x):
            return x[ways] if x is not None and len(x) == count else x

        other.shape = (int(ways.sum()), self.shape[1])
        other._lanes()
        other.registers = [pick(x) for x in self.registers]
        renumbered = np.cumsum(ways) - 1

        def move(at, unit):
            """Offsets into memory that programs share, of the programs that stay."""
            program = at // unit
            stay = ways[program]
            return stay, renumbered[program[stay]] * unit + at[stay] % unit

        def move_copies(copies):
            moved = []
            for at, warps, data in copies:
                stay, at = move(at, self.shared.size)
                moved.append((at, warps[stay], data[stay]))
            return moved

        products = {}

        def move_product(p):
            if p is None or p in products:
                return products.get(p)
            new = products[p] = copy.copy(p)
            new.a, new.b = [pick(x) for x in p.a], pick(p.b)
            new.start = p.start and [pick(x) for x in p.start]
            new.result = [pick(x) for x in p.result]
            new.before = move_product(p.before)
            new.held = [move(g, self.shared.size // self.shared.grain)[1] for g in p.held]
            return new

        other.copies = move_copies(self.copies)
        other.copy_groups = [move_copies(group) for group in self.copy_groups]
        other.products = [move_product(p) for p in self.products]
        other.product_groups = [[move_product(p) for p in group] for group in self.product_groups]
        other.flying = {name: move_product(p) for name, p in self.flying.items()}
        other.shared = self.shared.select(ways)
        return other

    def commit_copies(self) -> None:
        self.copy_groups.append(self.copies)
        self.copies = []

    def wait_copies(self, pending: int) -> None:
        while len(self.copy_groups) > pending:
            for at, warps, data in self.copy_groups.pop(0):
                self.shared.land(at, warps, data)

    def commit_products(self) -> None:
        self.product_groups.append(self.products)
        self.products = []

    def wait_products(self, pending: int) -> None:
        while len(self.product_groups) > pending:
            for p in self.product_groups.pop(0):
                p.run(self, p)
                p.before = None
                for grains in p.held:
                    self.shared.release(grains)
                for name, value in zip(p.accumulator, p.result, strict=True):
                    if self.flying[name] is p:
                        at = self.kernel.register(name)
                        self.registers[at] = value.view(self.kernel.types[at])
                        del self.flying[name]

    def finish(self) -> None:
        if self.products or any(self.product_groups):
            self.findings["wgmma never waited for"] += 1
        if self.copies:
            self.findings["cp.async never committed"] += 1


def _closure(function, targets, sources, on_machine):
    """A function of (machine, registers) that stores what `function` makes of the sources."""
    if on_machine:

        def run(m, registers):
            results = function(m, *[registers[i] for i in sources])
            if len(targets) == 1:
                registers[targets[0]] = results
            elif targets:
                for target, x in zip(targets, results, strict=True):
                    registers[target] = x

        return run
    if len(targets) > 1:

        def run(m, registers):
            for target, x in zip(targets, function(*[registers[i] for i in sources]), strict=True):
                registers[target] = x

        return run
    (target,), arity = targets, len(sources)
    if arity == 1:
        (a,) = sources

        def run(m, registers):
            registers[target] = function(registers[a])
    elif arity == 2:
        a, b = sources

        def run(m, registers):
            registers[target] = function(registers[a], registers[b])
    else:

        def run(m, registers):
            registers[target] = function(*[registers[i] for i in sources])

    return run


def _bits(value: int, t: type) -> np.ndarray:
    """A (1, 1) array of type `t` with these bits."""
    if t is np.bool_:
        return np.full((1, 1), bool(value))
    unsigned = UNSIGNED.get(t, t)
    size = 8 * np.dtype(t).itemsize
    return np.full((1, 1), int(value) & ((1 << size) - 1), unsigned).view(t)


def _integer(text: str) -> int:
    return int(text.rstrip("U"), 0)


def _element_size(instruction: Instruction) -> int:
    """Bytes of a shared-memory access's elements; 4 for other instructions."""
    shared = instruction.mnemonic in ("ld", "st") and "shared" in instruction.opcode
    return np.dtype(TYPES[instruction.modifiers[-1]]).itemsize if shared else 4


def work(kernel: Kernel, counts: Counts) -> dict[str, float]:
    """Counts of a launch per program: instructions (of warps), arithmetic, and memory traffic."""
    opcodes = defaultdict(int)
    for block, times in zip(kernel.blocks, counts.blocks, strict=True):
        for opcode, number in block.opcodes.items():
            opcodes[opcode] += number * int(times)
    warps = kernel.threads // 32
    total = Counter(instructions=sum(opcodes.values()) * warps)
    for opcode, number in opcodes.items():
        if shape := re.match(r"(wg)?mma\..*?m(\d+)n(\d+)k(\d+)", opcode):
            flop = 2 * int(shape[2]) * int(shape[3]) * int(shape[4])
            total["tensor FLOP"] += number * flop * (warps // 4 if shape[1] else warps)
        elif opcode.startswith("fma") and opcode.endswith("f32"):
            total["FMA"] += number * kernel.threads
        elif opcode.startswith("ex2"):
            total["exponentials"] += number * kernel.threads
        elif opcode.startswith("bar.sync"):
            total["barriers"] += number
    for site in counts.sites.values():
        total.update(site)
    return {name: value / max(counts.programs, 1) for name, value in total.items()}


def worst(counts: Counts, number: int = 5) -> list[str]:
    """The places with the most wavefronts above the least and the most sector bytes that nobody uses."""
    lines = []
    for place, site in counts.sites.items():
        excess = site["wavefronts"] - site["least wavefronts"]
        lines.append((excess, f"{excess / counts.programs:.0f} wavefronts too many: {place}"))
        unused = sum(site[f"{d} sector bytes"] - site[f"{d} useful bytes"] for d in ("load", "store"))
        lines.append((unused / 128, f"{unused / counts.programs:.0f} sector bytes unused: {place}"))
    return [line for cost, line in sorted(lines, reverse=True)[:number] if cost > 0]
