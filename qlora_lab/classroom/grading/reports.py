"""What comes out of grading: a grade for each exercise, a report for each hand-in. Plain data, stored as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qlora_lab.classroom.judging import MARKS

STATES = {**MARKS, "missing": "?", "not reached": "–"}  # every state that a grade may have, with its mark


@dataclass(frozen=True)
class Grade:
    """state: "right", "wrong", "open" (a stub), "unavailable" (this machine lacks something), "missing" (the answer is
    not there) or "not reached"."""

    id: str
    title: str
    points: int
    of: int
    state: str
    message: str


@dataclass
class Report:
    """The result of one hand-in.

    course: name of the lesson's notebook, or "" if that is not known. notes: what went wrong on the way, one sentence
    each. fault: why it could not be graded at all, or "".
    """

    notebook: str
    course: str
    grades: list[Grade] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fault: str = ""

    @property
    def points(self) -> int:
        return sum(grade.points for grade in self.grades)

    @property
    def of(self) -> int:
        return sum(grade.of for grade in self.grades)

    def as_dict(self) -> dict:
        return {**asdict(self), "points": self.points, "of": self.of}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Report:
        """The report that `as_dict` was made of. Raises KeyError or TypeError for anything else."""
        grades = [Grade(**grade) for grade in stored["grades"]]
        return cls(stored["notebook"], stored["course"], grades, list(stored["notes"]), stored["fault"])

    def __str__(self) -> str:
        if self.fault:
            lines = [f"{self.notebook}: not graded, {self.fault}"]
        else:
            lines = [f"{self.notebook}: {self.points} of {self.of} points"]
        for grade in self.grades:
            why = "" if grade.state == "right" else f"  {grade.message}"
            lines.append(f"  {STATES[grade.state]} {grade.id:<5}{grade.points}/{grade.of}  {grade.title}{why}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])
