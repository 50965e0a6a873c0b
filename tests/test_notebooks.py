"""Every notebook is short, committed without outputs, and runs from the first cell to the last."""

import pathlib
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


def test_all_are_there():
    stories = {"01_data", "02_training", "03_evaluation", "04_high_frequency_ablation", "05_kernels"}
    assert stories == set(NAMES)


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


@pytest.fixture(scope="module")
def executed(tiny_run):
    """Name -> the executed notebook; two kernels at a time, since most of the time is their start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OSSCL_RUN", str(tiny_run))
        patch.setenv("OSSCL_DATA", str(tiny_run / "data"))
        patch.setenv("OMP_NUM_THREADS", "1")

        def execute(path):
            notebook = nbformat.read(path, as_version=4)
            options = {"allow_errors": True, "timeout": 300, "kernel_name": "python3"}
            NotebookClient(notebook, resources={"metadata": {"path": str(path.parent)}}, **options).execute()
            return path.stem, notebook

        with ThreadPoolExecutor(2) as pool:
            yield dict(pool.map(execute, NOTEBOOKS))


@pytest.mark.parametrize("name", NAMES)
def test_executes(executed, name):
    outputs = [output for cell in executed[name].cells for output in cell.get("outputs", [])]
    errors = [output["evalue"] for output in outputs if output.output_type == "error"]
    warnings = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not errors and not warnings
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_says_that_the_data_is_synthetic(executed, name):
    text = "".join(
        output.get("text", "") for cell in executed[name].cells for output in cell.get("outputs", [])
    )
    assert "simulated machines" in text or name.startswith("05")  # kernels have no data
