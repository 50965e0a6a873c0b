"""From a run to results/, and from results/ into the documents: no number is typed by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from osscl_min.report import paper
from osscl_min.report.pages import origin as described
from osscl_min.report.pages import results_table, thresholds_table
from osscl_min.runtime.files import ROOT, UserError, read_csv, read_json, replacing, write_json, write_text
from osscl_min.runtime.tables import markdown
from osscl_min.train import read_log

KEPT = ("embeddings.png", "scores.png")  # the README's pictures
BLOCK = re.compile(r"(<!-- generated from (\S+) by: [^>]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)


def keep(run: Path | str, folder: Path | str, tests: Path | str | None = None) -> None:
    """Copy what a run measured into a folder of results/, and its tables for a paper beside it.

    The folder gets metrics.json, table.md, thresholds.md, cost.md and KEPT; results/paper the run's
    LaTeX tables, with the folder's name before theirs.

    Parameters
    ----------
    run : Path or str
        A run of reproduce.sh, evaluated; with its timing.csv, cost.md tells how long each step took. Of one
        of `reproduce.sh --experiments` only cost.md is kept.
    folder : Path or str
    tests : Path or str, optional
        timing.csv of `reproduce.sh --test`.

    Raises
    ------
    UserError
        If the run is not complete.
    """
    run, folder = Path(run), Path(folder)
    if (run / "components.json").is_file() and (run / "timing.csv").is_file():
        write_text(folder / "cost.md", experiments_cost(run))
        return
    try:
        evaluation = read_json(run / "evaluation" / "evaluation.json")
        metrics = {name: read_json(run / name / "metrics.json") for name in ("evaluation", "untrained")}
        log = read_log(run)
    except OSError as error:
        missing = f"{run} is not a complete run of reproduce.sh: {error.filename} is missing"
        raise UserError(missing) from error
    facts = ("synthetic", "data", "clips", "machines", "ms_per_clip", "identity_accuracy")
    about = {name: evaluation[name] for name in facts}
    write_json(folder / "metrics.json", about | metrics | {"provenance": evaluation["provenance"]})
    for name, table in (("table", results_table(run)), ("thresholds", thresholds_table(run))):
        if table:
            write_text(folder / f"{name}.md", f"{markdown(table)}\n\n{described(run)}\n")
    for picture in KEPT:
        if (run / "figures" / picture).is_file():
            with replacing(folder / picture, "wb") as file:
                file.write((run / "figures" / picture).read_bytes())
    for path in paper.write(run):
        text = path.read_text(encoding="utf-8")
        write_text(folder.parent / "paper" / f"{folder.name}_{path.name}", text)
    write_text(folder / "cost.md", run_cost(run, evaluation, log, tests))


def run_cost(
    run: Path, evaluation: dict[str, Any], log: list[dict[str, float]], tests: Path | str | None
) -> str:
    """How long a run and its steps took and what they needed, as Markdown."""
    origin = evaluation["provenance"]
    memory = max(evaluation["peak_memory_mb"], *(entry["peak_memory_mb"] for entry in log)) / 1000
    lines = [f"On {origin['processor']}, torch {origin['torch']}, device {origin['device']}:", ""]
    if (run / "timing.csv").is_file():
        steps = read_timing(run / "timing.csv")
        disk = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e6
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in steps.items())
        lines.append(f"- `bash reproduce.sh`: {_minutes(sum(steps.values()))} after the installation")
        lines.append(f"  ({parts}),")
        lines.append(f"  {memory:.1f} GB of memory at most, {disk:.0f} MB on disk;")
    train_ms = 1000 / (sum(entry["clips_per_second"] for entry in log) / len(log))
    if tests is not None and Path(tests).is_file():
        lines.append(f"- `bash reproduce.sh --test`: {_minutes(sum(read_timing(tests).values()))};")
    evaluation_ms = evaluation["ms_per_clip"]
    lines.append(f"- training {train_ms:.0f} ms a clip, evaluation {evaluation_ms:.0f} ms a clip.")
    return "\n".join(lines) + "\n"


def experiments_cost(run: Path) -> str:
    """How long each experiment took, as Markdown."""
    first = read_json(run / "components.json")
    steps = read_timing(run / "timing.csv")
    origin, trained = first["provenance"], len(list((run / "runs").glob("*/best.pt")))
    what = f"{trained} trainings of {first['epochs']} epochs, preset {first['preset']}"
    kind = "synthetic data" if first["synthetic"] else f"data {first['data']}"
    lines = [
        f"On {origin['processor']}, torch {origin['torch']}, commit {origin['commit']}; {kind}, {what}, "
        f"{_minutes(sum(steps.values()))} in all. A detector is trained where it is needed first.",
        "",
        "| experiment | wall time |",
        "|---|---|",
        *(f"| {name} | {_minutes(seconds)} |" for name, seconds in steps.items()),
    ]
    return "\n".join(lines) + "\n"


def read_timing(path: Path | str) -> dict[str, float]:
    """Step -> seconds, as reproduce.sh writes it."""
    return {row["step"]: float(row["seconds"]) for row in read_csv(path)}


def _minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def fill(document: Path | str) -> str:
    """The text of a Markdown document with every generated block made anew from its file.

    A block stands between `<!-- generated from FILE by: COMMAND -->` and `<!-- end -->`; FILE is relative to
    the project's folder.
    """
    document = Path(document)

    def block(match: re.Match) -> str:
        source = ROOT / match[2]
        if not source.is_file():
            raise UserError(f"{document}: {match[2]} does not exist")
        return f"{match[1]}\n{source.read_text(encoding='utf-8').strip()}\n\n{match[4]}"

    return BLOCK.sub(block, document.read_text(encoding="utf-8"))


def write_documents() -> list[Path]:
    """Fill README.md and kernels/README.md; returns those that changed."""
    changed = []
    for document in (ROOT / "README.md", ROOT / "kernels" / "README.md"):
        if document.is_file() and (text := fill(document)) != document.read_text(encoding="utf-8"):
            write_text(document, text)
            changed.append(document)
    return changed
