"""Counted work of a launch."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Kernel

PRODUCT = re.compile(r"(wg)?mma\..*?m(\d+)n(\d+)k(\d+)")


@dataclass
class Counts:
    """Of programs: runs of each block, memory traffic, and what is wrong or worth a note."""

    programs: int = 0
    blocks: Counter = field(default_factory=Counter)
    traffic: Counter = field(default_factory=Counter)
    findings: Counter = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        self.programs += other.programs
        self.blocks.update(other.blocks)
        self.traffic.update(other.traffic)
        self.findings.update(other.findings)

    def global_access(self, at, size, write) -> None:
        """Sectors of 32 bytes and distinct bytes, per warp; -1 where inactive."""
        lanes = np.sort(at.reshape(-1, 32), 1)
        for name, unit, weight in (("sector bytes", 5, 32), ("useful bytes", 0, size)):
            self.traffic[f"{'store' if write else 'load'} {name}"] += int(_new(lanes >> unit).sum()) * weight

    def shared_access(self, at, size) -> None:
        """Wavefronts: of warps for up to 4 bytes, half warps for 8, quarters for 16."""
        groups = at.reshape(-1, min(32, 128 // max(size, 4)))
        words = (groups >> 2)[:, :, None] + np.arange(max(size // 4, 1))
        words = np.sort(np.where(groups[:, :, None] >= 0, words, -1).reshape(len(groups), -1), 1)
        banks = np.arange(len(groups))[:, None] * 32 + (words & 31)
        waves = np.bincount(banks[_new(words)], minlength=32 * len(groups)).reshape(-1, 32).max(1)
        self.traffic["wavefronts"] += int(waves.sum())
        self.traffic["least wavefronts"] += int((waves > 0).sum())


def _new(sorted_values) -> np.ndarray:
    """Where a row's values differ from those before; not where they are negative."""
    return (np.diff(sorted_values, axis=1, prepend=-1) != 0) & (sorted_values >= 0)


def work(kernel: Kernel, counts: Counts) -> dict[str, float]:
    """Per program: instructions (of warps), arithmetic (of threads), wavefronts, sector and useful bytes."""
    opcodes, warps = Counter(), kernel.threads // 32
    for block, times in counts.blocks.items():
        for instruction in kernel.entry.blocks[block]:
            opcodes[instruction.opcode] += times
    total = Counter(counts.traffic, instructions=opcodes.total() * warps)
    for opcode, number in opcodes.items():
        if product := PRODUCT.match(opcode):
            m, n, k = map(int, product.group(2, 3, 4))
            total["tensor FLOP"] += number * 2 * m * n * k * (warps // 4 if product[1] else warps)
        elif opcode.startswith("fma") and opcode.endswith("f32"):
            total["FMA"] += number * kernel.threads
        elif opcode.startswith("ex2"):
            total["exponentials"] += number * kernel.threads
    return {name: value / max(counts.programs, 1) for name, value in total.items()}
