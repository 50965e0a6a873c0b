"""Benchmarks: the plain network is the same function, each case writes its table, misuse ends in one line."""

import csv
import subprocess

import pytest
import torch
from conftest import COMMAND, environment, tiny

from osscl_min.bench import bench, measure, plain
from osscl_min.config import AudioConfig, ModelConfig
from osscl_min.model import OSSCL


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


@pytest.mark.parametrize(
    ("name", "options", "identity", "measured"),
    [
        ("train", {"batch_size": 2, "config": tiny({})}, ["way", "precision"], "step_ms"),
        pytest.param("data", {"batch_size": 4}, ["what"], "clips_per_second", marks=pytest.mark.slow),
        (
            "score",
            {"files": (3,), "minutes": (0.1,), "config": tiny({"epochs": 1})},
            ["recordings"],
            "peak_mb",
        ),
    ],
)
def test_each_case_writes_its_table(name, options, identity, measured, data, tmp_path):
    table = bench(name, tmp_path, data, **options)
    with table.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({tuple(row[key] for key in identity) for row in rows}) == len(rows) > 1
    assert all(float(row[measured]) > 0 and row["commit"] and row["threads"] for row in rows)
    assert all(rows[0][key] in table.read_text() for key in (*identity, "torch"))


@pytest.mark.slow
@pytest.mark.exhaustive  # bfloat16 without its instructions takes many minutes
def test_the_model_case_takes_every_ways_best_batch(tmp_path):
    table = bench("model", tmp_path, seconds=1.0, sizes=(2, 3))
    with table.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["way"] for row in rows} == {"plain", "pytorch", "compiled"}
    assert len(rows) == 3 * 2 * (2 + 3) and {row["batch"] for row in rows} <= {"2", "3"}
    assert all(float(row["times_plain"]) == 1.0 for row in rows if row["way"] == "plain")


def test_a_model_benchmark_on_data_is_refused_in_one_line(data, tmp_path):
    command = [*COMMAND, "bench", "model", "--data", str(data), "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert run.returncode == 2 and run.stderr == "osscl: bench model reads no data: leave out --data\n"
