"""The one hook: which layers it replaces, what it says, and that results are those of PyTorch's own layers."""

import copy
import os
import pathlib
import subprocess
import sys

import osscl_cpu
import pytest
import torch
from osscl_cpu import native

from osscl_min.config import AudioConfig, ModelConfig
from osscl_min.model import OSSCL

KERNELS = pathlib.Path(osscl_cpu.__file__).parents[1]
SHORT = AudioConfig(seconds=1.0)
compiled = pytest.mark.skipif(native.library() is None, reason=native.load()[1])


def network(inputs=("log_mel", "tgram", "tfgram")):
    torch.manual_seed(0)
    return OSSCL(ModelConfig(audio=SHORT, inputs=inputs)).train()


def batch(clips, dtype=torch.float64):
    torch.manual_seed(1)
    wave = 0.1 * torch.randn(clips, SHORT.samples, dtype=torch.float64)
    log_mel = -30 + 10 * torch.randn(clips, 1, SHORT.mels, SHORT.frames, dtype=torch.float64)
    return wave.to(dtype), log_mel.to(dtype), torch.arange(clips) % 5


def step(model, dtype, clips=24, precision=torch.float32):
    """Logits, gradients and buffers after one forward and backward pass."""
    wave, log_mel, labels = batch(clips, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits, _ = model(wave, log_mel, labels)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    values = {"logits": logits} | {name: p.grad for name, p in model.named_parameters()}
    values |= {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {name: value.detach().double() for name, value in values.items()}


@compiled
@pytest.mark.parametrize(
    ("inputs", "precision", "floor"),
    [
        (("log_mel", "tgram", "tfgram"), torch.float32, 2e-3),
        (("log_mel",), torch.float32, 2e-3),
        (("tfgram", "log_mel"), torch.bfloat16, 0.05),
    ],
)
def test_errors_are_those_of_pytorchs_own_layers(inputs, precision, floor):
    plain = network(inputs)
    exact, fast = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    assert osscl_cpu.accelerate(fast) == "training layers: compiled for this CPU"
    truth = step(exact, torch.float64)
    ours, own = (step(model, torch.float32, precision=precision) for model in (fast, plain))
    for name, value in truth.items():  # some gradients cancel to 0
        errors = [(other[name] - value).norm() / value.norm().clamp(min=0.01) for other in (ours, own)]
        assert errors[0] <= 4 * errors[1] + floor, (name, errors)  # a ReLU that flips decides single values
    assert any(not torch.equal(ours[name], own[name]) for name in truth)  # it was not the same path
    assert list(fast.state_dict()) == list(plain.state_dict())
