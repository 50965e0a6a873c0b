"""Batches of samples on the device, read while the previous batch is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from osscl_min.data.audio import read_ahead
from osscl_min.data.reader import Reader

RESIDENT_SHARE = 0.5  # of a GPU's free memory that samples may take; a step needs the rest


def batches_of(order: Sequence[int], size: int, least: int = 2) -> list[np.ndarray]:
    """Cut an order into batches; a last batch of fewer than `least` clips joins the one before, since
    BatchNorm needs two clips on every rank."""
    cuts = list(range(size, len(order), size))
    if cuts and len(order) - cuts[-1] < least:
        cuts.pop()
    return np.split(np.asarray(order), cuts)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a small array to the device without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def resident(reader: Reader, device: torch.device, chunk: int = 256) -> torch.Tensor:
    """All samples of a reader in the device's memory, (clips, samples) int16, read in chunks of clips."""
    samples = torch.empty(len(reader), reader.length, dtype=torch.int16, device=device)
    rows = np.arange(len(reader))
    for part, own in load_batches(reader, rows, batches_of(rows, chunk, least=1), device):
        samples[own] = part
    return samples


def source_of(reader: Reader, device: torch.device, where: str = "auto") -> Reader | torch.Tensor:
    """The reader or, on a GPU, its samples in GPU memory: `where` is "yes", "no" or "auto", which means if
    they fit into RESIDENT_SHARE of what is free."""
    if device.type != "cuda" or where == "no":
        return reader
    needed = 2 * reader.length * len(reader)
    fits = needed <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    return resident(reader, device) if fits or where == "yes" else reader


def load_batches(
    source: Reader | torch.Tensor, labels: np.ndarray, batches: Sequence[np.ndarray], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Samples (B, samples) int16 and labels (B,) of each batch of positions in a reader or its samples.

    The next batch is read while one is worked on.
    """
    if isinstance(source, torch.Tensor):
        for batch in batches:
            yield source[to_device(batch, device)], to_device(labels[batch], device)
        return

    def read(batch: np.ndarray) -> torch.Tensor:
        samples = torch.from_numpy(source.read(batch))
        return samples.pin_memory() if device.type == "cuda" else samples

    for (batch,), (samples,) in read_ahead(read, ([batch] for batch in batches), jobs=1):
        yield samples.to(device, non_blocking=True), to_device(labels[batch], device)
