"""Ctrl-C while training: the first ends the run after the current step, a second ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def first_interrupt_noted() -> Iterator[list[int]]:
    """Yield a list to which the first Ctrl-C adds its signal's number; a second one raises KeyboardInterrupt as usual.

    Raised at once, the exception could surface in a destructor or a callback, where Python ignores it, and be lost.
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
