"""From a run to results/ and into the documents."""

import re
from functools import partial
from urllib.parse import unquote

import pytest
from conftest import refused

from osscl_min.report import results
from osscl_min.report.update import DOCUMENTS, PICTURES, cost_table, fill, keep, thresholds
from osscl_min.runtime.files import ROOT, read_json


@pytest.fixture
def run(copy):
    (copy / "timing.csv").write_text("step,seconds\ntraining,70\nreport,5\n")
    return copy


def test_a_run_is_kept(run, tmp_path):
    (run / "figures").mkdir()
    for picture in PICTURES:
        (run / "figures" / picture).write_bytes(picture.encode())
    kept = tmp_path / "kept"
    keep(run, kept)
    metrics = read_json(run / "evaluation" / "metrics.json")
    for file, parts in {
        "results.md": ("average, untrained", "Synthetic", f"{100 * metrics['average']['auc_pooled']:.2f}"),
        "headline.md": (results.headline(run),),
        "thresholds.md": ("| ToyConveyor",),
        "cost.md": ("75 s",),
        **{picture: (picture,) for picture in PICTURES},
    }.items():
        assert all(part in (kept / file).read_text() for part in parts), file
    assert read_json(kept / "metrics.json")["evaluation"] == metrics
    paper = {path.name for path in (tmp_path / "paper").iterdir()}
    assert paper == {"kept_results.tex", "kept_machines.tex", "kept_thresholds.tex"}
    (run / "evaluation" / "evaluation.json").unlink()
    with refused("evaluation.json is missing"):
        keep(run, tmp_path / "again")


def test_decisions_of_several_runs_are_kept_by_score(run, tmp_path, monkeypatch):
    # four recordings are held out, which resolve these rates
    monkeypatch.setattr(results, "thresholds_table", partial(results.thresholds_table, rates=(0.2, 0.4)))
    scores = run / "evaluation" / "scores.csv"
    header, *rows = (line.split(",") for line in scores.read_text().splitlines())
    for row in rows:  # nearest calls everything normal; the paper's score stays
        row[header.index("nearest")] = "-1e9"
    scores.write_text("\n".join(map(",".join, [header, *rows])) + "\n")
    thresholds(tmp_path, (run,))
    table = [line.split("|") for line in (tmp_path / "thresholds.md").read_text().splitlines() if "|" in line]
    alarms = {(cells[1].strip(), cells[3].strip()): cells[5].strip() for cells in table[2:]}
    own = [line for line in results.thresholds_table(run) if line[1] == "all"]
    assert [alarms["exact", line[0]] for line in own] == [line[3] for line in own] != ["0 of 24"] * 2
    assert [alarms["nearest", rate] for rate in ("20 %", "40 %")] == ["0 of 24"] * 2


def test_cost_is_a_table(run):
    rows = dict(cost_table(run))
    assert rows["training"] == "70 s" and rows["all steps"] == "75 s" and "peak memory" in rows
    for path in (run / "log.jsonl", run / "evaluation" / "evaluation.json"):  # not Linux: memory unknown
        path.write_text(re.sub(r'"peak_memory_mb": [\d.]+', '"peak_memory_mb": null', path.read_text()))
    assert "peak memory" not in dict(cost_table(run))
    (run / "log.jsonl").unlink()  # of experiments only the steps are known
    assert list(dict(cost_table(run))) == ["what", "training", "report", "all steps"]


def test_documents_are_filled_from_files(tmp_path):
    document = tmp_path / "some.md"
    document.write_text("a\n<!-- generated from LICENSE by: cp -->\nold 0.97\n<!-- end -->\nb\n")
    text = fill(document)
    assert "MIT License" in text and "old 0.97" not in text
    assert text.startswith("a\n") and text.endswith("\nb\n")
    document.write_text(text)
    assert fill(document) == text
    document.write_text("<!-- generated from results/none.md by: nothing -->\n<!-- end -->\n")
    with refused("results/none.md does not exist"):
        fill(document)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_and_heading_of_a_document_is_there_once(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    marks = [line for line in lines if line.startswith(("<!-- generated from", "## "))]
    assert len(marks) > 3 and len(marks) == len(set(marks))


@pytest.mark.parametrize("name", [*DOCUMENTS, "osscl_min/DEVIATIONS.md"])
def test_links_and_pictures_of_a_document_exist(name):
    document = ROOT / name
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = document.parent / unquote(path) if path else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, link


def test_readme_is_short_and_its_example_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text) <= 9500
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["loss"].isfinite() and names["loss"].item() == pytest.approx(names["plain"].item(), rel=1e-5)


def test_bibtex_and_citation_file_agree():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for author in ("Huang, Shun", "Fang, Zhihua", "He, Liang"):
        family, given = author.split(", ")
        assert author in readme
        assert re.search(rf"family-names: {family}\n +given-names: {given}\n", citation)
    (doi,) = set(re.findall(r"10\.1109/\S+?(?=[}\s])", readme + citation))
    assert doi
