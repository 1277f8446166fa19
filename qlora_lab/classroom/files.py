"""A course's files: its sources, its notebooks, and whether a stored notebook is what its source gives.

Notebooks are plain dicts here, as JSON gives them. nbformat and jupytext take two seconds to import and to read the
course, which `build --check` cannot spare; the tests compare `read_cells` with jupytext.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_lab.classroom import values
from qlora_lab.classroom.drafts import draft_notebooks
from qlora_lab.classroom.languages.texts import ENGLISH
from qlora_lab.classroom.notebook_json import parse_notebook
from qlora_lab.classroom.outputs import (
    MACHINE,
    clean_outputs,
    code_cells,
    count_anew,
    credit,
    find_fault,
    find_other_words,
    find_silence,
)
from qlora_lab.classroom.source import BuildError, find_all


def show_path(path: Path) -> str:
    """`path` relative to the working folder, where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def find_sources(notebooks: Path, names: list[str]) -> list[Path]:
    """The scripts in `notebooks`/source, or those whose names begin with one of `names`."""
    sources = find_all(notebooks)
    if not sources:
        raise BuildError(f"no sources in {show_path(notebooks / 'source')}")
    chosen = set()
    for name in names:
        found = [source for source in sources if source.stem.startswith(Path(name).stem)]
        if not found:
            raise BuildError(f"no source begins with {name}: there are {', '.join(path.stem for path in sources)}")
        chosen.update(found)
    return sorted(chosen) if names else sources


def read_notebook(path: Path) -> dict:
    """The notebook at `path`. Raises FileNotFoundError, or BuildError if it is damaged."""
    try:
        return parse_notebook(path.read_text(encoding="utf-8"))
    except ValueError:
        raise BuildError(f"{show_path(path)} is not a readable notebook: delete it and build again") from None


def write_notebook(notebook: dict, path: Path) -> None:
    import nbformat

    write(nbformat.writes(nbformat.from_dict(notebook)) + "\n", path)


def write(text: str, path: Path) -> None:
    """Write `path` in one step: whatever happens, either the old file or the new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_difference(path: Path, expected: dict, language: str = ENGLISH) -> str:
    """Say how the notebook at `path` differs from what its source gives, or why it is unfit to be stored; else ""."""
    if not path.exists():
        return "is missing"
    actual = read_notebook(path)
    credit(expected, actual["metadata"].get(MACHINE, ""), language)
    if actual["metadata"] != expected["metadata"]:
        return f"has other notebook metadata: {', '.join(actual['metadata']) or 'none'}"
    for number, (cell, wanted) in enumerate(zip(actual["cells"], expected["cells"], strict=False), start=1):
        for part in ("cell_type", "source", "metadata", "id"):
            if cell.get(part) != wanted[part]:
                line = first_difference(cell["source"], wanted["source"])
                return f"differs from its source in the {part} of cell {number}: {line[:120]!r}"
    if len(actual["cells"]) != len(expected["cells"]):
        return f"has {len(actual['cells'])} cells, its source gives {len(expected['cells'])}"
    cells = code_cells(actual)
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        return "was not executed from top to bottom: build it with --execute"
    counted = copy.deepcopy(actual)
    count_anew(counted, language)
    if counted != actual:
        return "shows the progress of other exercises than there are: build again"
    for number, cell in enumerate(cells, start=1):
        if cell["outputs"] != clean_outputs(cell["outputs"]):
            return f"has outputs that were not cleaned in [{number}]: build it with --execute"
        if fault := find_fault(cell["outputs"]) or find_silence(cell) or find_other_words(cell):
            return f"[{number}] {fault}"
    return ""


def first_difference(text: str, other: str) -> str:
    """The first line of `text` that differs from that of `other`; its first line if they are equal."""
    lines, others = text.split("\n"), other.split("\n")
    different = (line for line, theirs in zip(lines, [*others, *[None] * len(lines)], strict=False) if line != theirs)
    return next(different, lines[0])


def write_values(source: Path, wanted: list[values.Value], kept: list[values.Kept]) -> None:
    path = values.path_of_values(source)
    if wanted:
        write(values.file_of_values(wanted, kept), path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Put a place before the message of a BuildError."""
    try:
        yield
    except BuildError as error:
        raise BuildError(f"{place}{error}") from None


def targets(source: Path) -> list[tuple[Path, dict]]:
    """Where the two notebooks of `source` belong, and their drafts: first the learner's, then the solved one."""
    with errors_at(f"{show_path(source)}, "):
        learner, solved = draft_notebooks(source)
    notebooks = source.parents[1]
    return [(notebooks / f"{source.stem}.ipynb", learner), (notebooks / "solutions" / f"{source.stem}.ipynb", solved)]
