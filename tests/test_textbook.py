"""The textbook network is the same function as ours, and the training benchmark runs both ways."""

import pytest
import torch

from osscl_min.bench_train import PARTS, UNUSED, case, write_clips
from osscl_min.config import PRESETS, AudioConfig, ModelConfig
from osscl_min.model import OSSCL
from osscl_min.textbook import TextbookOSSCL


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_same_function(training):
    torch.manual_seed(0)
    config = ModelConfig(audio=AudioConfig(seconds=1.0), classes=5)
    ours, textbook = OSSCL(config).double().train(training), TextbookOSSCL(config).double().train(training)
    textbook.load_state_dict(ours.state_dict())
    wave, labels = 0.1 * torch.randn(4, 16_000, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    log_mel = -30 + 10 * torch.randn(4, 1, 128, 32, dtype=torch.float64)
    results = (network(wave, log_mel, labels) for network in (ours, textbook))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if training:
        for network in (ours, textbook):
            network(wave, log_mel, labels)[0].square().sum().backward()
        theirs = dict(textbook.named_parameters())
        for name, parameter in ours.named_parameters():
            scale = theirs[name].grad.abs().max()
            assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-8 * scale + 1e-9, name


def test_the_unused_entries_are_those_of_the_released_model():
    assert sum(UNUSED) == 81_174_760 - sum(p.numel() for p in OSSCL().parameters())


@pytest.mark.parametrize("way", ["plain", "engine"])
def test_a_case_is_measured_by_part(tmp_path, way):
    data = write_clips(tmp_path, 8, PRESETS["paper"])
    figures = case(way, "fp32", 2, "cpu", 1, str(data))
    assert all(figures[f"{part}_ms"] > 0 for part in PARTS)
    assert figures["step_ms"] == pytest.approx(sum(figures[f"{part}_ms"] for part in PARTS))
    assert figures["clips_per_second"] == pytest.approx(2000 / figures["step_ms"])
