"""From a lesson's source to its two notebooks, the learner's and the solved one.

The step between is a draft: a notebook, as a plain dict, with the claims still in it and the values not yet filled in.
Its cells may have keys that are removed later: "line", their line in the source, "claims", true for claims, and "part",
"hint" or "solution" for what is folded away below a check; then "solutions", the code in it.
"""

import hashlib
import re
from collections import defaultdict
from pathlib import Path

from qlora_lab import colab
from qlora_lab.classroom import values
from qlora_lab.classroom.outputs import describe_figures
from qlora_lab.classroom.source import (
    BuildError,
    check_claims,
    check_nbval_markers,
    read_cells,
    split_nbval_markers,
    split_solutions,
)

NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # Colab's and JupyterLab's names for it
OF_A_DRAFT = ("line", "claims", "part", "solutions")

DETAILS = re.compile(r"<details>.*?</details>", re.DOTALL)


def folded(solutions: list[str], summary: str = "Solution") -> str:
    """Markdown that hides `solutions`, each the source of a solved cell, until the learner opens it."""
    code = "\n\n".join(solutions)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))  # longer than any fence in the code
    return f"<details><summary>{summary}</summary>\n\n{fence}python\n{code}\n{fence}\n\n</details>"


def make_notebooks(source: Path) -> tuple[dict, dict]:
    """Return the learner's and the solved notebook of the script `source`, as they are stored, but without outputs."""
    learner, solved = draft_notebooks(source)
    kept = values.recall(values_in(learner), values.read_values(source))
    return finish(learner, kept), finish(solved, kept)


def draft_notebooks(source: Path) -> tuple[dict, dict]:
    """Return the drafts of the learner's and the solved notebook."""
    learner, solved = [], []
    waiting, line_of_exercise = [], 0  # solutions whose check is still to come, and where the last one begins
    checked = []  # solutions to be shown after the hints that follow their check
    cells = read_cells(source.read_text(encoding="utf-8"))
    for cell in cells:
        if cell.is_claims:
            comment = f"# Claims of notebooks/source/{source.name}, from line {cell.line}"
            for side in (learner, solved):
                side.append(new_cell("code", f"{comment}\n{cell.source}", {}, line=cell.line, claims=True))
            continue
        if checked and not (cell.type == "markdown" and cell.source.startswith("<details>")):
            learner.append(new_cell("markdown", folded(checked), {}, part="solution", solutions=checked))
            checked = []
        if cell.type == "markdown":
            if checked and DETAILS.sub("", cell.source).strip():
                raise BuildError(
                    f"line {cell.line}: the solution follows this cell of hints: other text needs a new cell"
                )
            part = {"part": "hint"} if checked else {}
            for side in (learner, solved):
                side.append(new_cell("markdown", cell.source, cell.metadata, line=cell.line, **part))
            continue
        check_nbval_markers(cell)
        stub, solution = split_solutions(cell.source, cell.line)
        (stub, tags), (solution, _) = split_nbval_markers(stub), split_nbval_markers(solution)
        title, metadata = "", cell.metadata
        if tags:
            metadata = metadata | {"tags": [*metadata.get("tags", []), *tags]}
        if cell.machinery:
            if stub != solution:
                raise BuildError(f"line {cell.line}: an exercise does not belong in a folded cell")
            title = f"# @title {cell.machinery}\n"
            metadata = {name: option for name, option in metadata.items() if name != "title"} | FOLDED
        learner.append(new_cell("code", title + stub, metadata, line=cell.line))
        solved.append(new_cell("code", title + solution, metadata, line=cell.line))
        if stub != solution:
            waiting.append(solution)
            line_of_exercise = cell.line
        elif waiting and "check_" in solution:
            checked, waiting = waiting, []
        elif waiting:
            break
    if checked:
        learner.append(new_cell("markdown", folded(checked), {}, part="solution", solutions=checked))
    if waiting:
        raise BuildError(f"line {line_of_exercise}: the next code cell must check this exercise: check_...(answer)")
    check_claims(cells)
    for cells in (learner, solved):
        after_title = int(cells[0]["cell_type"] == "markdown")
        cells.insert(after_title, new_cell("code", colab.CELL, FOLDED))
    return new_notebook(learner, source.stem), new_notebook(solved, source.stem)


def new_cell(cell_type: str, source: str, metadata: dict, **of_a_draft) -> dict:
    """A cell without id and outputs."""
    cell = {"cell_type": cell_type, "metadata": metadata, "source": source} | of_a_draft
    return cell | {"execution_count": None, "outputs": []} if cell_type == "code" else cell


def new_notebook(cells: list[dict], name: str) -> dict:
    """A notebook with `cells`, whose ids follow from their content: the same source always gives the same file."""
    seen = defaultdict(int)
    for cell in cells:
        content = f"{name}\n{cell['cell_type']}\n{cell['source']}"
        seen[content] += 1
        cell["id"] = identity(content, seen[content])
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": NOTEBOOK_METADATA, "cells": cells}


def identity(content: str, count: int = 1) -> str:
    """The id of a cell: the same for the same notebook's name, type and source, which `count` cells have had so far."""
    return hashlib.sha256(f"{content}\n{count}".encode()).hexdigest()[:12]


def values_in(draft: dict) -> list[values.Value]:
    """The values in all cells of a draft, in order."""
    return [value for cell in draft["cells"] for value in values.values_of(cell)]


def finish(draft: dict, kept: list[values.Kept], *, with_claims: bool = False) -> dict:
    """The notebook that a draft becomes. kept: what to write for its values. with_claims: as CI runs it."""
    following = iter(kept)
    cells = []
    for cell in draft["cells"]:
        found = values.values_of(cell)
        here = [next(following) for _ in found]
        finished = {key: content for key, content in cell.items() if key not in OF_A_DRAFT}
        if not cell.get("claims"):
            finished |= values.filled(cell, here)
        if with_claims or not cell.get("claims"):
            cells.append(finished)
        if with_claims and found:
            cells.append(new_cell("code", values.guarding(found, here), {}) | {"id": f"{cell['id']}-values"})
    notebook = draft | {"cells": cells}
    describe_figures(notebook)
    return notebook
