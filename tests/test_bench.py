"""Benchmarks: the plain network is the same function, and each case writes its table."""

import pytest
import torch
from conftest import tiny

from osscl_min.bench import bench, measure, plain
from osscl_min.config import AudioConfig, ModelConfig
from osscl_min.model import OSSCL
from osscl_min.runtime.files import read_csv


@pytest.mark.parametrize("training", [True, False])
def test_the_plain_network_is_the_same_function(training):
    torch.manual_seed(0)
    config = ModelConfig(audio=AudioConfig(seconds=1.0), classes=5)
    ours, authors = OSSCL(config).double().train(training), plain(OSSCL(config).double()).train(training)
    authors.load_state_dict(ours.state_dict())
    wave, labels = 0.1 * torch.randn(4, 16_000, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    log_mel = -30 + 10 * torch.randn(4, 1, 128, 32, dtype=torch.float64)
    for a, b in zip(ours(wave, log_mel, labels), authors(wave, log_mel, labels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if training:
        for network in (ours, authors):
            network(wave, log_mel, labels)[0].square().sum().backward()
        theirs = dict(authors.named_parameters())
        for name, parameter in ours.named_parameters():
            scale = theirs[name].grad.abs().max()
            assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-8 * scale + 1e-9, name


def test_calls_are_interleaved():
    calls = []
    times = measure({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    order = "".join(calls)
    assert set(times) == {"a", "b"} and order == order[: len(order) // 2] * 2 and "ba" in order


SHORT = {"files": (3,), "minutes": (0.1,), "config": tiny({"epochs": 1})}


@pytest.mark.parametrize(
    ("name", "options", "identity", "measured"),
    [
        ("train", {"batch_size": 2, "config": tiny({})}, ["way", "precision"], "step_ms"),
        pytest.param("data", {"batch_size": 4}, ["what"], "clips_per_second", marks=pytest.mark.slow),
        ("score", SHORT, ["recordings"], "peak_mb"),
        # bfloat16 without its instructions takes many minutes
        pytest.param(
            "model",
            {"seconds": 1.0, "batch_size": 2},
            ["part", "pass", "precision", "way"],
            "ms_per_clip",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_each_case_writes_its_table(name, options, identity, measured, data, tmp_path):
    table = bench(name, tmp_path, None if name == "model" else data, **options)
    rows = read_csv(table.with_suffix(".csv"))
    assert len({tuple(row[key] for key in identity) for row in rows}) == len(rows) > 1
    assert all(float(row[measured]) > 0 and row["commit"] and row["threads"] for row in rows)
    assert all(float(row["times_plain"]) == 1.0 for row in rows if row.get("way") == "plain")
    assert all(rows[0][key] in table.read_text() for key in (*identity, "torch"))
