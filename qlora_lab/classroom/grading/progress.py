"""What students have exported of their progress (`progress().export`), merged: students x exercises."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from qlora_lab.classroom.checks import all_exercises
from qlora_lab.classroom.grading.classes import Student

ENDINGS = (".csv", ".json")


def solved_in(path: Path) -> set[str]:
    """The exercises that an export says are solved.

    Raises:
        ValueError: this is no export; the message says why.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            lines = [(line["id"], line["solved"]) for line in json.loads(text)["exercises"]]
        else:
            lines = [(line["id"], line["solved"] == "True") for line in csv.DictReader(text.splitlines())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no export of progress: {type(error).__name__}: {error}") from error
    known = {exercise.id for exercise in all_exercises()}
    if strange := [id for id, _ in lines if id not in known]:
        raise ValueError(f"{path} has an exercise {strange[0]!r}, which the course has not")
    return {id for id, solved in lines if solved is True}


def merged(students: Sequence[Student]) -> tuple[list[list], list[str]]:
    """A table of students x exercises (1: solved, 0: not, empty: nothing exported), and what was no export.

    Of several exports, an exercise counts as solved if one of them says so.
    """
    exercises = all_exercises()
    table: list[list] = [["student", *(exercise.id for exercise in exercises), "solved", "points"]]
    of = [exercise.points for exercise in exercises]
    table.append(["points possible", *of, len(of), sum(of)])
    faults = []
    for student in students:
        solved, exports = set(), 0
        for path in student.with_ending(*ENDINGS):
            try:
                solved |= solved_in(path)
                exports += 1
            except ValueError as error:
                faults.append(str(error))
        marks = [int(exercise.id in solved) if exports else "" for exercise in exercises]
        points = sum(exercise.points for exercise in exercises if exercise.id in solved)
        table.append([student.name, *marks, len(solved), points])
    return table, faults
