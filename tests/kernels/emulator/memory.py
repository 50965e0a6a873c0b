"""Global and shared memory: what is read and written, what must not be, and what it costs.

`m` is the machine; addresses are registers, of which the active threads' count.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from .numbers import u1, u2, u4, u8
from .ptx import EmulationError

BASE = 0x7F0000000000  # address of the first byte of global memory
GAP = 2048  # bytes between tensors that nobody may touch
SEVERAL = 63  # in place of a warp's number
STAMPS = 64  # per epoch, one for each warp
VIEWS = {2: u2, 4: u4, 8: u8}


class GlobalMemory:
    """A flat copy of tensors' storages, with gaps between them; only the tensors may be accessed."""

    def __init__(self, tensors: list[torch.Tensor]):
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        self.copied, starts, top = [], {}, GAP
        for host, storage in storages.items():  # each keeps its address modulo 16
            starts[host] = -(-top // 256) * 256 + host % 16
            top = starts[host] + len(storage) + GAP
        self.bytes = np.zeros(-(-top // 256) * 256, u1)
        self.views = {size: self.bytes.view(t) for size, t in VIEWS.items()}
        self.allowed = np.zeros(len(self.bytes), bool)
        for host, storage in storages.items():
            original = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            copy = self.bytes[starts[host] :][: len(original)]
            copy[:] = original
            self.copied.append((original, copy))
        self.addresses = []
        for x in tensors:
            start = starts[x.untyped_storage().data_ptr()] + x.storage_offset() * x.element_size()
            last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            self.allowed[start : start + (1 + last) * x.element_size() * bool(x.numel())] = True
            self.addresses.append(BASE + start)

    def copy_back(self) -> None:
        for original, copy in self.copied:
            original[:] = copy

    def reach(self, m, addresses, size, instruction, write=False) -> np.ndarray:
        """Offsets of the active threads' addresses into `bytes`."""
        everywhere = (addresses - u8(BASE)).view(np.int64)
        at = m.picked(everywhere)
        if at.size:
            if at.min() < 0 or at.max() + size > len(self.bytes):
                raise EmulationError(f"global access outside every tensor: {instruction}")
            if not (self.allowed[at].all() and self.allowed[at + (size - 1)].all()):
                raise EmulationError(f"global access out of bounds: {instruction}")
            if (at & (size - 1)).any():
                raise EmulationError(f"global access is not aligned: {instruction}")
        if m.count:
            m.counts.global_access(np.where(m.active, everywhere, -1), size, write)
        return at


class SharedMemory:
    """Shared memory of several programs side by side, poisoned until it is written.

    Where `checks` is set, each grain of bytes (the kernel's smallest access) remembers which warp wrote and
    which read it last and between which barriers, both as one stamp, how many asynchronous copies will land
    in it, how many wgmma read it, and whether a fence is missing.
    """

    def __init__(self, programs: int, size: int, grain: int, checks: bool, findings: Counter):
        self.size = max(-(-size // 16) * 16, 16)
        self.grain, self.checks, self.findings, self.now = grain, checks, findings, STAMPS
        self.bytes = np.full(programs * self.size, 0xFF, u1)
        self.views = {size: self.bytes.view(t) for size, t in VIEWS.items()}
        self.base = (np.arange(programs) * self.size)[:, None]
        for name in ("writer", "reader", "landing", "held", "unfenced"):
            setattr(self, name, np.zeros(len(self.bytes) // grain if checks else 0, np.int32))

    def reach(self, m, addresses, size, instruction, write=False, lands=False) -> np.ndarray:
        """Offsets of the active threads' addresses into `bytes`; `lands`: written by a copy, later."""
        inside = (addresses <= u4(self.size - size)) & (addresses & u4(size - 1) == 0)
        if not (inside | ~m.active).all():
            raise EmulationError(f"shared access out of bounds or not aligned: {instruction}")
        everywhere = addresses.astype(np.int64) + self.base
        at = m.picked(everywhere)
        if m.count:
            m.counts.shared_access(np.where(m.active, everywhere, -1), size)
        if self.checks and len(at):
            g, stamps = self._grains(at, m.picked(m.warps), size)
            if write:
                self._check_write(g, stamps, lands, instruction)
            else:
                self._check_read(g, stamps, instruction)
        return at

    def barrier(self) -> None:
        self.now += STAMPS

    def _grains(self, at, warps, size) -> tuple[np.ndarray, np.ndarray]:
        """The grains of accesses, and the stamp of each."""
        grains = at[:, None] // self.grain + np.arange(max(size // self.grain, 1))
        return grains.reshape(-1), np.repeat(self.now + warps, grains.shape[1])

    def _conflict(self, who, stamps) -> np.ndarray:
        """Where another warp was there since the last barrier."""
        return (who >= self.now) & (who != stamps)

    def _report(self, instruction, **wrong) -> None:
        for kind, places in wrong.items():
            if places.any():
                self.findings[f"{kind.replace('_', ' ')}: {instruction}"] += 1

    def _check_read(self, g, stamps, instruction) -> None:
        self._report(
            instruction,
            read_of_shared_memory_that_was_never_written=self.writer[g] == 0,
            race_read_of_a_write_without_a_barrier=self._conflict(self.writer[g], stamps),
            race_read_of_a_copy_that_was_not_waited_for=self.landing[g] > 0,
        )
        several = self._conflict(self.reader[g], stamps)
        self.reader[g] = stamps
        several |= self.reader[g] != stamps
        self.reader[g[several]] = self.now + SEVERAL

    def _check_write(self, g, stamps, lands, instruction) -> None:
        self._report(
            instruction,
            race_two_writes_without_a_barrier=self._conflict(self.writer[g], stamps),
            race_write_after_read_without_a_barrier=self._conflict(self.reader[g], stamps),
            race_write_over_an_operand_of_a_running_wgmma=self.held[g] > 0,
            race_write_where_a_copy_will_land=self.landing[g] > 0,
        )
        self.unfenced[g] = 1
        if lands:
            self.landing[g] += 1
        else:
            self.writer[g] = stamps

    def land(self, at, warps, data) -> None:
        """An asynchronous copy arrives."""
        size = data.shape[1]
        self.bytes[at[:, None] + np.arange(size)] = data
        if self.checks:
            g, stamps = self._grains(at, warps, size)
            self.landing[g] -= 1
            self.writer[g] = stamps

    def hold(self, at, instruction) -> np.ndarray:
        """A wgmma begins to read; `release` ends it."""
        g = np.unique(at // self.grain)
        self._report(
            instruction,
            wgmma_reads_shared_memory_that_was_never_written=self.writer[g] == 0,
            race_wgmma_reads_what_was_written_since_the_last_barrier=self.writer[g] >= self.now,
            wgmma_reads_what_was_written_without_a_proxy_fence=self.unfenced[g] > 0,
        )
        self.held[g] += 1
        return g

    def release(self, g) -> None:
        self.held[g] -= 1
        self.reader[g] = self.now + SEVERAL
