"""The one hook: what it replaces, what it says, and that results are those of PyTorch's own layers."""

import copy
import re

import osscl_cpu
import pytest
import torch
from osscl_cpu import native, tfgram
from osscl_cpu.chain import Chain, Patches
from torch import nn

from osscl_min.config import AudioConfig, ModelConfig
from osscl_min.model import OSSCL, TFgram

SHORT = AudioConfig(seconds=1.0)
COMPILED = "training layers: compiled for this CPU"
compiled = pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1])


def network(inputs=("log_mel", "tgram", "tfgram")):
    torch.manual_seed(0)
    return OSSCL(ModelConfig(audio=SHORT, inputs=inputs)).train()


def step(model, dtype, clips, precision=torch.float32):
    """Logits, gradients and buffers after one forward and backward pass."""
    torch.manual_seed(1)
    wave = 0.1 * torch.randn(clips, SHORT.samples, dtype=torch.float64)
    log_mel = -30 + 10 * torch.randn(clips, 1, SHORT.mels, SHORT.frames, dtype=torch.float64)
    labels = torch.arange(clips) % 5
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits, _ = model(wave.to(dtype), log_mel.to(dtype), labels)
    nn.functional.cross_entropy(logits, labels).backward()
    values = {"logits": logits} | {name: p.grad for name, p in model.named_parameters()}
    values |= {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {name: value.detach().double() for name, value in values.items()}


def error(value, exact, floor=0.0):
    return float((value.double() - exact).norm() / exact.norm().clamp(min=floor))


@compiled
@pytest.mark.parametrize(
    ("inputs", "precision", "floor"),
    [
        (("log_mel", "tgram", "tfgram"), torch.float32, 0.02),
        (("log_mel",), torch.float32, 0.02),
        pytest.param(("tfgram", "log_mel"), torch.bfloat16, 0.05, marks=pytest.mark.exhaustive),
    ],
)
def test_errors_are_those_of_pytorchs_own_layers(inputs, precision, floor):
    plain = network(inputs)
    exact, fast = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    assert osscl_cpu.accelerate(fast) == COMPILED
    truth = step(exact, torch.float64, 12)
    ours, own = (step(model, torch.float32, 12, precision) for model in (fast, plain))
    for name, value in truth.items():  # some gradients cancel to 0
        errors = [error(other[name], value, 0.01) for other in (ours, own)]
        assert errors[0] <= 4 * errors[1] + floor, (name, errors)  # a ReLU that flips decides single values
    assert any(not torch.equal(ours[name], own[name]) for name in truth)  # it was not the same path
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_modules_run_their_own_forward_where_nothing_is_compiled():
    """In evaluation, for a single clip, in float64, with frozen statistics; copies keep the hook."""

    def frozen(model):
        model.tfgram.norm[2].eval(), model.encoder.conv1.bn.eval()
        return model

    changes = [(nn.Module.eval, 3), (nn.Module.train, 1), (nn.Module.double, 3), (frozen, 3)]
    for change, clips in changes:
        plain, fast = network(), network()
        osscl_cpu.accelerate(fast)
        plain, fast = change(plain), change(copy.deepcopy(fast))
        dtype = plain.arcface.weight.dtype
        expected, actual = step(plain, dtype, clips), step(fast, dtype, clips)
        assert all(torch.equal(actual[name], expected[name]) for name in expected), change


def tfgram_module():
    """Gammas of both signs and exactly 0, betas of both signs; float64."""
    torch.manual_seed(0)
    module = TFgram(512).double().train()
    for norm in module.norm:
        norm.weight.data += 0.3 * torch.randn_like(norm.weight)
        norm.weight.data[::3] *= -1
        norm.weight.data[[1, 4]] = 0
        norm.bias.data = 0.3 * torch.randn_like(norm.bias)
    return module


def tfgram_results(module, forward, wave):
    """Output, gradients and running statistics."""
    output = forward(module, wave)
    generator = torch.Generator().manual_seed(7)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output))
    results = {"output": output.detach()} | {name: p.grad for name, p in module.named_parameters()}
    return results | {name: b for name, b in module.named_buffers() if b.is_floating_point()}


@compiled
@pytest.mark.parametrize("shape", [(1, 1237), (2, 1237), (5, 700), (19, 331), (1, 16_000)])
def test_tfgram_errs_no_more_than_plain_layers_do(shape, poisoned):
    module, wave = tfgram_module(), 0.1 * torch.randn(shape).double() + 0.05
    if shape[1] == 16_000:  # far below the first filters' band, with an offset: variances get lost in float32
        wave = (0.3 + 0.1 * torch.sin(0.0236 * torch.arange(shape[1], dtype=torch.float64)))[None]
    exact = tfgram_results(copy.deepcopy(module), TFgram.forward, wave)
    plain, ours = (
        tfgram_results(copy.deepcopy(module).float(), forward, wave.float())
        for forward in (TFgram.forward, lambda module, x: tfgram.forward(module, x, x.dtype))
    )
    for name, value in exact.items():
        assert ours[name].isfinite().all(), name
        assert error(ours[name], value, 1e-9) <= 2 * error(plain[name], value, 1e-9) + 1e-5, name


@compiled
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(precision):
    torch.manual_seed(0)
    model, before, results = network(("log_mel", "tgram")), torch.get_num_threads(), []
    maps = torch.randn(5, 2, 13, 50)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            encoder = copy.deepcopy(model.encoder)
            layers = osscl_cpu.encoder.chain_layers(encoder, (13, 50))
            Chain(Patches(maps, 2), layers, precision, 5)().square().sum().backward()
            assert torch.get_num_threads() == threads
            results.append([p.grad for p in encoder.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(before)
    assert len(results[0]) > 40
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@compiled
def test_a_second_backward_pass_is_refused():
    output = tfgram.forward(TFgram(512), torch.randn(2, 700), torch.float32).sum()
    output.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def homeless():
    raise RuntimeError("no home folder")  # as where HOME is unset and the user has no entry


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"OSSCL_KERNELS_NATIVE": "0"}, r"PyTorch's own \(OSSCL_KERNELS_NATIVE=0\)"),
        ({"CXX": "", "PATH": ""}, r"PyTorch's own \(no C\+\+ compiler\)"),
        ({"CXX": "false"}, r"PyTorch's own \(false does not compile layers.cpp: status 1\)"),
        ({"CXX": "no-such-compiler"}, r"PyTorch's own \(.*no-such-compiler.*\)"),
        ({"OSSCL_KERNELS_BACKEND": "triton"}, r"PyTorch's own \(.*\)"),
        ({"XDG_CACHE_HOME": "/dev/null"}, r"PyTorch's own \(.*/dev/null.*\)"),
        ({"XDG_CACHE_HOME": ""}, r"PyTorch's own \(no home folder\)"),
    ],
)
def test_it_says_why_nothing_is_compiled(change, line, monkeypatch):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    if change.get("XDG_CACHE_HOME") == "":
        monkeypatch.setattr(native.pathlib.Path, "home", homeless)
    monkeypatch.setattr(native, "FOR_THIS_CPU", ((),))
    native.load.cache_clear()
    try:
        model = network(("log_mel",))
        message = osscl_cpu.accelerate(model)
    finally:
        native.load.cache_clear()
    assert re.fullmatch("training layers: " + line, message), message
    assert "forward" not in vars(model.encoder)


def test_unknown_layers_are_left_alone():
    model = network(("log_mel",))
    model.encoder.blocks[1].conv[3] = nn.Conv2d(256, 256, 5, 1, 2, groups=256, bias=False)
    assert "Conv2d(256, 256, kernel_size=(5, 5)" in osscl_cpu.accelerate(model) or native.load()[0] is None
    assert "forward" not in vars(model.encoder)
    assert "float64" in osscl_cpu.accelerate(network(("log_mel",)).double()) or native.load()[0] is None
