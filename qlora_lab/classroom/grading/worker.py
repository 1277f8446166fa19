"""Grade one hand-in in a process of its own: `runs.py` starts it.

It takes JSON on standard input (see `work`), keeps the report in the folder named there, and ends everything that the
hand-in started. It ends itself when the process that started it is gone. (The hand-in's path is also its argument, so
that `ps` shows what it is at.)
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from qlora_lab.classroom.grading.hand_in import grade
from qlora_lab.classroom.grading.kernel import MARK, Crowd, Limits, adopt_orphans
from qlora_lab.classroom.grading.runs import keep


def work(path: str, limits: dict, course: str, key: str, results: str) -> None:
    """Grade the file at `path` and keep the report under `key` in the folder `results`."""
    report = grade(Path(path), Limits(**limits), course)
    keep(Path(results), key, report, Limits(**limits), course)


def end_with(parent: int) -> None:
    """Stop this process, in order, when its parent is gone: whoever started it was killed."""
    import psutil

    while psutil.pid_exists(parent) and os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    adopt_orphans()
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    crowd = Crowd(os.environ[MARK])
    try:
        work(**json.load(sys.stdin))
    finally:
        crowd.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
