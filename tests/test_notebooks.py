"""Every notebook is short, committed without outputs, and runs from the first cell to the last."""

import pathlib

import nbformat
import pytest

from osscl_min.notebook import open_run
from osscl_min.report.pages import NEEDS
from osscl_min.runtime.files import UserError

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def test_all_are_there():
    stories = {"01_data", "02_training", "03_evaluation", "04_high_frequency_ablation", "05_kernels"}
    assert stories | {"report"} == set(NAMES) == set(NEEDS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_short_and_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 25
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert [cell.id for cell in notebook.cells] == [
        f"{path.stem[:2]}-{number:02d}" for number in range(1, len(notebook.cells) + 1)
    ]
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.execution_count is None and not cell.outputs
            assert not any(line.startswith(("def ", "class ")) for line in cell.source.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_executes(reported, name):
    notebook = nbformat.read(reported / "notebooks" / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]  # no warnings
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert "simulated machines" in text or name.startswith("05")  # kernels have no data


def test_without_a_run_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("OSSCL_RUN", str(tmp_path))
    with pytest.raises(UserError, match="no trained run in .*reproduce.sh"):
        open_run()


def test_open_run(tiny_run, monkeypatch, capsys):
    monkeypatch.setenv("OSSCL_RUN", str(tiny_run))
    run = open_run("test")
    assert run.folder == tiny_run and run.data.train is None and len(run.data.test) == 48
    assert run.note == " (synthetic data)" and run.audio.seconds == 1
    assert capsys.readouterr().out == "simulated machines, no recordings: 48 test clips\n"
