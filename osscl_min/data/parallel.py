"""Work on many files in several processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

from osscl_min.runtime.files import UserError

Task, Result = TypeVar("Task"), TypeVar("Result")


def in_processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], description: str, jobs: int | None = None
) -> Iterator[Result]:
    """`function` of every task, in order.

    Parameters
    ----------
    function : callable
        Of a module's top level, or a `functools.partial` of one.
    tasks : sequence
    description : str
        For the progress bar.
    jobs : int, optional
        Processes; the machine's cores without. One works in this process.

    Raises
    ------
    UserError
        If a process is killed.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(tasks))
    bar = {"desc": description, "total": len(tasks), "unit": "file", "disable": None, "leave": False}
    if jobs <= 1:
        yield from tqdm(map(function, tasks), **bar)
        return
    # spawned, not forked: the caller may have threads
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start)
    try:
        chunk = max(1, min(16, len(tasks) // (4 * jobs)))
        yield from tqdm(pool.map(function, tasks, chunksize=chunk), **bar)
    except BrokenProcessPool as error:
        raise UserError(
            "a process at work on the files was killed, maybe for want of memory; try fewer --jobs"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()  # a parent that was killed can end nobody
    os._exit(1)
