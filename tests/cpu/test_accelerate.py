"""The one hook: what it replaces, what it says, and that results are those of PyTorch's own layers."""

import copy
import os
import pathlib
import re
import subprocess
import sys

import osscl_cpu
import pytest
import torch
from osscl_cpu import native, tfgram
from osscl_kernels import LAYERS, tfgram_train_ref
from torch import nn

from osscl_min.config import AudioConfig, ModelConfig
from osscl_min.model import OSSCL, TFgram

KERNELS = pathlib.Path(osscl_cpu.__file__).parents[1]
SHORT = AudioConfig(seconds=1.0)
COMPILED = "training layers: compiled for this CPU"
compiled = pytest.mark.skipif(native.library() is None, reason=native.load()[1])


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
        pytest.param(("tfgram", "log_mel"), torch.bfloat16, 0.05, marks=pytest.mark.slow),
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
    output = forward(module, wave)
    generator = torch.Generator().manual_seed(7)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output))
    results = {"output": output.detach()} | {name: p.grad for name, p in module.named_parameters()}
    return results | {name: b for name, b in module.named_buffers() if b.is_floating_point()}


def poisoned_forward(module, wave):
    """Fresh memory is NaN, so that nothing unwritten passes unnoticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return tfgram.forward(module, wave, wave.dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def low_tone(samples):
    """Far below the band of the first filters, with an offset: its variances get lost in float32 moments."""
    return (0.3 + 0.1 * torch.sin(0.0236 * torch.arange(samples, dtype=torch.float64)))[None]


@compiled
@pytest.mark.parametrize(
    "wave",
    [
        0.1 * torch.randn(clips, samples, generator=torch.Generator().manual_seed(clips)).double() + 0.05
        for clips, samples in ((1, 1237), (2, 1237), (5, 700), (19, 331))
    ]
    + [low_tone(16_000)],
    ids=lambda wave: "x".join(map(str, wave.shape)),
)
def test_tfgram_errs_no_more_than_plain_layers_do(wave):
    module = tfgram_module()
    exact = tfgram_results(copy.deepcopy(module), TFgram.forward, wave)
    plain, ours = (
        tfgram_results(copy.deepcopy(module).float(), forward, wave.float())
        for forward in (TFgram.forward, poisoned_forward)
    )
    for name, value in exact.items():
        assert ours[name].isfinite().all(), name
        assert error(ours[name], value, 1e-9) <= 2 * error(plain[name], value, 1e-9) + 1e-5, name


@compiled
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(precision):
    model, before, results = network(), torch.get_num_threads(), []
    osscl_cpu.accelerate(model)
    maps = torch.randn(5, 3, 13, 50)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            encoder = copy.deepcopy(model.encoder)
            chain = osscl_cpu.encoder.chain_layers(encoder, (13, 50))
            chain = osscl_cpu.chain.Chain(osscl_cpu.chain.Image(maps), chain, precision, 5)
            chain().square().sum().backward()
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


def test_the_pytorch_path_is_the_definition():
    wave, module = torch.randn(2, 700).double(), tfgram_module()
    weights, norms = [conv.weight for conv in module.conv], module.norm
    reference = tfgram_train_ref(wave, weights, [n.weight for n in norms], [n.bias for n in norms])[0]
    assert torch.equal(module(wave), reference)
    x = wave.unsqueeze(1)
    for layer, conv, norm in zip(LAYERS, module.conv, module.norm, strict=True):
        x = norm(conv(x)).relu()
        if layer.pool == "max4":
            x = nn.functional.max_pool1d(x, 4)
        elif layer.pool:
            x = nn.functional.adaptive_max_pool1d(x, 4 if layer.pool == "frames2" else 2)
    torch.testing.assert_close(module(wave), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"OSSCL_KERNELS_NATIVE": "0"}, r"PyTorch's own \(OSSCL_KERNELS_NATIVE=0\)"),
        ({"CXX": "", "PATH": ""}, r"PyTorch's own \(no C\+\+ compiler\)"),
        ({"CXX": "false"}, r"PyTorch's own \(false does not compile layers.cpp: status 1\)"),
        ({"CXX": "no-such-compiler"}, r"PyTorch's own \(.*no-such-compiler.*\)"),
        ({"OSSCL_KERNELS_BACKEND": "triton"}, r"PyTorch's own \(.*\)"),
        ({"XDG_CACHE_HOME": "/dev/null", "TMPDIR": "/dev/null"}, r"PyTorch's own \(.*\)"),
    ],
)
def test_it_says_why_nothing_is_compiled(change, line, monkeypatch):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", change.get("TMPDIR"))
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
    assert "Conv2d(256, 256, kernel_size=(5, 5)" in osscl_cpu.accelerate(model) or native.library() is None
    assert "forward" not in vars(model.encoder)
    assert "float64" in osscl_cpu.accelerate(network(("log_mel",)).double()) or native.library() is None


@compiled
@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="needs to become another user")
def test_a_user_without_a_home_or_an_entry_in_the_user_database():
    """The cache is then a private folder among the temporary files."""
    program = """
import os, tempfile
from osscl_cpu import native
os.setgid(54321), os.setuid(54321)
folder = native.cache_folder()
print(str(folder.parent) == tempfile.gettempdir(), folder.name, oct(folder.stat().st_mode & 0o777))
folder.rmdir()
"""
    variables = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-c", program]
    run = subprocess.run(
        command, capture_output=True, text=True, env=variables | {"PYTHONPATH": str(KERNELS)}, cwd=KERNELS
    )
    assert run.stdout == "True osscl_cpu-54321 0o700\n", run.stderr


def test_a_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert native.cache_folder() == tmp_path / "cache" / "osscl_cpu"
    native.cache_folder().chmod(0o777)
    assert native.cache_folder().parent == tmp_path
    native.cache_folder().chmod(0o777)
    with pytest.raises(OSError, match="no private cache folder"):
        native.cache_folder()
