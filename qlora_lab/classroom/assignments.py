"""A lesson as an assignment of nbgrader's: solutions and checks marked in the cells' metadata.

`build --nbgrader FOLDER` writes nbgrader's course folder: FOLDER/source/NAME/NAME.ipynb and nbgrader_config.py. The
source has the solutions, between nbgrader's marks and below the stubs; `nbgrader generate_assignment` takes them out.
Checks are autograded cells with the exercise's points. They tell learners what is wrong and raise nothing; when they
are graded, hidden lines make what is not right an error (QLORA_LAB_STRICT), for which nbgrader gives no points.

Format: https://nbgrader.readthedocs.io/en/stable/contributor_guide/metadata.html, schema 3.
"""

import re
from pathlib import Path

from qlora_lab.classroom import values
from qlora_lab.classroom.checks import CHECKS
from qlora_lab.classroom.drafts import draft_notebooks, finish, values_in
from qlora_lab.classroom.source import read_cells, split_nbval_markers, versions

CALL = re.compile(r"^(check_\w+)\(", re.MULTILINE)
STRICT = """### BEGIN HIDDEN TESTS
__import__("os").environ["QLORA_LAB_STRICT"] = "1"
### END HIDDEN TESTS
"""
CONFIGURATION = """# Made by qlora_lab.classroom.build --nbgrader, and read by nbgrader when it is run in this folder.
c = get_config()
c.CourseDirectory.course_id = "qlora"
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE, in the place of what stands above"}
c.ExecutePreprocessor.timeout = 1800  # seconds a cell: some train a model
"""


def assignment(source: Path) -> dict:
    """The source version of the lesson in the script `source`, without outputs.

    Raises:
        BuildError: as `draft_notebooks`, or the values of its text are not known yet.
    """
    draft, _ = draft_notebooks(source)
    written = {cell.line: cell for cell in read_cells(source.read_text(encoding="utf-8"))}
    kept = values.recall(values_in(draft), values.read_values(source))
    cells, count = [], 0
    for cell in draft["cells"]:
        if cell["cell_type"] == "markdown" and "line" not in cell:
            continue  # a solution, folded away
        if cell["cell_type"] == "code" and "line" in cell and not cell.get("claims"):
            texts = versions(written[cell["line"]].source, cell["line"])
            stub, solution, both = (split_nbval_markers(text)[0] for text in texts)
            checks = [CHECKS[name] for name in CALL.findall(solution) if name in CHECKS]
            if stub != solution:
                count += 1
                cell = cell | {"source": both} | marked(cell, f"answer-{count}", solution=True)
            elif checks:
                name = "exercise-" + "-".join(check.exercise.id.replace(".", "-") for check in checks)
                points = sum(check.exercise.points for check in checks)
                cell = cell | {"source": STRICT + solution} | marked(cell, name, points=points)
        cells.append(cell)
    return finish(draft | {"cells": cells}, kept)


def marked(cell: dict, name: str, *, solution: bool = False, points: int | None = None) -> dict:
    """The cell's metadata with nbgrader's: a solution, or a check that gives points."""
    data = {"grade_id": name, "schema_version": 3, "solution": solution, "task": False}
    data |= {"grade": points is not None, "locked": points is not None}
    data |= {} if points is None else {"points": points}
    return {"metadata": cell["metadata"] | {"nbgrader": data}}
