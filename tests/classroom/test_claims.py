"""Claims run in CI and are not in the notebooks that learners open; machinery is there, and folded away."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from qlora_lab.classroom.build import REPOSITORY, add_what_proves, main
from qlora_lab.classroom.drafts import FOLDED, make_notebooks
from qlora_lab.classroom.source import find_all, read_cells

SOURCE = """\
# %% [markdown]
# # A title

# %% machinery "Imports: what is needed"
import math

# %%
x = 2.0
x * 10

# %% claims
half = x / 2
assert half == 1

# %%
# NBVAL_IGNORE_OUTPUT
# because the second depends on the machine
print(x, 3)

# %% claims
assert half * 2 == x and math.sqrt(4) == x

# %% [markdown]
# Ten times x is {{10 * x:.0f}}, more or less {{x * 1.001:.2f ±1%}}.
#
# | x | ten times x |
# |---|---|
# | {{x:.1f}} | \\{{ {{x * 10:.1f}} }} |

# %% alt="A line up to {{top}}"
import matplotlib.pyplot as plt

top = 3
_ = plt.plot([0, top])
"""


def course(folder: Path, source: str) -> Path:
    """A course in `folder` with one lesson, 01. Returns its notebooks folder."""
    (folder / "notebooks" / "source").mkdir(parents=True)
    write_source(folder / "notebooks", source)
    return folder / "notebooks"


def write_source(notebooks: Path, source: str) -> None:
    (notebooks / "source" / "01.py").write_text(source, encoding="utf-8")


def nbval(folder: Path, *paths: Path) -> tuple[str, list[str]]:
    """Run copies with claims as `make notebooks` does: what pytest prints, and each cell's result."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "QLORA_LAB_PROGRESS": str(folder / "progress.json")}
    options = ["-v", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, *map(str, paths)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    return done.stdout, re.findall(r"::Cell \d+ (PASSED|FAILED)", done.stdout)


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """The executed course. Read only: copy it to change it."""
    notebooks = course(tmp_path_factory.mktemp("executed"), SOURCE)
    assert main(["--execute"], notebooks) == 0
    return notebooks


@pytest.fixture
def changeable(executed, tmp_path) -> Path:
    subprocess.run(["cp", "-r", executed, tmp_path], check=True)
    return tmp_path / "notebooks"


# --- What learners open -----------------------------------------------------------------------------------------------


def test_stored_notebooks_have_no_claims_and_count_their_cells_without_them(executed):
    assert main(["--check"], executed) == 0
    for path in (executed / "01.ipynb", executed / "solutions" / "01.ipynb"):
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert "assert" not in str(notebook) and "half" not in str(notebook)
        assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5]
        (shown,) = code[2].outputs
        assert shown.execution_count == 3 and shown.data["text/plain"] == "20.0"


def test_machinery_is_folded_under_its_title(executed):
    cell = nbformat.read(executed / "01.ipynb", 4).cells[2]
    assert cell.source == "# @title Imports: what is needed\nimport math"
    assert cell.metadata == FOLDED


def test_values_and_descriptions_are_plain_text(executed):
    for path in (executed / "01.ipynb", executed / "solutions" / "01.ipynb"):
        *_, text, figure = nbformat.read(path, 4).cells
        assert text.source.startswith("Ten times x is 20, more or less 2.00.\n")
        assert text.source.endswith("| 2.0 | {{ 20.0 }} |")
        assert figure.metadata.alt == figure.outputs[0].metadata["image/png"]["alt"] == "A line up to 3"
    kept = json.loads((executed / "source" / "01.json").read_text(encoding="utf-8"))
    assert kept == [
        ["{{10 * x:.0f}}", "20"],
        ["{{x * 1.001:.2f ±1%}}", 2.002],
        ["{{x:.1f}}", "2.0"],
        ["{{x * 10:.1f}}", "20.0"],
        ["{{top}}", "3"],
    ]


def test_check_finds_a_description_typed_over_where_only_programs_read_it(changeable, capsys):
    path = changeable / "01.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].outputs[0].metadata["image/png"]["alt"] = "A line up to 30"
    nbformat.write(notebook, path)
    assert main(["--check"], changeable) == 1
    assert "01.ipynb [5] has a figure with another description than its source" in capsys.readouterr().err


def test_claims_between_a_check_and_its_hints(tmp_path):
    exercise = "# %%\n### BEGIN SOLUTION\n### STUB: x = ...\nx = 1\n### END SOLUTION\n"
    claims = "# %% claims\nassert True\n"
    hint = "# %% [markdown]\n# <details>hint</details>\n"
    source = course(tmp_path, exercise + claims + "# %%\ncheck_x(x)\n" + claims + hint) / "source" / "01.py"
    learner, _ = make_notebooks(source)
    kinds = [cell["source"].split("\n")[0] for cell in learner["cells"]][1:]
    assert kinds == ["x = ...", "check_x(x)", "<details>hint</details>", "<details><summary>Solution</summary>"]


# --- What CI runs -----------------------------------------------------------------------------------------------------


def test_copies_with_claims_pass_nbval(changeable, tmp_path):
    assert main(["--with-claims", str(tmp_path / "ci")], changeable) == 0
    (path,) = (tmp_path / "ci").rglob("*.ipynb")
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    claims = [cell.source for cell in notebook.cells if "assert" in cell.source]
    assert claims[0] == "# Claims of notebooks/source/01.py, from line 12\nhalf = x / 2\nassert half == 1"
    assert len(claims) == 2
    stored = nbformat.read(changeable / "01.ipynb", 4).cells
    in_sight = [cell for cell in notebook.cells if cell.id in {cell.id for cell in stored}]
    assert [cell.source for cell in in_sight] == [cell.source for cell in stored]
    assert [cell.get("outputs") for cell in in_sight] == [cell.get("outputs") for cell in stored]
    printed, results = nbval(tmp_path, path)
    # set-up, 4 in sight, 2 claims, 2 generated; without an exercise, the solved one has nothing to add
    assert results == ["PASSED"] * 9, printed
    assert main(["--with-claims", str(tmp_path / "all"), "--whole"], changeable) == 0
    whole = nbformat.read(tmp_path / "all" / "solutions" / "01.ipynb", 4)
    assert [cell.source for cell in whole.cells] == [cell.source for cell in notebook.cells]


def notebook_of(*cells: tuple[str, str]) -> dict:
    """A notebook of code cells, each with what it prints."""
    made = [nbformat.v4.new_code_cell(source, execution_count=1) for source, _ in cells]
    for cell, (_, printed) in zip(made, cells, strict=True):
        cell["outputs"] = [nbformat.v4.new_output("stream", text=printed)] if printed else []
    for place, cell in enumerate(made):
        cell["id"] = f"cell-{place}"
    return nbformat.v4.new_notebook(cells=made)


@pytest.mark.parametrize(("solution", "results"), [("answer = 4", "PPPPPPP"), ("answer = 5", "PPPPPPF")])
def test_what_proves_the_solved_notebook_runs_behind_the_learners(tmp_path, solution, results):
    """In its kernel, where what took long is there; and with exercises that have to be right."""
    strict = "print(answer, trained, os.environ.get('QLORA_LAB_STRICT'))"
    first = [("import os\nos.environ.pop('QLORA_LAB_STRICT', 0)\ntrained = 0", ""), ("trained += 1", "")]
    learner = notebook_of(*first, ("answer = ...", ""), (strict, "Ellipsis 1 None\n"))
    solved = notebook_of(*first, (solution, ""), (strict, "4 1 1\n"))
    add_what_proves(learner, solved)
    assert learner["metadata"]["cells_of_the_learner"] == 4
    assert [cell["source"] for cell in learner["cells"][5:]] == [solution, strict]
    nbformat.validate(learner)
    (tmp_path / "01.ipynb").write_text(json.dumps(learner))
    printed, found = nbval(tmp_path, tmp_path / "01.ipynb")
    assert "".join(result[0] for result in found) == results, printed


def test_a_wrong_claim_and_values_typed_over_everywhere_fail_in_ci(changeable, tmp_path):
    """Whoever types over the text in the notebooks and in the file beside the source deceives --check, but not CI."""
    write_source(changeable, SOURCE.replace("assert half * 2 == x", "assert half * 2 > x"))
    kept = changeable / "source" / "01.json"
    kept.write_text(kept.read_text().replace('"20"', '"21"').replace("2.002", "2.03").replace('"3"', '"4"'))
    assert main([], changeable) == 0 and main(["--check"], changeable) == 0
    assert main(["--with-claims", str(tmp_path / "ci")], changeable) == 0
    printed, results = nbval(tmp_path, tmp_path / "ci" / "01.ipynb")
    assert [place for place, result in enumerate(results) if result == "FAILED"] == [5, 6, 8], printed
    assert "assert half * 2 > x" in printed
    assert "line 24: {{10 * x:.0f}} is 20, the text says 21" in printed
    assert "line 24: {{x * 1.001:.2f ±1%}} is 2.00, the text says 2.03" in printed
    assert "line 30: {{top}} is 3, the text says 4" in printed


def test_copies_are_made_of_notebooks_in_step_only(changeable, tmp_path, capsys):
    write_source(changeable, SOURCE.replace("x * 10\n", "x * 11\n"))
    assert main(["--with-claims", str(tmp_path / "ci")], changeable) == 1
    assert "01.ipynb differs from its source in the source of cell 4: 'x * 10'" in capsys.readouterr().err
    assert not (tmp_path / "ci").exists()


# --- Cells typed wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, told",
    [
        ("# %% claim\nassert True\n", "line 1: `# %% claim` is no cell: # %%, # %% [markdown], # %% claims"),
        ("# %% Claims\nassert True\n", "line 1: `# %% Claims` is no cell"),
        ("# %% claims [markdown]\n# x\n", "line 1: `# %% claims [markdown]` is no cell"),
        ("# %% machinery\nx = 1\n", "line 1: `# %% machinery` is no cell"),
        ("# %% machinery Imports\nx = 1\n", "line 1: `# %% machinery Imports` is no cell"),
        ('# %% machinery "x = 1"\nx = 1\n', 'line 1: `# %% machinery "x = 1"` is no cell'),  # jupytext: an option
        (
            '# %% machinery "M"\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n# %%\ncheck_x(x)\n',
            "line 2: an exercise does not belong in a folded cell",
        ),
        ("# %% claims\nassert True\nprint(1)\n", "line 3: a claims cell shows nothing"),
        ("# %% claims\nfor i in 1, 2:\n    display(i)\n", "line 3: a claims cell shows nothing"),
        ("# %% claims\n1 == 1\n", "line 2: a claims cell shows nothing"),
        ("# %% claims\n# NBVAL_SKIP\n# because I can\nassert 0\n", "line 2: a claims cell always runs"),
        ("# %% claims\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n", "line 2: a claims cell always runs"),
        ("# %% claims\nassert (\n", "line 2: this is no Python"),
    ],
)
def test_cells_typed_wrong(tmp_path, capsys, source, told):
    assert main([], course(tmp_path, source)) == 1
    assert f"01.py, {told}" in capsys.readouterr().err


LEAK = "a claims cell gives `y` a value that"


@pytest.mark.parametrize(
    "cells, told",
    [
        (["x = 1", "y = x\nassert y", "x"], ""),
        (["x = 1", "y = x", "!y + 1"], ""),  # ! marks another claims cell
        (["x = 1", "y = x", "z = y"], f"line 4: {LEAK} the cell in line 6 reads"),
        (["x = 1", "y = x", "y = 3\ny"], ""),  # it has a value of its own by then
        (["x = 1", "y = x", "y = y + 1"], f"line 4: {LEAK} the cell in line 6 reads"),
        (["x = 1", "for y in 1, 2:\n    assert y", "def f():\n    return y"], f"line 4: {LEAK} the cell in line 7"),
        (["x = 1", "assert all(y for y in [1])", "y"], ""),  # a comprehension keeps its names to itself
        (["x = 1", "def f():\n    y = 1\n    assert y", "y"], ""),  # so does a function
        (["x = 1", "import y.z", "%time y"], ""),  # a magic is no Python, and so not seen
        (["x = 1", "import y.z", "y"], f"line 4: {LEAK}"),
        (["y = 1\ndef f():\n    return y", "y = 2", "f()"], f"line 6: {LEAK} a function above reads"),
        (["y = 1\ng = lambda: y", "assert (y := 2)", "g()"], f"line 5: {LEAK} a function above reads"),
    ],
)
def test_names_that_leak_out_of_claims(tmp_path, capsys, cells, told):
    first, claims, last = cells
    marker = "# %% claims" if last.startswith("!") else "# %%"
    last = last.removeprefix("!")
    last = f"assert {last}" if "claims" in marker else last
    source = f"# %%\n{first}\n# %% claims\n{claims}\n{marker}\n{last}\n"
    assert main([], course(tmp_path, source)) == bool(told)
    assert told in capsys.readouterr().err


SOURCES = find_all(REPOSITORY / "notebooks")
ASSERT = re.compile(r"^\s*assert\b", re.MULTILINE)
CLAIMS = "# Claims of "


def test_the_course_keeps_its_assertions_out_of_sight_and_runs_them_in_ci(tmp_path):
    assert main(["--with-claims", str(tmp_path)]) == 0
    for source in SOURCES:
        cells = [cell for cell in read_cells(source.read_text(encoding="utf-8")) if cell.type == "code"]
        in_sight = [cell.line for cell in cells if not cell.is_claims and ASSERT.search(cell.source)]
        assert in_sight == [], source.name
        written = [cell.source for cell in cells if cell.is_claims]
        copy = nbformat.read(tmp_path / f"{source.stem}.ipynb", 4)
        run = [cell.source.partition("\n")[2] for cell in copy.cells if cell.source.startswith(CLAIMS)]
        learner, solved = run[: len(written)], run[len(written) :]  # behind it, what proves the solved notebook
        assert learner == written and (written or not cells), source.name  # the glossary has no code
        assert set(solved) <= set(written)
