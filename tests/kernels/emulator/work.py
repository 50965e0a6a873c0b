"""Counted work of a launch."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Kernel

PRODUCT = re.compile(r"(wg)?mma\..*?m(\d+)n(\d+)k(\d+)")


class Counts:
    """Work of the programs of a launch: runs of each block, and traffic by line of source."""

    def __init__(self, blocks: int):
        self.programs = 0
        self.blocks = np.zeros(blocks, np.int64)
        self.sites: dict[str, Counter] = {}

    def add(self, other: Counts) -> None:
        self.programs += other.programs
        self.blocks += other.blocks
        for place, site in other.sites.items():
            self.sites.setdefault(place, Counter()).update(site)

    def _site(self, instruction) -> Counter:
        return self.sites.setdefault(f"{instruction.place} {instruction.opcode}", Counter())

    def global_access(self, at, size, instruction, write) -> None:
        """Sectors of 32 bytes and distinct bytes, per warp; -1 where inactive."""
        lanes = np.sort(at.reshape(-1, 32), 1)
        for name, unit, weight in (("sector bytes", 5, 32), ("useful bytes", 0, size)):
            values = lanes >> unit
            new = (np.diff(values, axis=1, prepend=-1) != 0) & (values >= 0)
            self._site(instruction)[f"{'store' if write else 'load'} {name}"] += int(new.sum()) * weight

    def shared_access(self, at, size, instruction) -> None:
        """Wavefronts: of warps for up to 4 bytes, half warps for 8, quarters for 16."""
        groups = at.reshape(-1, min(32, 128 // max(size, 4)))
        words = (groups >> 2)[:, :, None] + np.arange(max(size // 4, 1))
        words = np.sort(np.where(groups[:, :, None] >= 0, words, -1).reshape(len(groups), -1), 1)
        new = (np.diff(words, axis=1, prepend=-1) != 0) & (words >= 0)
        banks = np.arange(len(groups))[:, None] * 32 + (words & 31)
        waves = np.bincount(banks[new], minlength=32 * len(groups)).reshape(-1, 32).max(1)
        self._site(instruction).update(
            {"wavefronts": int(waves.sum()), "least wavefronts": int((waves > 0).sum())}
        )


def work(kernel: Kernel, counts: Counts) -> dict[str, float]:
    """Per program: instructions (of warps), arithmetic (of threads), wavefronts, sector and useful bytes."""
    opcodes, warps = Counter(), kernel.threads // 32
    for block, times in zip(kernel.blocks, counts.blocks, strict=True):
        opcodes.update({opcode: number * int(times) for opcode, number in block.opcodes.items()})
    total = Counter(instructions=opcodes.total() * warps)
    for opcode, number in opcodes.items():
        if product := PRODUCT.match(opcode):
            m, n, k = map(int, product.group(2, 3, 4))
            total["tensor FLOP"] += number * 2 * m * n * k * (warps // 4 if product[1] else warps)
        elif opcode.startswith("fma") and opcode.endswith("f32"):
            total["FMA"] += number * kernel.threads
        elif opcode.startswith("ex2"):
            total["exponentials"] += number * kernel.threads
    for site in counts.sites.values():
        total.update(site)
    return {name: value / max(counts.programs, 1) for name, value in total.items()}
