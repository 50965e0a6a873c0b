"""The benchmarks' plots, drawn from made-up rows."""

import csv
import importlib
import pathlib
import sys

import pytest
from osscl_kernels import backend

BENCHMARKS = pathlib.Path(backend.__file__).parents[1] / "benchmarks"
BASE = {"device": "a device", "date": "2000-01-01"}
PROVIDERS = ("kernels", "modules, CUDA graph", "modules, torch.compile")
FAILED = ("training", PROVIDERS[2], "tf32")


def supcon_rows():
    return [
        {"kernel": "supcon", "provider": provider, "pass": passing, "precision": precision, "rows": n}
        | {"width": 128, "median_ms": 1e-6 * n**2, "extra_mb": 1.0 * n, **BASE}
        for provider, precision in (("kernels", "ieee"), ("kernels", "bf16"), ("dense", "ieee"))
        for n in (64, 1024)
        for passing in ("forward", "both")
    ]


def tfgram_rows(batches):
    rows = [
        {"kernel": "tfgram", "provider": provider, "pass": passing, "precision": precision, "clips": clips}
        | {"samples": 160_000, "limit_ms": 0.1 * clips, "median_ms": 0.3 * clips, "extra_mb": 9.0, **BASE}
        for clips in batches
        for passing in ("inference", "training")
        for precision in ("ieee", "tf32")
        for provider in PROVIDERS
    ]
    for row in rows:
        if (row["pass"], row["provider"], row["precision"]) == FAILED:
            del row["median_ms"], row["limit_ms"], row["extra_mb"]
    return rows


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Writes rows as the benchmark of that name does; the figure that plot.py makes of its CSV."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    common, plot = importlib.import_module("common"), importlib.import_module("plot")

    def write(name, rows):
        path = tmp_path / f"{name}.csv"
        common.write(path, rows, importlib.import_module(name).COLUMNS, "")
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert {file.suffix for file in tmp_path.iterdir()} == {".csv", ".md", ".png"}
        with path.open(newline="") as file:
            return plot.FIGURES[name](list(csv.DictReader(file)))

    return write


def points(axis, label):
    return [len(line.get_xdata()) for line in axis.lines if line.get_label() == label]


def test_supcon_lines(drawn):
    time, memory = drawn("supcon", supcon_rows()).axes
    assert (time.get_xlabel(), time.get_ylabel()) == ("N", "forward + backward (ms)")
    assert memory.get_ylabel() == "extra memory (MB)"
    for axis in (time, memory):
        assert [list(line.get_xdata()) for line in axis.lines] == [[64, 1024]] * 3
    looks = {(line.get_color(), line.get_linestyle()) for line in time.lines}
    assert len(looks) == 3


@pytest.mark.parametrize("batches", [(64,), (16, 4)])
def test_tfgram_panels(drawn, batches):
    figure = drawn("tfgram", tfgram_rows(batches))
    inference, training, memory, _ = figure.axes
    assert [axis.get_title() for axis in figure.axes[:2]] == ["inference", "training, forward + backward"]
    assert (inference.get_ylabel(), memory.get_ylabel()) == ("median (ms)", "extra memory (MB)")
    ticks = [label.get_text() for label in memory.get_xticklabels()]
    if len(batches) == 1:
        assert (memory.get_xlabel(), ticks) == ("precision", ["ieee", "tf32"])
    else:
        assert (memory.get_xlabel(), ticks) == (
            "precision, clips",
            ["ieee\n4", "ieee\n16", "tf32\n4", "tf32\n16"],
        )
    for provider in PROVIDERS:
        assert points(inference, provider) == points(memory, provider) == [2 * len(batches)]
    assert points(training, PROVIDERS[2]) == [len(batches)], "a case that failed has no time"
    assert sum(points(inference, "roofline limit")) == 6 * len(batches)
    for line in inference.lines:
        assert set(line.get_ydata()) == {
            (0.1 if line.get_label() == "roofline limit" else 0.3) * n for n in batches
        }
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*PROVIDERS, "roofline limit"]


def test_rows_of_nothing_known_are_refused(drawn, tmp_path):
    (tmp_path / "x.csv").write_text("kernel,provider\nother,kernels\n")
    with pytest.raises(ValueError, match="supcon, tfgram"):
        importlib.import_module("plot").draw(tmp_path / "x.csv")


def test_without_matplotlib_a_line_says_so(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    importlib.import_module("common").write(tmp_path / "y.csv", [{"kernel": "supcon"}], ["kernel"], "table")
    assert {file.name for file in tmp_path.iterdir()} == {"y.csv", "y.md"}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no plot: ") and "matplotlib" in line
