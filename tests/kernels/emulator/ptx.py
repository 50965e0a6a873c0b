"""Reading PTX: an entry's parameters, register banks and basic blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

ENTRY = re.compile(r"\.visible \.entry \S+?\((.*?)\)[^{]*\{", re.S)
STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*);")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+")
PLACE = re.compile(r"[\w.]+\.py:\d+")
ADDRESS = re.compile(r"\[\s*([^+\s\]]+)\s*(?:\+\s*(-?\d+))?\s*\]")
IGNORED = (".reg", ".pragma", ".file")


class EmulationError(Exception):
    """The program does what a GPU must not, or uses an instruction that is not emulated."""


@dataclass
class Instruction:
    """One instruction; `place` is the line of the Python source that it comes from."""

    opcode: str
    operands: list[str]
    guard: str
    negated: bool
    place: str

    def __post_init__(self) -> None:
        self.mnemonic, *self.modifiers = self.opcode.split(".")

    def __str__(self) -> str:
        return f"{self.place} | {self.opcode} {', '.join(self.operands)}"[:160]


@dataclass
class Operation:
    """A decoded instruction: `compute` maps its sources, taken as these types, to its targets' values.

    With `on_machine` it takes the machine first, and returns a list. All threads must run a `collective` one.
    """

    compute: Callable
    sources: list[tuple[str, type]] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    on_machine: bool = False
    collective: bool = False


@dataclass
class Entry:
    """A kernel: parameter names, the type of each register bank, basic blocks and the block of each label."""

    parameters: list[str]
    banks: dict[str, str]
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)


def vector(operand: str) -> list[str]:
    """The elements of {a, b}; a single operand is a vector of one."""
    return re.findall(r"[^\s{},]+", operand)


def address(operand: str) -> tuple[str, int]:
    """Base and byte offset of [base + offset]."""
    match = ADDRESS.fullmatch(operand)
    return match[1], int(match[2] or 0)


def parse(ptx: str) -> Entry:
    """Parse a module with one entry, as LLVM prints it: a statement or a label on each line."""
    header = ENTRY.search(ptx)
    entry = Entry(
        [line.split()[-1] for line in header[1].split(",") if line.strip()],
        {bank: kind for kind, bank in re.findall(r"\.reg \.(\w+)\s+(%\w+)<", ptx)},
    )
    place, jumped_to = "", set(re.findall(r"\bbra\S*\s+([$\w]+)", ptx))
    for line in ptx[header.end() :].splitlines():
        code, _, note = map(str.strip, line.partition("//"))
        if code.startswith(".section"):
            break
        if code.startswith(".loc"):
            place = " < ".join(PLACE.findall(note))
        elif code.endswith(":"):
            if code[:-1] in jumped_to:
                entry.blocks.append([])
                entry.labels[code[:-1]] = len(entry.blocks) - 1
        elif match := STATEMENT.fullmatch(code):
            negated, guard, opcode, operands = match.groups()
            instruction = Instruction(opcode, OPERAND.findall(operands), guard or "", bool(negated), place)
            entry.blocks[-1].append(instruction)
            if opcode.startswith(("bra", "ret", "exit")):
                entry.blocks.append([])
        elif code.strip("{}") and not code.startswith(IGNORED):
            raise EmulationError(f"not emulated: {code}")
    return entry
