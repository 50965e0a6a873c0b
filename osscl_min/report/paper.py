"""A run's tables in LaTeX (booktabs), to \\input in a paper, each with its origin in the first line."""

from __future__ import annotations

from pathlib import Path

from osscl_min.report import pages as report
from osscl_min.runtime.files import UserError, write_text
from osscl_min.runtime.tables import latex


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
    note = f"AUC and pAUC in percent, 95 % bootstrap intervals. {origin}"
    content = {
        "results": latex(report.results_table(run), note),
        "machines": latex(report.machines_table(run), note),
    }
    if thresholds := report.thresholds_table(run):
        content["thresholds"] = latex(thresholds, f"Normal test clips called anomalous. {origin}")
    for path in sorted((run / "experiments").glob("*.tex")):
        content[f"experiment_{path.stem}"] = path.read_text(encoding="utf-8")
    for name, text in content.items():
        write_text(run / "paper" / f"{name}.tex", text)
    return [run / "paper" / f"{name}.tex" for name in content]
