"""What runs in the learner's kernel: ask one of the package's own checks, and write down its verdict."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from qlora_lab.classroom import checks

# taken when this module is imported, in the kernel before the learner's first cell: later changes have no effect
CHECKS = {name: (check.exercise, check.verdict) for name, check in checks.CHECKS.items()}
KERNEL = os.getpid()


def prepare() -> None:
    """Called before the learner's first cell: a fork of the kernel ends with the cell that made it.

    Otherwise the fork would go on as a second kernel on the same sockets, and neither would be heard any more.
    """
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    assert shell is not None, "only a kernel is prepared"
    shell.events.register("post_execute", end_fork)


def end_fork() -> None:
    if os.getpid() != KERNEL:
        os._exit(0)


def judge(name: str, answer: Callable[[], tuple], file: str) -> None:
    """Write to a file, as JSON [state, message], what the check `name` says of the answer.

    Nothing is written if the answer raises what is no Exception, such as SystemExit.
    """
    try:
        verdict = CHECKS[name][1](*answer())
        state, message = verdict.state, verdict.message
    except NameError as error:
        state, message = "missing", f"{error}: the cell that makes it failed, or was deleted or renamed"
    end_fork()
    Path(file).write_text(json.dumps([state, message]), encoding="utf-8")


def judging(name: str, given: str, file: Path) -> str:
    """Code that calls `judge` with the learner's answer, whatever names the learner has redefined."""
    return f"{called('judge')}({name!r}, lambda: ({given},), {str(file)!r})"


def called(function: str) -> str:
    """An expression for a function of this module, which needs no name of the learner's."""
    return f"__import__({__name__!r}, fromlist=[{function!r}]).{function}"
