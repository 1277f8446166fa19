"""A class as numbers: students x exercises, statistics for each exercise, and files that Moodle and Canvas import.

Formats: https://docs.moodle.org/en/Grade_import (columns are mapped when the file is uploaded; a grade and its feedback
are imported together) and Canvas' "How do I import grades in the Gradebook?" (the columns of its own export, a second
line "Points Possible", a column for each assignment).
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qlora_lab.classroom.grading.classes import Student, column
from qlora_lab.classroom.grading.reports import STATES, Grade, Report

MOODLE = ("Email address", "ID number", "Username")  # any of these identifies a user
CANVAS = ("Student", "ID", "SIS User ID", "SIS Login ID", "Section")
LINE = ("student", "notebook", "exercise", "title", "points", "of", "state", "message")


@dataclass
class Row:
    """A student's results. grades: by exercise, the best of all hand-ins. comments: what else there is to say."""

    student: Student
    grades: dict[str, Grade] = field(default_factory=dict)
    lessons: dict[str, str] = field(default_factory=dict)  # name of the lesson's notebook, by exercise
    comments: list[str] = field(default_factory=list)

    def points(self, lesson: str | None = None) -> int:
        """Of one lesson, or of all."""
        return sum(grade.points for id, grade in self.grades.items() if lesson in (None, self.lessons[id]))


def row_of(student: Student, reports: Sequence[Report]) -> Row:
    """reports: of the student's notebooks, those that are done."""
    row = Row(student)
    for report in reports:
        for grade in report.grades:
            if grade.id not in row.grades or grade.points > row.grades[grade.id].points:
                row.grades[grade.id], row.lessons[grade.id] = grade, report.course
        name = report.notebook.replace("\\", "/").rpartition("/")[2]
        row.comments += [f"{name}: not graded, {report.fault}"] if report.fault else []
        row.comments += [f"{name}: {note}" for note in report.notes]
    waiting = len(student.with_ending(".ipynb")) - len(reports)
    if waiting:
        row.comments.append(f"{waiting} not graded yet")
    if not student.with_ending(".ipynb"):
        there = ", ".join(path.name for path in student.files[:5])
        row.comments.append(f"no notebook handed in{f' (there is {there})' if there else ''}")
    return row


def exercises_of(rows: Iterable[Row]) -> dict[str, tuple[Grade, str]]:
    """The exercises of all hand-ins, in the course's order: any student's grade, and the lesson."""
    found = {id: (grade, row.lessons[id]) for row in rows for id, grade in row.grades.items()}
    lesson = {id: id.partition(".")[0] for id in found}  # letters are deep dives
    return dict(
        sorted(
            found.items(), key=lambda item: (lesson[item[0]].isalpha(), lesson[item[0]].rjust(2), len(item[0]), item[0])
        )
    )


def lessons_of(rows: Iterable[Row]) -> dict[str, int]:
    """The lessons of all hand-ins in order, with the points of each."""
    lessons = defaultdict(int)
    for grade, lesson in exercises_of(rows).values():
        lessons[lesson] += grade.of
    return dict(lessons)


def matrix(rows: Sequence[Row]) -> list[list]:
    """Students x exercises: points, empty where the lesson was not handed in; then their sum and the comments."""
    exercises = exercises_of(rows)
    of = [grade.of for grade, _ in exercises.values()]
    table = [["student", *exercises, "points", "comments"], ["points possible", *of, sum(of), ""]]
    for row in rows:
        points = [row.grades[id].points if id in row.grades else "" for id in exercises]
        table.append([row.student.name, *points, row.points(), "; ".join(row.comments)])
    return table


def lines(student: str, report: Report) -> list[list]:
    """A report as lines of `LINE`, one for each exercise; one for a hand-in that could not be graded."""
    told = [[grade.id, grade.title, grade.points, grade.of, grade.state, grade.message] for grade in report.grades]
    if report.fault and not told:
        told = [["", "", 0, "", "not graded", report.fault]]
    return [[student, report.notebook, *line] for line in told]


# ---------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Finding:
    """Students who got the same message at an exercise, numbers aside. message: as the first of them got it."""

    exercise: str
    title: str
    state: str
    message: str
    students: tuple[str, ...]


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Who is where at each exercise, and who fell for which mistake: by exercise, state, and the most frequent first.

    Messages count as the same mistake when they differ in numbers only.
    """
    found = []
    for id, (exercise, _) in exercises_of(rows).items():
        groups = defaultdict(list)
        for row in rows:
            if grade := row.grades.get(id):
                kind = re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", grade.message) if grade.state == "wrong" else ""
                groups[grade.state, kind].append((row.student.name, grade.message))
        order = list(STATES)
        for (state, _), members in sorted(
            groups.items(), key=lambda group: (order.index(group[0][0]), -len(group[1]), group[0][1])
        ):
            message = members[0][1] if state == "wrong" else ""
            found.append(Finding(id, exercise.title, state, message, tuple(name for name, _ in members)))
    return found


def statistics(rows: Sequence[Row]) -> list[list]:
    """`findings` as a table."""
    table: list[list] = [["exercise", "title", "state", "students", "message", "who"]]
    for f in findings(rows):
        table.append([f.exercise, f.title, f.state, len(f.students), f.message, "; ".join(f.students)])
    return table


# --------------------------------------------------------------------------------------------- for learning platforms


def moodle(rows: Sequence[Row]) -> list[list] | None:
    """For Moodle: who, and points and feedback for each lesson. None if the roster has none of the columns `MOODLE`."""
    keys = [key for key in MOODLE if any(column(row.student, key) for row in rows)]
    if not keys:
        return None
    lessons = lessons_of(rows)
    head = [name for lesson in lessons for name in (lesson, f"{lesson} (feedback)")]
    table: list[list] = [["Name", *keys, *head]]
    for row in rows:
        told: list = []
        for lesson in lessons:
            has = lesson in row.lessons.values()
            told += [row.points(lesson) if has else "", feedback(row, lesson) if has else ""]
        table.append([row.student.name, *(column(row.student, key) for key in keys), *told])
    return table


def feedback(row: Row, lesson: str) -> str:
    """What to tell the student of a lesson: each exercise that is not right, with its message."""
    mine = [row.grades[id] for id in row.grades if row.lessons[id] == lesson and row.grades[id].state != "right"]
    return " | ".join(f"{grade.id} {grade.title}: {grade.message}" for grade in mine) or "all right"


def canvas(rows: Sequence[Row]) -> list[list] | None:
    """For Canvas: its own export's columns, then one for each lesson. None if the roster is no export of Canvas'."""
    keys = [key for key in CANVAS if any(name.strip() == key for row in rows for name in row.student.columns)]
    if not {"Student", "Section"} <= set(keys) or not {"ID", "SIS User ID", "SIS Login ID"} & set(keys):
        return None
    lessons = lessons_of(rows)
    blank = [""] * (len(keys) - 1)
    table: list[list] = [[*keys, *lessons], ["    Points Possible", *blank, *lessons.values()]]
    for row in rows:
        points = [row.points(lesson) if lesson in row.lessons.values() else "" for lesson in lessons]
        table.append([*(column(row.student, key) for key in keys), *points])
    return table


def as_csv(table: Iterable[Sequence]) -> str:
    """A table as CSV. A text that a spreadsheet would take for a formula gets an apostrophe before it."""

    def safe(cell):
        return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([safe(cell) for cell in row] for row in table)
    return text.getvalue()
