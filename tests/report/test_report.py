"""The report: one page that needs nothing else, with the run's own numbers and honest about them."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from osscl_min.report import pages as report
from osscl_min.report import paper
from osscl_min.runtime.files import UserError, read_json, write_json
from osscl_min.runtime.tables import markdown


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags with their attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("data"))


def change(path, function):
    content = read_json(path)
    function(content)
    write_json(path, content)


def test_the_page_needs_nothing_else(tiny_run):
    text = (tiny_run / "report.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & set(tags)
    assert tags.count("img") == 6
    for _, attributes in page.tags:
        for name in attributes.keys() & {"src", "href", "srcset", "style"}:
            assert attributes[name].startswith("data:image/png;base64,")
    assert "url(" not in text and "@import" not in text


def test_the_page_has_the_numbers_of_the_files(tiny_run):
    text = Page((tiny_run / "report.html").read_text()).text
    metrics = json.loads((tiny_run / "evaluation" / "metrics.json").read_text())
    for entry in (*metrics["types"], metrics["average"]):
        assert f"{100 * entry['auc_id_mean']:.2f}" in text
    assert "Synthetic data." in text and "simulated machines" in text
    for part in ("config.json", "evaluation/evaluation.json", "high_frequency/high_frequency.json"):
        assert json.loads((tiny_run / part).read_text())["provenance"]["time"] in text
    assert '"margin": 0.4' in text and "zero-phase Butterworth" in text
    assert "Not there yet" not in text and "Beside published numbers" not in text


def test_results_table(tiny_run):
    rows = report.results_table(tiny_run)
    types = ["fan", "pump", "slider", "ToyCar", "ToyConveyor", "valve"]
    assert [row[0] for row in rows] == ["machine type", *types, "average", "average, untrained"]
    for row, name in ((rows[-2], "evaluation"), (rows[-1], "untrained")):
        average = json.loads((tiny_run / name / "metrics.json").read_text())["average"]
        assert row[1].startswith(f"{100 * average['auc_pooled']:.2f} [")
        accuracy = json.loads((tiny_run / name / "evaluation.json").read_text())["identity_accuracy"]
        assert row[-1] == f"{100 * accuracy:.1f}"
    assert len(markdown(rows).splitlines()) == len(rows) + 1


def test_results_table_of_a_run_without_them(tmp_path):
    with pytest.raises(UserError, match="osscl_min evaluate"):
        report.results_table(tmp_path)


def test_what_is_missing_names_its_command(tmp_path):
    text = report.write(tmp_path).read_text()
    for command in (
        "train --data DATA --out RUN",
        "evaluate --checkpoint RUN/best.pt --data DATA --out RUN/evaluation",
        "report RUN --data DATA",
        "ablate high-frequency --checkpoint RUN/best.pt --data DATA --out RUN/high_frequency",
    ):
        assert f"python -m osscl_min {command}</code>" in text
    Page(text)


def test_without_the_untrained_network_or_truth(copy, tmp_path):
    shutil.rmtree(copy / "untrained")
    assert "evaluate --checkpoint RUN/initial.pt" in report.write(copy, tmp_path / "one.html").read_text()
    assert report.results_table(copy)[-1][0] == "average"
    (copy / "evaluation" / "metrics.json").unlink()
    assert "No clip has a known truth" in Page(report.write(copy, tmp_path / "two.html").read_text()).text


def test_evaluation_set_stands_apart(copy):
    shutil.copytree(copy / "evaluation", copy / "evaluation" / "evaluation_set")
    path = copy / "evaluation" / "evaluation_set" / "metrics.json"
    change(path, lambda m: m["average"].update(auc_pooled=0.123456))
    text = Page(report.write(copy).read_text()).text
    assert "Evaluation set" in text and "12.35" in text
    (copy / "evaluation" / "metrics.json").unlink()  # only the evaluation set has a known truth
    assert report.results_table(copy)[7][1].startswith("12.35")


def test_values_are_escaped_and_unused_files_listed(copy):
    nasty = "<script>alert(1)</script>&.wav"
    change(copy / "evaluation" / "evaluation.json", lambda e: e["problems"].update({nasty: "truncated <b>"}))
    for part in ("config.json", "evaluation/evaluation.json", "high_frequency/high_frequency.json"):
        content = read_json(copy / part)
        (content["data"] if isinstance(content["data"], dict) else content)["synthetic"] = False
        write_json(copy / part, content)
    change(copy / "evaluation" / "evaluation.json", lambda e: e.update(data="<i>folder"))
    text = report.write(copy).read_text()
    page = Page(text)
    assert "<script" not in text and nasty in page.text and "truncated <b>" in page.text
    assert "OS-SCL on <i>folder" in page.text and "Synthetic" not in page.text


def benchmark(metrics):
    for entry in metrics["ids"]:
        entry["normal"], entry["anomaly"] = 0, 0
    for name, clips in report.BENCHMARK_TEST.items():
        next(entry for entry in metrics["ids"] if entry["type"] == name)["normal"] = clips


def test_published_numbers_only_beside_the_whole_benchmark(tiny_run):
    metrics = json.loads((tiny_run / "evaluation" / "metrics.json").read_text())
    assert report.published_table(metrics, synthetic=False) == []
    benchmark(metrics)
    assert report.published_table(metrics, synthetic=True) == []
    rows = report.published_table(metrics, synthetic=False)
    assert len({len(row) for row in rows}) == 1 and len(rows) == 3 + len(report.PUBLISHED)
    types = {entry["type"]: entry for entry in metrics["types"]}
    for row, kind in ((rows[1], "pooled"), (rows[2], "id_mean")):
        for name, cell in zip(rows[0][1:7], row[1:7], strict=True):
            expected = 100 * types[name][f"auc_{kind}"], 100 * types[name][f"pauc_{kind}"]
            assert tuple(map(float, cell.split("/"))) == pytest.approx(expected, abs=0.005)
    metrics["ids"][0]["anomaly"] += 1
    assert report.published_table(metrics, synthetic=False) == []


def test_published_rows_agree_with_their_averages():
    """A slip in a type's figure shows in the mean; the paper's own pAUC mean is off by 0.03."""
    assert sum(report.BENCHMARK_TEST.values()) == 10868
    for system, types, average, _ in report.PUBLISHED:
        figures = re.findall(r"([\d.]+)/([\d.]+)", types)
        if figures:
            means = [sum(float(pair[k]) for pair in figures) / 6 for k in (0, 1)]
            stated = [float(value) for value in re.match(r"([\d.]+)/([\d.]+)", average).groups()]
            assert means == pytest.approx(stated, abs=0.035 if system == "OS-SCL, TFgram" else 0.0101), system


def test_thresholds_are_those_of_the_checkpoint(tiny_run):
    rows = report.thresholds_table(tiny_run)
    types = ["fan", "pump", "slider", "ToyCar", "ToyConveyor", "valve", "all"]
    assert [row[0] for row in rows] == ["machine type", *types, *types]
    assert {row[2] for row in rows[1:]} == {  # four clips held out of training
        f"4 normal recordings of all machines; {rate} % false alarms need {more} more"
        for rate, more in ((5, 15), (10, 5))
    }
    assert rows[-1][3] == rows[-1][7] == "- of 24"
    text = Page((tiny_run / "report.html").read_text()).text
    assert all(cell in text for row in rows for cell in row)


def test_what_experiments_wrote_is_shown(copy):
    folder = copy / "experiments"
    folder.mkdir()
    (folder / "noise.md").write_text("| a | b |\n|---|---|\n| 1.25 | x <y> |\n\nA note\non it.\n")
    (folder / "noise-more.md").write_text("Words alone.\n")
    picture = (copy / "figures" / "scores.png").read_bytes()
    for name in ("noise", "noise_more", "noise_filters", "alone"):
        (folder / f"{name}.png").write_bytes(picture)
    (copy / "inspection").mkdir()
    (copy / "inspection" / "inspect.png").write_bytes(picture)
    text = report.write(copy).read_text()
    page = Page(text)
    assert "1.25" in page.text and "x <y>" in page.text
    assert "A note\non it." in page.text and "---" not in page.text
    shown = [dict(attributes)["alt"] for tag, attributes in page.tags if tag == "img"]
    assert shown[-5:] == ["noise_more", "noise", "noise_filters", "alone", "inspect"]


def test_tables_for_a_paper(copy):
    folder = copy / "experiments"
    folder.mkdir()
    (folder / "noise.tex").write_text("% noise\n")
    written = {path.name: path.read_text() for path in paper.write(copy)}
    assert written.keys() == {"results.tex", "machines.tex", "thresholds.tex", "experiment_noise.tex"}
    metrics = json.loads((copy / "evaluation" / "metrics.json").read_text())
    commit = json.loads((copy / "evaluation" / "evaluation.json").read_text())["provenance"]["commit"]
    for name in ("results", "machines", "thresholds"):
        first, *rest = written[f"{name}.tex"].splitlines()
        assert first.startswith("% ") and commit in first
        assert "Synthetic: simulated machines. 48 test clips" in first
        assert rest[0].startswith(r"\begin{tabular}{l") and rest[-1] == r"\end{tabular}"
        columns = {line.replace(r"\&", "").count("&") for line in rest if line.endswith(r"\\")}
        assert len(columns) == 1 and not any(re.search(r"(?<!\\)[%_#]", line) for line in rest)
    assert f"{100 * metrics['average']['auc_pooled']:.2f}" in written["results.tex"]
    shutil.rmtree(copy / "evaluation")
    with pytest.raises(UserError, match="nothing was measured"):
        paper.write(copy)
