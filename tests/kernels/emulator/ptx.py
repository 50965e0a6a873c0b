"""Reading PTX: an entry's parameters, register declarations and basic blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

ENTRY = re.compile(r"\.visible \.entry (\S+?)\((.*?)\)[^{]*\{", re.S)
LABEL = re.compile(r"([$\w]+):(?!:)\s*")
GUARD = re.compile(r"@(!?)(%\w+)\s+")
PLACE = re.compile(r"([\w.]+\.py:\d+)")
IGNORED = (".reg", ".pragma", ".shared")


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

    @property
    def mnemonic(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    def __str__(self) -> str:
        return f"{self.place} | {self.opcode} {', '.join(self.operands)}"[:160]


@dataclass(slots=True)
class Entry:
    """A kernel: parameter names, bits of each register bank, basic blocks, and the block behind each label."""

    name: str
    parameters: list[str]
    banks: dict[str, str]
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)


def operands(text: str) -> list[str]:
    """Split at commas outside braces and brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def vector(operand: str) -> list[str]:
    """The elements of {a, b}; a single operand is a vector of one."""
    return [x.strip() for x in operand[1:-1].split(",")] if operand.startswith("{") else [operand]


def address(operand: str) -> tuple[str, int]:
    """Base and byte offset of [base + offset]."""
    inside = operand.strip()[1:-1].strip()
    match = re.fullmatch(r"(.*\S)\s*([+-])\s*(-?\d+)", inside)
    return (match[1], int(match[2] + "1") * int(match[3])) if match else (inside, 0)


def parse(ptx: str) -> Entry:
    """Parse a module with one entry."""
    match = ENTRY.search(ptx)
    parameters = [line.split()[-1] for line in match[2].split(",") if line.strip()]
    banks = {base: bits for bits, base in re.findall(r"\.reg \.(\w+)\s+(%\w+)<\d+>", ptx)}
    entry = Entry(match[1], parameters, banks)
    body = re.sub(r"/\*.*?\*/", "", ptx[match.end() :], flags=re.S)
    place, statement = "", ""
    for line in body.splitlines():
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
                _start_block(entry)
                entry.labels[label[1]] = len(entry.blocks) - 1
                statement = statement[label.end() :]
            elif ";" in statement:
                one, _, statement = statement.partition(";")
                statement = statement.strip()
                _append(entry, one.strip(), place)
            else:
                break
    return entry


def _start_block(entry: Entry) -> None:
    if entry.blocks[-1]:
        entry.blocks.append([])


def _append(entry: Entry, statement: str, place: str) -> None:
    if statement.startswith(".local"):
        raise EmulationError(f"local memory is not emulated: {statement}")
    if not statement or statement.startswith(IGNORED):
        return
    guard = GUARD.match(statement)
    opcode, _, rest = statement[guard.end() if guard else 0 :].replace("\t", " ").partition(" ")
    instruction = Instruction(
        opcode, operands(rest), guard[2] if guard else "", bool(guard and guard[1]), place
    )
    entry.blocks[-1].append(instruction)
    if instruction.mnemonic in ("bra", "ret", "exit"):
        entry.blocks.append([])
