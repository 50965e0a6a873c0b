"""Parity with the authors' released code, float64 on a CPU; tests/golden/README.md tells the recipe."""

import zlib

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from osscl_min.checkpoint import _live_entries, load_upstream_state, upstream_state_shapes
from osscl_min.config import PRESETS, ModelConfig
from osscl_min.features import LogMel
from osscl_min.losses import anomaly_score
from osscl_min.model import OSSCL, ArcMarginHead, FeaturePerturbationHead
from osscl_min.trainer import Trainer

GOLD = np.load(GOLDEN / "upstream_float64.npz")
INPUTS = {"tfst": ("log_mel", "tgram", "tfgram"), "mel": ("log_mel",)}


def rng(name):
    return np.random.default_rng(zlib.crc32(f"osscl/{name}".encode()))


def entry(name, shape, key=None):
    z = rng(key or name).standard_normal(shape)
    if len(shape) == 1:
        z = 1 + 0.1 * np.abs(z) if name.endswith(("weight", "running_var")) else 0.1 * z
    else:
        z = z / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(z)


def batch(number, size):
    g = rng(f"batch{number}")
    wave = torch.from_numpy(0.1 * g.standard_normal((size, 1, 160000)))
    log_mel = torch.from_numpy(-30 + 10 * g.standard_normal((size, 1, 128, 313)))
    labels = torch.from_numpy(g.integers(0, 5, size) * 8)
    permutation = torch.from_numpy(g.permutation(size))
    return wave, log_mel, labels, float(g.beta(0.5, 0.5)), permutation


def close(ours, theirs, tolerance=1e-9):
    ours = np.asarray(ours.detach() if isinstance(ours, torch.Tensor) else ours)
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert difference <= tolerance, f"differs by {difference:.2e} of the largest entry"


def built(kind):
    config = ModelConfig(inputs=INPUTS[kind])
    model = OSSCL(config).double()
    shapes = upstream_state_shapes(config)
    return load_upstream_state(model, {name: entry(name, shape) for name, shape in shapes.items()})


@pytest.fixture(scope="module", params=["tfst", "mel"])
def steps(request):
    """A model in its first training-mode forward, and after three steps of the trainer."""
    model, outputs = built(request.param), []
    trainer = Trainer(PRESETS["paper"], torch.device("cpu"), model)
    handle = model.register_forward_hook(lambda module, inputs, output: outputs.extend(output))
    losses = [trainer.step(*batch(1, 6))]
    handle.remove()
    parameters = dict(model.named_parameters())
    first = {"train_logits": outputs[0].detach(), "train_embedding": outputs[1].detach()}
    first["gradients"] = {
        theirs: parameters[ours].grad.clone()
        for theirs, (ours, _) in _live_entries(model).items()
        if ours in parameters
    }
    losses += [trainer.step(*batch(number, 6)) for number in (2, 3)]
    return request.param, trainer, first, losses


@pytest.mark.parametrize("kind", ["tfst", "mel"])
def test_evaluation(kind):
    model = built(kind).eval()
    wave, log_mel, labels, _, _ = batch(0, 4)
    with torch.no_grad():
        logits, embedding = model(wave, log_mel, labels)
        if kind == "tfst":
            close(model.tgram(wave[:2, 0])[:, ::8, ::4], GOLD["tgram"])
            close(model.tfgram(wave[:2, 0])[:, ::8, ::4], GOLD["tfgram_eval"])
    close(logits, GOLD[f"{kind}_eval_logits"])
    close(embedding, GOLD[f"{kind}_eval_embedding"])
    close(anomaly_score(logits, labels), GOLD[f"{kind}_eval_score"])


def test_first_step_forward_and_gradients(steps):
    kind, _, first, _ = steps
    gradients, names = first["gradients"], [str(name) for name in GOLD[f"{kind}_grad_names"]]
    for name in ("train_logits", "train_embedding"):
        close(first[name], GOLD[f"{kind}_{name}"])
    assert set(names) == set(gradients)
    close(np.array([gradients[name].norm().item() for name in names]), GOLD[f"{kind}_grad_norms"])
    if kind == "tfst":
        close(gradients["TFgramNet.pre_conv0.weight"], GOLD["tfgram_pre_conv0_grad"])


def test_losses_of_three_steps(steps):
    kind, _, _, losses = steps
    for ours, theirs in (("total", "losses"), ("cross_entropy", "ce"), ("contrastive", "supcon")):
        close(np.array([loss[ours].item() for loss in losses]), GOLD[f"{kind}_{theirs}"])


def test_student_and_average_after_three_steps(steps):
    kind, trainer, _, _ = steps
    names = [str(name) for name in GOLD[f"{kind}_state_names"]]
    for model, key, tolerance in ((trainer.model, "student", 1e-9), (trainer.ema, "ema", 1e-12)):
        live, theirs = _live_entries(model), dict(zip(names, GOLD[f"{kind}_{key}_norms"], strict=True))
        for name, (_, value) in live.items():
            assert value.norm().item() == pytest.approx(theirs[name], rel=tolerance), f"{key} {name}"
    wave, log_mel, labels, _, _ = batch(0, 4)
    with torch.no_grad():
        close(anomaly_score(trainer.ema(wave, log_mel, labels)[0], labels), GOLD[f"{kind}_ema_score"])


def test_log_mel():
    t = np.arange(160000) / 16000
    x = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.05 * rng("logmel").standard_normal(160000)
    x[80000:90000] = 0
    double = LogMel()(torch.from_numpy(x)[None])[0, 0, ::2, ::2]
    assert double.min() == -100
    close(double, GOLD["logmel"], 1e-6)
    close(LogMel()(torch.from_numpy(x).float()[None])[0, 0, ::2, ::2], GOLD["logmel"], 1e-4)


def test_arcface_branches():
    g = rng("arcface")
    head = ArcMarginHead(128, 41).double()
    weight = g.standard_normal((41, 128))
    labels = g.integers(0, 41, 12)
    n = g.standard_normal((12, 128))
    features = np.concatenate([n[:4], weight[labels[4:8]] + 0.1 * n[4:8], -weight[labels[8:]] + 0.1 * n[8:]])
    features = torch.from_numpy(features / np.linalg.norm(features, axis=1, keepdims=True))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        close(head(features, torch.from_numpy(labels)), GOLD["arcface_logits"])


def test_leaky_head():
    head = FeaturePerturbationHead(128, "leaky").double().eval()
    with torch.no_grad():
        for name, value in head.state_dict().items():
            if value.is_floating_point():
                theirs = f"head.{name.removeprefix('layers.')}"
                value.copy_(entry(theirs, tuple(value.shape), f"leaky.{theirs}"))
        close(head(torch.from_numpy(rng("leaky_input").standard_normal((5, 128)))), GOLD["leaky_head"])


def test_live_parameters():
    assert sum(p.numel() for p in OSSCL().parameters()) == 1_372_246
    assert sum(p.numel() for p in OSSCL(ModelConfig(inputs=("log_mel",))).parameters()) == 891_968
