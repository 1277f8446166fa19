"""Grade a learner's notebooks: run each in a process of its own, under limits, and count the points.

    python -m qlora_lab.classroom.grade 04_double_quantization.ipynb [more.ipynb] [--json]
        [--minutes 30] [--cell-minutes 10] [--memory-gb 8]

How it grades. The cells are run in their order, in an empty folder. Where the course's notebook checks an exercise, the
grader calls the package's own check, taken before the learner's first line ran: what a cell prints does not count. An
exercise whose check the learner deleted is judged at the end. A cell that fails, or is interrupted at its limit, does
not end the run; a kernel that dies or exceeds its limit does, and what was judged by then counts. The learner's file is
not changed.

This guards against accidents and idle tricks. Untrusted code must be run in a container.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_lab.classroom import checks
from qlora_lab.classroom.judging import MARKS
from qlora_lab.classroom.notebook_json import parse_notebook
from qlora_lab.classroom.outputs import code_cells
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.errors import UserError

CHECK = re.compile(r"^(check_\w+)\((.*)\)\s*$", re.MULTILINE)
# taken when this module is imported, in the kernel before the learner's first cell: later changes have no effect
CHECKS = {name: (check.exercise, check.verdict) for name, check in checks.CHECKS.items()}
GRACE = 10  # seconds that an interrupted cell has to stop


@dataclass(frozen=True)
class Limits:
    """seconds: for the whole notebook, and for one cell. memory: bytes of the kernel and its children, resident."""

    seconds: float = 30 * 60
    cell_seconds: float = 10 * 60
    memory: float = 8e9


@dataclass(frozen=True)
class Grade:
    """state: "right", "wrong", "open" (a stub), "missing" (the answer is not there) or "not reached"."""

    id: str
    title: str
    points: int
    of: int
    state: str
    message: str


@dataclass
class Report:
    """The result of one notebook. notes: what went wrong on the way, one sentence each."""

    notebook: str
    course: str
    grades: list[Grade] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        return sum(grade.points for grade in self.grades)

    @property
    def of(self) -> int:
        return sum(grade.of for grade in self.grades)

    def as_dict(self) -> dict:
        return {**asdict(self), "points": self.points, "of": self.of}

    def __str__(self) -> str:
        marks = {**MARKS, "missing": "?", "not reached": "–"}
        lines = [f"{self.notebook}: {self.points} of {self.of} points"]
        for grade in self.grades:
            why = "" if grade.state == "right" else f"  {grade.message}"
            lines.append(f"  {marks[grade.state]} {grade.id:<5}{grade.points}/{grade.of}  {grade.title}{why}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


# -------------------------------------------------------------------------------------------------------- the notebooks


def read_notebook(path: Path) -> dict:
    """A notebook as JSON gives it. Raises UserError for a file that is missing or is no notebook."""
    try:
        return parse_notebook(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is no notebook of Jupyter (version 4): {error}") from error


def course_checks(notebook: dict) -> tuple[str, dict[str, str]]:
    """The name of the course's notebook that this one comes from, and its checks, each with its arguments as written.

    It is the one with the most cells in common (cells keep their ids when a notebook is edited and renamed), or else
    the most checks.

    Raises:
        UserError: it has nothing in common with any of them.
    """
    ids = {cell.get("id") for cell in notebook["cells"]}
    names = {name for cell in code_cells(notebook) for name, _ in CHECK.findall(cell["source"])}

    def likeness(path: Path) -> tuple[int, int]:
        original = read_notebook(path)
        return len(ids & {cell["id"] for cell in original["cells"]}), len(names & set(checks_in(original)))

    originals = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
    best = max(originals, key=likeness)
    if not any(likeness(best)):
        raise UserError("it has no cell and no check of the course's notebooks: there is nothing to grade")
    return best.stem, checks_in(read_notebook(best))


def checks_in(notebook: dict) -> dict[str, str]:
    """Name and arguments of each check that is called, in order."""
    return {name: given for cell in code_cells(notebook) for name, given in CHECK.findall(cell["source"])}


# ------------------------------------------------------------------------------------------------------- in the kernel


def judge(name: str, answer: Callable[[], tuple], file: str) -> None:
    """Called in the learner's kernel: write to a file what the check `name` says of the answer."""
    try:
        verdict = CHECKS[name][1](*answer())
        state, message = verdict.state, verdict.message
    except NameError as error:
        state, message = "missing", f"{error}: the cell that makes it failed, or was deleted or renamed"
    Path(file).write_text(json.dumps([state, message]), encoding="utf-8")


def judging(name: str, given: str, file: Path) -> str:
    """Code that calls `judge` with the learner's answer, whatever names the learner has redefined."""
    module = "__import__('qlora_lab.classroom.grade', fromlist=['judge'])"
    return f"{module}.judge({name!r}, lambda: ({given},), {str(file)!r})"


# ------------------------------------------------------------------------------------------------------------- running


class Stopped(Exception):
    """The run cannot go on; the message says why."""


class Kernel:
    """A Jupyter kernel under limits.

    Raises:
        Stopped: from `run`, if the run cannot go on.
        TimeoutError: from `run`, if a cell was interrupted at its limit.
    """

    def __init__(self, folder: Path, limits: Limits):
        import psutil
        from jupyter_client.manager import start_new_kernel

        environment = {key: value for key, value in os.environ.items() if key != "QLORA_LAB_STRICT"}
        environment |= {"QLORA_LAB_PROGRESS": str(folder / "progress.json"), "PYTHONPATH": _python_path()}
        environment.setdefault("GOMP_SPINCOUNT", "1000")  # as in Makefile: it need not have the cores to itself
        self.limits, self.deadline = limits, time.monotonic() + limits.seconds
        self.manager, self.client = start_new_kernel(
            cwd=str(folder), env=environment, extra_arguments=["--log-level=ERROR"], startup_timeout=120
        )
        provisioner: Any = self.manager.provisioner  # a LocalProvisioner: the kernel is a process of this machine
        self.process = psutil.Process(provisioner.pid)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, code: str, seconds: float | None = None) -> str:
        """Run code and return the error that it raised, "NameError: ...", or "". seconds: default a cell's limit."""
        end = min(self.deadline, time.monotonic() + (seconds or self.limits.cell_seconds))
        request = self.client.execute(code, allow_stdin=False)
        if (error := self._wait(request, end)) is not None:
            return error
        self.manager.interrupt_kernel()
        if self._wait(request, time.monotonic() + GRACE) is None:
            raise Stopped(f"it did not stop when it was interrupted after {self.limits.cell_seconds:g} s")
        if time.monotonic() > self.deadline:
            raise Stopped(f"the notebook took longer than {self.limits.seconds:g} s")
        raise TimeoutError(f"it took longer than {self.limits.cell_seconds:g} s and was interrupted")

    def _wait(self, request: str, end: float) -> str | None:
        """What `run` returns, or None if that is not known at the time `end`."""
        error = ""
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=0.2)
            except queue.Empty:
                message = {"parent_header": {}}
            if message["parent_header"].get("msg_id") == request:
                content = message["content"]
                if message["msg_type"] == "error":
                    error = f"{content['ename']}: {content['evalue']}"
                if message["msg_type"] == "status" and content["execution_state"] == "idle":
                    return error
            self._watch()
            if time.monotonic() > end:
                return None

    def _watch(self) -> None:
        """Raise Stopped if the kernel is dead or uses too much memory."""
        import psutil

        if not self.manager.is_alive():
            raise Stopped("the kernel died")
        try:
            processes = [self.process, *self.process.children(recursive=True)]
            used = sum(process.memory_info().rss for process in processes)
        except psutil.Error:  # one has just ended
            return
        if used > self.limits.memory:
            raise Stopped(f"it used {used / 1e9:.1f} GB, more than {self.limits.memory / 1e9:g} GB")


def _python_path() -> str:
    """A PYTHONPATH with which the kernel finds this package, even where it is not installed."""
    return os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


def grade(path: Path, limits: Limits = Limits()) -> Report:
    """Run a learner's notebook and judge its exercises.

    Raises:
        UserError: it cannot be read, is no notebook, or has nothing to do with the course.
    """
    notebook = read_notebook(path)
    try:
        course, wanted = course_checks(notebook)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    report, verdicts = Report(str(path), course), {}
    with tempfile.TemporaryDirectory() as folder, Kernel(Path(folder), limits) as kernel:
        file = Path(folder) / "verdict.json"

        def ask(name: str) -> None:
            file.unlink(missing_ok=True)  # the previous verdict
            error = kernel.run(judging(name, wanted[name], file))
            if file.exists():
                verdicts[name] = json.loads(file.read_text(encoding="utf-8"))
            else:  # the answer ended the judging, by `raise SystemExit` for one
                verdicts[name] = ["wrong", f"it could not be judged: {error}"]

        try:
            kernel.run(
                "import qlora_lab.classroom.grade as _", limits.seconds
            )  # which takes the checks as they are now
            for number, cell in enumerate(code_cells(notebook), start=1):
                place = f"code cell {number}"
                if error := _run_cell(kernel, cell["source"]):
                    first = next((line for line in cell["source"].splitlines() if line.strip()), "")
                    report.notes.append(f"{place} (`{first}`): {error}")
                for name, _ in CHECK.findall(cell["source"]):
                    if name in wanted:
                        ask(name)
            place = "the end"
            for name in [name for name in wanted if name not in verdicts]:
                report.notes.append(f"{name} is not called: judged at the end")
                ask(name)
        except Stopped as stop:
            report.notes.append(f"stopped at {place}: {stop}")
        except TimeoutError as error:
            report.notes.append(f"stopped while judging after {place}: {error}")
    for name in wanted:
        exercise, _ = CHECKS[name]
        state, message = verdicts.get(name, ("not reached", "the run stopped before"))
        points = exercise.points if state == "right" else 0
        report.grades.append(Grade(exercise.id, exercise.title, points, exercise.points, state, message))
    return report


def _run_cell(kernel: Kernel, source: str) -> str:
    """Run the learner's cell; what went wrong, or ""."""
    try:
        return kernel.run(source)
    except TimeoutError as error:
        return str(error)


# --------------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when all notebooks were graded, whatever their points; 2 when one could not be."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.classroom.grade", description=description)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="a list of reports on standard output, instead of tables")
    parser.add_argument("--minutes", type=float, default=30, help="for a notebook (default: %(default)s)")
    parser.add_argument("--cell-minutes", type=float, default=10, help="for a cell (default: %(default)s)")
    parser.add_argument("--memory-gb", type=float, default=8, help="10^9 bytes, resident (default: %(default)s)")
    args = parser.parse_args(arguments)
    limits = Limits(60 * args.minutes, 60 * args.cell_minutes, 1e9 * args.memory_gb)
    reports, failed = [], False
    for path in args.notebooks:
        try:
            reports.append(grade(path, limits))
            if not args.json:
                print(reports[-1], flush=True)
        except UserError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
    if args.json:
        print(json.dumps([report.as_dict() for report in reports], indent=1, ensure_ascii=False))
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
