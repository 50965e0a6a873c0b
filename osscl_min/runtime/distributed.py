"""Several processes, one per device, that train or score together; torchrun starts them."""

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
    group: Any = None  # a torch.distributed process group; None for a single process

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def blocks(self, items: np.ndarray) -> list[np.ndarray]:
        """Items cut into one block per rank, of nearly equal size, in rank order."""
        return np.array_split(items, self.world_size)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (anything that can be pickled), in rank order."""
        if self.group is None:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, self.group)
        return values


def global_sum(value: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the ranks of a group, with the gradient of this rank's part alone."""
    if group is None:
        return value
    own = value.detach()
    total = own.clone()
    dist.all_reduce(total, group=group)
    return value + (total - own)


def current() -> Ranks:
    """This process in the default process group; a single process without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join torchrun's process group if torchrun started this process; otherwise run alone.

    After an error the group is left as it is: torchrun stops the other processes.
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
