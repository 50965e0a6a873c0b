"""One table for the terminal, Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from osscl_min.runtime.files import write_csv, write_text

Rows = Sequence[Sequence[str]]  # the first row is the header

_LATEX = str.maketrans({
    "±": r"$\pm$", "−": "$-$", "≤": r"$\le$", "≥": r"$\ge$", "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    **{character: rf"\{character}" for character in "%&_#${}"},
})  # fmt: skip


def markdown(rows: Rows) -> str:
    """Aligned Markdown, which reads well in a terminal too."""
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    line = "".join(f"| {{:<{max(map(len, column))}}} " for column in zip(*rows, strict=True)) + "|"
    header, *body = [line.format(*row) for row in rows]
    rule = line.format(*[""] * len(rows[0])).replace(" ", "-")
    return "\n".join([header, rule, *body])


def latex(rows: Rows, note: str = "") -> str:
    """A booktabs tabular to \\input in a paper; `note` is a comment on top."""
    header, *body = [" & ".join(cell.translate(_LATEX) for cell in row) + r" \\" for row in rows]
    comment = f"% {' '.join(note.split())}\n" * bool(note)
    begin = rf"\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}"
    lines = [begin, r"\toprule", header, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return comment + "\n".join(lines) + "\n"


def write_table(
    stem: Path | str, rows: Rows, records: Sequence[Mapping[str, Any]] = (), notes: Sequence[str] = ()
) -> None:
    """Write a table as STEM.md and STEM.tex with its notes below it, and its `records` as STEM.csv.

    The first record names the CSV's columns; without records there is no CSV.
    """
    write_text(f"{stem}.md", "\n\n".join([markdown(rows), *filter(None, notes)]) + "\n")
    write_text(f"{stem}.tex", latex(rows, " ".join(filter(None, notes))))
    if records:
        write_csv(f"{stem}.csv", list(records[0]), [[r[name] for name in records[0]] for r in records])


def percent(entry: Mapping[str, Any], name: str) -> str:
    """A metric of an entry in percent, with its interval where there is one; "-" for none."""
    if (value := entry.get(name)) is None:
        return "-"
    interval = (entry.get("interval") or {}).get(name)
    bounds = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * value:.2f}{bounds}"


def mean_text(values: Sequence[float], digits: int = 1) -> str:
    """The mean, with the standard deviation where there are several values."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"
