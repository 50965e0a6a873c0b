"""The network's benchmark: every case runs, both ways compute the same, the table takes the best batch."""

import pytest

from osscl_min import bench_model
from osscl_min.bench_model import PASSES, PLAIN, PRECISIONS, case, errors, table


@pytest.fixture
def once(monkeypatch):
    def measure(call, **_):
        call()
        return {"wall_ms": 6.0, "processor_ms": 8.0, "peak_mb": 1.0}

    monkeypatch.setattr(bench_model, "measure", measure)
    monkeypatch.setattr(bench_model, "prepare", lambda device: None)


@pytest.mark.parametrize(("part", "passing"), [(a, b) for a, passes in PASSES.items() for b in passes])
def test_every_case_runs(part, passing, once):
    for precision in PRECISIONS:
        for way in ("plain", "ours"):
            assert case(part, passing, precision, way, 2, 1.0) == {
                "ms_per_clip": 3.0,
                "processor_ms_per_clip": 4.0,
                "peak_mb": 1.0,
            }


def test_both_ways_are_the_same_network():
    for part in PASSES:
        found = errors(part, 1.0)
        assert len(found) == 8
        for name, value in found.items():
            assert value < (0.5 if "bf16" in name else 1e-4), (part, name)
        assert found["inference fp32 ours"] < 1e-5


def test_the_plain_modules_take_their_best_batch():
    measured = {}
    for part, passes in PASSES.items():
        for passing in passes:
            for precision in PRECISIONS:
                for clips in PLAIN[passing]:
                    measured[part, passing, precision, "plain", clips] = {"ms_per_clip": 100.0 + clips % 16}
                measured[part, passing, precision, "ours", 16] = {"ms_per_clip": 50.0}
    error = {
        part: {
            f"{k} {p} {w}": 0.0
            for k in ("inference", "training")
            for p in PRECISIONS
            for w in ("plain", "ours")
        }
        for part in PASSES
    }
    rows = table(measured, error)
    assert len(rows) == 2 * 2 * 7
    assert all(row["batch"] == 16 for row in rows)
    assert {row["times_plain"] for row in rows if row["way"] == "ours"} == {2.0}
    assert {row["target"] for row in rows if row["way"] == "plain"} == {None}
