"""Launching Triton kernels on CPU tensors through the emulator, in place of a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from osscl_kernels import backend
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .machine import Kernel
from .memory import GlobalMemory
from .ptx import EmulationError
from .work import Counts, work


@dataclass
class Launch:
    """One launch of a kernel, with its tl.constexpr arguments."""

    name: str
    grid: tuple[int, ...]
    constants: dict[str, Any]
    counts: Counts
    kernel: Kernel

    def work(self) -> dict[str, float]:
        return work(self.kernel, self.counts)


@dataclass
class Emulation:
    """A GPU, and the launches on it.

    `count` counts memory traffic. `one` runs one program of each launch: the results mean nothing, its work
    does. `edit` changes the PTX before it is read, to plant a fault.
    """

    count: bool = False
    one: bool = False
    edit: Callable[[str], str] = str
    launches: list[Launch] = field(default_factory=list)
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def findings(self, notes: bool = False) -> dict[str, int]:
        """What is wrong in the launches so far, or only worth a note: right, but slow."""
        found = sum((launch.counts.findings for launch in self.launches), Counter())
        return {text: n for text, n in found.items() if text.startswith("note") == notes}

    def launch(self, compiled: CompiledKernel, grid: tuple[int, ...], _, *values) -> None:
        """Run a kernel that Triton has compiled with all its arguments."""
        function, metadata = compiled.src.fn, compiled.metadata
        if compiled.hash not in self.kernels:
            ptx = self.edit(compiled.asm["ptx"])
            self.kernels[compiled.hash] = Kernel(ptx, metadata.num_warps, metadata.shared)
        kernel = self.kernels[compiled.hash]
        kinds = compiled.src.signature.values()
        parameters = [value for value, kind in zip(values, kinds, strict=True) if kind != "constexpr"]
        memory = GlobalMemory([x for x in parameters if isinstance(x, torch.Tensor)])
        addresses = iter(memory.addresses)
        parameters = [next(addresses) if isinstance(x, torch.Tensor) else x for x in parameters]
        parameters += [0] * (len(kernel.entry.parameters) - len(parameters))  # scratch memory, unused
        try:
            counts = kernel.launch(memory, parameters, grid, self.count, self.one)
        except EmulationError as error:
            raise EmulationError(f"{function.__name__}: {error}") from None
        memory.copy_back()
        constants = {p.name: x for p, x in zip(function.params, values, strict=True) if p.is_constexpr}
        self.launches.append(Launch(function.__name__, grid, constants, counts, kernel))


@contextmanager
def emulated(capability: int, **options) -> Iterator[Emulation]:
    """Run every Triton kernel that is launched inside on an emulated GPU of this compute capability.

    The questions for the GPU that the package under test asks are answered, too.
    """
    emulation = Emulation(**options)
    gpu = SimpleNamespace(
        get_current_device=lambda: capability,  # Triton keeps compiled kernels by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    # Triton asks a compiled kernel for what a profiler may want, then runs it.
    launches = {"launch_metadata": lambda *arguments: emulation.launch(*arguments), "run": lambda *_: None}
    with (
        mock.patch.object(driver, "_active", gpu),
        mock.patch.multiple(CompiledKernel, **launches),
        mock.patch.multiple(backend, capability=lambda _: capability, _obstacle=lambda _: ""),
    ):
        yield emulation
