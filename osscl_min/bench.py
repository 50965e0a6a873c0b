"""What the benchmarks share: a case in a fresh process, wall and processor time, rows as CSV and Markdown.

A case runs in a process of its own, because what a process computed before decides how its allocator and
its caches treat the next case. Rounds of all cases are interleaved: whatever else the machine does hits all.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from osscl_min.runtime.files import ROOT, UserError, peak_memory_mb, provenance, write_csv, write_text


def measure(call: Callable[[], Any], seconds: float = 1.5, least: int = 3) -> dict[str, float]:
    """Run `call` once to warm up, then repeatedly.

    Parameters
    ----------
    call : callable
    seconds : float
        How long to go on.
    least : int
        Runs at least.

    Returns
    -------
    dict
        "wall_ms" and "processor_ms", medians of a run (all threads together for the processor), and
        "peak_mb", the largest resident memory of this process so far.
    """
    call()
    runs, end = [], time.perf_counter() + seconds
    while len(runs) < least or time.perf_counter() < end:
        wall, processor = time.perf_counter(), time.process_time()
        call()
        runs.append((time.perf_counter() - wall, time.process_time() - processor))
    walls, processors = zip(*runs, strict=True)
    return {
        "wall_ms": 1e3 * statistics.median(walls),
        "processor_ms": 1e3 * statistics.median(processors),
        "peak_mb": peak_memory_mb(),
    }


def fresh(function: str, *arguments: Any, threads: int | None = None) -> Any:
    """Call "module:function" of JSON arguments in a new interpreter; its result, which must be JSON too.

    Parameters
    ----------
    function : str
        Such as "osscl_min.bench_model:case".
    *arguments
    threads : int, optional
        Of PyTorch; default: its own choice.

    Raises
    ------
    UserError
        If the process ends in an error; the message ends with the last line that it printed.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "osscl_min.bench", function, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        raise UserError(f"bench: {function}{arguments} failed: {last}")
    return json.loads(run.stdout.splitlines()[-1])


def interleaved(
    cases: Sequence[tuple], run: Callable[..., dict[str, float]], rounds: int = 3
) -> dict[tuple, dict[str, float]]:
    """Run every case once a round; the median of each figure over the rounds, by case.

    Parameters
    ----------
    cases : sequence of tuple
        The arguments of `run`.
    run : callable
        Such as `lambda *case: fresh("osscl_min.bench_model:case", *case)`; returns figures by name.
    rounds : int
    """
    from tqdm import tqdm

    found: dict[tuple, list[dict[str, float]]] = {case: [] for case in cases}
    for case in tqdm([*cases] * rounds, desc="bench", unit="case", disable=None):
        found[case].append(run(*case))
    return {
        case: {name: statistics.median(one[name] for one in results) for name in results[0]}
        for case, results in found.items()
    }


def write_rows(
    path: Path | str, rows: Sequence[dict[str, Any]], *, title: str, notes: Sequence[str] = ()
) -> Path:
    """Write rows as PATH.csv, provenance in every row, and as the table PATH.md.

    Parameters
    ----------
    path : Path or str
        Without suffix.
    rows : sequence of dict
        Columns by name, in the order of the first row; a float is shown with three significant digits in
        the table, and written whole in the CSV; None is an empty cell.
    title : str
        The first line of the table's text: what was measured, on what data.
    notes : sequence of str
        Paragraphs under the table.

    Returns
    -------
    Path
        The Markdown file.
    """
    import torch

    source = provenance() | {
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
    }
    names = list(rows[0])
    path = Path(path)
    write_csv(
        path.with_suffix(".csv"),
        [*names, *source],
        [["" if row[n] is None else row[n] for n in names] + list(source.values()) for row in rows],
    )
    lines = [title, "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(_cell(row[n]) for n in names) + " |" for row in rows]
    for note in notes:
        lines += ["", note]
    said = "{processor}, {threads} threads, load {load}, torch {torch}; {time}, commit {commit}."
    lines += ["", said.format(**source)]
    write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")
    return path.with_suffix(".md")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def main() -> None:
    """The fresh process: `python -m osscl_min.bench MODULE:FUNCTION ARGUMENTS_AS_JSON`."""
    module, _, name = sys.argv[1].partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
