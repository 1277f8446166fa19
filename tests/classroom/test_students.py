"""The students' copy holds no solution, neither in a notebook nor elsewhere, and the instructor's grader knows it."""

import json
import re
from pathlib import Path

import pytest

from qlora_lab.classroom.build import main
from qlora_lab.classroom.grading.hand_in import course_checks, grade
from qlora_lab.classroom.notebook_json import parse_notebook
from qlora_lab.classroom.outputs import code_cells
from qlora_lab.classroom.source import BEGIN, END, REPOSITORY, STUB

NOTEBOOKS = REPOSITORY / "notebooks"


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def solutions() -> dict[str, str]:
    """The regions between the marks in all sources, without white space; by where they begin."""
    found = {}
    for source in sorted((NOTEBOOKS / "source").glob("*.py")):
        place = None
        for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
            if BEGIN.fullmatch(line):
                place = f"{source.stem}:{number}"
                found[place] = ""
            elif END.fullmatch(line):
                place = None
            elif place and not STUB.fullmatch(line):
                found[place] += squeezed(line)
    return found


def read(path: Path) -> dict:
    return parse_notebook(path.read_text(encoding="utf-8"))


def sources(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"]]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("for") / "my class"
    assert main(["--no-solutions", str(folder), "--hints", "none"]) == 0
    return folder


def test_no_solution_is_in_the_copy(copy):
    texts = {}
    for path in copy.rglob("*"):
        if path.suffix == ".ipynb":
            texts[path.name] = [squeezed(text) for text in sources(read(path))]
        elif path.suffix in (".py", ".md"):
            texts[str(path.relative_to(copy))] = [squeezed(path.read_text(encoding="utf-8"))]
    assert len(solutions()) > 50 and len(texts) > 100
    found = {
        place: name
        for place, solution in solutions().items()
        for name, inside in texts.items()
        if any(solution in text for text in inside)
    }
    assert found == {}
    for name in ("notebooks/source", "notebooks/solutions", "tests"):
        assert not (copy / name).exists()
    assert "This is the students' copy" in (copy / "README.md").read_text(encoding="utf-8")


def test_it_has_all_other_cells_and_their_outputs(copy):
    stored = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert [path.name for path in stored] == sorted(path.name for path in (copy / "notebooks").iterdir())
    for path in stored:
        ours, theirs = read(path), read(copy / "notebooks" / path.name)
        assert code_cells(theirs) == code_cells(ours)
        gone = [cell for cell in ours["cells"] if cell not in theirs["cells"]]
        assert all("".join(cell["source"]).startswith("<details>") for cell in gone), path.name
        assert [cell for cell in ours["cells"] if cell not in gone] == theirs["cells"]
        tasks = sum("check_" in text and not text.startswith("#") for text in sources(ours))
        assert (len(gone) >= 1 and tasks) or path.stem == "glossary", path.name


def test_hints_stay_if_they_are_wanted(copy, tmp_path):
    assert main(["--no-solutions", str(tmp_path / "copy"), "05"]) == 0
    (path,) = (tmp_path / "copy" / "notebooks").iterdir()
    with_hints, without = "".join(sources(read(path))), "".join(sources(read(copy / "notebooks" / path.name)))
    assert "<summary>Hint 1</summary>64 weights share" in with_hints and "<summary>Solution" not in with_hints
    assert "<summary>Hint" not in without and "<summary>One that beats it" in without


def test_the_instructors_grader_knows_it(copy, tmp_path):
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        assert course_checks(read(copy / "notebooks" / path.name)) == course_checks(read(path))
    notebook = read(copy / "notebooks" / "05_double_quantization.ipynb")
    answered = []
    for cell in code_cells(notebook):
        text = "".join(cell["source"])
        if text.startswith("def bits("):
            text += "\n\ndef bits(block, scales):\n    return 4 + 8 / block + 32 / block / scales"
        if "import" in text.split() or "bits(" in text.partition("\n")[0]:
            answered.append(cell | {"source": text})
    (tmp_path / "mine.ipynb").write_text(json.dumps(notebook | {"cells": answered}))
    report = grade(tmp_path / "mine.ipynb")
    assert {g.id: g.state for g in report.grades}["5.2"] == "right", report


def test_it_is_never_written_over_a_course(copy, tmp_path, capsys):
    (tmp_path / "notebooks" / "source").mkdir(parents=True)
    for folder in (tmp_path, NOTEBOOKS.parent / "copy"):
        assert main(["--no-solutions", str(folder)]) == 1
        assert "is, or is in, a copy of the course with its sources" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "notebooks"]
    with pytest.raises(SystemExit):
        main(["--hints", "none"])
    assert "--hints goes with --no-solutions" in capsys.readouterr().err
