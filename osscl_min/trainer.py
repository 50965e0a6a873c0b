"""The networks, the optimiser and one training step."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from osscl_min.config import Config
from osscl_min.features import FrontEnd
from osscl_min.losses import mixup, os_scl_loss, stage_loss
from osscl_min.model import OSSCL
from osscl_min.runtime.device import autocast, implementation
from osscl_min.runtime.distributed import Ranks
from osscl_min.runtime.graph import CaptureError, Graphed

try:
    from osscl_cpu import accelerate
except ImportError:  # optional
    accelerate = None


class Trainer:
    """The networks, the optimiser and one step.

    Parameters
    ----------
    config : Config
    device : torch.device
    model : OSSCL, optional
        The starting point; a randomly initialised network without it.
    ranks : Ranks
        The processes that train together. Gradients and losses are those of the global batch; BatchNorm's
        statistics are each rank's own.

    Attributes
    ----------
    model, ema : OSSCL
        The student and its exponential moving average, which start alike. The EMA is validated, kept and
        used for scoring.
    computed_by : str
        The implementation of the network's layers in training.
    """

    def __init__(
        self, config: Config, device: torch.device, model: OSSCL | None = None, ranks: Ranks = Ranks()
    ):
        self.config, self.device, self.ranks = config, device, ranks
        self.model = (model or OSSCL(config.model)).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.front = FrontEnd(config.model.audio).to(device)
        self.loss = config.loss
        graphed = config.engine.cuda_graph == "auto" and device.type == "cuda" and ranks.group is None
        self.graph = Graphed(self.eager_step) if graphed else None
        rate = config.train.learning_rate
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            torch.tensor(rate, device=device) if graphed else rate,  # a graph would freeze a number
            capturable=graphed,
            fused=True,
        )
        # every float entry but frozen weights, BatchNorm's statistics included, as in the authors' code
        frozen = {name for name, value in self.model.named_parameters() if not value.requires_grad}
        self._student, self._average = (
            [
                value
                for name, value in network.state_dict().items()
                if value.is_floating_point() and name not in frozen
            ]
            for network in (self.model, self.ema)
        )
        self.computed_by = implementation(self.model.arcface.weight)  # "Triton kernels" or "PyTorch"
        self._network: nn.Module = self.model  # as it is called: compiled or wrapped
        if config.engine.compile:
            self._network = torch.compile(self.model)
            self.computed_by += ", torch.compile"
        elif device.type == "cpu" and accelerate is not None:
            self.computed_by = accelerate(self.model) or self.computed_by  # replaces layers' forward
        if ranks.group is not None:
            # of a new name for broadcast_buffers that older versions lack
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self._network = DistributedDataParallel(
                    self._network, broadcast_buffers=False, process_group=ranks.group
                )

    def network(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The student in the configured precision."""
        with autocast(self.device, self.config.train.precision):
            return self._network(*inputs)

    def step(
        self,
        wave: torch.Tensor,
        log_mel: torch.Tensor,
        labels: torch.Tensor,
        lam: float | torch.Tensor,
        permutation: torch.Tensor,
        share: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """One optimisation step on a batch; returns its losses, still on the device.

        On a GPU, full batches replay a CUDA graph of `eager_step`, if `lam` is a tensor.

        Parameters
        ----------
        wave : (B, samples)
        log_mel : (B, 1, mels, frames), dB, of the unmixed waves
        labels : (B,) int64
        lam, permutation
            See `losses.mixup`.
        share : float
            This rank's share of the global batch.
        """
        batch = wave, log_mel, labels, lam, permutation
        full = len(labels) == self.config.train.batch_size and isinstance(lam, torch.Tensor)
        if self.graph is not None and full:
            try:
                return self.graph(*batch)
            except CaptureError as error:
                tqdm.write(f"steps run without a CUDA graph: {error}")
                self.graph = None
        return self.eager_step(*batch, share)

    def eager_step(self, wave, log_mel, labels, lam, permutation, share=1.0) -> dict[str, torch.Tensor]:
        """Mix the clips, run the network, compute the losses, update the student and then its EMA."""
        self.model.train()
        partner_labels, clean = labels[permutation], None
        lam = lam if self.loss.mixup else 1.0
        mixed = mixup(wave, log_mel, lam, permutation) if self.loss.mixup else (wave, log_mel)
        margins = torch.stack([labels, partner_labels], 1) if self.loss.margin_on == "each" else labels
        logits, embedding = self.network(*mixed, margins)
        if self.loss.mixup and self.loss.contrastive == "clean":
            clean = self.network(wave, log_mel, labels)[1]
        losses = os_scl_loss(
            logits, embedding, labels, partner_labels, lam, self.loss, self.ranks.group, share, clean
        )
        self.optimizer.zero_grad(set_to_none=True)
        total = losses["total"] * self.ranks.world_size  # DistributedDataParallel averages over the ranks
        total.backward()
        self.optimizer.step()
        self.update_average()
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the EMA, then shrink the student."""
        torch._foreach_lerp_(self._average, self._student, 1 - self.config.train.ema_decay)
        if self.config.train.student_decay:
            torch._foreach_mul_(self._student, 1 - self.config.train.student_decay)

    def learning_rate(self, epoch: int) -> float:
        """Cosine annealing, one step per epoch (counted from 0)."""
        train = self.config.train
        cosine = (1 + math.cos(math.pi * epoch / train.epochs)) / 2
        return train.final_learning_rate + (train.learning_rate - train.final_learning_rate) * cosine

    def start_epoch(self, epoch: int) -> None:
        """Set the epoch's learning rate and loss."""
        loss = stage_loss(self.config, epoch)
        if loss != self.loss:
            self.loss = loss
            self.graph = self.graph and Graphed(self.eager_step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.learning_rate(epoch))
            else:
                group["lr"] = self.learning_rate(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes. No step draws from a global generator."""
        return {
            "ema": self.ema.state_dict(),
            "student": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(content["student"])
        self.ema.load_state_dict(content["ema"])
        # keep this process's groups: their learning rate is a tensor on a GPU, else a number
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": groups})

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether the student, the EMA and the optimiser are finite; waits for the device once."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        largest = torch._foreach_norm([*self._student, *self._average, *moments], ord=math.inf)
        return bool(torch.stack([value.double() for value in largest]).isfinite().all())
