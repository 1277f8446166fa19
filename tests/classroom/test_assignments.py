"""Lessons as nbgrader's assignments: their marks, and nbgrader itself on a small one."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.classroom.assignments import CONFIGURATION, assignment
from qlora_lab.classroom.build import main
from qlora_lab.classroom.checks import CHECKS
from qlora_lab.classroom.source import NAME, REPOSITORY, exercises_of, find_all, versions

SOURCES = find_all(REPOSITORY / "notebooks")
LESSON = """# %% [markdown]
# # Small

# %%
from qlora_lab.classroom.checks import check_bits_per_parameter, check_diagnosis

# %%
def bits(block_size, scale_block_size):
    ### BEGIN SOLUTION (about 1 line)
    return 4 + 8 / block_size + 32 / (block_size * scale_block_size)
    ### END SOLUTION

# %%
check_bits_per_parameter(bits)

# %% [markdown]
# <details><summary>Hint</summary>Scales cost bits, too.</details>

# %%
diagnosis = {
    ### BEGIN SOLUTION
    ### STUB: "A": ...,
    ### STUB: "B": ...,
    "A": "no sign",
    "B": "healthy",
    ### END SOLUTION
    "C": "one scale",
}

# %%
check_diagnosis(diagnosis)
"""


def graded(notebook) -> dict:
    """nbgrader's marks by the name of the cell."""
    marks = [cell["metadata"]["nbgrader"] for cell in notebook["cells"] if "nbgrader" in cell["metadata"]]
    return {mark["grade_id"]: mark for mark in marks}


def test_a_source_has_stub_and_solution_one_after_the_other():
    cell = 'd = {\n    ### BEGIN SOLUTION\n    ### STUB: "A": ...,\n    "A": 1,\n    ### END SOLUTION\n}'
    both = 'd = {\n    "A": ...,\n    ### BEGIN SOLUTION\n    "A": 1,\n    ### END SOLUTION\n}'
    assert versions(cell) == ('d = {\n    "A": ...,\n}', 'd = {\n    "A": 1,\n}', both)
    two = "### BEGIN SOLUTION (two)\na = 1\n### END SOLUTION\nb = 2\n### BEGIN SOLUTION\nc = 3\n### END SOLUTION"
    assert versions(two)[2].split("\n") == [
        *["...  # your code (two)", "### BEGIN SOLUTION (two)", "a = 1", "### END SOLUTION", "b = 2"],
        *["...  # your code here", "### BEGIN SOLUTION", "c = 3", "### END SOLUTION"],
    ]


@pytest.mark.parametrize("source", [p for p in SOURCES if NAME.fullmatch(p.stem)], ids=lambda path: path.stem)
def test_every_lesson_is_an_assignment_with_the_points_of_its_exercises(source):
    notebook = assignment(source)
    marks = [cell["metadata"]["nbgrader"] for cell in notebook["cells"] if "nbgrader" in cell["metadata"]]
    assert len({mark["grade_id"] for mark in marks}) == len(marks)
    assert all(re.fullmatch(r"[\w-]+", mark["grade_id"]) for mark in marks)
    wanted = [
        check.exercise for check in CHECKS.values() if check.exercise.id.partition(".")[0] == exercises_of(source.stem)
    ]
    assert sum(mark.get("points", 0) for mark in marks) == sum(exercise.points for exercise in wanted)
    assert [mark["solution"] for mark in marks].count(True) >= len(wanted)
    for cell in notebook["cells"]:
        text = cell["source"]
        if cell["cell_type"] == "markdown":
            assert "<summary>Solution" not in text
            continue
        assert cell["outputs"] == []
        ast.parse(re.sub(r"^(\s*)[%!]", r"\1#", text, flags=re.MULTILINE))
        assert ("### BEGIN SOLUTION" in text) == cell["metadata"].get("nbgrader", {}).get("solution", False)


@pytest.fixture
def course(tmp_path):
    """nbgrader's course folder with a small lesson."""
    (tmp_path / "notebooks" / "source").mkdir(parents=True)
    (tmp_path / "notebooks" / "source" / "04_small.py").write_text(LESSON, encoding="utf-8")
    folder = tmp_path / "course"
    assert main(["--nbgrader", str(folder)], tmp_path / "notebooks") == 0
    return folder


def test_a_course_folder_keeps_its_own_configuration(course, tmp_path):
    path = course / "nbgrader_config.py"
    assert path.read_text(encoding="utf-8") == CONFIGURATION
    path.write_text("# mine", encoding="utf-8")
    assert main(["--nbgrader", str(course)], tmp_path / "notebooks") == 0
    assert path.read_text(encoding="utf-8") == "# mine"


def nbgrader(course: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "QLORA_LAB_STRICT"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])  # it calls alembic
    environment |= {"PYTHONPATH": str(REPOSITORY), "QLORA_LAB_PROGRESS": str(course / "progress.json")}
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nbgrader") is None, reason="nbgrader is missing: the extra `nbgrader`")
def test_nbgrader_validates_releases_and_grades_it(course):
    import nbformat

    name = "04_small/04_small.ipynb"
    assert "Success! Your notebook passes all the tests." in nbgrader(course, "validate", f"source/{name}")
    nbgrader(course, "generate_assignment", "04_small")
    released = nbformat.read(course / "release" / name, as_version=4)
    text = "\n".join(cell.source for cell in released.cells)
    assert "8 / block_size" not in text and '"no sign"' not in text and "QLORA_LAB_STRICT" not in text
    assert '"A": ...,' in text and '"C": "one scale"' in text and "Scales cost bits" in text
    for student in ("untouched", "right", "wrong"):
        handed_in = nbformat.from_dict(released)
        for cell in handed_in.cells:
            mark = cell.metadata.get("nbgrader", {})
            if mark.get("grade_id") == "answer-1" and student != "untouched":
                cell.source = "def bits(b, s): return 4 + 8 / b" + (" + 32 / (b * s)" if student == "right" else "")
            if mark.get("grade_id") == "answer-2" and student != "untouched":
                cell.source = 'diagnosis = {"A": "no sign", "B": "healthy", "C": "one scale"}'
        path = course / "submitted" / student / name
        path.parent.mkdir(parents=True)
        nbformat.write(handed_in, path)
    nbgrader(course, "autograde", "04_small")
    nbgrader(course, "export", "--to", "grades.csv")
    head, *lines = (course / "grades.csv").read_text(encoding="utf-8").splitlines()
    columns = [head.split(",").index(column) for column in ("student_id", "score", "max_score")]
    scores = {tuple(line.split(",")[column] for column in columns) for line in lines}
    assert scores == {("untouched", "0.0", "3.0"), ("right", "3.0", "3.0"), ("wrong", "2.0", "3.0")}
