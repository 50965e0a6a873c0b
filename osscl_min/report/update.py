"""From a run to results/, and from results/ into the documents: no number is typed by hand.

For maintainers: ``python -m osscl_min.report.update keep RUN results/quick``; its other commands are
`thresholds` and `readme`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import tyro

from osscl_min.report import results
from osscl_min.runtime.files import ROOT, UserError, read_csv, read_json, replacing, write_json, write_text
from osscl_min.runtime.tables import Rows, markdown
from osscl_min.train import read_log

PICTURES = ("embeddings.png", "overview.png", "scores.png")
DOCUMENTS = ("README.md", "results/README.md", "kernels/README.md")
BLOCK = re.compile(r"(<!-- generated from (\S+) by: [^>]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)


def keep(run: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path]) -> None:
    """Copy what a run of reproduce.sh measured into a folder of results/.

    Args:
        run: An evaluated run; of one of `reproduce.sh --experiments`, only cost.md is kept.
        folder: Such as results/quick; results/paper gets the LaTeX tables.
    """
    if not (is_experiments := (run / "runs").is_dir()):
        results.check(run)
    write_text(folder / "cost.md", markdown(cost_table(run)) + "\n")
    if is_experiments:
        return
    evaluation = read_json(run / "evaluation" / "evaluation.json")
    facts = ("synthetic", "data", "clips", "machines", "ms_per_clip", "identity_accuracy", "provenance")
    metrics = {name: results.read_metrics(run / name) for name in ("evaluation", "untrained")}
    write_json(folder / "metrics.json", {name: evaluation[name] for name in facts} | metrics)
    write_text(folder / "headline.md", f"{results.headline(run)}\n")
    for name in ("results", "thresholds"):
        if table := getattr(results, f"{name}_table")(run):
            write_text(folder / f"{name}.md", f"{markdown(table)}\n\n{results.origin(run)}\n")
    copies = {run / "figures" / name: folder / name for name in PICTURES}
    copies |= {path: folder / "notebooks" / path.name for path in (run / "notebooks").glob("0*.ipynb")}
    for source, copy in copies.items():
        if source.is_file():
            with replacing(copy, "wb") as file:
                file.write(source.read_bytes())
    for name, text in results.paper_tables(run).items():
        write_text(folder.parent / "paper" / f"{folder.name}_{name}.tex", text)


def thresholds(folder: tyro.conf.Positional[Path], runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Write FOLDER/thresholds.md: decisions on the test clips of runs with different seeds, by two scores.

    Args:
        runs: Evaluated runs, such as OUT/runs/os-scl-seed* of an experiment.
    """
    rows: Rows = []
    for run in runs:
        seed = read_json(run / "config.json")["config"]["train"]["seed"]
        for score in ("exact", "nearest"):
            header, *lines = results.thresholds_table(run, score=score)
            rows = rows or [["score", "seed", header[0], *header[2:]]]
            rows += [[score, str(seed), line[0], *line[2:]] for line in lines if line[1] == "all"]
    rows[1:] = sorted(rows[1:], key=lambda row: (row[0], float(row[2].rstrip("% ")), int(row[1])))
    origin = re.sub(r"seed \d+", "a seed per row", results.origin(runs[-1]))
    write_text(folder / "thresholds.md", f"{markdown(rows)}\n\n{origin}\n")


def cost_table(run: Path) -> Rows:
    """How long each step of reproduce.sh took, and what the run needed."""
    steps = {row["step"]: float(row["seconds"]) for row in read_csv(run / "timing.csv", ("step", "seconds"))}
    rows = [["what", "value"], *([name, f"{seconds:.0f} s"] for name, seconds in steps.items())]
    rows.append(["all steps", f"{sum(steps.values()):.0f} s"])
    if (run / "log.jsonl").is_file():
        log, evaluation = read_log(run), read_json(run / "evaluation" / "evaluation.json")
        rates = [entry["clips_per_second"] for entry in log]
        rows.append(["training, per clip", f"{1000 * len(rates) / sum(rates):.0f} ms"])
        rows.append(["evaluation, per clip", f"{evaluation['ms_per_clip']:.0f} ms"])
        peaks = [part["peak_memory_mb"] for part in (evaluation, *log) if part["peak_memory_mb"]]
        if peaks:
            rows.append(["peak memory", f"{max(peaks) / 1000:.1f} GB"])
        origin = evaluation["provenance"]
        rows += [[name, origin[name]] for name in ("processor", "device", "torch", "commit")]
    return rows


def fill(document: Path | str) -> str:
    """The text of a Markdown document with every generated block replaced by its file.

    A block stands between `<!-- generated from FILE by: COMMAND -->` and `<!-- end -->`; FILE is relative to
    the repository.
    """
    document = Path(document)

    def block(match: re.Match) -> str:
        source = ROOT / match[2]
        if not source.is_file():
            raise UserError(f"{document}: {match[2]} does not exist")
        return f"{match[1]}\n{source.read_text(encoding='utf-8').strip()}\n\n{match[4]}"

    return BLOCK.sub(block, document.read_text(encoding="utf-8"))


def readme() -> None:
    """Fill the generated blocks of DOCUMENTS."""
    for document in map(ROOT.joinpath, DOCUMENTS):
        if (text := fill(document)) != document.read_text(encoding="utf-8"):
            write_text(document, text)
            print(document)


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"keep": keep, "readme": readme, "thresholds": thresholds}, description=__doc__
        )
    except UserError as error:
        sys.exit(f"update: {error}")
