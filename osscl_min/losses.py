"""One-stage training's loss: mixup, ArcFace cross-entropy on both labels, SupCon; and the anomaly score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from osscl_kernels import supcon_loss
from torch.nn import functional as F

from osscl_min.config import Config, LossConfig


def mixup(
    wave: torch.Tensor, log_mel: torch.Tensor, mix: float | torch.Tensor, permutation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix every clip with its partner: waves linearly, and log-mels linearly in dB, separately.

    The log-mel of a mixed wave is another thing; the authors' code mixes the two maps as here.

    Parameters
    ----------
    wave : (B, samples)
    log_mel : (B, 1, mels, frames), dB
    mix : float or 0-d tensor
        lambda, the share of the clip itself; one for the batch, drawn from Beta(0.5, 0.5).
    permutation : (B,) int64
        Position of each clip's partner.
    """
    return (
        mix * wave + (1 - mix) * wave[permutation],
        mix * log_mel + (1 - mix) * log_mel[permutation],
    )


def os_scl_loss(
    logits: torch.Tensor,
    embedding: torch.Tensor,
    labels: torch.Tensor,
    partner_labels: torch.Tensor,
    mix: float | torch.Tensor,
    config: LossConfig = LossConfig(),
    group=None,
    share: float = 1.0,
    clean: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """lambda CE(logits, y_a) + (1 - lambda) CE(logits, y_b) + w SupCon(z, y_a); paper, section 2.

    The margin sits on y_a's logit in both cross-entropies, and SupCon sees mixed features under y_a alone:
    the mixed-in partner is label noise, which is the "noise-supervised" part.

    Parameters
    ----------
    logits : (B, classes) or (B, 2, classes)
        With the margin on `labels`, or once with it on `labels` and once on `partner_labels`.
    embedding : (B, D)
        Of unit length, of the mixed clips.
    labels, partner_labels : (B,) int64
        y_a and y_b.
    mix : float or 0-d tensor
        lambda.
    config : LossConfig
    group : torch.distributed.ProcessGroup, optional
        SupCon over the rows of all its ranks.
    share : float
        Of the rows of all ranks that these are: the cross-entropies of all ranks add up to the mean of all.
    clean : (B, D), optional
        Of unit length, of the unmixed clips: what SupCon sees where `config.contrastive` is "clean".

    Returns
    -------
    dict of 0-d tensors
        "total", "cross_entropy", "contrastive".
    """
    own, partner = (logits, logits) if logits.dim() == 2 else logits.unbind(1)
    cross_entropy = mix * F.cross_entropy(own, labels) + (1 - mix) * F.cross_entropy(partner, partner_labels)
    cross_entropy = share * cross_entropy

    def supcon(features: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        scale = {"temperature": config.temperature, "base_temperature": config.base_temperature}
        return supcon_loss(features, classes, **scale, group=group)

    if config.contrastive == "none":
        contrastive = torch.zeros_like(cross_entropy)
    elif config.contrastive == "weighted":
        contrastive = mix * supcon(embedding, labels) + (1 - mix) * supcon(embedding, partner_labels)
    else:
        contrastive = supcon(embedding if clean is None else clean, labels)
    total = config.cross_entropy_weight * cross_entropy + config.contrastive_weight * contrastive
    return {"total": total, "cross_entropy": cross_entropy, "contrastive": contrastive}


def training_losses(
    network: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    wave: torch.Tensor,
    log_mel: torch.Tensor,
    labels: torch.Tensor,
    mix: float | torch.Tensor,
    permutation: torch.Tensor,
    config: LossConfig = LossConfig(),
    group=None,
    share: float = 1.0,
) -> dict[str, torch.Tensor]:
    """A training batch's losses: mix the clips, run the network, compare.

    Parameters
    ----------
    network : callable
        (wave, log_mel, labels) -> (logits, embedding), an `OSSCL` or what wraps one.
    wave : (B, samples)
    log_mel : (B, 1, mels, frames), dB, of the unmixed waves
    labels : (B,) int64
    mix, permutation
        See `mixup`.
    config, group, share
        See `os_scl_loss`.

    Returns
    -------
    dict of 0-d tensors
        "total", "cross_entropy", "contrastive".
    """
    wave, partners, clean = wave.flatten(1), labels[permutation], None
    if config.mixup:
        mixed = mixup(wave, log_mel, mix, permutation)
    else:
        mixed, mix = (wave, log_mel), 1.0
    margins = torch.stack([labels, partners], 1) if config.margin_on == "each" else labels
    logits, embedding = network(*mixed, margins)
    if config.mixup and config.contrastive == "clean":
        clean = network(wave, log_mel, labels)[1]
    return os_scl_loss(logits, embedding, labels, partners, mix, config, group, share, clean)


def stage_loss(config: Config, epoch: int) -> LossConfig:
    """The loss of an epoch (counted from 0): the configured one, or, with pre-training, that of its stage.

    Two-stage training is SupCon of clean clips first and classification with mixup after it, as systems
    before OS-SCL did.
    """
    if not config.train.pretrain_epochs:
        return config.loss
    if epoch < config.train.pretrain_epochs:
        return replace(config.loss, mixup=False, contrastive="noise", cross_entropy_weight=0.0)
    return replace(config.loss, contrastive="none")


def anomaly_score(logits: torch.Tensor, labels: torch.Tensor, form: str = "exact") -> torch.Tensor:
    """Cross-entropy against the clip's own machine, in float64 and free of saturation.

    log(1 + sum over the other classes of exp(logit - own logit)): a cross-entropy in float32 is exactly 0
    for every clip that is recognised well, and such clips tie.

    Parameters
    ----------
    logits : (B, classes)
        With the margin on the own class, as the authors score.
    labels : (B,) int64
    form : {"exact", "upstream"}
        "upstream" is the authors' cross-entropy, in the logits' own precision.

    Returns
    -------
    (B,) float64, higher = more anomalous
    """
    if form == "upstream":
        return F.cross_entropy(logits, labels, reduction="none").double()
    logits = logits.double()
    difference = logits - logits.gather(1, labels[:, None])
    return difference.scatter(1, labels[:, None], -torch.inf).exp().sum(1).log1p()
