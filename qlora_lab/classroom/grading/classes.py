"""Whose hand-ins are whose: by the names of folders, or by a roster. Names are never guessed from files.

A roster is a CSV file (with commas, semicolons or tabs) with a line for each student: what Canvas exports from its
gradebook, what Moodle exports from its list of participants, or one written by hand. It names the student in a column
"Student", or in "First name" and "Last name" (or "Surname"). A column "hand_in" says where in the folder the student's
files are: a folder or a file, with wildcards if need be. Without it they are in a folder with the student's name.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from qlora_lab.errors import UserError

NAMES = (("student",), ("first name", "last name"), ("first name", "surname"))


@dataclass(frozen=True)
class Student:
    """name: as folder or roster has it. columns: the roster's line, by the names of its columns. files: handed in."""

    name: str
    columns: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def with_ending(self, *endings: str) -> list[Path]:
        """The files whose names end in one of these, such as ".ipynb"."""
        return [path for path in self.files if path.name.lower().endswith(endings)]


def students_in(folder: Path, roster: Path | None = None, endings: tuple[str, ...] = (".ipynb",)) -> list[Student]:
    """The students of a class with their files, in the roster's order or else by name.

    endings: of the files that must belong to somebody; others may lie where they will.

    Folders and files whose names begin with a dot or with "__" are passed over: Jupyter and macOS keep copies in such.

    Raises:
        UserError: there is no such folder or roster, or a file belongs to nobody, or to two.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name the one that holds what the class handed in")
    files = visible_files(folder)
    if roster is None:
        loose = [path for path in files if path.parent == folder and path.name.lower().endswith(endings)]
        if loose:
            raise UserError(
                f"{loose[0]} lies in no student's folder: give each student a folder, or say with --roster whose it is"
            )
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_visible(path.name))
        return [Student(name, files=tuple(_below(folder / name, files))) for name in names]
    students = [_with_files(student, folder, files) for student in read_roster(roster)]
    _refuse_disputes(students, [path for path in files if path.name.lower().endswith(endings)], roster)
    return students


def read_roster(path: Path) -> list[Student]:
    """The students that a roster names, without files.

    Raises:
        UserError: it cannot be read, has no column with names, or names a student twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    students = []
    for line in csv.DictReader(text.splitlines(), delimiter=delimiter):
        columns = {name: (value or "").strip() for name, value in line.items() if isinstance(name, str)}
        lower = {name.strip().lower(): value for name, value in columns.items()}
        found = next((keys for keys in NAMES if all(key in lower for key in keys)), None)
        if found is None:
            raise UserError(
                f'{path} has no column "Student", nor "First name" and "Last name": its columns are {header}'
            )
        name = " ".join(lower[key] for key in found).strip()
        if name and not name.lower().startswith("points possible"):  # Canvas' second line
            students.append(Student(name, columns))
    names = [student.name for student in students]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path} names {twice[0]} twice: add something to tell them apart, and a column hand_in")
    if not students:
        raise UserError(f"{path} names no student")
    return students


def column(student: Student, *names: str) -> str:
    """The student's entry in the first of these columns that the roster has, whatever its case; "" without one."""
    lower = {name.strip().lower(): value for name, value in student.columns.items()}
    return next((lower[name.lower()] for name in names if name.lower() in lower), "")


def visible_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and all(map(_is_visible, path.relative_to(folder).parts))
    )


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _below(folder: Path, files: Iterable[Path]) -> list[Path]:
    return [path for path in files if folder in path.parents]


def _with_files(student: Student, folder: Path, files: list[Path]) -> Student:
    where = column(student, "hand_in")
    if where and (Path(where).is_absolute() or ".." in Path(where).parts):
        raise UserError(f"{student.name} has hand_in {where!r} in the roster: expected a path inside of {folder}")
    places = sorted(folder.glob(where)) if where else [folder / student.name]
    mine = {path for place in places for path in (_below(place, files) if place.is_dir() else [place]) if path in files}
    return Student(student.name, student.columns, tuple(sorted(mine)))


def _refuse_disputes(students: list[Student], files: list[Path], roster: Path) -> None:
    for path in files:
        owners = [student.name for student in students if path in student.files]
        if not owners:
            raise UserError(f"{path} belongs to nobody in {roster}: name it there in a column hand_in, or move it away")
        if len(owners) > 1:
            raise UserError(f"{path} belongs to {owners[0]} and {owners[1]} in {roster}: make hand_in more exact")
