"""The loss and its variants, and what each of them trains."""

from dataclasses import replace

import pytest
import torch
from conftest import refused
from osscl_kernels import supcon_loss_ref
from torch.nn import functional as F

from osscl_min.config import PRESETS, AudioConfig, LossConfig, ModelConfig, TrainConfig
from osscl_min.losses import stage_loss
from osscl_min.model import OSSCL
from osscl_min.trainer import Trainer

SHORT = AudioConfig(seconds=1.0)
LAM = 0.3


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(6, SHORT.samples, generator=generator)
    log_mel = -30 + 10 * torch.randn(6, 1, SHORT.mels, SHORT.frames, generator=generator)
    return wave, log_mel, torch.tensor([0, 0, 1, 1, 2, 2]), LAM, torch.tensor([3, 2, 5, 4, 0, 1])


def trainer(loss=LossConfig(), inputs=("log_mel",), frozen=(), **settings):
    torch.manual_seed(0)
    small = PRESETS["small"]
    model = replace(small.model, audio=SHORT, classes=3, inputs=inputs, frozen=frozen)
    config = replace(small, model=model, loss=loss, train=replace(small.train, **settings))
    return Trainer(config, torch.device("cpu"))


def parts(model, batch):
    """Own logits, partner's logits, mixed and clean embeddings, computed by hand."""
    wave, log_mel, labels, lam, permutation = batch
    mixed = [lam * x + (1 - lam) * x[permutation] for x in (wave, log_mel)]
    own, embedding = model(*mixed, labels)
    return own, model(*mixed, labels[permutation])[0], embedding, model(wave, log_mel)[1]


@pytest.mark.parametrize("contrastive", ["noise", "clean", "weighted", "none"])
@pytest.mark.parametrize("margin_on", ["own", "each"])
def test_every_variant_is_what_it_says(batch, contrastive, margin_on):
    student = trainer(LossConfig(contrastive=contrastive, margin_on=margin_on, contrastive_weight=0.5))
    labels, partners = batch[2], batch[2][batch[4]]
    own, partner, embedding, clean = parts(student.model, batch)
    other = own if margin_on == "own" else partner
    cross_entropy = LAM * F.cross_entropy(own, labels) + (1 - LAM) * F.cross_entropy(other, partners)
    expected = {
        "noise": supcon_loss_ref(embedding, labels),
        "clean": supcon_loss_ref(clean, labels),
        "weighted": LAM * supcon_loss_ref(embedding, labels)
        + (1 - LAM) * supcon_loss_ref(embedding, partners),
        "none": torch.tensor(0.0),
    }[contrastive]
    losses = student.step(*batch)
    torch.testing.assert_close(losses["cross_entropy"], cross_entropy)
    torch.testing.assert_close(losses["contrastive"], expected)
    torch.testing.assert_close(losses["total"], cross_entropy + 0.5 * expected)


def test_without_mixup_clips_are_clean(batch):
    student, labels = trainer(LossConfig(mixup=False)), batch[2]
    logits, embedding = student.model(*batch[:3])
    losses = student.step(*batch)
    torch.testing.assert_close(losses["cross_entropy"], F.cross_entropy(logits, labels))
    torch.testing.assert_close(losses["contrastive"], supcon_loss_ref(embedding, labels))


def test_two_stages():
    config = replace(PRESETS["small"], train=TrainConfig(epochs=3, pretrain_epochs=2))
    first, second = stage_loss(config, 1), stage_loss(config, 2)
    assert not first.mixup and first.cross_entropy_weight == 0 and first.contrastive == "noise"
    assert second.mixup and second.cross_entropy_weight == 1 and second.contrastive == "none"
    assert stage_loss(PRESETS["small"], 0) == PRESETS["small"].loss


def test_frozen_convolutions_stay_as_drawn(batch):
    frozen = trainer(inputs=("tfgram", "log_mel"), frozen=("tfgram",))
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}
    frozen.step(*batch)
    for network in (frozen.model, frozen.ema):
        for name, value in network.named_parameters():
            still = torch.equal(value, before[name])
            assert still if name.startswith("tfgram.conv") else not still, name
    with refused("model.frozen"):
        OSSCL(ModelConfig(inputs=("log_mel",), frozen=("tfgram",)))


def test_bfloat16_trains_alike_and_keeps_cosines_in_float32(batch):
    runs = {name: trainer(precision=name) for name in ("fp32", "bf16")}
    losses = {name: run.step(*batch) for name, run in runs.items()}
    for name, loss in losses["bf16"].items():
        assert loss.dtype == torch.float32
        exact = losses["fp32"][name].item()
        assert loss.item() != exact and loss.item() == pytest.approx(exact, rel=0.2)
    logits, embedding = runs["bf16"].network(*batch[:3])
    assert logits.dtype == embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(6), rtol=1e-6, atol=0)
