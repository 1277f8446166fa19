"""A Jupyter kernel under limits, and the end of everything that it started.

What it starts is found twice over: as its descendants, and by a variable of their environment (`MARK`), which stays
with a process that has left its parent, its session and its process group. On Linux, orphans come back to the process
that grades, whatever their environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_lab.places import IMPORTED_FROM

GRACE = 10.0  # seconds that an interrupted cell has to stop; no more than it had to run
START = 120.0  # seconds that a kernel has to start
PROCESSES = 300  # more than these at once are no course work
MARK = "QLORA_LAB_GRADING"


@dataclass(frozen=True)
class Limits:
    """seconds: for the whole notebook, for one cell, for judging one answer. memory: bytes, resident, of the kernel and
    all that it started."""

    seconds: float = 30 * 60
    cell_seconds: float = 10 * 60
    answer_seconds: float = 2 * 60
    memory: float = 8e9


class Stopped(Exception):
    """This kernel is of no more use; the message says why."""


class Kernel:
    """A kernel in the working folder `folder`, which ends at `deadline` (of `time.monotonic`) at the latest.

    Its output is not read, so that no amount of it does harm: what a cell prints does not count.

    Raises:
        Stopped: from `run`, if the kernel cannot go on.
        TimeoutError: from `run`, if a cell was interrupted at its limit.
    """

    def __init__(self, folder: Path, limits: Limits, deadline: float):
        from jupyter_client.manager import KernelManager

        self.limits, self.deadline = limits, deadline
        self.mark = os.environ.get(MARK) or uuid.uuid4().hex
        environment = {key: value for key, value in os.environ.items() if key != "QLORA_LAB_STRICT"}
        environment |= {MARK: self.mark, "QLORA_LAB_PROGRESS": str(folder / "progress.json")}
        environment |= {"PYTHONPATH": python_path()}
        environment.setdefault("GOMP_SPINCOUNT", "1000")  # as in Makefile: it need not have the cores to itself
        self.manager, self.crowd = KernelManager(kernel_name="python3"), Crowd(self.mark)
        self.manager.start_kernel(
            cwd=str(folder),
            env=environment,
            extra_arguments=["--log-level=ERROR"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        provisioner: Any = self.manager.provisioner  # a LocalProvisioner: the kernel is a process of this machine
        self.crowd.add(provisioner.pid)
        self.client = self.manager.blocking_client()
        self.client.start_channels(iopub=False, stdin=False, hb=False)

    def __enter__(self) -> Kernel:
        try:
            request, end = self.client.kernel_info(), time.monotonic() + START
            if self._wait(request, end) is None:
                raise Stopped(f"the kernel did not start within {START:g} s")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.client.stop_channels()
        self.crowd.end()
        self.manager.shutdown_kernel(now=True)

    def run(self, code: str, seconds: float | None = None) -> str:
        """Run code and return the error that it raised, "NameError: ...", or "". seconds: default a cell's limit."""
        seconds = seconds or self.limits.cell_seconds
        end = min(self.deadline, time.monotonic() + seconds)
        # stop_on_error would have a kernel that is slow drop the request after one that failed
        request = self.client.execute(code, allow_stdin=False, store_history=False, stop_on_error=False)
        if (error := self._wait(request, end)) is not None:
            return error
        self.manager.interrupt_kernel()
        stopped = self._wait(request, time.monotonic() + min(GRACE, seconds)) is not None
        if time.monotonic() > self.deadline:
            raise Stopped(f"the notebook took longer than {self.limits.seconds:g} s")
        if not stopped:
            raise Stopped(f"it did not stop when it was interrupted after {seconds:g} s")
        raise TimeoutError(f"it took longer than {seconds:g} s and was interrupted")

    def _wait(self, request: str, end: float) -> str | None:
        """What `run` returns, or None if that is not known at the time `end`."""
        while True:
            try:
                reply = self.client.get_shell_msg(timeout=0.2)
            except queue.Empty:
                reply = {"parent_header": {}}
            if reply["parent_header"].get("msg_id") == request:
                content = reply["content"]
                if content["status"] == "ok":
                    return ""
                return f"{content.get('ename', content['status'])}: {content.get('evalue', '')}".rstrip(": ")
            self._watch()
            if time.monotonic() > end:
                return None

    def _watch(self) -> None:
        """Raise Stopped if the kernel is dead, uses too much memory or has started too many processes."""
        if not self.manager.is_alive():
            raise Stopped("the kernel died")
        processes = self.crowd.now()
        used = sum(map(_resident, processes))
        if used > self.limits.memory:
            raise Stopped(f"it used {used / 1e9:.1f} GB, more than {self.limits.memory / 1e9:g} GB")
        if len(processes) > PROCESSES:
            raise Stopped(f"it had {len(processes)} processes, more than {PROCESSES}")


class Crowd:
    """The processes that belong to one hand-in: those added, their descendants, and those with its mark.

    Where orphans come to this process (`adopt_orphans`), they belong to it, too. This process and its parents never do.
    """

    def __init__(self, mark: str):
        import psutil

        self.mark, self.members = mark, {}  # psutil.Process by pid
        self.spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        self.strangers = set(psutil.pids())  # looked at before: not to be asked again
        self.adopting = adopts_orphans()

    def add(self, pid: int) -> None:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            self.members[pid] = psutil.Process(pid)

    def now(self) -> list:
        """Those that are running, as psutil.Process."""
        import psutil

        pids = set(psutil.pids())
        new = pids - self.spared - self.strangers - self.members.keys()
        while found := {pid for pid in new if self._is_ours(pid)}:
            for pid in found:
                self.add(pid)
            new -= found
        self.strangers = (self.strangers & pids) | new
        self.members = {pid: process for pid, process in self.members.items() if _is_running(process)}
        return list(self.members.values())

    def _is_ours(self, pid: int) -> bool:
        import psutil

        try:
            process = psutil.Process(pid)
            parent = process.ppid()
            if parent in self.members or (self.adopting and parent == os.getpid()):
                return True
            return process.environ().get(MARK) == self.mark
        except (psutil.Error, OSError):  # somebody else's, or gone
            return False

    def end(self, seconds: float = 10) -> None:
        """Kill them all, and those that they start meanwhile, for `seconds` at most."""
        import psutil

        until = time.monotonic() + seconds
        self.strangers.clear()  # one of them may have been asked before it had its mark, or its parent
        while (left := self.now()) and time.monotonic() < until:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=0.2)


def adopt_orphans() -> None:
    """Let this process be the parent of its descendants whose parents have ended. Linux only; elsewhere nothing.

    See prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def adopts_orphans() -> bool:
    if sys.platform != "linux":
        return False
    answer = ctypes.c_int()
    ctypes.CDLL(None).prctl(37, ctypes.byref(answer), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
    return bool(answer.value)


def _is_running(process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _resident(process) -> int:
    import psutil

    try:
        return process.memory_info().rss
    except psutil.Error:  # it has just ended
        return 0


def python_path() -> str:
    """A PYTHONPATH with which the kernel finds this package, even where it is not installed."""
    return os.pathsep.join([str(IMPORTED_FROM), *filter(None, [os.environ.get("PYTHONPATH")])])
