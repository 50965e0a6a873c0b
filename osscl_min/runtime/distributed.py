"""Several processes, one a device, that train or score together; torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together."""

    rank: int = 0
    world_size: int = 1
    group: Any = None  # torch.distributed's; None for a process alone

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def blocks(self, items: np.ndarray) -> list[np.ndarray]:
        """Items cut into a block a rank, as equal as they can be; joined in rank order they are the items."""
        return np.array_split(items, self.world_size)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order; any values that can be pickled."""
        if self.group is None:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, self.group)
        return values

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's value, on the device; the value itself for a process alone."""
        if self.group is not None:
            value = value.clone()
            dist.all_reduce(value, group=self.group)
        return value


def current() -> Ranks:
    """Where this process stands now."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Work together with torchrun's other processes, if it started this one; alone otherwise.

    A process that ends in an error leaves the group as it is: torchrun stops the others.
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 or not dist.is_torchelastic_launched()
    if alone or dist.is_initialized():
        yield current()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield current()
    dist.barrier()
    dist.destroy_process_group()
