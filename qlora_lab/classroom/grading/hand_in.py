"""One hand-in: find the lesson that it comes from, run its cells, judge its answers.

The cells are run in their order, in an empty folder. Calls of the course's checks are not run but judged, by the
package's own checks, taken before the learner's first line ran. An exercise whose check the learner deleted is judged
at the end. A cell that fails, or is interrupted at its limit, does not end the run. A cell or an answer that ends the
kernel (by `os._exit`, by a crash, by eating memory, by ignoring interrupts) is left out, and the notebook is run once
more without it, as long as there is time; verdicts are kept.
"""

from __future__ import annotations

import ast
import json
import re
import tempfile
import time
from pathlib import Path

from qlora_lab.classroom.grading.inside import CHECKS, called, judging
from qlora_lab.classroom.grading.kernel import START, Kernel, Limits, Stopped
from qlora_lab.classroom.grading.reports import Grade, Report
from qlora_lab.classroom.notebook_json import parse_notebook
from qlora_lab.classroom.outputs import code_cells
from qlora_lab.errors import UserError
from qlora_lab.places import NOTEBOOKS

CHECK = re.compile(r"^(check_\w+)\((.*)\)[^\S\n]*$", re.MULTILINE)
LARGEST = 100_000_000  # bytes of a hand-in
DEFAULT = Limits()


def read_hand_in(path: Path) -> bytes:
    """The bytes of a file. Raises UserError if it is none, cannot be read, or is far too large for a notebook."""
    try:
        if path.exists() and not path.is_file():
            raise UserError("it is no file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"it is larger than {LARGEST / 1e6:g} MB: clear its outputs")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror or error}") from error


def read_notebook(path: Path) -> dict:
    """A notebook as JSON gives it. Raises UserError for a file that is missing or is no notebook."""
    content = read_hand_in(path)
    try:
        return parse_notebook(content)
    except ValueError as error:
        raise UserError(f"it is no notebook of Jupyter (version 4): {error}") from error


def course_checks(notebook: dict, course: str = "") -> tuple[str, dict[str, str]]:
    """The name of the course's notebook that this one comes from, and its checks, each with its arguments as written.

    It is the one whose name begins with `course`, if that is given; or else the one with the most cells in common
    (cells keep their ids when a notebook is edited and renamed), or else the most checks.

    Raises:
        UserError: it has nothing in common with any of them, or none has that name.
    """
    ids = {id for cell in notebook["cells"] if isinstance(id := cell.get("id"), str)}
    names = {name for cell in code_cells(notebook) for name, _ in CHECK.findall(cell["source"])}

    def likeness(path: Path) -> tuple[int, int]:
        original = read_notebook(path)
        return len(ids & {cell["id"] for cell in original["cells"]}), len(names & set(checks_in(original)))

    originals = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.stem.startswith(course)]
    if not originals:
        raise UserError(f"no notebook of the course begins with {course!r}")
    best = max(originals, key=likeness)
    if not course and not any(likeness(best)):
        raise UserError("it has no cell and no check of the course's notebooks: there is nothing to grade")
    return best.stem, checks_in(read_notebook(best))


def checks_in(notebook: dict) -> dict[str, str]:
    """Name and arguments of each check that is called, in order."""
    return {name: given for cell in code_cells(notebook) for name, given in CHECK.findall(cell["source"])}


def without_checks(source: str, names: set[str]) -> str:
    """A cell whose calls of these checks, each on a line of its own, do nothing: they are judged after the cell."""

    def replaced(call: re.Match) -> str:
        if call[1] not in names:
            return call[0]
        try:
            ast.parse(call[0].strip(), mode="eval")
        except SyntaxError:  # more than a call
            return call[0]
        return "pass"

    return CHECK.sub(replaced, source)


def grade(path: Path, limits: Limits = DEFAULT, course: str = "") -> Report:
    """Run a hand-in and judge its exercises. Whatever is wrong with the file stands in the report's `fault`.

    course: the beginning of the name of the lesson that was asked for; default: the one that it resembles.

    Raises:
        UserError: no lesson has that name.
    """
    asked = course_checks({"cells": []}, course) if course else None
    try:
        notebook = read_notebook(path)
        name, wanted = asked or course_checks(notebook)
    except UserError as error:
        name, wanted = asked or ("", {})
        report = Report(str(path), name, fault=str(error))
        report.grades = [_grade(check, "not reached", "the hand-in could not be graded") for check in wanted]
        return report
    run = Run(notebook, wanted, limits)
    run.to_the_end()
    report = Report(str(path), name, notes=list(run.notes.values()))
    for check in wanted:
        report.grades.append(_grade(check, *run.verdicts.get(check, ("not reached", "the run stopped before"))))
    return report


def _grade(check: str, state: str, message: str) -> Grade:
    exercise, _ = CHECKS[check]
    points = exercise.points if state == "right" else 0
    return Grade(exercise.id, exercise.title, points, exercise.points, state, message)


class Run:
    """A notebook on its way through one kernel, or several.

    verdicts: by check, a state and a message. notes: by place (the number of a code cell, or a check's name), what went
    wrong there. Cells left out, and checks in `hopeless`, ended a kernel or took too long: not to be tried once more.
    """

    def __init__(self, notebook: dict, wanted: dict[str, str], limits: Limits):
        self.sources = [cell["source"] for cell in code_cells(notebook)]
        self.wanted, self.limits = wanted, limits
        self.deadline = time.monotonic() + limits.seconds
        self.verdicts: dict[str, tuple[str, str]] = {}
        self.notes: dict[int | str, str] = {}
        self.left_out: set[int] = set()
        self.hopeless: set[str] = set()
        self.settled: set[str] = set()  # by an earlier kernel
        self.place: int | str = 0

    def to_the_end(self) -> None:
        """Run the notebook, with as many kernels as it takes, until its time is over."""
        while True:
            try:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                    self.once(Path(folder))
                return
            except Stopped as stop:
                if not self.goes_on_after(stop):
                    return

    def goes_on_after(self, stop: Stopped) -> bool:
        """Note what stopped the kernel, and say whether the notebook can be run without it."""
        if time.monotonic() > self.deadline or not self.place:
            self.notes["end"] = f"stopped at {self.named(self.place)}: {stop}"
            return False
        if isinstance(self.place, int):
            self.left_out.add(self.place)
            self.notes[self.place] = f"{self.named(self.place)} ended the kernel: {stop}; the others ran without it"
        else:
            self.hopeless.add(self.place)
            self.verdicts[self.place] = ("wrong", f"it could not be judged: {stop}")
        self.settled = self.hopeless | {name for name, (state, _) in self.verdicts.items() if state == "right"}
        return True

    def named(self, place: int | str) -> str:
        if not isinstance(place, int):
            return f"the judging of {place}"
        if not place:
            return "the start"
        first = next((line for line in self.sources[place - 1].splitlines() if line.strip()), "")
        return f"code cell {place} (`{first[:80]}`)"

    def once(self, folder: Path) -> None:
        """Run the notebook in one kernel. Raises Stopped if that ends before its time."""
        work, verdict = folder / "work", folder / "verdict.json"
        work.mkdir()
        self.place = 0
        with Kernel(work, self.limits, self.deadline) as kernel:
            # takes the checks as they are now; the first import of a library may take long
            if error := kernel.run(f"{called('prepare')}()", START):
                raise Stopped(f"the kernel could not be prepared: {error}")
            judged = set()
            for number, source in enumerate(self.sources, start=1):
                if self.settled >= self.wanted.keys():
                    return  # what is left can change nothing
                self.run_cell(kernel, number, source)
                for name, _ in CHECK.findall(source):
                    self.judge(kernel, name, verdict)
                    judged.add(name)
            for name in self.wanted:
                if name not in judged:
                    self.notes[f"{name} at the end"] = f"{name} is not called: judged at the end"
                    self.judge(kernel, name, verdict)

    def run_cell(self, kernel: Kernel, number: int, source: str) -> None:
        if number in self.left_out:
            return
        self.place = number
        try:
            error = kernel.run(without_checks(source, set(self.wanted)))
        except TimeoutError as over:
            error = str(over)
            self.left_out.add(number)  # should the notebook be run once more
        if error:
            self.notes[number] = f"{self.named(number)}: {error}"

    def judge(self, kernel: Kernel, name: str, file: Path) -> None:
        """Ask the check `name`, unless it was settled by an earlier kernel. Of several calls the last one counts."""
        if name not in self.wanted or name in self.settled:
            return
        self.place = name
        file.unlink(missing_ok=True)  # the previous verdict
        try:
            error = kernel.run(judging(name, self.wanted[name], file), self.limits.answer_seconds)
            if file.exists():
                state, message = json.loads(file.read_text(encoding="utf-8"))
            else:
                state, message = "wrong", f"it could not be judged: {error}"
        except TimeoutError as over:
            self.hopeless.add(name)
            state, message = "wrong", f"it could not be judged: {over}"
        self.verdicts[name] = (state, message)
