"""Benchmarks: a case in a process of its own, its figures, the written rows."""

import csv

import numpy as np
import pytest

from osscl_min.bench import fresh, interleaved, measure, write_rows
from osscl_min.runtime.files import UserError, peak_memory_mb


def test_fresh_calls_in_another_process_and_reports_errors():
    assert fresh("os:getpid") != fresh("os:getpid")
    assert fresh("operator:add", 2, 3) == 5
    assert fresh("os:getenv", "OMP_NUM_THREADS", threads=1) == "1"
    with pytest.raises(UserError, match=r"operator:truediv\(1, 0\) failed: ZeroDivisionError"):
        fresh("operator:truediv", 1, 0)


def test_memory_is_the_processes_own_and_not_its_parents():
    held = np.ones(40_000_000)  # 320 MB here
    assert peak_memory_mb() > 320
    assert fresh("osscl_min.runtime.files:peak_memory_mb") < 200
    del held


def test_measure_and_medians():
    calls = []
    figures = measure(lambda: calls.append(0), seconds=0, least=3)
    assert len(calls) == 4 and set(figures) == {"wall_ms", "processor_ms", "peak_mb"}
    order, answers = [], iter([1.0, 10.0, 5.0, 30.0, 2.0, 20.0])
    result = interleaved([("a",), ("b",)], lambda c: order.append(c) or {"x": next(answers)}, rounds=3)
    assert order == ["a", "b"] * 3
    assert result == {("a",): {"x": 2.0}, ("b",): {"x": 20.0}}


def test_rows_as_csv_and_markdown(tmp_path):
    rows = [{"what": "a", "ms": 1.23456}, {"what": "b", "ms": None}]
    written = write_rows(tmp_path / "new" / "x_cpu", rows, title="Numbers.", notes=["A note."])
    text = written.read_text()
    assert "| a | 1.23 |\n| b |  |\n" in text and text.startswith("Numbers.") and "\nA note.\n" in text
    with (tmp_path / "new" / "x_cpu.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [r["ms"] for r in read] == ["1.23456", ""] and read[0]["commit"] and read[0]["torch"]
