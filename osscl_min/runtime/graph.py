"""CUDA graphs: one launch per training step instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 3  # eager calls first: they allocate and tune what a capture may not


class CaptureError(Exception):
    """CUDA refuses to capture a function."""


class Graphed:
    """A function, tensors of fixed shapes -> dict of tensors, recorded as a CUDA graph and replayed.

    It may change other tensors, such as weights, in place. A CaptureError says that CUDA refuses to capture
    it; other errors, running out of memory included, pass through.
    """

    def __init__(self, function: Callable[..., dict[str, torch.Tensor]]):
        self.function, self.calls = function, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        current = torch.cuda.current_stream()
        if self.calls <= WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                outputs = self.function(*inputs)
            current.wait_stream(side)
            return outputs
        if self.graph is None:
            with torch.cuda.stream(current):  # current again after a capture that fails
                self._capture(inputs)
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}

    def _capture(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self.inputs, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        try:
            # thread_local: the data loader's thread may call CUDA meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            first = error.__context__ or error  # ending a broken capture raises once more
            if isinstance(first, torch.OutOfMemoryError) or "captur" not in str(first):
                raise first from None
            raise CaptureError(str(first).splitlines()[0]) from error
        self.graph = graph
