"""The report: pages with the run's own numbers that need nothing else, and tables for a paper."""

import re
import shutil
from contextlib import nullcontext

import nbformat
import numpy as np
import pytest
import scipy.stats
from conftest import contents, refused

from osscl_min.inference.calibration import Calibration
from osscl_min.report import pages, results
from osscl_min.runtime.files import read_json, write_json

TYPES = "fan pump slider ToyCar ToyConveyor valve".split()


def change(path, function):
    content = read_json(path)
    function(content)
    write_json(path, content)


@pytest.mark.slow
def test_the_report_of_a_run(reported):
    written = sorted((reported / "report").iterdir())
    assert [path.stem for path in written] == sorted(pages.NEEDS)
    for path in written:  # nothing is loaded from elsewhere, and links lead to other pages
        text = path.read_text()
        sources = re.findall(r"<(?:script|link|iframe|img)[^>]*? (?:src|href)=\"([^\"]*)", text)
        assert all(source.startswith("data:image/") for source in sources)
        local = [link for link in re.findall(r'<a href="([^"#]+)"', text) if "://" not in link]
        assert {link.split("#")[0] for link in local} <= {page.name for page in written}
    page = (reported / "report" / "report.html").read_text()
    text = re.sub(r"<[^>]+>", "", page)
    metrics = read_json(reported / "evaluation" / "metrics.json")
    for entry in (*metrics["types"], metrics["average"]):
        assert f"{100 * entry['auc_id_mean']:.2f}" in text
    assert results.headline(reported) in text and "no benchmark result" in text
    assert read_json(reported / "evaluation" / "evaluation.json")["provenance"]["time"] in text
    assert "published numbers do not apply" in text
    assert "input_area" not in page and "results_table(RUN)" not in page  # no code on the first page
    before = {path: path.stat().st_mtime_ns for path in (reported / "notebooks").iterdir()}
    pages.write(reported)  # executed notebooks are kept
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("best.pt", None, "best.pt is missing; first run `osscl train"),
        ("evaluation/evaluation.json", None, "evaluation.json is missing"),
        ("evaluation/scores.csv", "a,b\n1,2\n", "no column"),
        ("evaluation/embeddings.npz", "x", "damaged"),
    ],
)
def test_a_run_that_cannot_be_reported_is_one_line_and_makes_nothing(copy, file, content, message):
    (copy / file).unlink()
    if content:
        (copy / file).write_text(content)
    before = contents(copy)
    with refused(message):
        pages.write(copy)
    assert contents(copy) == before


def test_notebooks_run_where_what_they_need_is_there(copy, monkeypatch):
    note = nullcontext(lambda source, *_: executed.append(source.stem) or "{}")
    monkeypatch.setattr(pages, "notebook_runner", lambda: note)
    monkeypatch.setattr(pages, "_page", lambda executed: "")
    (copy / "data").mkdir()
    monkeypatch.setattr(pages.figures, "draw", lambda *_: {})
    for lost, names in (
        ("experiments", list(pages.NEEDS)),
        ("data", ["03_evaluation", "05_kernels", "report"]),
        ("evaluation/metrics.json", ["05_kernels", "report"]),
    ):
        executed = []
        for path in (copy / lost, copy / "notebooks"):
            if path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        pages.write(copy)
        assert executed == names


def test_a_notebook_does_not_see_the_variables_of_another(tmp_path):
    for name, source in (("a", "x = 1"), ("b", "print('x' in globals())")):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    with pages.notebook_runner() as execute:
        _, text = (execute(tmp_path / f"{name}.ipynb", tmp_path, None) for name in "ab")
    (cell,) = nbformat.reads(text, as_version=4).cells
    assert cell.outputs[0].text == "False\n" and cell.execution_count == 1


def test_results_table(copy):
    rows = results.results_table(copy)
    others = ["average, nearest", "average, profile", "average, gaussian", "average, untrained"]
    assert [row[0] for row in rows] == ["machine type", *TYPES, "average", *others]
    for row, name in ((rows[-5], "evaluation"), (rows[-1], "untrained")):
        average = read_json(copy / name / "metrics.json")["average"]
        assert row[1].startswith(f"{100 * average['auc_pooled']:.2f} [")
        accuracy = read_json(copy / name / "evaluation.json")["identity_accuracy"]
        assert row[-1] == f"{100 * accuracy:.1f}"
    shutil.rmtree(copy / "untrained")
    assert results.results_table(copy) == rows[:-1]
    other = copy / "evaluation" / "evaluation_set" / "metrics.json"
    shutil.copytree(copy / "evaluation", other.parent)
    change(other, lambda m: m["average"].update(auc_pooled=0.123456))
    assert results.results_table(copy) == rows[:-1]
    (copy / "evaluation" / "metrics.json").unlink()  # only the evaluation set has a known truth
    assert results.results_table(copy)[7][1].startswith("12.35")
    other.unlink()
    assert results.results_table(copy) == [] and "nothing to measure" in results.headline(copy)


def test_the_quick_run_says_whether_it_is_as_expected(copy):
    assert results.expectation(copy) == ""  # another number of clips
    change(copy / "evaluation" / "evaluation.json", lambda e: e.update(clips=results.QUICK_CLIPS))
    for trained, untrained, verdict in ((0.95, 0.5, "as expected"), (0.8, 0.5, "NOT"), (0.95, 0.8, "NOT")):
        for name, value in (("evaluation", trained), ("untrained", untrained)):
            new = {"auc_id_mean": value}
            change(copy / name / "metrics.json", lambda m, new=new: m["average"].update(new))
        line = results.expectation(copy)
        assert f"trained {100 * trained:.1f} %" in line and line.split(": ")[-1].startswith(verdict)
    change(copy / "evaluation" / "evaluation.json", lambda e: e.update(synthetic=False))
    assert results.expectation(copy) == ""


def test_published_numbers_only_beside_the_whole_benchmark(tiny_run):
    metrics = read_json(tiny_run / "evaluation" / "metrics.json")
    assert results.published_table(metrics, synthetic=False) == []
    ids = {entry["type"]: entry for entry in metrics["ids"]}
    for entry in metrics["ids"]:  # one id of each type gets the clips of the whole benchmark
        own = entry is ids[entry["type"]]
        entry |= {"anomaly": 0, "normal": own * results.BENCHMARK_TEST[entry["type"]]}
    assert results.published_table(metrics, synthetic=True) == []
    rows = results.published_table(metrics, synthetic=False)
    assert len({len(row) for row in rows}) == 1 and len(rows) == 3 + len(results.PUBLISHED)
    types = {entry["type"]: entry for entry in metrics["types"]}
    for row, kind in ((rows[1], "pooled"), (rows[2], "id_mean")):
        for name, cell in zip(rows[0][1:7], row[1:7], strict=True):
            expected = 100 * types[name][f"auc_{kind}"], 100 * types[name][f"pauc_{kind}"]
            assert tuple(map(float, cell.split("/"))) == pytest.approx(expected, abs=0.005)
    metrics["ids"][0]["anomaly"] += 1
    assert results.published_table(metrics, synthetic=False) == []


def test_published_rows_agree_with_their_averages():
    """A slip in a type's value shows in the mean; the paper's own pAUC mean is off by 0.03."""
    assert sum(results.BENCHMARK_TEST.values()) == 10868
    for system, types, average, _ in results.PUBLISHED:
        values = re.findall(r"([\d.]+)/([\d.]+)", types)
        if values:
            means = [sum(float(pair[k]) for pair in values) / 6 for k in (0, 1)]
            stated = [float(value) for value in re.match(r"([\d.]+)/([\d.]+)", average).groups()]
            assert means == pytest.approx(stated, abs=0.035 if system == "OS-SCL, TFgram" else 0.0101), system


def test_thresholds_by_machine_type_are_of_the_measured_clips(copy):
    rows = results.thresholds_table(copy, rates=(0.05, 0.2))
    assert [row[1] for row in rows[1:]] == [*TYPES, "all"] * 2
    assert rows[7][3] == rows[7][5] == "- of 24"  # four held-out clips do not resolve 5 %
    for column in (3, 5):
        counts = [tuple(map(int, row[column].split(" of "))) for row in rows[8:]]
        assert tuple(map(sum, zip(*counts[:-1], strict=True))) == counts[-1]  # the types add up to all
        assert {total for _, total in counts[:-1]} == {4} and counts[-1][1] == 24
    path = copy / "evaluation" / "scores.csv"  # clips of the evaluation set are another measurement
    path.write_text(path.read_text().replace("valve,00,development", "valve,00,evaluation"))
    assert results.thresholds_table(copy)[-1][3].endswith("of 22")


def test_alarms_by_chance_are_beta_binomial():
    machines = [("fan", "00")] * 43 + [("pump", "00")] * 43
    one = Calibration(machines[:43], np.arange(43.0), 0.05).threshold(machines[0])
    expected = np.array(scipy.stats.betabinom(180, 2, 42).interval(0.95)) / 180
    np.testing.assert_allclose(results.rates_by_chance([one] * 180), expected)
    two = Calibration(machines, np.arange(86.0), 0.05)
    low, high = results.rates_by_chance([two.threshold(machine) for machine in machines])
    (low_of_one, high_of_one) = results.rates_by_chance([one] * 86)
    assert low_of_one <= low < high < high_of_one  # two groups vary less


def test_tables_for_a_paper(copy):
    folder = copy / "experiments"
    folder.mkdir()
    (folder / "noise.tex").write_text("% noise\n")
    written = results.paper_tables(copy)
    assert written.keys() == {"results", "machines", "thresholds", "experiment_noise"}
    metrics = read_json(copy / "evaluation" / "metrics.json")
    commit = read_json(copy / "evaluation" / "evaluation.json")["provenance"]["commit"]
    for name in ("results", "machines", "thresholds"):
        first, *rest = written[name].splitlines()
        assert first.startswith("% ") and commit in first
        assert "Synthetic: simulated machines. 48 test clips" in first
        assert rest[0].startswith(r"\begin{tabular}{l") and rest[-1] == r"\end{tabular}"
        columns = {line.replace(r"\&", "").count("&") for line in rest if line.endswith(r"\\")}
        assert len(columns) == 1 and not any(re.search(r"(?<!\\)[%_#]", line) for line in rest)
    assert f"{100 * metrics['average']['auc_pooled']:.2f}" in written["results"]
