"""Counted work of a launch, per program."""

from __future__ import annotations

import re
from collections import Counter

from .machine import Kernel
from .memory import Counts

PRODUCT = re.compile(r"(wg)?mma\..*?m(\d+)n(\d+)k(\d+)")


def work(kernel: Kernel, counts: Counts) -> dict[str, float]:
    """Instructions (of warps), arithmetic (of threads), wavefronts, sector bytes and useful bytes."""
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
