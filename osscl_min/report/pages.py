"""A run's report: one HTML page that needs nothing else, and the table that is printed last."""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from osscl_min import checkpoint
from osscl_min.inference.calibration import Calibration
from osscl_min.metrics import percent, table
from osscl_min.runtime.files import UserError, read_csv, read_json, write_text

# Clips of the development test set of DCASE 2020 Task 2; only a run on exactly these stands beside PUBLISHED.
BENCHMARK_TEST = {"fan": 1875, "pump": 856, "slider": 1290, "valve": 879, "ToyCar": 2459, "ToyConveyor": 3509}
# System; AUC/pAUC in percent of each type above, then on average (mAUC in brackets); where it was read.
PUBLISHED = [
    ("OS-SCL, TFgram", "98.41/94.50 96.25/88.74 99.63/98.04 99.85/99.23 96.55/91.17 83.56/69.87",
     "95.71/90.23 (91.23)", "average: the paper's abstract; types: second-hand"),
    ("OS-SCL, Log-Mel", "- - - - - -", "94.64/88.42 (89.24)", "the paper's abstract"),
    ("independent rerun of OS-SCL, 1 seed, pooled",
     "97.81/93.73 94.52/86.26 99.62/97.99 99.91/99.53 96.12/91.13 81.69/69.40",
     "94.95/89.67 (89.22)", "github.com/algasami/OS-SCL"),
    ("the same scores, id-mean", "97.29/93.02 95.48/89.01 99.65/98.16 99.91/99.52 96.39/91.37 81.26/68.98",
     "95.00/90.01", "recomputed from its scores"),
    ("Noisy-ArcMix + TASTgram", "98.32/95.34 95.44/85.99 99.53/97.50 99.95/99.74 96.76/90.11 77.90/67.15",
     "94.65/89.31 (89.78)", "its README"),
    ("STgram-MFN, id-mean", "94.04/88.97 91.94/81.75 99.55/97.61 99.64/98.44 94.44/87.68 74.57/63.60",
     "92.36/86.34 (84.86)", "its README"),
    ("autoencoder baseline", "65.16/52.59 72.59/60.00 84.99/66.93 66.46/50.60 80.09/67.22 72.68/60.66",
     "73.66/59.67", "its README"),
]  # fmt: skip
CAPTIONS = {  # of figures/NAME.png, in the page's order
    "maps": """A normal and an anomalous clip of one machine as the encoder sees them. The channels of Tgram
    and TFgram are learned and have no order.""",
    "training": """The loss on mixed clips does not near 0, since a mixed clip's labels contradict each other.
    The epoch with the lowest validation loss of the averaged weights (EMA) is kept.""",
    "scores": "A machine type is detected as far as the two colours part. The axis is logarithmic.",
    "roc": """A type's ids pooled (the authors' protocol), each id alone (the challenge averages their areas),
    and the network before training.""",
    "embeddings": """A cluster is a machine; a clip beside the clusters gets a high score. Distances between
    clusters mean little in such a map.""",
    "high_frequency": """Test clips are filtered, the detector stays as trained; bands are 95 % intervals.
    Filtered clips are also unlike those trained on: a drop bounds the reliance on a band from above.""",
}
BANNER = """<p class="banner"><b>Synthetic data.</b> The machines are simulated. This shows that the code
learns; it says nothing about real machines and is no benchmark result.</p>"""
PROTOCOLS = """<p>Percent, with 95 % bootstrap intervals over the clips. Pooled: one ROC over a type's ids, as
the authors measure. Id-mean: the mean over the ids, as the DCASE 2020 challenge does. pAUC: up to a
false-positive rate of 0.1. mAUC: the lowest AUC of a type's ids. Machine recognised: normal clips taken for
their own machine.</p>"""
FALSE_ALARMS = """<p>What <code>score</code> calls anomalous, on these test clips. A threshold comes from
scores of normal clips that were held out of training: those of the machine, of its type or of all, whichever
are the first to resolve the rate. Binomial: 95 % interval of the share found. Chance: the central 95 % of
what is to be expected where test clips are like those held out, which counts in that few of them place a
threshold.</p>"""
BESIDE = """<h2>Beside published numbers</h2><p>AUC/pAUC in percent, mAUC in brackets; development test set.
The six pAUC values of the first published row average 90.26; the paper's abstract says 90.23.</p>"""
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>OS-SCL report</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 66em; margin: 2em auto; padding: 1em }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2em }} h1, h2, h3 {{ line-height: 1.2; break-after: avoid }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92em }}
th, td {{ padding: 0.25em 1em 0.25em 0; text-align: left; vertical-align: top; border-top: 1px solid #ddd }}
th {{ border: 0; border-bottom: 2px solid #555 }} small {{ color: #666; display: block }}
.banner {{ background: #fff3d6; border-left: 6px solid #e69f00; padding: 0.7em }} .wide {{ overflow: auto }}
figure {{ margin: 2em 0 }} img {{ max-width: 100% }} figcaption {{ color: #444 }} code {{ background: #eee }}
pre {{ columns: 3; font-size: 0.85em }} td:first-child, small {{ white-space: nowrap }}
@media print {{ body {{ font-size: 8pt }} img {{ max-width: 75% }}
  figure, tr {{ break-inside: avoid }} }}
</style></head><body>
<h1>OS-SCL on {data}</h1>
<p>Anomalous sound detection trained on normal sounds alone; an independent reproduction of Huang, Fang and
He, ICASSP 2025, arXiv 2509.13853.</p>
{banner}
<h2>Results</h2>{results}
{published}
<h2>Thresholds</h2>{thresholds}
<h2>Figures</h2>{figures}
<h2>High frequencies</h2>{high_frequency}
{experiments}{data_set}
<h2>Files not used</h2>{problems}
<h2>Configuration</h2>{configuration}
<h2>Provenance</h2>{provenance}
</body></html>
"""


def _read(path: Path) -> dict[str, Any]:
    """A JSON file, empty where there is none."""
    return read_json(path) if path.is_file() else {}


def _metrics(evaluation: Path) -> dict[str, Any]:
    """Of the development set, or of the evaluation set where only that has a known truth."""
    return _read(evaluation / "metrics.json") or _read(evaluation / "evaluation_set" / "metrics.json")


def is_measured(run: Path | str) -> bool:
    """Whether a run has been evaluated on clips of known truth."""
    return bool(_metrics(Path(run) / "evaluation"))


def results_table(run: Path | str) -> list[list[str]]:
    """A run's result in percent: machine types, their average, and that of the untrained network.

    Returns
    -------
    list of rows, the header first, as `metrics.markdown` takes them

    Raises
    ------
    UserError
        If the run has not been evaluated, or no clip has a known truth.
    """
    trained, untrained = (_metrics(Path(run) / name) for name in ("evaluation", "untrained"))
    if not trained:
        todo = "run `python -m osscl_min evaluate` on clips of known truth"
        raise UserError(f"{run}: no metrics in it; {todo}")
    rows = table(trained, [("average, untrained", untrained["average"])] if untrained else [])
    recognised = {"machine type": "machine recognised"}
    for row, name in (("average", "evaluation"), ("average, untrained", "untrained")):
        accuracy = _read(Path(run) / name / "evaluation.json").get("identity_accuracy")
        recognised[row] = "-" if accuracy is None else f"{100 * accuracy:.1f}"
    return [[*row, recognised.get(row[0], "")] for row in rows]


def machines_table(run: Path | str) -> list[list[str]]:
    """A run's result for each machine, the header first."""
    return _machines(_metrics(Path(run) / "evaluation"))


def thresholds_table(run: Path | str) -> list[list[str]]:
    """False alarms of a run's thresholds on its test clips; empty where it cannot tell.

    The thresholds are those of `score`: from the scores that best.pt keeps of clips held out of training.
    """
    run = Path(run)
    try:
        own, held_out = checkpoint.load(run / "best.pt").held_out()
        rows = [row for row in read_csv(run / "evaluation" / "scores.csv") if row["anomaly"]]
    except (UserError, OSError):
        return []
    truth = np.array([int(row["anomaly"]) for row in rows])
    if not own or not (truth == 0).any():
        return []
    machines = [(row["machine_type"], row["machine_id"]) for row in rows]
    scores = np.array([float(row["score"]) for row in rows])
    header = (
        "machine type",
        "rate asked",
        "threshold from",
        "false alarms",
        "rate found",
        "binomial",
        "chance",
    )
    table = [[*header, "detected"]]
    for rate in (0.05, 0.1):
        for row in Calibration(own, held_out, rate).alarms(machines, scores, truth):
            known = row["rate_found"] is not None
            spans = [row[name] for name in ("binomial", "chance")]
            spans = [f"{100 * low:.1f} to {100 * high:.1f} %" for low, high in spans] if known else ["", ""]
            alarms = f"{'-' if row['false_alarms'] is None else row['false_alarms']} of {row['normal_clips']}"
            detected = f"{'-' if row['detected'] is None else row['detected']} of {row['anomalous_clips']}"
            share = f"{100 * row['rate_found']:.1f} %" if known else "not resolved"
            asked = [row["machine_type"], f"{100 * rate:g} %", row["threshold_from"]]
            table.append([*asked, alarms, share, *spans, detected])
    return table


def origin(run: Path | str) -> str:
    """One line on where a run's figures come from: data, configuration, commit, day."""
    run = Path(run)
    evaluation, training = _read(run / "evaluation" / "evaluation.json"), _read(run / "config.json")
    config, source = evaluation["config"], evaluation["provenance"]
    epochs = len((run / "log.jsonl").read_text().splitlines()) if training else "unknown"
    synthetic = "Synthetic: simulated machines. " if evaluation["synthetic"] else ""
    return (
        f"{synthetic}{evaluation['clips']} test clips of {evaluation['machines']} machines; "
        f"preset `{config['preset']}`, seed {config['train']['seed']}, "
        f"{epochs} epochs; commit {source['commit']}, {source['time'][:10]}."
    )


def published_table(metrics: dict[str, Any], synthetic: bool) -> list[list[str]]:
    """This run above PUBLISHED; empty unless its clips are the benchmark's whole development test set."""
    counts: Counter[str] = Counter()
    for entry in metrics.get("ids", []):
        counts[entry["type"]] += entry["normal"] + entry["anomaly"]
    if synthetic or counts != BENCHMARK_TEST:
        return []
    types = {entry["type"]: entry for entry in metrics["types"]}
    rows = [["system", *BENCHMARK_TEST, "average", "read from"]]
    for protocol in ("pooled", "id_mean"):
        cells = [
            f"{100 * entry[f'auc_{protocol}']:.2f}/{100 * entry[f'pauc_{protocol}']:.2f}"
            for entry in (*(types[name] for name in BENCHMARK_TEST), metrics["average"])
        ]
        cells[-1] += f" ({100 * metrics['average']['mauc']:.2f})"
        rows.append([f"this run, {protocol.replace('_', '-')}", *cells, ""])
    return rows + [[system, *types.split(), average, source] for system, types, average, source in PUBLISHED]


def write(run: Path | str, out: Path | str | None = None) -> Path:
    """Write a run's report; a section whose files are missing says which command makes them.

    Parameters
    ----------
    run : Path or str
    out : Path or str, optional
        report.html in the run's folder by default.
    """
    run = Path(run)
    out = run / "report.html" if out is None else Path(out)
    training, evaluation = _read(run / "config.json"), _read(run / "evaluation" / "evaluation.json")
    ablation = _read(run / "high_frequency" / "high_frequency.json")
    data = training.get("data", {})
    synthetic = any(part.get("synthetic") for part in (data, evaluation, ablation))
    published = published_table(_metrics(run / "evaluation"), synthetic)
    problems = data.get("problems", {}) | evaluation.get("problems", {})
    settings = f"<pre>{escape(json.dumps(training['config'], indent=2))}</pre>" if training else ""
    origins = {"training": training, "evaluation": evaluation, "filtering": ablation}
    origins = {name: part["provenance"] for name, part in origins.items() if part}
    facts = dict.fromkeys(fact for origin in origins.values() for fact in origin)
    page = PAGE.format(
        data="simulated machines" if synthetic else escape(evaluation.get("data") or data.get("folder", "")),
        banner=BANNER if synthetic else "",
        results=_results(run, evaluation),
        published=BESIDE + _table(published) if published else "",
        figures=_figures(run, synthetic),
        thresholds=_thresholds(run),
        high_frequency=_high_frequency(ablation),
        experiments=_experiments(run),
        data_set=_data_set(run),
        problems=_table([["file", "reason"], *problems.items()]) if problems else "<p>None.</p>",
        configuration=settings or _missing("train --data DATA --out RUN"),
        provenance=_table([["", *origins], *([f, *(o.get(f, "") for o in origins.values())] for f in facts)]),
    )
    write_text(out, page)
    return out


def _results(run: Path, evaluation: dict[str, Any]) -> str:
    if not evaluation:
        return _missing("evaluate --checkpoint RUN/best.pt --data DATA --out RUN/evaluation")
    facts = "{clips} test clips of {machines} machines; {ms_per_clip:.1f} ms a clip. {not_scored}"
    page = f"<p>{escape(facts.format(**evaluation))}</p>"
    metrics = _metrics(run / "evaluation")
    if not metrics:
        return page + "<p>No clip has a known truth: there are scores, but nothing to measure.</p>"
    page += PROTOCOLS + _table(results_table(run))
    if not _metrics(run / "untrained"):
        page += _missing("evaluate --checkpoint RUN/initial.pt --data DATA --out RUN/untrained")
    apart = _read(run / "evaluation" / "evaluation_set" / "metrics.json")
    if apart and apart != metrics:
        page += "<h3>Evaluation set</h3>" + _table(table(apart)) + _table(_machines(apart))
    return page + "<h3>Each machine</h3>" + _table(_machines(metrics))


def _machines(metrics: dict[str, Any]) -> list[list[str]]:
    rows = [["type", "id", "normal", "anomalous", "AUC", "pAUC"]]
    for entry in metrics["ids"]:
        counts = [str(entry[name]) for name in ("type", "id", "normal", "anomaly")]
        rows.append([*counts, percent(entry, "auc"), percent(entry, "pauc")])
    return rows


def _thresholds(run: Path) -> str:
    rows = thresholds_table(run)
    if rows:
        return FALSE_ALARMS + _table(rows)
    return "<p>Not there: it takes a trained best.pt and test clips of known truth.</p>"


def _figures(run: Path, synthetic: bool) -> str:
    page = ""
    pictures = {path.stem: path for path in sorted((run / "figures").glob("*.png"))}
    for name in sorted(pictures, key=[*CAPTIONS, *pictures].index):
        page += _picture(pictures[name], "Synthetic data. " * synthetic + CAPTIONS.get(name, name))
    return page or _missing("report RUN --data DATA")


def _picture(path: Path, caption: str = "") -> str:
    coded = base64.b64encode(path.read_bytes()).decode()
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(path.stem)}" src="data:image/png;base64,{coded}">{caption}</figure>\n'


def _experiments(run: Path) -> str:
    """Every table (NAME.md) in RUN/experiments with its pictures (NAME*.png), whatever they are."""

    def plain(path: Path) -> str:
        return path.stem.replace("_", "-")

    folder = run / "experiments"
    shown: dict[str, list[Path]] = {plain(path): [path] for path in sorted(folder.glob("*.md"))}
    for picture in sorted(folder.glob("*.png")):
        owners = [name for name in shown if plain(picture).startswith(name)]
        shown.setdefault(max(owners, key=len, default=plain(picture)), []).append(picture)
    page = ""
    for name, paths in shown.items():
        page += f"<h3>{escape(name)}</h3>"
        for path in paths:
            table = path.suffix == ".md"
            page += _markdown(path.read_text(encoding="utf-8")) if table else _picture(path)
    return f"<h2>Experiments</h2>{page}" if page else ""


def _data_set(run: Path) -> str:
    """inspect.png, wherever in the run's folder `inspect --out` put it."""
    found = [path for path in sorted(run.rglob("inspect.png")) if path.is_file()]
    return "<h2>Data</h2>" + "".join(map(_picture, found)) if found else ""


def _markdown(text: str) -> str:
    """Tables and paragraphs, all that this package's own .md files have."""
    page, rows = "", []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
            page += _table([row for row in rows if not re.fullmatch(r"[-: ]*", "".join(row))])
        else:
            page += f"<p>{escape(block.lstrip('# '))}</p>"
    return page


def _high_frequency(ablation: dict[str, Any]) -> str:
    if not ablation:
        return _missing("ablate high-frequency --checkpoint RUN/best.pt --data DATA --out RUN/high_frequency")
    types = [entry["type"] for entry in ablation["conditions"][0]["metrics"]["types"]]
    rows = [["filter", "cut-off (Hz)", "average", *types]]
    for condition in ablation["conditions"]:
        metrics = condition["metrics"]
        cutoff = f"{condition['cutoff_hz']:g}" if condition["cutoff_hz"] else "-"
        cells = [percent(entry, "auc_id_mean") for entry in (metrics["average"], *metrics["types"])]
        rows.append([condition["filter"], cutoff, *cells])
    text = "AUC, id-mean, percent. Filter: {filter}, order {order}, of clips at {sample_rate} Hz."
    return f"<p>{escape(text.format(**ablation))}</p>" + _table(rows)


def _missing(command: str) -> str:
    return f"<p>Not there yet. To make it: <code>python -m osscl_min {escape(command)}</code></p>"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as an HTML table, the first one its header."""
    lines = ["".join(f"<th>{escape(str(cell))}</th>" for cell in rows[0])]
    for row in rows[1:]:
        cells = (re.sub(r" (\[[^]]*\])$", r" <small>\1</small>", escape(str(cell))) for cell in row)
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return '<div class="wide"><table>\n<tr>' + "</tr>\n<tr>".join(lines) + "</tr>\n</table></div>\n"
