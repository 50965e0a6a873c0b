"""The networks, the optimiser and one step: what a step computes, and how it is made fast on a GPU."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from osscl_min.config import Config
from osscl_min.features import FrontEnd
from osscl_min.losses import anomaly_score, stage_loss, training_losses
from osscl_min.model import OSSCL
from osscl_min.runtime.device import autocast
from osscl_min.runtime.distributed import Ranks

LOSSES = ("total", "cross_entropy", "contrastive")
WARM_UP = 3  # eager steps before a CUDA graph is recorded


@dataclass(frozen=True)
class Validation:
    """What the EMA says of the held-out clips, unmixed and each beside its own machine."""

    loss: float  # mean cross-entropy, margin on
    accuracy: float  # share recognised as their own machine, margin off
    labels: torch.Tensor  # (n,) int64
    scores: torch.Tensor  # (n,) float64, anomaly scores: of normal clips never trained on


class Trainer:
    """The networks, the optimiser and one step.

    Parameters
    ----------
    config : Config
    device : torch.device
    model : OSSCL, optional
        Where training starts; a freshly drawn network without.
    ranks : Ranks
        The processes that train together. Gradients and losses are those of the global batch; BatchNorm's
        statistics are each rank's own.

    Attributes
    ----------
    model, ema : OSSCL
        The student and its exponential moving average, which start alike. The EMA is what is validated,
        kept and scored with.
    """

    def __init__(
        self, config: Config, device: torch.device, model: OSSCL | None = None, ranks: Ranks = Ranks()
    ):
        self.config, self.device, self.ranks = config, device, ranks
        self.model = (model or OSSCL(config.model)).to(device)
        try:
            import osscl_cpu

            self.computed_by = osscl_cpu.accelerate(self.model)
        except ImportError:  # optional
            self.computed_by = ""
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.front = FrontEnd(config.model.audio).to(device)
        self.loss = config.loss
        wanted = config.engine.cuda_graph == "auto"
        self.graphed = wanted and device.type == "cuda" and ranks.group is None
        rate = config.train.learning_rate
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            torch.tensor(rate, device=device) if self.graphed else rate,  # a graph would freeze a number
            capturable=self.graphed,
            fused=True,
        )
        # every float entry of the state, BatchNorm's statistics included, as the authors' code does
        frozen = {name for name, value in self.model.named_parameters() if not value.requires_grad}
        self._student, self._average = (
            [
                value
                for name, value in network.state_dict().items()
                if value.is_floating_point() and name not in frozen
            ]
            for network in (self.model, self.ema)
        )
        self._network: nn.Module = self.compiled() if config.engine.compile else self.model
        if ranks.group is not None:
            with warnings.catch_warnings():  # of a new name for broadcast_buffers that older versions lack
                warnings.simplefilter("ignore", FutureWarning)
                self._network = DistributedDataParallel(
                    self._network, broadcast_buffers=False, process_group=ranks.group
                )
        self._graph: _StepGraph | None = None
        self._warm = 0

    def network(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The student in the configured precision."""
        with autocast(self.device, self.config.train.precision):
            return self._network(*inputs)

    def step(
        self,
        wave: torch.Tensor,
        log_mel: torch.Tensor,
        labels: torch.Tensor,
        mix: float | torch.Tensor,
        permutation: torch.Tensor,
        share: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """One optimisation step on a batch; returns its losses, still on the device.

        Parameters
        ----------
        wave : (B, samples)
        log_mel : (B, 1, mels, frames), dB, of the unmixed waves
        labels : (B,) int64
        mix : float or 0-d tensor
            lambda.
        permutation : (B,) int64
        share : float
            Of the global batch that these clips are.
        """
        self.model.train()
        losses = training_losses(
            self.network, wave, log_mel, labels, mix, permutation, self.loss, self.ranks.group, share
        )
        self.backward(losses["total"])
        self.optimizer.step()
        self.average()
        return self._reported(losses)

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of the global batch's loss, given this rank's part of it."""
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.ranks.world_size).backward()  # DistributedDataParallel averages over the ranks

    @torch.no_grad()
    def average(self) -> None:
        """Update the EMA, then shrink the student."""
        torch._foreach_lerp_(self._average, self._student, 1 - self.config.train.ema_decay)
        if self.config.train.student_decay:
            torch._foreach_mul_(self._student, 1 - self.config.train.student_decay)

    def _reported(self, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        losses = {name: loss.detach() for name, loss in losses.items()}
        if self.ranks.group is not None:  # SupCon's is the global batch's already
            own = losses["cross_entropy"]
            losses["cross_entropy"] = self.ranks.total(own)
            losses["total"] = losses["total"] + self.loss.cross_entropy_weight * (
                losses["cross_entropy"] - own
            )
        return losses

    def batch_step(
        self,
        samples: torch.Tensor,
        labels: torch.Tensor,
        mix: float | torch.Tensor,
        permutation: torch.Tensor,
        share: float = 1.0,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`step` from samples (B, samples) int16, as a CUDA graph where it can be.

        Parameters
        ----------
        samples : (B, samples) int16
        labels, mix, permutation, share
            As in `step`.
        transform : callable, optional
            Applied to the waves first, as by `FrontEnd`; it works on the host and keeps the step out of a
            graph.

        Returns
        -------
        (3,)
            In LOSSES' order, still on the device.
        """
        batch = samples, labels, mix, permutation
        if self.graphed and transform is None and len(labels) == self.config.train.batch_size:
            return self._graphed_step(*batch)
        return self._eager_step(*batch, share, transform)

    def _eager_step(self, samples, labels, mix, permutation, share=1.0, transform=None) -> torch.Tensor:
        losses = self.step(*self.front(samples, transform), labels, mix, permutation, share)
        return torch.stack([losses[name] for name in LOSSES])

    def _graphed_step(self, *batch: torch.Tensor) -> torch.Tensor:
        if self._warm < WARM_UP:
            self._warm += 1
            beside, here = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                losses = self._eager_step(*batch)
            here.wait_stream(beside)
            return losses
        try:
            self._graph = self._graph or _StepGraph(self, batch)
        except RuntimeError as error:
            tqdm.write(f"steps run without a CUDA graph: {str(error).splitlines()[0]}")
            self.graphed = False
            return self._eager_step(*batch)
        return self._graph(batch)

    def compiled(self) -> nn.Module:
        """The student compiled, or as it is where the compiler fails, which is said in one line."""
        audio = self.config.model.audio
        state = copy.deepcopy(self.model.state_dict())
        waves = torch.zeros(
            self.config.train.batch_size // self.ranks.world_size, audio.samples, dtype=torch.int16
        )
        labels = torch.zeros(len(waves), dtype=torch.int64, device=self.device)
        network = torch.compile(self.model)
        self.model.train()
        try:
            with autocast(self.device, self.config.train.precision):
                logits, _ = network(*self.front(waves.to(self.device)), labels)
            logits.sum().backward()
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            tqdm.write(f"the network runs uncompiled: {str(error).strip().splitlines()[0]}")
            network = self.model
        self.model.load_state_dict(state)
        self.model.zero_grad(set_to_none=True)
        return network

    def learning_rate(self, epoch: int) -> float:
        """Cosine annealing, stepped once an epoch (counted from 0)."""
        train = self.config.train
        cosine = (1 + math.cos(math.pi * epoch / train.epochs)) / 2
        return train.final_learning_rate + (train.learning_rate - train.final_learning_rate) * cosine

    def start_epoch(self, epoch: int) -> None:
        """Set the epoch's learning rate and loss."""
        loss = stage_loss(self.config, epoch)
        if loss != self.loss:
            self.loss, self._graph, self._warm = loss, None, 0
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(self.learning_rate(epoch))
            else:
                group["lr"] = self.learning_rate(epoch)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Validation:
        """Score held-out clips, given as batches of samples (B, samples) int16 and labels (B,)."""
        correct, all_labels, scores = [], [], []
        for samples, labels in batches:
            with autocast(self.device, self.config.train.precision):
                _, embedding = self.ema(*self.front(samples))
            scores.append(anomaly_score(self.ema.arcface(embedding, labels), labels).cpu())
            correct.append((self.ema.arcface(embedding).argmax(1) == labels).cpu())
            all_labels.append(labels.cpu())
        scores = torch.cat(scores)
        accuracy = torch.cat(correct).double().mean().item()
        return Validation(scores.mean().item(), accuracy, torch.cat(all_labels), scores)

    def state(self) -> dict[str, Any]:
        """Everything that a step changes. No step draws from a global generator."""
        return {
            "ema": self.ema.state_dict(),
            "student": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, content: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.model.load_state_dict(content["student"])
        self.ema.load_state_dict(content["ema"])
        # the groups stay: whether the learning rate is a tensor is this device's matter
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": groups})

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether the student, the EMA and the optimiser hold numbers only; waits for the device once."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        largest = torch._foreach_norm([*self._student, *self._average, *moments], ord=math.inf)
        return bool(torch.stack([value.double() for value in largest]).isfinite().all())


class _StepGraph:
    """A step of one batch size, recorded once as a CUDA graph: one launch instead of hundreds."""

    def __init__(self, trainer: Trainer, batch: tuple[torch.Tensor, ...]):
        self.inputs = [tensor.clone() for tensor in batch]
        trainer.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = trainer._eager_step(*self.inputs)

    def __call__(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        for mine, given in zip(self.inputs, batch, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.losses.clone()
