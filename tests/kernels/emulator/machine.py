"""A compiled kernel as numpy closures, and the machine that runs bundles of its programs in step.

A register is an array (programs, threads); what is equal in all of them is kept as (1, 1). Programs that take
different ways are split into two bundles. Threads of a program that do are run block by block under a mask
until they meet again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from .decode import TYPES, UNSIGNED, Operation, decode
from .memory import GlobalMemory, SharedMemory
from .numbers import BITS, u4
from .ptx import JUMPS, EmulationError, Instruction, parse
from .work import Counts

BUNDLE = 2048  # threads that run in step: enough that numpy's overhead does not dominate
SPECIAL = ("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid")
POISON = 0xFFBADBADBADBADBAD
NUMBER = re.compile(r"-?(?:0x[0-9a-fA-F]+|\d+)U?")
FLOAT = re.compile(r"0[fFdD]([0-9a-fA-F]{8,16})")


class Split(Exception):
    """Programs of a bundle go different ways; `ways` tells which take the jump."""

    def __init__(self, ways: np.ndarray):
        self.ways = ways


@dataclass(slots=True)
class Step:
    """One closure of a block. `guard` is a register or -1, `collective` the instruction if it is so."""

    run: Callable
    targets: list[int]
    guard: int = -1
    negated: bool = False
    collective: Instruction | None = None


@dataclass
class Block:
    """Straight-line code; `jump` is (guard, negated, block) or None."""

    steps: list[Step] = field(default_factory=list)
    jump: tuple[int, bool, int] | None = None
    opcodes: Counter = field(default_factory=Counter)


class Kernel:
    """A kernel translated from PTX, with its warps and bytes of shared memory per program."""

    def __init__(self, ptx: str, warps: int, shared_bytes: int):
        self.entry = parse(ptx)
        self.threads, self.shared_bytes = 32 * warps, shared_bytes
        self.index: dict[str, int] = {}  # of registers, constants and converted operands
        self.types: list[type] = []
        self.initial: list[np.ndarray | None] = []
        self.grain = 4  # smallest access to shared memory
        self.given: dict[str, type] = {}  # types that instructions give their targets
        self.accumulators: set[str] = set()  # of wgmma
        blocks = [[self._decoded(i) for i in instructions] for instructions in self.entry.blocks]
        self.blocks = [self._block(operations) for operations in blocks]

    # Translation

    def _decoded(self, instruction: Instruction) -> Operation | Instruction:
        """The operation; moves and jumps wait until the types of all registers are known."""
        shared = any(m.startswith("shared") for m in instruction.modifiers)
        if shared and instruction.mnemonic in ("ld", "st"):
            self.grain = min(self.grain, BITS[TYPES[instruction.modifiers[-1]]] // 8)
        if instruction.mnemonic in (*JUMPS, "mov"):
            return instruction
        operation = decode(instruction, self.type_of)
        for name, t in operation.targets:
            self.given.setdefault(name, t)
        if instruction.opcode.startswith("wgmma.mma"):
            self.accumulators.update(name for name, _ in operation.targets)
        return operation

    def type_of(self, name: str) -> type:
        """The type that a register is kept in: its first instruction's if that fills the declared width."""
        declared = TYPES[self.entry.banks.get(name.rstrip("0123456789"), "b32")]
        t = self.given.get(name, declared)
        return t if BITS[t] == BITS[declared] else UNSIGNED.get(declared, declared)

    def register(self, name: str, t: type | None = None, value: np.ndarray | None = None) -> int:
        """Index of a register, which begins as `value`, or poisoned."""
        if name not in self.index:
            if t is None:
                t = self.type_of(name)
                value = bits(0 if t is np.bool_ else POISON, t)
            self.index[name] = len(self.types)
            self.types.append(t)
            self.initial.append(value)
        return self.index[name]

    def _operand(self, text: str, t: type, i: Instruction, views: dict, steps: list[Step]) -> int:
        """The register that holds an operand as type `t`; adds a step that converts it where needed."""
        if text in self.entry.parameters:
            return self.register(f"[{text}] {t.__name__}", t)
        if (number := FLOAT.fullmatch(text)) or NUMBER.fullmatch(text):
            value = int(number[1], 16) if number else int(text.rstrip("U"), 0)
            return self.register(f"{text} {t.__name__}", t, bits(value, t))
        if text == "global_smem":
            return self.register(f"{text} {t.__name__}", t, bits(0, t))
        at = self.register(text.lstrip("!"), *((u4,) if text.startswith(SPECIAL) else ()))
        kept = self.types[at]
        if text.startswith("!"):
            convert = np.logical_not
        elif kept is t:
            return at
        elif BITS[t] > BITS[kept] or np.bool_ in (kept, t):
            raise EmulationError(f"register {text} of {kept.__name__} read as {t.__name__}")
        elif BITS[t] == BITS[kept]:
            convert = lambda x: x.view(t)  # noqa: E731
        else:
            whole, part = UNSIGNED.get(kept, kept), UNSIGNED.get(t, t)
            convert = lambda x: x.view(whole).astype(part).view(t)  # noqa: E731
        known = views.setdefault(at, {})
        name = f"{text} as {t.__name__}"
        if name not in known:
            known[name] = self.register(name, t)
            steps.append(Step(self._watched(_closure(convert, [known[name]], [at], False), [text], i), []))
        return known[name]

    def _block(self, operations: list[Operation | Instruction]) -> Block:
        block, views = Block(), {}
        for operation in operations:
            i = operation if isinstance(operation, Instruction) else operation.instruction
            block.opcodes[i.opcode] += 1
            guard = self.register(i.guard) if i.guard else -1
            if i.mnemonic in JUMPS:
                jumps = i.mnemonic == "bra"
                to = self.entry.labels[i.operands[0]] if jumps else len(self.entry.blocks)
                block.jump = (guard, i.negated, to)
                continue
            operation = decode(i, self.type_of) if operation is i else operation
            sources = [self._operand(text, t, i, views, block.steps) for text, t in operation.sources]
            targets = [self.register(name) for name, _ in operation.targets]
            run = _closure(self._fitted(operation), targets, sources, operation.on_machine)
            run = self._watched(run, [name for name, _ in operation.sources + operation.targets], i)
            block.steps.append(Step(run, targets, guard, i.negated, i if operation.collective else None))
            for target in targets:
                views.pop(target, None)
            if i.mnemonic == "wgmma":  # a wait writes registers that are not its targets
                views.clear()
        return block

    def _watched(self, run: Callable, names: list[str], instruction: Instruction) -> Callable:
        """Look out for accumulators of a running wgmma: then ptxas waits for every single one."""
        names = self.accumulators.intersection(names)
        if not names or instruction.mnemonic == "wgmma":
            return run

        def watched(m, registers):
            if m.flying and names.intersection(m.flying):
                m.findings[f"note: wgmma used before its wait, ptxas serialises: {instruction}"] += 1
                m.commit_products()
                m.wait_products(0)
            run(m, registers)

        return watched

    def _fitted(self, operation: Operation) -> Callable:
        """The operation's function with results in the types that their registers are kept in."""
        compute, kept = operation.compute, [self.type_of(name) for name, _ in operation.targets]
        if kept == [t for _, t in operation.targets]:
            return compute

        def fit(x, t):
            return x.view(t) if 8 * x.itemsize == BITS[t] else x.astype(t)

        if len(kept) == 1:
            return lambda *sources: fit(compute(*sources), kept[0])
        return lambda *sources: [fit(x, t) for x, t in zip(compute(*sources), kept, strict=True)]

    # Execution

    def launch(
        self, memory: GlobalMemory, parameters: list, grid: tuple[int, ...], count: bool
    ) -> tuple[Counter, Counts]:
        """Run all programs of a grid; returns findings and counts.

        `parameters` are integers and floats in the order of the entry's. Races are looked for in the first
        bundle of programs: the others run the same code.
        """
        grid = (*grid, 1, 1)[:3]
        programs = np.array([p[::-1] for p in product(*map(range, grid[::-1]))])
        size = max(BUNDLE // self.threads, 1)
        bundles = [programs[first : first + size] for first in range(0, len(programs), size)]
        findings, counts = Counter(), Counts(len(self.blocks))
        while bundles:
            bundle = bundles.pop(0)
            before = memory.bytes.copy() if len(bundle) > 1 else None
            machine = Machine(self, memory, bundle, grid, parameters, not counts.programs, count)
            try:
                with np.errstate(all="ignore"):
                    self._run(machine)
            except Split as split:  # forget it, and run those that stay together
                memory.bytes[:] = before
                bundles[:0] = [bundle[split.ways], bundle[~split.ways]]
                continue
            findings.update(machine.findings)
            counts.add(machine.counts)
        return findings, counts

    def _run(self, m: Machine) -> None:
        at, registers = 0, m.registers
        while at < len(self.blocks):
            block = self.blocks[at]
            m.counts.blocks[at] += len(m.programs)
            for step in block.steps:
                if step.guard < 0:
                    step.run(m, registers)
                else:
                    m.run_where(registers[step.guard] ^ step.negated, step)
            at, taken = at + 1, m.taken(block)
            if taken.all():
                at = block.jump[2]
            elif taken.any():
                ways = taken.any(1)
                if len(ways) > 1 and (ways == taken.all(1)).all():
                    raise Split(ways)
                at = self._run_apart(m, np.where(m.full(taken), block.jump[2], at))
        m.finish()

    def _run_apart(self, m: Machine, at: np.ndarray) -> int:
        """Run threads that went different ways until they meet; returns the block where they do."""
        while True:
            first = int(at.min())
            mask = at == first
            if mask.all():
                return first
            block = self.blocks[first]
            m.counts.blocks[first] += int(mask.any(1).sum())
            for step in block.steps:
                if step.collective:
                    raise EmulationError(f"run by a part of the threads: {step.collective}")
                guard = True if step.guard < 0 else m.registers[step.guard] ^ step.negated
                m.run_where(mask & guard, step)
            following = np.where(m.taken(block), block.jump[2] if block.jump else 0, first + 1)
            at = np.where(mask, following, at)


class Machine:
    """Registers, memories and everything in flight of a bundle of programs."""

    def __init__(self, kernel: Kernel, memory: GlobalMemory, programs, grid, parameters, checks, count):
        self.kernel, self.memory, self.programs, self.count = kernel, memory, programs, count
        self.findings, self.counts = Counter(), Counts(len(kernel.blocks))
        self.counts.programs = len(programs)
        self.shared = SharedMemory(len(programs), kernel.shared_bytes, kernel.grain, checks, self.findings)
        self.shape = (len(programs), kernel.threads)
        self.active = self.everyone = np.ones(self.shape, bool)  # threads that run the present step
        self.copies, self.copy_groups = [], []
        self.products, self.product_groups, self.flying = [], [], {}
        thread = np.arange(kernel.threads, dtype=u4)[None]
        self.warps = np.broadcast_to(thread.astype(int) // 32, self.shape)
        values = {"%laneid": thread % u4(32), "%warpid": thread // u4(32)}
        for i, axis in enumerate("xyz"):
            values[f"%tid.{axis}"] = thread if i == 0 else bits(0, u4)
            values[f"%ntid.{axis}"] = bits(kernel.threads if i == 0 else 1, u4)
            values[f"%ctaid.{axis}"] = programs[:, i : i + 1].astype(u4)
            values[f"%nctaid.{axis}"] = bits(grid[i], u4)
        given = dict(zip(kernel.entry.parameters, parameters, strict=True))
        self.registers = list(kernel.initial)
        for name, at in kernel.index.items():
            if name in values:
                self.registers[at] = values[name]
            elif name.startswith("["):
                value = given[name[1:].partition("]")[0]]
                value = int(np.float32(value).view(u4)) if isinstance(value, float) else value
                self.registers[at] = bits(value, kernel.types[at])

    def full(self, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, self.shape)

    def taken(self, block: Block) -> np.ndarray:
        """Which threads take the block's jump."""
        if block.jump is None:
            return np.zeros((1, 1), bool)
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
            self.active = self.everyone
            for target, before in zip(step.targets, old, strict=True):
                registers[target] = np.where(active, registers[target], before)

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


def _closure(function: Callable, targets: list[int], sources: list[int], on_machine: bool) -> Callable:
    """A function of (machine, registers) that stores in the targets what `function` makes of the sources."""
    single = targets[0] if len(targets) == 1 else -1
    if single >= 0 and not on_machine and len(sources) == 2:  # by far the most frequent
        a, b = sources

        def run(m, registers):
            registers[single] = function(registers[a], registers[b])

        return run

    def run(m, registers):
        values = [registers[i] for i in sources]
        results = function(m, *values) if on_machine else function(*values)
        if single >= 0:
            registers[single] = results
        elif targets:
            for target, x in zip(targets, results, strict=True):
                registers[target] = x

    return run


def bits(value: int, t: type) -> np.ndarray:
    """A (1, 1) array of type `t` with these bits."""
    if t is np.bool_:
        return np.full((1, 1), bool(value))
    return np.full((1, 1), int(value) & ((1 << BITS[t]) - 1), UNSIGNED.get(t, t)).view(t)
