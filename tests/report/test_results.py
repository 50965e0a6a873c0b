"""From a run to results/ and into the documents."""

import json
import shutil

import pytest

from osscl_min.report.update import KEPT, fill, keep
from osscl_min.runtime.files import ROOT, UserError


def test_a_run_is_kept(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("data", "*.wav"))
    (run / "timing.csv").write_text("step,seconds\ntraining,70\nreport,5\n")
    (tmp_path / "tests.csv").write_text("step,seconds\ntests,61\n")
    keep(run, tmp_path / "kept", tmp_path / "tests.csv")
    table = (tmp_path / "kept" / "table.md").read_text()
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert f"{100 * metrics['average']['auc_pooled']:.2f}" in table and "average, untrained" in table
    assert "Synthetic: simulated machines." in table
    assert "5 % false alarms need 15 more" in (tmp_path / "kept" / "thresholds.md").read_text()
    for picture in KEPT:
        assert (tmp_path / "kept" / picture).read_bytes() == (run / "figures" / picture).read_bytes()
    paper = {path.name for path in (tmp_path / "paper").iterdir()}
    assert paper == {"kept_results.tex", "kept_machines.tex", "kept_thresholds.tex"}
    cost = (tmp_path / "kept" / "cost.md").read_text()
    assert "1 min 15 s after the installation\n  (training 70 s, report 5 s)" in cost
    assert "`bash reproduce.sh --test`: 1 min 1 s" in cost
    assert json.loads((tmp_path / "kept" / "metrics.json").read_text())["evaluation"] == metrics
    (run / "untrained" / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"not a complete run.*untrained/metrics.json is missing"):
        keep(run, tmp_path / "again")


def test_documents_are_filled_from_files(tmp_path):
    document = tmp_path / "some.md"
    document.write_text("a\n<!-- generated from LICENSE by: cp -->\nold 0.97\n<!-- end -->\nb\n")
    text = fill(document)
    assert (
        "MIT License" in text and "old 0.97" not in text and text.startswith("a\n") and text.endswith("\nb\n")
    )
    document.write_text(text)
    assert fill(document) == text
    document.write_text("<!-- generated from results/none.md by: nothing -->\n<!-- end -->\n")
    with pytest.raises(UserError, match="results/none.md does not exist"):
        fill(document)


def test_the_time_of_experiments_is_kept(tmp_path):
    run = tmp_path / "run"
    for name in ("one", "two", "unfinished"):
        (run / "runs" / name).mkdir(parents=True)
    for name in ("one", "two"):
        (run / "runs" / name / "best.pt").touch()
    (run / "timing.csv").write_text("step,seconds\nscores,70\ncomponents,5\n")
    origin = {"processor": "A chip", "torch": "2.x", "commit": "abc"}
    content = {"data": "quick", "synthetic": True, "preset": "quick", "epochs": 4, "provenance": origin}
    (run / "components.json").write_text(json.dumps(content))
    keep(run, tmp_path / "kept")
    text = (tmp_path / "kept" / "cost.md").read_text()
    assert "synthetic data, 2 trainings of 4 epochs, preset quick, 1 min 15 s in all" in text
    assert "| scores | 1 min 10 s |\n| components | 0 min 5 s |" in text
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["cost.md"]


def test_every_block_and_heading_of_a_document_is_there_once():
    for document in (ROOT / "README.md", ROOT / "kernels" / "README.md"):
        lines = document.read_text(encoding="utf-8").splitlines()
        marks = [line for line in lines if line.startswith(("<!-- generated from", "## "))]
        assert len(marks) > 5 and len(marks) == len(set(marks)), document
