"""Every notebook is short, committed without outputs, and runs from the first cell to the last."""

import re
import sys
from types import SimpleNamespace

import nbformat
import pytest
from conftest import ROOT, refused
from IPython.core.inputtransformer2 import TransformerManager

from osscl_min.notebook import open_run
from osscl_min.report.pages import NEEDS

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_report_knows_what_each_needs():
    assert [path.stem for path in NOTEBOOKS] == list(NEEDS)


@every
def test_short_and_stripped_and_links_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 25 and set(notebook.metadata) <= {"kernelspec", "language_info"}
    for number, cell in enumerate(notebook.cells, 1):
        assert cell.id == f"{path.stem[:2]}-{number:02d}" and not cell.metadata
        if cell.cell_type == "code":
            assert cell.execution_count is None and not cell.outputs
            assert not any(line.startswith(("def ", "class ")) for line in cell.source.splitlines())
        for link in re.findall(r"\]\(([\w./]+)\)", cell.source) if cell.cell_type == "markdown" else ():
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize("colab", [True, False])
@every
def test_the_first_cell_prepares_colab_and_leaves_other_places_alone(path, colab, monkeypatch):
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    calls = []
    shell = SimpleNamespace(run_line_magic=lambda name, _: calls.append(name), system=calls.append)
    (cell, *_) = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    guard, _, rest = cell.source.partition("sys.path.extend")
    exec(TransformerManager().transform_cell(guard), {"get_ipython": lambda: shell})
    assert calls[:1] == ["matplotlib"] and calls[1:3] == ["cd", "pip"] * colab
    assert all("bash ../reproduce.sh" in call for call in calls[3:])
    assert len(calls) == 1 + colab * (3 if "osscl_min.notebook" in rest else 2)


@pytest.mark.slow
@every
def test_executes(reported, path):
    notebook = nbformat.read(reported / "notebooks" / path.name, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]  # no warnings
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text") or output.data.get("text/markdown", "") for output in outputs)
    assert "simulated machines" in text or path.stem == "05_kernels"  # which has no data


def test_open_run(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OSSCL_RUN", str(tmp_path))
    with refused("no trained run in .*reproduce.sh"):
        open_run()
    monkeypatch.setenv("OSSCL_RUN", str(tiny_run))
    run = open_run("test")
    assert run.folder == tiny_run and run.data.train is None and len(run.data.test) == 48
    assert run.note == " (synthetic data)" and run.audio.seconds == 1
    assert capsys.readouterr().out == "simulated machines, no recordings: 48 test clips\n"
