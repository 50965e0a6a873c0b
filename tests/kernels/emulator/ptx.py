"""Reading PTX: an entry's parameters, register declarations and basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ENTRY = re.compile(r"\.visible \.entry (\S+?)\((.*?)\)[^{]*\{", re.S)
LABEL = re.compile(r"([$\w]+):(?!:)\s*")
GUARD = re.compile(r"@(!?)(%\w+)\s+")
PLACE = re.compile(r"([\w.]+\.py:\d+)")
ADDRESS = re.compile(r"\[\s*([^+\s\]]+)\s*(?:\+\s*(-?\d+))?\s*\]")
IGNORED = (".reg", ".pragma", ".shared")
JUMPS = ("bra", "ret", "exit")


class EmulationError(Exception):
    """The program does what a GPU must not, or uses an instruction that is not emulated."""


@dataclass(slots=True)
class Instruction:
    """One instruction; `place` is the line of the Python source that it comes from."""

    opcode: str
    operands: list[str]
    guard: str
    negated: bool
    place: str
    mnemonic: str = ""
    modifiers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mnemonic, *self.modifiers = self.opcode.split(".")

    def __str__(self) -> str:
        return f"{self.place} | {self.opcode} {', '.join(self.operands)}"[:160]


@dataclass(slots=True)
class Entry:
    """A kernel: parameter names, the type of each register bank, basic blocks and the block of each label."""

    parameters: list[str]
    banks: dict[str, str]
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)


def split(text: str) -> list[str]:
    """Operands: split at commas outside braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def vector(operand: str) -> list[str]:
    """The elements of {a, b}; a single operand is a vector of one, p|q one of two."""
    return [x.strip() for x in operand.strip("{} ").replace("|", ",").split(",")]


def address(operand: str) -> tuple[str, int]:
    """Base and byte offset of [base + offset]."""
    match = ADDRESS.fullmatch(operand)
    return match[1], int(match[2] or 0)


def parse(ptx: str) -> Entry:
    """Parse a module with one entry."""
    match = ENTRY.search(ptx)
    entry = Entry(
        [line.split()[-1] for line in match[2].split(",") if line.strip()],
        {base: kind for kind, base in re.findall(r"\.reg \.(\w+)\s+(%\w+)<\d+>", ptx)},
    )
    jumped_to = set(re.findall(r"\bbra(?:\.uni)?\s+([$\w]+)", ptx))
    place, statement = "", ""
    for line in re.sub(r"/\*.*?\*/", "", ptx[match.end() :], flags=re.S).splitlines():
        code, _, note = line.partition("//")
        code = code.strip()
        if code.startswith(".loc"):
            place = " < ".join(PLACE.findall(note)) or ":".join(code.split()[1:3])
            continue
        if code.startswith((".section", ".file")):
            break
        statement = f"{statement} {code}".strip()
        while statement:
            if statement[0] in "{}":
                statement = statement[1:].strip()
            elif label := LABEL.match(statement):
                if label[1] in jumped_to:
                    if entry.blocks[-1]:
                        entry.blocks.append([])
                    entry.labels[label[1]] = len(entry.blocks) - 1
                statement = statement[label.end() :]
            elif ";" in statement:
                complete, _, statement = statement.partition(";")
                statement = statement.strip()
                _append(entry, complete.strip(), place)
            else:
                break
    return entry


def _append(entry: Entry, statement: str, place: str) -> None:
    if statement.startswith(".local"):
        raise EmulationError(f"local memory is not emulated: {statement}")
    if not statement or statement.startswith(IGNORED):
        return
    guard = GUARD.match(statement)
    opcode, *rest = statement[guard.end() if guard else 0 :].split(None, 1)
    operands = split(rest[0]) if rest else []
    instruction = Instruction(opcode, operands, guard[2] if guard else "", bool(guard and guard[1]), place)
    entry.blocks[-1].append(instruction)
    if instruction.mnemonic in JUMPS:
        entry.blocks.append([])
