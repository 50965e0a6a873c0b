"""The loss of one-stage training: mixup, ArcFace cross-entropy on both labels, SupCon; the anomaly score."""

from __future__ import annotations

from dataclasses import replace

import torch
from osscl_kernels import supcon_loss
from torch.nn import functional as F

from osscl_min.config import Config, LossConfig
from osscl_min.runtime.distributed import global_sum


def mixup(
    wave: torch.Tensor, log_mel: torch.Tensor, lam: float | torch.Tensor, permutation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix every clip with its partner: waves linearly, and log-mels linearly in dB, separately.

    Mixed log-mels are not the log-mels of mixed waves; the authors' code mixes both maps as here.

    Parameters
    ----------
    wave : (B, samples)
    log_mel : (B, 1, mels, frames), dB
    lam : float or 0-d tensor
        lambda, the weight of the clip itself; one per batch, drawn from Beta(alpha, alpha).
    permutation : (B,) int64
        Position of each clip's partner.
    """
    return (
        lam * wave + (1 - lam) * wave[permutation],
        lam * log_mel + (1 - lam) * log_mel[permutation],
    )


def os_scl_loss(
    logits: torch.Tensor,
    embedding: torch.Tensor,
    labels: torch.Tensor,
    partner_labels: torch.Tensor,
    lam: float | torch.Tensor,
    config: LossConfig = LossConfig(),
    group=None,
    share: float = 1.0,
    clean: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """lambda CE(logits, y_a) + (1 - lambda) CE(logits, y_b) + w SupCon(z, y_a); paper, section 2.

    By default the margin sits on y_a's logit in both cross-entropies, and SupCon sees mixed features under
    y_a alone: the partner mixed in is label noise, the "noise-supervised" part.

    Parameters
    ----------
    logits : (B, classes) or (B, 2, classes)
        With the margin on `labels`; or two rows, with it on `labels` and on `partner_labels`.
    embedding : (B, D)
        Of unit length, of the mixed clips.
    labels, partner_labels : (B,) int64
        y_a and y_b.
    lam : float or 0-d tensor
        lambda.
    config : LossConfig
    group : torch.distributed.ProcessGroup, optional
        The losses are those of the batches of all its ranks together.
    share : float
        This rank's share of the clips of all ranks.
    clean : (B, D), optional
        Of unit length, of the unmixed clips, for SupCon to take instead of `embedding`.

    Returns
    -------
    dict of 0-d tensors
        "total" and its terms, "cross_entropy" and "contrastive"; all are logged.
    """
    own, partner = (logits, logits) if logits.dim() == 2 else logits.unbind(1)
    cross_entropy = lam * F.cross_entropy(own, labels) + (1 - lam) * F.cross_entropy(partner, partner_labels)
    # the value of the global batch, with the gradient of this rank's share
    cross_entropy = global_sum(share * cross_entropy, group)

    def supcon(features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scale = {"temperature": config.temperature, "base_temperature": config.base_temperature}
        return supcon_loss(features, targets, **scale, group=group)

    if config.contrastive == "none":
        contrastive = torch.zeros_like(cross_entropy)
    elif config.contrastive == "weighted":
        contrastive = lam * supcon(embedding, labels) + (1 - lam) * supcon(embedding, partner_labels)
    else:
        contrastive = supcon(embedding if clean is None else clean, labels)
    total = config.cross_entropy_weight * cross_entropy + config.contrastive_weight * contrastive
    return {"total": total, "cross_entropy": cross_entropy, "contrastive": contrastive}


def stage_loss(config: Config, epoch: int) -> LossConfig:
    """The loss of an epoch (counted from 0): the configured one or, with pre-training, that of its stage.

    Two-stage training, as in systems before OS-SCL: SupCon of clean clips, then classification with mixup.
    """
    if not config.train.pretrain_epochs:
        return config.loss
    if epoch < config.train.pretrain_epochs:  # "noise" is SupCon of the batch as it is, here unmixed
        return replace(config.loss, mixup=False, contrastive="noise", cross_entropy_weight=0.0)
    return replace(config.loss, contrastive="none")


def anomaly_score(logits: torch.Tensor, labels: torch.Tensor, form: str = "exact") -> torch.Tensor:
    """Cross-entropy against the clip's own machine, (B,) float64, higher = more anomalous.

    log(1 + sum over the other classes of exp(logit - own logit)). A float32 cross-entropy is exactly 0 for
    every clip that is recognised well, and such clips tie; `form` "upstream" gives that one (the authors').

    Parameters
    ----------
    logits : (B, classes)
        With the margin on the own class, as the authors score.
    labels : (B,) int64
    form : {"exact", "upstream"}
    """
    if form == "upstream":
        return F.cross_entropy(logits, labels, reduction="none").double()
    logits = logits.double()
    difference = logits - logits.gather(1, labels[:, None])
    return difference.scatter(1, labels[:, None], -torch.inf).exp().sum(1).log1p()
