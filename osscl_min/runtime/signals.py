"""Stopping on a signal, but not before the work is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def noting_signals(hurry: bool = True) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of stopping at once.

    With `hurry` a second one acts as usual; torchrun, however, may send its processes the same one twice.
    """
    signals: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: Any) -> None:
        signals.append(number)
        if hurry:
            restore()

    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        restore()
