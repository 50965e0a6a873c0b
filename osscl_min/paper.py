"""A run's tables in LaTeX (booktabs), to \\input in a paper, each with its origin in the first line."""

from __future__ import annotations

from pathlib import Path

from osscl_min import report
from osscl_min.files import UserError, replacing
from osscl_min.metrics import as_latex


def write(run: Path | str) -> list[Path]:
    """Write RUN/paper/NAME.tex: results, machines, thresholds, and the tables of its experiments.

    Raises
    ------
    UserError
        If the run has not been evaluated on clips of known truth.
    """
    run = Path(run)
    if not report.is_measured(run):
        raise UserError(f"{run}: nothing was measured yet, so there are no tables")
    origin = report.origin(run)
    tables = {
        "results": (
            report.results_table(run),
            f"AUC and pAUC in percent, 95 % bootstrap intervals. {origin}",
        ),
        "machines": (
            report.machines_table(run),
            f"AUC and pAUC in percent, 95 % bootstrap intervals. {origin}",
        ),
    }
    thresholds = report.thresholds_table(run)
    if thresholds:
        tables["thresholds"] = thresholds, f"Normal test clips called anomalous. {origin}"
    content = {name: as_latex(rows, note) for name, (rows, note) in tables.items()}
    for path in sorted((run / "experiments").glob("*.tex")):
        content[f"experiment_{path.stem}"] = path.read_text(encoding="utf-8")
    written = []
    for name, text in content.items():
        written.append(run / "paper" / f"{name}.tex")
        with replacing(written[-1]) as file:
            file.write(text)
    return written
