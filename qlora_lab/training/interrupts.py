"""Ctrl-C while training: the first one is noted and ends the run after its step, a second one ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def first_interrupt_noted() -> Iterator[list]:
    """Ctrl-C adds to the list that this gives; a second one raises KeyboardInterrupt, as it does elsewhere.

    Raised at once it could come up in a destructor or a callback, where Python ignores exceptions, and be lost.
    """
    interrupts: list[int] = []
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield interrupts
        return

    def note(number: int, _frame) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, usual)
