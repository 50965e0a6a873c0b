"""Global and shared memory: what is read and written, what must not be, and what it costs."""

from __future__ import annotations

from collections import Counter

import numpy as np

from .numbers import u1, u2, u4, u8
from .ptx import EmulationError

BASE = 0x7F0000000000  # address of the first byte of global memory
GAP = 2048  # bytes between tensors that nobody may touch
SEVERAL = -2  # in place of a warp's number
VIEWS = {1: u1, 2: u2, 4: u4, 8: u8}


class GlobalMemory:
    """A flat copy of the tensors of a launch, with gaps between them."""

    def __init__(self, storages: list[np.ndarray], offsets: list[int]):
        """`storages` are bytes; each keeps its host address modulo 16, given in `offsets`."""
        self.starts, top = [], GAP
        for storage, offset in zip(storages, offsets, strict=True):
            self.starts.append(-(-top // 256) * 256 + offset % 16)
            top = self.starts[-1] + len(storage) + GAP
        self.bytes = np.zeros(-(-top // 256) * 256, u1)
        self.allowed = np.zeros(len(self.bytes), bool)
        for storage, start in zip(storages, self.starts, strict=True):
            self.bytes[start : start + len(storage)] = storage
        self.views = {size: self.bytes.view(t) for size, t in VIEWS.items()}

    def allow(self, storage: int, first: int, length: int) -> int:
        """Permit access to a span of a storage; returns its address."""
        start = self.starts[storage] + first
        self.allowed[start : start + length] = True
        return BASE + start

    def places(self, addresses: np.ndarray, size: int, instruction) -> np.ndarray:
        """Offsets of the (active) addresses into `bytes`."""
        at = (addresses - u8(BASE)).view(np.int64)
        if not at.size:
            return at
        if at.min() < 0 or at.max() + size > len(self.bytes):
            raise EmulationError(f"global access outside every tensor: {instruction}")
        if not (self.allowed[at].all() and self.allowed[at + (size - 1)].all()):
            raise EmulationError(f"global access out of bounds: {instruction}")
        if (at & (size - 1)).any():
            raise EmulationError(f"global access is not aligned: {instruction}")
        return at


class SharedMemory:
    """Shared memory of several programs side by side, poisoned until it is written.

    Where `checks` is set, each grain of bytes remembers who wrote and read it since the last barrier, whether
    an asynchronous copy will land in it, a tensor core reads it, or a fence is missing. Epochs number the
    intervals between barriers; a grain is the smallest access of the kernel.
    """

    TRACKS = ("written", "writer", "was_read", "reader", "landing", "held", "unfenced")

    def __init__(self, programs: int, size: int, grain: int, checks: bool, findings: Counter):
        self.size = max(-(-size // 16) * 16, 16)
        self.grain, self.checks, self.findings, self.epoch = grain, checks, findings, 1
        self.bytes = np.full(programs * self.size, 0xFF, u1)
        self.views = {size: self.bytes.view(t) for size, t in VIEWS.items()}
        self.base = (np.arange(programs) * self.size)[:, None]
        for name in self.TRACKS:
            setattr(self, name, np.zeros(len(self.bytes) // grain if checks else 0, np.int32))

    def places(self, addresses: np.ndarray, size: int, active, instruction) -> np.ndarray:
        """Offsets into `bytes` of the active threads' addresses, (programs, threads) in."""
        at = addresses.view(np.int32).astype(np.int64) + self.base
        inside = (addresses <= u4(self.size - size)) & (addresses & u4(size - 1) == 0)
        if not (inside if active is None else inside | ~active).all():
            raise EmulationError(f"shared access out of bounds or not aligned: {instruction}")
        return at.reshape(-1) if active is None else at[active]

    def grains(self, at: np.ndarray, size: int) -> np.ndarray:
        return ((at[:, None] // self.grain) + np.arange(max(size // self.grain, 1))).reshape(-1)

    def report(self, kind: str, instruction) -> None:
        self.findings[f"{kind}: {instruction}"] += 1

    def check_read(self, at, warps, size, instruction) -> None:
        if not self.checks or not len(at):
            return
        g = self.grains(at, size)
        w = np.repeat(warps, len(g) // len(at))
        if not self.written[g].all():
            self.report("read of shared memory that was never written", instruction)
        if ((self.written[g] == self.epoch) & (self.writer[g] != w)).any():
            self.report("race: read of another warp's write without a barrier", instruction)
        if self.landing[g].any():
            self.report("race: read of a copy that was not waited for", instruction)
        self._mark_read(g, w)

    def _mark_read(self, g, w) -> None:
        again = (self.was_read[g] == self.epoch) & (self.reader[g] != w)
        self.reader[g] = np.where(again, SEVERAL, w)
        self.reader[g] = np.where(self.reader[g] != w, SEVERAL, w)
        self.was_read[g] = self.epoch

    def check_write(self, at, warps, size, instruction, landed=True) -> None:
        """`landed` is False for an asynchronous copy that is only issued."""
        if not self.checks or not len(at):
            return
        g = self.grains(at, size)
        w = np.repeat(warps, len(g) // len(at))
        if ((self.written[g] == self.epoch) & (self.writer[g] != w)).any():
            self.report("race: two warps write without a barrier between", instruction)
        if ((self.was_read[g] == self.epoch) & (self.reader[g] != w)).any():
            self.report("race: write over what another warp reads without a barrier", instruction)
        if self.held[g].any():
            self.report("race: write over an operand of a running wgmma", instruction)
        if self.landing[g].any():
            self.report("race: write where a copy has not landed", instruction)
        self.unfenced[g] = 1
        if landed:
            self.mark_written(g, w)
        else:
            self.landing[g] += 1

    def mark_written(self, g, w) -> None:
        self.writer[g] = w
        self.written[g] = self.epoch

    def land(self, at, warps, data) -> None:
        """An asynchronous copy arrives."""
        size = data.shape[1]
        self.bytes[at[:, None] + np.arange(size)] = data
        if self.checks and len(at):
            g = self.grains(at, size)
            self.landing[g] -= 1
            self.mark_written(g, np.repeat(warps, len(g) // len(at)))

    def hold(self, at, instruction) -> np.ndarray:
        """A wgmma begins to read; `release` ends it."""
        g = np.unique(at // self.grain)
        if not self.written[g].all():
            self.report("wgmma reads shared memory that was never written", instruction)
        if (self.written[g] == self.epoch).any():
            self.report("race: wgmma reads what was written since the last barrier", instruction)
        if self.unfenced[g].any():
            self.report("wgmma reads what was written without fence.proxy.async", instruction)
        self.held[g] += 1
        return g

    def fence(self) -> None:
        self.unfenced[:] = 0

    def release(self, g) -> None:
        self.held[g] -= 1
        self.was_read[g] = self.epoch
        self.reader[g] = SEVERAL


class Counts:
    """Work of the programs of a launch, in units that the hardware issues."""

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

    def global_access(self, at: np.ndarray, active, size: int, instruction) -> None:
        """Sectors of 32 bytes and distinct bytes per warp; `at` (programs, threads)."""
        lanes = np.where(active, at, -1) if active is not None else at
        lanes = np.sort(lanes.reshape(-1, 32), 1)
        direction = "store" if instruction.mnemonic == "st" else "load"
        site = self._site(instruction)
        for name, unit, weight in (("sector bytes", 5, 32), ("useful bytes", 0, size)):
            values = lanes >> unit
            new = (np.diff(values, axis=1, prepend=-1) != 0) & (values >= 0)
            site[f"{direction} {name}"] += int(new.sum()) * weight

    def shared_access(self, at: np.ndarray, size: int, instruction) -> None:
        """Wavefronts: warps for up to 4 bytes, half warps for 8, quarters for 16; `at` -1 where inactive."""
        lanes = min(32, 128 // max(size, 4))
        groups = at.reshape(-1, lanes)
        words = (groups >> 2)[:, :, None] + np.arange(max(size // 4, 1))
        words = np.where(groups[:, :, None] >= 0, words, -1).reshape(len(groups), -1)
        words = np.sort(words, 1)
        new = (np.diff(words, axis=1, prepend=-1) != 0) & (words >= 0)
        banks = np.arange(len(groups))[:, None] * 32 + (words & 31)
        waves = np.bincount(banks[new], minlength=32 * len(groups)).reshape(-1, 32).max(1)
        site = self._site(instruction)
        site["wavefronts"] += int(waves.sum())
        site["least wavefronts"] += int((waves > 0).sum())
