"""Launching Triton kernels on CPU tensors through the emulator, in place of a GPU."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from .machine import Kernel
from .memory import GlobalMemory
from .ptx import EmulationError
from .work import Counts, work

# Functions of the package under test that ask for the GPU; they answer for the emulated one.
CAPABILITY = ("capability", "_capability", "_family")
OBSTACLE = "_obstacle"


@dataclass
class Launch:
    """One launch of a kernel, with its tl.constexpr arguments."""

    name: str
    grid: tuple[int, ...]
    constants: dict[str, Any]
    findings: Counter
    counts: Counts
    kernel: Kernel

    def work(self) -> dict[str, float]:
        return work(self.kernel, self.counts)


@dataclass
class Emulation:
    """A GPU of compute capability `capability`, and the launches on it.

    `count` counts memory traffic. `edit` changes the PTX before it is read, to plant a fault.
    """

    capability: int
    count: bool = False
    edit: Callable[[str], str] | None = None
    launches: list[Launch] = field(default_factory=list)
    kernels: dict[Any, Kernel] = field(default_factory=dict)

    def findings(self, notes: bool = False) -> dict[str, int]:
        """What is wrong in the launches so far, or only worth a note: right, but slow."""
        found = sum((launch.findings for launch in self.launches), Counter())
        return {text: n for text, n in found.items() if text.startswith("note") == notes}

    def compile(self, function, values, kinds, options) -> Kernel:
        """The kernel for these types, constants and alignments."""
        key = repr((function, kinds, options))
        if key not in self.kernels:
            signature = {name: kind for name, (kind, _) in zip(values, kinds, strict=True)}
            constants = {name: value for name, value in values.items() if signature[name] == "constexpr"}
            aligned = {(i,): [["tt.divisibility", 16]] for i, (_, known) in enumerate(kinds) if known == "D"}
            compiled = triton.compile(
                ASTSource(function, signature, constexprs=constants, attrs=aligned),
                target=GPUTarget("cuda", self.capability, 32),
                options=options,
            )
            ptx, metadata = compiled.asm["ptx"], compiled.metadata
            ptx = self.edit(ptx) if self.edit else ptx
            self.kernels[key] = Kernel(ptx, metadata.num_warps, metadata.shared)
        return self.kernels[key]

    def run(self, function, arguments, grid, **keywords) -> None:
        """One launch, with the arguments that Triton's own launcher takes."""
        bind = create_function_from_signature(function.signature, function.params, BaseBackend)
        values, kinds, options = bind(*arguments, **keywords)
        if unknown := set(options) - {"num_warps", "num_stages"}:
            raise TypeError(f"{function.__name__}: unknown arguments {sorted(unknown)}")
        kernel = self.compile(function, values, kinds, options)
        grid = tuple(map(int, grid(values) if callable(grid) else grid))
        memory, storages, parameters = _upload(
            [value for value, (kind, _) in zip(values.values(), kinds, strict=True) if kind != "constexpr"]
        )
        parameters += [0] * (len(kernel.entry.parameters) - len(parameters))
        try:
            findings, counts = kernel.launch(memory, parameters, grid, self.count)
        except EmulationError as error:
            raise EmulationError(f"{function.__name__}: {error}") from None
        for storage, start in zip(storages, memory.starts, strict=True):
            storage[:] = memory.bytes[start : start + len(storage)]
        chosen = {p.name: values[p.name] for p in function.params if p.is_constexpr}
        self.launches.append(Launch(function.__name__, grid, chosen, findings, counts, kernel))


def _upload(values: list) -> tuple[GlobalMemory, list[np.ndarray], list]:
    """A memory with the tensors' storages, these as bytes, and what the kernel is passed."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    hosts = list(storages)
    views = [torch.empty(0, dtype=torch.uint8).set_(s).numpy() for s in storages.values()]
    memory, parameters = GlobalMemory(views, hosts), []
    for value in values:
        if isinstance(value, torch.Tensor):
            host = value.untyped_storage().data_ptr()
            last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
            extent = (1 + last) * value.element_size() if value.numel() else 0
            value = memory.allow(hosts.index(host), value.data_ptr() - host if extent else 0, extent)
        parameters.append(value)
    return memory, views, parameters


class Emulated(JITFunction):
    """A jitted function whose launches go to the emulation; other kernels can still call it."""

    def __init__(self, function: JITFunction, emulation: Emulation):
        super().__init__(function.fn)
        self.emulation = emulation

    def run(self, *args, grid, warmup=False, **keywords):
        self.emulation.run(self, args, grid, **keywords)


@contextmanager
def emulated(package: str, capability: int, **options) -> Iterator[Emulation]:
    """Run every Triton kernel of an imported package on the emulated GPU.

    Inside, the package's jitted functions launch into the emulator, and its own questions for the GPU are
    answered: Triton can take CPU tensors, and the compute capability is `capability`.
    """
    emulation, changed, replaced = Emulation(capability, **options), [], {}
    for module in [m for name, m in sys.modules.items() if f"{name}.".startswith(f"{package}.")]:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                new = replaced.setdefault(id(value), Emulated(value, emulation))
            elif name in CAPABILITY and inspect.isfunction(value):
                new = lambda *_: capability  # noqa: E731
            elif name == OBSTACLE:
                new = lambda _: ""  # noqa: E731
            else:
                continue
            changed.append((module, name, value))
            setattr(module, name, new)
    if not replaced:
        raise EmulationError(f"{package} has no jitted functions: import it, without TRITON_INTERPRET")
    try:
        yield emulation
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
