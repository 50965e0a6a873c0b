"""A compiled kernel as numpy closures, and the machine that runs bundles of its programs in step.

A register is an array (programs, threads); what is equal in all of them is kept as (1, 1). It has whatever
type it was last used as: of the bits, others are views. Programs that take different ways are split into two
bundles; threads of a program that do are run block by block under a mask until they meet again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .decode import TYPES, decode
from .memory import GlobalMemory, SharedMemory
from .numbers import u4
from .ptx import EmulationError, Instruction, Operation, parse
from .work import Counts

BUNDLE = 2048  # threads that run in step: enough that numpy's overhead does not dominate
POISON = 0xFFBADBADBADBADBAD
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "global_smem")
JUMPS = ("bra", "ret", "exit")
NUMBER = re.compile(r"0[fd]([0-9a-fA-F]+)|(-?\d+|0x[0-9a-fA-F]+)U?")
HALF_WORDS = re.compile(r"\b(ld|st)\.shared\S*16\b")


class Split(Exception):
    """Programs of a bundle go different ways: its argument tells which go one of them."""


@dataclass(slots=True)
class Step:
    """A translated instruction; `targets` and `guard` (-1 if there is none) are indices of registers."""

    instruction: Instruction
    operation: Operation
    run: Callable
    targets: list[int]
    guard: int

    def uses(self, names) -> bool:
        """Whether it reads or writes any of these registers, not as the accumulator of a product."""
        touched = {name for name, _ in self.operation.sources}.union(self.operation.targets)
        return self.instruction.mnemonic != "wgmma" and not touched.isdisjoint(names)


@dataclass
class Block:
    """Straight-line code; `jump` is (guard, negated, block) or None."""

    steps: list[Step]
    jump: tuple[int, bool, int] | None = None


class Kernel:
    """A kernel translated from PTX, with its warps and bytes of shared memory per program."""

    def __init__(self, ptx: str, warps: int, shared_bytes: int):
        self.entry, self.threads, self.shared_bytes = parse(ptx), 32 * warps, shared_bytes
        self.grain = 2 if HALF_WORDS.search(ptx) else 4  # smallest access to shared memory
        self.index: dict[str, int] = {}  # of registers, and of constants as a type
        self.initial: list[np.ndarray] = []
        self.blocks = [self._block(instructions) for instructions in self.entry.blocks]

    # Translation

    def _register(self, name: str, value: int, t: type) -> int:
        """Index of a register that begins with these bits."""
        if name not in self.index:
            self.index[name] = len(self.initial)
            self.initial.append(bits(value, t))
        return self.index[name]

    def _variable(self, name: str, t: type | None = None) -> int:
        """Index of one of the program's registers, which begins poisoned and may be read as `t`."""
        declared = TYPES.get(self.entry.banks.get(name.rstrip("0123456789")))
        if not declared or t and np.dtype(t).itemsize != np.dtype(declared).itemsize:
            raise EmulationError(f"not emulated: {name} read as {t}")
        return self._register(name, 0 if declared is np.bool_ else POISON, declared)

    def _operand(self, text: str, t: type) -> tuple[int, np.dtype]:
        """Index and type of what an instruction reads."""
        if match := NUMBER.fullmatch(text):
            value = int(match[1], 16) if match[1] else int(match[2], 0)
            at = self._register(f"{text} {t.__name__}", value, t)
        elif text in SPECIAL or text in self.entry.parameters:  # 0 unless the machine knows
            at = self._register(text, 0, t)
        else:
            at = self._variable(text, t)
        return at, np.dtype(t)

    def _step(self, i: Instruction) -> Step:
        operation = decode(i)
        sources = [self._operand(text, t) for text, t in operation.sources]
        targets = [self._variable(name) for name in operation.targets]
        guard = self._variable(i.guard) if i.guard else -1
        return Step(i, operation, _closure(operation, sources, targets), targets, guard)

    def _block(self, instructions: list[Instruction]) -> Block:
        block = Block([])
        for i in instructions:
            if i.mnemonic not in JUMPS:
                block.steps.append(self._step(i))
            else:
                guard = self._variable(i.guard) if i.guard else -1
                to = self.entry.labels[i.operands[0]] if i.operands else len(self.entry.blocks)
                block.jump = (guard, i.negated, to)
        return block

    def launch(
        self, memory: GlobalMemory, parameters: list, grid: tuple[int, ...], count: bool, one: bool
    ) -> Counts:
        """Run all programs of a grid, or its middle `one`; `parameters` are numbers in the entry's order.

        Races are looked for in the first bundle of programs: the others run the same code.
        """
        programs = np.indices(grid[::-1]).reshape(len(grid), -1)[::-1].T
        programs = programs[len(programs) // 2 :][:1] if one else programs
        size = max(BUNDLE // self.threads, 1)
        bundles = [programs[first : first + size] for first in range(0, len(programs), size)]
        counts = Counts()
        while bundles:
            bundle = bundles.pop(0)
            before = memory.bytes.copy() if len(bundle) > 1 else None
            machine = Machine(self, memory, bundle, parameters, not counts.programs, count)
            try:
                with np.errstate(all="ignore"):
                    machine.run()
                counts.add(machine.counts)
            except Split as split:  # forget it, and run those that stay together
                memory.bytes[:] = before
                (ways,) = split.args
                bundles[:0] = [bundle[ways], bundle[~ways]]
        return counts


class InFlight:
    """Asynchronous work: it is committed in groups, and a wait leaves a number of them pending."""

    def __init__(self) -> None:
        self.open: list[Callable] = []
        self.groups: list[list[Callable]] = []

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        while len(self.groups) > pending:
            for arrive in self.groups.pop(0):
                arrive()


class Machine:
    """Registers, memories and everything in flight of a bundle of programs."""

    def __init__(self, kernel: Kernel, memory: GlobalMemory, programs, parameters, checks, count):
        self.kernel, self.programs, self.count = kernel, programs, count
        self.counts = Counts(len(programs))
        self.findings = self.counts.findings
        self.shared = SharedMemory(len(programs), kernel.shared_bytes, kernel.grain, checks, self.findings)
        self.spaces = {"global": memory, "shared": self.shared}
        self.shape = (len(programs), kernel.threads)
        self.active = self.everyone = np.ones(self.shape, bool)  # threads that run the present step
        self.copies, self.products = InFlight(), InFlight()
        self.accumulators = Counter()  # registers of the products in flight
        thread = np.arange(kernel.threads, dtype=u4)[None]
        self.warps = self.full(thread.astype(int) // 32)
        self.registers = list(kernel.initial)
        values = dict(zip(SPECIAL, (thread, *programs.astype(u4).T[:, :, None]), strict=False))
        values |= zip(kernel.entry.parameters, parameters, strict=True)
        for name in values.keys() & kernel.index.keys():
            at = kernel.index[name]
            self.registers[at] = bits(values[name], self.registers[at].dtype.type)

    def full(self, x: np.ndarray) -> np.ndarray:
        """Values of all threads."""
        return x if x.shape == self.shape else np.broadcast_to(x, self.shape)

    def picked(self, x: np.ndarray) -> np.ndarray:
        """Values of the active threads, one after another."""
        return self.full(x).reshape(-1) if self.active is self.everyone else self.full(x)[self.active]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `picked`; zero for the other threads."""
        if self.active is self.everyone:
            return values.reshape(self.shape)
        out = np.zeros(self.shape, values.dtype)
        out[self.active] = values
        return out

    def run(self) -> None:
        """Run until all threads have returned; `at` is the block that each is at."""
        blocks, at = self.kernel.blocks, np.zeros((1, 1), int)
        while (first := int(at.min())) < len(blocks):
            block, here = blocks[first], at == first
            together = here.all()
            self.counts.blocks[first] += len(self.programs) if together else self.full(here).any(1).sum()
            for step in block.steps:
                self.execute(step, None if together else here)
            following = first + 1
            if block.jump:
                guard, negated, to = block.jump
                taken = guard < 0 or self.registers[guard] ^ negated
                following = np.where(taken, to, following)
            at = np.where(here, following, at)
            if (at == at[0, 0]).all():
                at = at[:1, :1]
            elif len(at) > 1 and (at == at[:, :1]).all():
                raise Split(at[:, 0] == at[0, 0])
        if self.products.open or any(self.products.groups):
            self.findings["wgmma never waited for"] += 1
        if self.copies.open:
            self.findings["cp.async never committed"] += 1

    def execute(self, step: Step, here: np.ndarray | None) -> None:
        """Run a step for those threads that are here; the others keep their registers."""
        if self.accumulators and step.uses(self.accumulators):
            self.findings[f"note: wgmma used before its wait, ptxas serialises: {step.instruction}"] += 1
            self.products.commit()
            self.products.wait(0)
        registers, guard = self.registers, step.guard
        if guard < 0 and here is None:
            step.run(self, registers)
            return
        active = here if guard < 0 else registers[guard] ^ step.instruction.negated
        if here is not None:
            active = active & here
        if active.all():
            step.run(self, registers)
        elif active.any():
            if step.operation.collective:
                raise EmulationError(f"run by a part of the threads: {step.instruction}")
            old = [registers[t] for t in step.targets]
            self.active = self.full(active)
            step.run(self, registers)
            self.active = self.everyone
            for target, before in zip(step.targets, old, strict=True):
                new = registers[target]
                registers[target] = np.where(active, new, before.view(new.dtype))


def _closure(operation: Operation, sources: list[tuple[int, np.dtype]], targets: list[int]) -> Callable:
    """The operation as a function of (machine, registers), which stores its results in the targets."""
    function, on_machine = operation.compute, operation.on_machine
    single = targets[0] if len(targets) == 1 and not on_machine else None

    def run(m, registers):
        values = [m] if on_machine else []
        for at, dtype in sources:
            x = registers[at]
            if x.dtype is not dtype:
                x = registers[at] = x.view(dtype)
            values.append(x)
        results = function(*values)
        if single is not None:
            registers[single] = results
        elif targets:
            for target, x in zip(targets, results, strict=True):
                registers[target] = x

    return run


def bits(value, t: type) -> np.ndarray:
    """A (1, 1) array of type `t` with these bits, or of a float; arrays are taken as they are."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, float):
        value = int(np.float32(value).view(u4))
    if t is np.bool_:
        return np.full((1, 1), bool(value))
    size = np.dtype(t).itemsize
    return np.full((1, 1), value % 2 ** (8 * size), f"u{size}").view(t)
