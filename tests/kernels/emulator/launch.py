"""Launching Triton kernels on CPU tensors through the emulator, in place of a GPU."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .machine import Kernel
from .memory import Counts, GlobalMemory
from .ptx import EmulationError
from .work import work, worst

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "i1",
}  # fmt: skip
# Functions of the package under test that ask for the GPU; they answer for the emulated one.
CAPABILITY = ("capability", "_capability", "_family")
OBSTACLE = "_obstacle"


@dataclass
class Launch:
    """One launch: the kernel, its grid, findings, counts and compiled form."""

    name: str
    grid: tuple[int, ...]
    constants: dict[str, Any]
    findings: Counter
    counts: Counts
    kernel: Kernel

    def work(self) -> dict[str, float]:
        return work(self.kernel, self.counts)

    def worst(self, number: int = 5) -> list[str]:
        return worst(self.counts, number)


@dataclass
class Emulation:
    """A GPU of compute capability `capability`, the launches on it, and how they are made.

    `specialise` marks integers as Triton's launcher does: 1 is a constant, multiples of 16 are known as such.
    `edit` changes the PTX before it is read, to plant a fault.
    """

    capability: int
    count: bool = False
    checks: bool = True
    specialise: bool = True
    edit: Any = None
    launches: list[Launch] = field(default_factory=list)
    kernels: dict = field(default_factory=dict)

    def findings(self, notes: bool = False) -> dict[str, int]:
        """What is wrong in the launches so far, or only worth a note: right, but slow."""
        found = sum((launch.findings for launch in self.launches), Counter())
        return {text: n for text, n in found.items() if text.startswith("note") == notes}

    def compile(self, function, signature, constants, aligned, warps, stages) -> Kernel:
        key = (function.__module__, function.__qualname__, warps, stages, tuple(signature.items()))
        key += (tuple((name, str(value)) for name, value in constants.items()), tuple(aligned), self.edit)
        if key not in self.kernels:
            attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
            compiled = triton.compile(
                ASTSource(function, signature, constexprs=constants, attrs=attributes),
                target=GPUTarget("cuda", self.capability, 32),
                options={"num_warps": warps, "num_stages": stages},
            )
            ptx = compiled.asm["ptx"]
            self.kernels[key] = Kernel(
                self.edit(ptx) if self.edit else ptx, compiled.metadata.num_warps, compiled.metadata.shared
            )
        return self.kernels[key]

    def run(self, function, arguments, grid, num_warps=4, num_stages=3, **keywords) -> None:
        """One launch, with the arguments that Triton's own launcher takes."""
        values = dict(zip(function.arg_names, arguments, strict=False)) | keywords
        if missing := set(function.arg_names) ^ set(values):
            raise TypeError(f"{function.__name__}: missing or unknown arguments {sorted(missing)}")
        signature, constants, aligned = {}, {}, []
        for parameter in function.params:
            name, value = parameter.name, values[parameter.name]
            signature[name] = _type(value)
            if parameter.is_constexpr or (self.specialise and type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                aligned += [name] * (value.data_ptr() % 16 == 0)
            elif self.specialise and type(value) is int and value % 16 == 0:
                aligned.append(name)
        kernel = self.compile(function, signature, constants, aligned, num_warps, num_stages)
        passed = {name: values[name] for name in values if signature[name] != "constexpr"}
        grid = tuple(int(g) for g in (grid(values) if callable(grid) else grid))
        storages, memory, parameters = _upload([passed[name] for name in signature if name in passed])
        parameters += [0] * (len(kernel.entry.parameters) - len(parameters))
        try:
            findings, counts = kernel.launch(memory, parameters, grid, self.checks, self.count)
        except EmulationError as error:
            raise EmulationError(f"{function.__name__}: {error}") from None
        for storage, start in zip(storages, memory.starts, strict=True):
            storage[:] = memory.bytes[start : start + len(storage)]
        self.launches.append(Launch(function.__name__, grid, constants, findings, counts, kernel))


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _upload(values: list) -> tuple[list[np.ndarray], GlobalMemory, list]:
    """Storages of the tensors as bytes, the memory that holds them, and what the kernel is passed."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    order = list(storages)
    views = [torch.empty(0, dtype=torch.uint8).set_(storage).numpy() for storage in storages.values()]
    memory = GlobalMemory(views, order)
    parameters = []
    for value in values:
        if isinstance(value, torch.Tensor):
            where = value.untyped_storage().data_ptr()
            extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            extent = extent * value.element_size() if value.numel() else 0
            value = memory.allow(order.index(where), value.data_ptr() - where if extent else 0, extent)
        parameters.append(value)
    return views, memory, parameters


class Emulated(JITFunction):
    """A jitted function whose launches go to the emulation; other kernels can still call it."""

    def __init__(self, function, emulation: Emulation):
        super().__init__(function.fn)
        self.emulation = emulation

    def run(self, *args, grid, warmup=False, **keywords):
        self.emulation.run(self, args, grid, **keywords)


def modules(package: str) -> Iterator[Any]:
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            yield module


@contextmanager
def emulated(package: str, capability: int, **options) -> Iterator[Emulation]:
    """Run every Triton kernel of an imported package on the emulated GPU.

    Inside, the package's jitted functions launch into the emulator, and its own questions for the GPU are
    answered: Triton can take CPU tensors, and the compute capability is `capability`.
    """
    emulation = Emulation(capability, **options)
    changed, replaced = [], {}
    for module in modules(package):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and not isinstance(value, Emulated):
                if id(value) not in replaced:
                    replaced[id(value)] = Emulated(value, emulation)
                new = replaced[id(value)]
            elif name in CAPABILITY and inspect.isfunction(value):
                new = lambda *_: capability  # noqa: E731
            elif name == OBSTACLE and inspect.isfunction(value):
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
