"""Global and shared memory: what is read and written, what must not be, and what it costs.

`m` is the machine; addresses are arrays (programs, threads), of which the active threads' count.
"""

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
    """A flat copy of tensors' storages, with gaps between them."""

    def __init__(self, storages: list[np.ndarray], addresses: list[int]):
        """`storages` are bytes; each keeps its host address modulo 16."""
        self.starts, top = [], GAP
        for storage, host in zip(storages, addresses, strict=True):
            self.starts.append(-(-top // 256) * 256 + host % 16)
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

    def reach(self, m, addresses, size, instruction, write=False) -> np.ndarray:
        """Offsets of the active threads' addresses into `bytes`."""
        everywhere = (addresses - u8(BASE)).view(np.int64)
        at = everywhere[m.active]
        if at.size:
            if at.min() < 0 or at.max() + size > len(self.bytes):
                raise EmulationError(f"global access outside every tensor: {instruction}")
            if not (self.allowed[at].all() and self.allowed[at + (size - 1)].all()):
                raise EmulationError(f"global access out of bounds: {instruction}")
            if (at & (size - 1)).any():
                raise EmulationError(f"global access is not aligned: {instruction}")
        if m.count:
            m.counts.global_access(np.where(m.active, everywhere, -1), size, instruction, write)
        return at


class SharedMemory:
    """Shared memory of several programs side by side, poisoned until it is written.

    Where `checks` is set, each grain of bytes remembers who wrote and read it since the last barrier, whether
    an asynchronous copy will land in it, a wgmma reads it, or a fence is missing. Epochs number the intervals
    between barriers; a grain is the smallest access of the kernel.
    """

    def __init__(self, programs: int, size: int, grain: int, checks: bool, findings: Counter):
        self.size = max(-(-size // 16) * 16, 16)
        self.grain, self.checks, self.findings, self.epoch = grain, checks, findings, 1
        self.bytes = np.full(programs * self.size, 0xFF, u1)
        self.views = {size: self.bytes.view(t) for size, t in VIEWS.items()}
        self.base = (np.arange(programs) * self.size)[:, None]
        for name in ("written", "writer", "was_read", "reader", "landing", "held", "unfenced"):
            setattr(self, name, np.zeros(len(self.bytes) // grain if checks else 0, np.int32))

    def reach(self, m, addresses, size, instruction, write=False, lands=False) -> np.ndarray:
        """Offsets of the active threads' addresses into `bytes`; `lands`: written by a copy, later."""
        inside = (addresses <= u4(self.size - size)) & (addresses & u4(size - 1) == 0)
        if not inside[m.active].all():
            raise EmulationError(f"shared access out of bounds or not aligned: {instruction}")
        everywhere = addresses.view(np.int32).astype(np.int64) + self.base
        at = everywhere[m.active]
        if m.count:
            m.counts.shared_access(np.where(m.active, everywhere, -1), size, instruction)
        if self.checks and len(at):
            grains, warps = self.grains(at, m.warps[m.active], size)
            if write:
                self._check_write(grains, warps, lands, instruction)
            else:
                self._check_read(grains, warps, instruction)
        return at

    def grains(self, at, warps, size) -> tuple[np.ndarray, np.ndarray]:
        """The grains of accesses, and the warp of each."""
        number = max(size // self.grain, 1)
        return (at[:, None] // self.grain + np.arange(number)).reshape(-1), np.repeat(warps, number)

    def _report(self, instruction, **wrong) -> None:
        for kind, places in wrong.items():
            if places.any():
                self.findings[f"{kind.replace('_', ' ')}: {instruction}"] += 1

    def _check_read(self, g, w, instruction) -> None:
        self._report(
            instruction,
            read_of_shared_memory_that_was_never_written=self.written[g] == 0,
            race_read_of_a_write_without_a_barrier=(self.written[g] == self.epoch) & (self.writer[g] != w),
            race_read_of_a_copy_that_was_not_waited_for=self.landing[g] > 0,
        )
        again = (self.was_read[g] == self.epoch) & (self.reader[g] != w)
        self.reader[g] = np.where(again, SEVERAL, w)
        self.reader[g] = np.where(self.reader[g] != w, SEVERAL, w)
        self.was_read[g] = self.epoch

    def _check_write(self, g, w, lands, instruction) -> None:
        self._report(
            instruction,
            race_two_writes_without_a_barrier=(self.written[g] == self.epoch) & (self.writer[g] != w),
            race_write_after_read_without_a_barrier=(self.was_read[g] == self.epoch) & (self.reader[g] != w),
            race_write_over_an_operand_of_a_running_wgmma=self.held[g] > 0,
            race_write_where_a_copy_will_land=self.landing[g] > 0,
        )
        self.unfenced[g] = 1
        if lands:
            self.landing[g] += 1
        else:
            self._wrote(g, w)

    def _wrote(self, g, w) -> None:
        self.writer[g] = w
        self.written[g] = self.epoch

    def land(self, at, warps, data) -> None:
        """An asynchronous copy arrives."""
        size = data.shape[1]
        self.bytes[at[:, None] + np.arange(size)] = data
        if self.checks:
            g, w = self.grains(at, warps, size)
            self.landing[g] -= 1
            self._wrote(g, w)

    def hold(self, at, instruction) -> np.ndarray:
        """A wgmma begins to read; `release` ends it."""
        g = np.unique(at // self.grain)
        self._report(
            instruction,
            wgmma_reads_shared_memory_that_was_never_written=self.written[g] == 0,
            race_wgmma_reads_what_was_written_since_the_last_barrier=self.written[g] == self.epoch,
            wgmma_reads_what_was_written_without_a_proxy_fence=self.unfenced[g] > 0,
        )
        self.held[g] += 1
        return g

    def release(self, g) -> None:
        self.held[g] -= 1
        self.was_read[g] = self.epoch
        self.reader[g] = SEVERAL
