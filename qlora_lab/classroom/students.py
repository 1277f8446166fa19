"""The students' copy of the course, for a class that is graded: without solutions, sources and tests.

`build --no-solutions FOLDER` writes it; the notebooks keep their outputs and their cells' ids, so that the grader of
the instructor's copy knows them. What a check holds right stands in the package, as numbers and messages: a learner who
reads `classroom/lessons/nNN/checks.py` learns from it, but finds no solution written out.
"""

import re
import shutil
from pathlib import Path

from qlora_lab.classroom.source import BuildError

KEPT = (
    ".gitattributes",
    ".gitignore",
    "CITATION.cff",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "data",
    "docs",
    "examples",
    "pyproject.toml",
    "qlora_lab",
    "requirements.txt",
    "setup.py",
)
TRANSLATED = re.compile(r"\n\[\w+\]\(README\.[\w-]+\.md\)\n")  # the copy is in English
NOTE = """
This is the students' copy: the solutions, the sources of the notebooks, and the tests are in the instructor's.
"""


def copy_course(root: Path, folder: Path) -> None:
    """Copy what students need to a folder, all but the notebooks; what it holds of that is replaced.

    Raises BuildError if the folder has a course's sources: that is no students' copy, but somebody's own.
    """
    if (folder / "notebooks" / "source").exists() or folder.resolve().is_relative_to(root.resolve()):
        raise BuildError(f"{folder} is, or is in, a copy of the course with its sources: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    ignored = shutil.ignore_patterns("__pycache__", "runs", ".ipynb_checkpoints", "*.egg-info")
    for name in KEPT:
        if (root / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(root / name, folder / name, ignore=ignored)
        elif (root / name).exists():
            shutil.copy(root / name, folder / name)
    if (folder / "README.md").exists():
        title, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition("\n")
        rest = TRANSLATED.sub("", rest, count=1)
        (folder / "README.md").write_text(f"{title}\n{NOTE}{rest}", encoding="utf-8")


def without_solutions(draft: dict, hints: str) -> dict:
    """A learner's draft without its folded solutions and, if `hints` is "none", without its hints."""
    dropped = ("solution", "hint") if hints == "none" else ("solution",)
    return draft | {"cells": [cell for cell in draft["cells"] if cell.get("part") not in dropped]}
