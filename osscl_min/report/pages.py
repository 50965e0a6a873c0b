"""A run's report: its figures, its tables in LaTeX, and the executed notebooks as HTML pages."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

from tqdm import tqdm

from osscl_min.report import figures, results
from osscl_min.runtime.files import ROOT, UserError, printable, write_text
from osscl_min.runtime.plotting import save_all

ABLATION = "high_frequency/high_frequency.json"
# what a notebook needs besides an evaluated run: its data, test clips of known truth, a file of the run
NEEDS = {
    "01_data": ("data", "truth"),
    "02_training": ("data",),
    "03_evaluation": ("truth",),
    "04_high_frequency_ablation": ("data", "truth", ABLATION),
    "05_kernels": (),
    "report": (),
}
# what reading a damaged file of a run raises
DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, EOFError, BadZipFile)
# nbconvert's page without what it would load from other servers
TEMPLATE = """{% extends 'lab/index.html.j2' %}{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}{% block html_head_js_mermaidjs %}{% endblock %}"""


def write(run: Path | str, data: Path | str | None = None) -> Path:
    """Write RUN/figures (PNG, PDF), RUN/paper (LaTeX), RUN/notebooks (executed) and RUN/report (HTML).

    `data` is the run's data folder or packed store, by default RUN/data; what shows clips needs it. An
    executed notebook that is newer than its source and the run is kept. Returns the first page.
    """
    run = results.check(run).resolve()
    if data is not None or (run / "data").is_dir():
        data = Path(data or run / "data").resolve()
    sources = _notebooks(run, data)
    try:
        drawn, tables = figures.draw(run, data), results.paper_tables(run)
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{printable(run)}: damaged; evaluate it again ({reason})") from error
    for name, text in tables.items():
        write_text(run / "paper" / f"{name}.tex", text)
    results_of = (run / "best.pt", run / "evaluation" / "evaluation.json")
    with ThreadPoolExecutor(1) as pool, notebook_runner() as execute:
        saved = pool.submit(save_all, drawn, run / "figures")  # beside the notebooks' own process
        for source in tqdm(sources, "notebooks", unit="notebook", disable=None, leave=False):
            executed = run / "notebooks" / source.name
            newest = max(part.stat().st_mtime for part in (source, *results_of))
            if not executed.is_file() or executed.stat().st_mtime < newest:
                write_text(executed, execute(source, run, data))
            write_text(run / "report" / f"{source.stem}.html", _page(executed))
        saved.result()
    return run / "report" / "report.html"


def _notebooks(run: Path, data: Path | None) -> list[Path]:
    """The notebooks for which everything is there, the first page last: it links to the others."""
    try:
        import nbclient  # noqa: F401
        import nbconvert  # noqa: F401
    except ImportError as error:
        raise UserError("the report needs Jupyter: pip install 'osscl-min[notebooks]'") from error
    sources = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not sources:
        raise UserError("the report needs the folder notebooks/: run it from a clone of the repository")
    have = {"data": data is not None, "truth": bool(results.read_metrics(run / "evaluation"))}
    have[ABLATION] = (run / ABLATION).is_file()
    return [source for source in sources if all(have[need] for need in NEEDS.get(source.stem, ()))]


@contextmanager
def notebook_runner() -> Iterator[Callable[[Path, Path, Path | None], str]]:
    """A function that executes a notebook on a run and its data and returns it as JSON.

    One kernel executes them all, so that only the first waits for imports; each starts without variables.
    """
    import nbformat
    from jupyter_client import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbclient.util import run_sync

    kernel = AsyncKernelManager(kernel_name="python3")

    def execute(source: Path, run: Path, data: Path | None) -> str:
        notebook = nbformat.read(source, as_version=4)
        folders = {"OSSCL_RUN": str(run)} | ({"OSSCL_DATA": str(data)} if data else {})
        where = {"metadata": {"path": str(source.parent)}}
        client = NotebookClient(notebook, kernel, timeout=None, startup_timeout=300, resources=where)
        try:  # the kernel's own remarks on standard error are noise here; a failing cell is reported
            client.execute(env=os.environ | folders, stderr=subprocess.DEVNULL)
        except CellExecutionError as error:
            raise UserError(f"{source.name} stopped with {error.ename}: {error.evalue}") from error
        run_sync(client.kc.execute_interactive)("%reset -f", silent=True)
        return nbformat.writes(notebook)

    try:
        yield execute
    finally:
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)(now=True)


def _page(executed: Path) -> str:
    """An executed notebook as HTML that needs no other file; links lead to other pages or become text."""
    from nbconvert import HTMLExporter

    plain = executed.stem == "report"  # code is noise on the first page
    exporter = HTMLExporter(
        raw_template=TEMPLATE, exclude_input=plain, exclude_input_prompt=plain, exclude_output_prompt=plain
    )
    text = exporter.from_filename(str(executed))[0]
    text = re.sub(r'<a href="\.\./[^"]*">(.*?)</a>', r"\1", text)
    return re.sub(r'href="(\w+)\.ipynb"', r'href="\1.html"', text)
