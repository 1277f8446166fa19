"""The workshop turns a source into the two notebooks, runs them, cleans their outputs, and sees when they are stale."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbval.plugin import coalesce_streams, find_comment_markers, find_metadata_tags

from qlora_lab import colab
from qlora_lab.classroom import build
from qlora_lab.classroom.build import main
from qlora_lab.classroom.checks import all_exercises
from qlora_lab.classroom.drafts import NOTEBOOK_METADATA, make_notebooks
from qlora_lab.classroom.outputs import WIDGET, clean_outputs, find_fault, keep_outputs
from qlora_lab.classroom.source import read_cells, split_solutions
from qlora_lab.models.hardware import name_machine

SOURCE = """\
# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: My Python 3.11.7
#     name: my-env
# ---

# %% [markdown]
# # What do weights cost?
#
# **Exercise 0.1.** Count bytes.

# %% tags=["exercise"]
def weight_bytes(parameters, bits):
    ### BEGIN SOLUTION (about 2 lines)
    total = parameters * bits

    return total / 8
    ### END SOLUTION

# %% [markdown]
# <details><summary>Hint</summary>
#
# Eight bits make a byte.
# </details>

# %%
from qlora_lab.classroom.checks import check_bytes_of_weights

check_bytes_of_weights(weight_bytes)

# %%
### BEGIN SOLUTION
### STUB: answer = ...  # bytes
### STUB: unit = "B"
answer = 7
unit = "B"  # ```
### END SOLUTION
unit

# %%
# NBVAL_IGNORE_OUTPUT
# because `check_answer` shows another object each time
def check_answer(answer):
    print("open" if answer is ... else "right")
    return object()


check_answer(answer)

# %% [markdown]
# The end.
"""
STUB_OF_0_1 = """\
def weight_bytes(parameters, bits):
    ...  # your code (about 2 lines)"""
SOLUTION_OF_0_1 = """\
def weight_bytes(parameters, bits):
    total = parameters * bits

    return total / 8"""


def course(folder: Path, **sources: str) -> Path:
    """A course in `folder` with the given sources: name="text". Returns its notebooks folder."""
    (folder / "notebooks" / "source").mkdir(parents=True)
    for name, text in sources.items():
        write_source(folder / "notebooks", name, text)
    return folder / "notebooks"


def write_source(notebooks: Path, name: str, text: str) -> None:
    (notebooks / "source" / f"{name.removeprefix('n')}.py").write_text(text, encoding="utf-8")


def cell(text: str) -> str:
    return f"# %%\n{text}\n"


def kinds(notebook: dict) -> str:
    """The cells' types by their first letters: "mc" for markdown, code."""
    return "".join(cell["cell_type"][0] for cell in notebook["cells"])


def outputs(path: Path) -> list:
    return [cell.outputs for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    """A course whose one notebook was executed. Read only: copy it to change it."""
    notebooks = course(tmp_path_factory.mktemp("executed"), n01_demo=SOURCE)
    assert main(["--execute"], notebooks) == 0
    return notebooks


@pytest.fixture
def changeable(executed, tmp_path) -> Path:
    subprocess.run(["cp", "-r", executed, tmp_path], check=True)
    return tmp_path / "notebooks"


# --- From source to cells -----------------------------------------------------------------------------------------


PERCENT = [
    SOURCE,
    "\n\n# %% [markdown]\n# text\n#\n#   indented\n#\n# # title\n\n\n# %%\n\n\n# %%\nx = 1\n\n\n\ny = 2\n",
    "# %%\n# %pip install x\n# !ls data\n#!ls\n# !!\n# % of all\n    # %time x\n# %%time\nx = 5 % 3\n",
    '# %% claims\nx = 1\n# %% machinery "A title, b: c (d) / 10³"\n# %% machinery "E" alt="[f] {{g:.1f}}"\nx\n# y',
    '# %% tags=["a", "b c"] jupyter={"source_hidden": true}\nx = 1\n# %% [markdown] tags=["d"]\n# x\n',
    "# %%\n# only a comment\n# # twice\n#none\n\n#\n# %% [markdown]\n# ```python\n# x = 1\n# ```\n",
    "# %%\nfor i in range(3):\n    # inside\n    print('# no cell')\n\n# at the end\n",
]
OUR_SOURCES = sorted((build.REPOSITORY / "notebooks" / "source").glob("*.py"))


@pytest.mark.parametrize("text", [*PERCENT, *OUR_SOURCES], ids=lambda text: getattr(text, "name", ""))
def test_percent_format_is_read_as_jupytext_reads_it(text):
    text = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
    theirs = [cell for cell in jupytext.reads(text, fmt="py:percent").cells if cell.source]
    ours = read_cells(text)
    assert [cell.source for cell in ours] == [cell.source for cell in theirs]
    assert [cell.type for cell in ours] == [cell.cell_type for cell in theirs]
    for our, their in zip(ours, theirs, strict=True):
        # jupytext also notes blank lines, to write the script back as it was
        assert our.metadata == {name: value for name, value in their.metadata.items() if "lines_to_" not in name}


@pytest.mark.parametrize(
    "text, told",
    [
        ("import torch\n# %%\nx", "line 1: the script must begin with # %%"),
        ("x = 1\n", "line 1: the script must begin with # %%"),
        ("", "line 1: the script must begin with # %%"),
        ("# %%\nx\n# %% [Markdown]\n# y", "line 3: `# %% [Markdown]` is no cell"),
        ("# %%\nx\n# %%[markdown]\n# y", "line 3: `# %%[markdown]` is no cell"),
        ("# %%\nx\n#%%\ny", "line 3: `#%%` is no cell"),
        ("# %% tags=[a]\nx", "line 1: tags=[a] is not understood"),
        ("# %% [markdown]\n# a\n#\n#b\n", "line 4: in a markdown cell every line begins with `# `, unlike `#b`"),
        ("# %% [markdown]\n# a\nb\n", "line 3: in a markdown cell every line begins with `# `, unlike `b`"),
    ],
)
def test_percent_format_that_is_not_understood(tmp_path, capsys, text, told):
    assert main([], course(tmp_path, n01=text)) == 1
    assert f"01.py, {told}" in capsys.readouterr().err


def test_learners_cells(tmp_path):
    learner, _ = make_notebooks(course(tmp_path, n01_demo=SOURCE) / "source" / "01_demo.py")
    assert kinds(learner) == "mccmcmccmm"
    title, set_up, exercise, hint, _, folded, second, _, folded_again, _ = (cell["source"] for cell in learner["cells"])
    assert title == "# What do weights cost?\n\n**Exercise 0.1.** Count bytes."
    assert exercise == STUB_OF_0_1 and learner["cells"][2]["metadata"] == {"tags": ["exercise"]}
    assert set_up == colab.CELL
    assert hint.startswith("<details><summary>Hint</summary>\n\nEight bits")
    assert folded == (f"<details><summary>Solution</summary>\n\n```python\n{SOLUTION_OF_0_1}\n```\n\n</details>")
    assert second == 'answer = ...  # bytes\nunit = "B"\nunit'
    assert "\n````python\nanswer = 7\n" in folded_again  # longer than the fence inside
    assert "SOLUTION" not in str(learner) and "STUB" not in str(learner)


def test_solution_comes_behind_the_hints(tmp_path):
    hints = (
        "# %% [markdown]\n# <details><summary>Hint 1</summary>a</details>\n\n# %% [markdown]\n# <details>b</details>\n"
    )
    source = SOURCE.replace(
        "check_bytes_of_weights(weight_bytes)\n", f"check_bytes_of_weights(weight_bytes)\n\n{hints}"
    )
    learner, _ = make_notebooks(course(tmp_path, n01_demo=source) / "source" / "01_demo.py")
    check = next(i for i, cell in enumerate(learner["cells"]) if "check_bytes_of_weights(w" in cell["source"])
    behind = [cell["source"] for cell in learner["cells"][check + 1 : check + 4]]
    assert [text.partition("</summary>")[0] for text in behind] == [
        "<details><summary>Hint 1",
        "<details>b</details>",
        "<details><summary>Solution",
    ]


def test_a_hint_cell_holds_hints_alone(tmp_path, capsys):
    """The solution comes after it: below a new heading, it would be taken for that section's."""
    more = "\n# %% [markdown]\n# <details><summary>Hint</summary>\n#\n# Eight.\n# </details>\n#\n# ## 2 · Next\n"
    check = "check_bytes_of_weights(weight_bytes)\n"
    assert main([], course(tmp_path, n01=SOURCE.replace(check, check + more))) == 1
    assert "the solution follows this cell of hints: other text needs a new cell" in capsys.readouterr().err


def test_solved_cells(tmp_path):
    _, solved = make_notebooks(course(tmp_path, n01_demo=SOURCE) / "source" / "01_demo.py")
    assert kinds(solved) == "mccmcccm"
    assert solved["cells"][1]["source"] == colab.CELL
    assert solved["cells"][2]["source"] == SOLUTION_OF_0_1
    assert solved["cells"][5]["source"] == 'answer = 7\nunit = "B"  # ```\nunit'
    assert "SOLUTION" not in str(solved) and "STUB" not in str(solved)


def test_notebooks_are_valid_and_name_no_machine(tmp_path):
    for notebook in make_notebooks(course(tmp_path, n01_demo=SOURCE) / "source" / "01_demo.py"):
        nbformat.validate(notebook)
        assert notebook["metadata"] == {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }


def test_ids_follow_from_content(tmp_path):
    source = course(tmp_path, n01=cell("x = 1") + cell("x = 1") + cell("y = 2")) / "source" / "01.py"

    def ids():
        return [cell["id"] for cell in make_notebooks(source)[0]["cells"]]

    set_up, *before = ids()
    assert len({set_up, *before}) == 4 and ids() == [set_up, *before]
    source.write_text(cell("new = 0") + source.read_text())
    assert ids()[2:] == before


def test_regions_keep_their_indentation_and_may_stand_in_a_row():
    learner, solved = split_solutions(
        "if x:\n"
        "    ### BEGIN SOLUTION\n"
        "    ### STUB: for i in x:\n"
        "    ### STUB:     ...\n"
        "    y()\n"
        "    ### END SOLUTION\n"
        "    ### BEGIN SOLUTION\n"
        "    z()\n"
        "    ### END SOLUTION"
    )
    assert learner == "if x:\n    for i in x:\n        ...\n    ...  # your code here"
    assert solved == "if x:\n    y()\n    z()"


def test_exercise_of_two_cells_is_folded_together(tmp_path):
    region = "### BEGIN SOLUTION\n{} = 1\n### END SOLUTION"
    text = cell(region.format("a")) + cell(region.format("b")) + cell("check_both(a, b)") + cell("a")
    learner, _ = make_notebooks(course(tmp_path, n01=text) / "source" / "01.py")
    assert kinds(learner) == "ccccmc"  # set-up, exercise, exercise, check, solution, cell
    assert "```python\na = 1\n\nb = 1\n```" in learner["cells"][4]["source"]


B, E = "### BEGIN SOLUTION", "### END SOLUTION"


@pytest.mark.parametrize(
    "lines, line, told",
    [
        (["x = 1", E], 3, "END SOLUTION without BEGIN"),
        ([B, "x = 1"], 2, "BEGIN SOLUTION without END SOLUTION in the same cell"),
        ([B, "x = 1", "", "# %%", E], 2, "BEGIN SOLUTION without END SOLUTION in the same cell"),
        ([B, "x = 1", B, "y = 2", E, E], 4, "inside the solution that begins in line 2"),
        ([B, E], 3, "is empty"),
        ([B, "x = 1", "### STUB: x = ...", E], 4, "directly below BEGIN SOLUTION"),
        (["### STUB: x = ..."], 2, "directly below BEGIN SOLUTION"),
        (["## BEGIN SOLUTION", "x = 1", E], 2, "is no marker"),
        (["### begin solution", "x = 1", E], 2, "is no marker"),
        (["### BEGIN SOLUTION about 2 lines", "x = 1", E], 2, "is no marker"),
        ([B, "x = 1", "###END_SOLUTION"], 4, "is no marker"),
        ([B, "## STUB x = ...", "x = 1", E], 3, "is no marker"),
    ],
)
def test_markers_in_disorder(tmp_path, capsys, lines, line, told):
    notebooks = course(tmp_path, n01_demo=cell("\n".join(lines)) + cell("check_x(x)"))
    assert main([], notebooks) == 1
    error = capsys.readouterr().err
    assert f"01_demo.py, line {line}: " in error and told in error
    assert not list(notebooks.glob("**/*.ipynb"))


@pytest.mark.parametrize("following", ["", cell("print(x)") + cell("check_x(x)")])
def test_exercise_without_its_check(tmp_path, capsys, following):
    assert main([], course(tmp_path, n01=cell(f"{B}\nx = 1\n{E}") + following)) == 1
    assert "line 2: the next code cell must check this exercise" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, told",
    [
        ("# NBVAL_IGNORE_OUTPUT\n# because time passes\nx", ""),
        ("x = 1\n# NBVAL_SKIP\n#  because it needs a GPU", ""),
        ("# NBVAL_IGNORE_OUTPUT\nx", "line 2: NBVAL_IGNORE_OUTPUT needs its reason"),
        ("x\n# NBVAL_IGNORE_OUTPUT", "line 3: NBVAL_IGNORE_OUTPUT needs its reason"),
        ("# NBVAL_SKIP\n# because", "line 2: NBVAL_SKIP needs its reason"),
        ("# NBVAL_IGNORE_OUTPUT: time passes\nx", "line 2: nbval overlooks NBVAL_IGNORE_OUTPUT"),
    ],
)
def test_nbval_markers_are_heeded_by_nbval_and_give_a_reason(tmp_path, capsys, text, told):
    for arguments in ([], ["--check"]) if told else ([],):
        assert main(arguments, course(tmp_path / str(arguments), n01=cell(text))) == (1 if told else 0)
        assert told in capsys.readouterr().err
    assert bool(list(find_comment_markers(text))) == ("overlooks" not in told)


def test_learners_see_no_marker_and_nbval_its_tag(tmp_path):
    marked = '# %% tags=["mine"]\nx = 1\n# NBVAL_IGNORE_OUTPUT\n# because time passes\nx\n'
    notebooks = course(tmp_path, n01=marked + cell("x"))
    assert main([], notebooks) == 0
    both = list(notebooks.rglob("*.ipynb"))
    assert len(both) == 2
    for path in both:
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        first, second = cells[-2:]
        assert "".join(first["source"]) == "x = 1\nx"
        assert dict(find_metadata_tags(first["metadata"])) == {"check": False}
        assert first["metadata"]["tags"] == ["mine", "nbval-ignore-output"]
        assert "tags" not in second["metadata"]


def test_nbval_tags_are_refused(tmp_path, capsys):
    assert main([], course(tmp_path, n01='# %% tags=["nbval-skip"]\nx\n')) == 1
    assert "line 1: mark cells for nbval in a comment" in capsys.readouterr().err


# --- Rebuilding and --check ---------------------------------------------------------------------------------------


def test_executed_notebooks(executed):
    learner, solved = executed / "01_demo.ipynb", executed / "solutions" / "01_demo.ipynb"
    set_up, first, stub, unit, _ = outputs(learner)
    assert set_up == first == []
    assert stub[0].text.startswith("· 0.1 not attempted yet")
    assert unit[0].data["text/plain"] == "'B'"
    assert outputs(solved)[2][0].text.startswith("✓ 0.1 ")
    assert "right" in outputs(solved)[4][0].text
    for path in (learner, solved):
        notebook = nbformat.read(path, 4)
        nbformat.validate(notebook)
        assert notebook.metadata == NOTEBOOK_METADATA
        assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert sorted(path.name for path in executed.glob("**/*")) == [
        "01_demo.ipynb",
        "01_demo.ipynb",
        "01_demo.py",
        "solutions",
        "source",
    ]


def test_executed_notebooks_pass_the_check_and_a_rebuild_changes_no_byte(changeable, capsys):
    assert main(["--check"], changeable) == 0
    before = {path: path.read_bytes() for path in changeable.glob("**/*.ipynb")}
    assert main([], changeable) == 0
    assert {path: path.read_bytes() for path in changeable.glob("**/*.ipynb")} == before and len(before) == 2
    assert main(["--check", "01"], changeable) == 0
    assert capsys.readouterr().err == ""


def test_outputs_of_unchanged_cells_are_kept(changeable, capsys):
    write_source(changeable, "01_demo", SOURCE.replace("unit\n\n# %%", "unit * 2\n\n# %%"))
    assert main(["--check"], changeable) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("differs from its source in the source of cell" in line for line in told)
    assert main([], changeable) == 0
    _, _, stub, unit, answer = outputs(changeable / "01_demo.ipynb")
    assert stub[0].text.startswith("· 0.1") and answer and unit == []
    assert main(["--check"], changeable) == 1
    assert "was not executed from top to bottom" in capsys.readouterr().err


def test_outputs_of_equal_cells_keep_their_order(tmp_path):
    source = course(tmp_path, n01=cell("x += 1") * 2 + cell("y")) / "source" / "01.py"
    old, new = make_notebooks(source)[0], make_notebooks(source)[0]
    for count, old_cell in enumerate(old["cells"], start=1):
        old_cell |= {"execution_count": count, "outputs": [stream(str(count))]}
    keep_outputs(new, old)
    assert new == old


def test_a_failed_write_leaves_the_old_notebook(changeable, capsys, monkeypatch):
    def no_space(*paths):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    old = (changeable / "01_demo.ipynb").read_bytes()
    write_source(changeable, "01_demo", cell("x = 1"))
    assert main([], changeable) == 1
    assert "No space left" in capsys.readouterr().err
    assert (changeable / "01_demo.ipynb").read_bytes() == old
    assert not list(changeable.glob("**/.*"))


def edit(path: Path, change) -> None:
    notebook = nbformat.read(path, 4)
    change(notebook)
    nbformat.write(notebook, path)


def leak(notebook):
    notebook.cells[4].outputs[0].text = f"saved in {Path.home()}/x\n"


def leave_a_gap(notebook):
    """As if the fourth cell had been run once more, and those below it after that."""
    for count, cell in enumerate([cell for cell in notebook.cells if cell.cell_type == "code"], start=1):
        cell.execution_count = count + (count > 3)


def begin_late(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count += 1


def count_other_exercises(notebook):
    notebook.cells[4].outputs[0].text = "✓ 0.1 Right.\n0 of 1 exercises solved, 0 of 1 points\n"


def test_stored_progress_is_counted_anew(changeable):
    edit(changeable / "01_demo.ipynb", count_other_exercises)
    assert main([], changeable) == 0
    shown = nbformat.read(changeable / "01_demo.ipynb", 4).cells[4].outputs[0].text
    path = [exercise for exercise in all_exercises() if not exercise.in_a_dive]
    points = sum(exercise.points for exercise in path)
    assert shown == f"✓ 0.1 Right.\n1 of {len(path)} exercises solved, 1 of {points} points\n"


def add_widget(notebook):
    notebook.cells[6].outputs.append(nbformat.v4.new_output("display_data", {WIDGET: {"model_id": "1"}}))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda notebook: notebook.cells[0].update(source="Other"), "in the source of cell 1: 'Other'"),
        (lambda notebook: notebook.cells[2].metadata.tags.append("x"), "in the metadata of cell 3"),
        (lambda notebook: notebook.cells[1].update(id="x"), "in the id of cell 2"),
        (lambda notebook: notebook.cells.reverse(), "of cell 1"),
        (lambda notebook: notebook.cells.pop(), "has 9 cells, its source gives 10"),
        (lambda notebook: notebook.metadata.update(widgets={}), "widgets"),
        (lambda notebook: notebook.cells[4].update(execution_count=None), "was not executed"),
        (lambda notebook: notebook.cells[4].update(execution_count=7), "was not executed"),
        (leave_a_gap, "was not executed from top to bottom"),
        (begin_late, "was not executed from top to bottom"),
        (leak, f"shows a path of this machine, {Path.home()}"),
        (add_widget, "not cleaned in [4]"),
        (count_other_exercises, "shows the progress of other exercises than there are: build again"),
    ],
)
def test_check_finds_what_was_changed_in_a_notebook(changeable, capsys, change, told):
    edit(changeable / "01_demo.ipynb", change)
    assert main(["--check"], changeable) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "ipynb" in line]
    assert "01_demo.ipynb " in line and "solutions" not in line and told in line


def test_check_finds_missing_damaged_and_orphaned_notebooks(changeable, capsys):
    (changeable / "01_demo.ipynb").write_text('{"cells": [')
    (changeable / "solutions" / "01_demo.ipynb").rename(changeable / "solutions" / "02_old.ipynb")
    write_source(changeable, "03_new", cell("x = 1"))
    assert main(["--check"], changeable) == 1
    told = capsys.readouterr().err
    assert "01_demo.ipynb is not a readable notebook" in told
    assert f"{Path('solutions/02_old.ipynb')} has no source" in told
    assert "03_new.ipynb is missing" in told and f"{Path('solutions/03_new.ipynb')} is missing" in told
    assert main(["--check", "01"], changeable) == 1
    assert "has no source" not in capsys.readouterr().err  # of 01, that is
    assert main(["--check", "02"], changeable) == 1
    assert "no source begins with 02: there are 01_demo, 03_new" in capsys.readouterr().err


def test_no_sources(tmp_path, capsys):
    assert main([], tmp_path) == 1
    assert "no sources in" in capsys.readouterr().err


def test_names_choose_sources(tmp_path):
    notebooks = course(tmp_path, n01_a=cell("x = 1"), n02_b=cell("x = 1"), n03_c=cell("x = 1"))
    assert main(["01", "notebooks/source/03_c.py"], notebooks) == 0
    assert sorted(path.name for path in notebooks.glob("*.ipynb")) == ["01_a.ipynb", "03_c.ipynb"]


# --- --execute ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, told",
    [
        ("nothing = 0\n1 / nothing", ["1 / nothing", "ZeroDivisionError: division by zero"]),
        ("import warnings\nwarnings.warn('old')", ["warnings.warn('old')", "standard error", "UserWarning: old"]),
        ("import os\nos.getcwd()", ["os.getcwd()", f"a path of this machine, {tempfile.gettempdir()}"]),
    ],
    ids=["error", "warning", "path"],
)
def test_a_run_that_fails_leaves_the_old_notebook(changeable, capsys, text, told):
    old = (changeable / "01_demo.ipynb").read_bytes()
    write_source(changeable, "01_demo", cell("x = 1") + cell(text))
    assert main(["--execute"], changeable) == 1
    error = capsys.readouterr().err
    assert "01_demo.ipynb: " in error and "\x1b" not in error
    assert all(part in error for part in told)
    assert (changeable / "01_demo.ipynb").read_bytes() == old
    assert not list(changeable.glob("**/.*"))


SURROUNDINGS = """\
# %%
import os
from pathlib import Path
from qlora_lab.classroom.checks import check_bytes_of_weights, progress

check_bytes_of_weights(lambda parameters, bits: parameters * bits / 8)
print(progress().solved, Path.cwd().name, os.environ["MPLBACKEND"], "QLORA_LAB_STRICT" in os.environ)
"""


def test_surroundings_of_a_run(tmp_path, monkeypatch):
    own = tmp_path / "own.json"
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(own))
    monkeypatch.setenv("QLORA_LAB_STRICT", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebooks = course(tmp_path, n01=SURROUNDINGS)
    assert main(["--execute"], notebooks) == 0
    for path, strict in [("01.ipynb", False), ("solutions/01.ipynb", True)]:
        shown = outputs(notebooks / path)[1][0].text.splitlines()[1]
        assert shown == f"frozenset({{'0.1'}}) notebooks module://matplotlib_inline.backend_inline {strict}"
    assert not own.exists()


def test_an_unsolved_exercise_stops_the_solved_notebook_only(tmp_path, capsys):
    notebooks = course(tmp_path, n01=SOURCE.replace("return total / 8", "return total"), n02=cell("x = 1"))
    assert main(["--execute"], notebooks) == 1
    assert "ExerciseUnsolved: ✗ 0.1 weight_bytes" in capsys.readouterr().err
    assert (notebooks / "01.ipynb").exists() and not (notebooks / "solutions" / "01.ipynb").exists()
    assert main(["--check", "02"], notebooks) == 0  # the failure of one does not stop the others


LIVE = """\
# %%
import ipywidgets
from IPython.display import display

for step in range(3):
    print(f"step {step}", end="\\r", flush=True)
print()
display(ipywidgets.IntSlider(5))
print("done")
"""


def test_live_cells_are_cleaned_and_pass_nbval(tmp_path):
    notebooks = course(tmp_path, n01_live=LIVE, n02_demo=SOURCE)
    assert main(["--execute"], notebooks) == 0
    printed, slider, done = outputs(notebooks / "01_live.ipynb")[1]
    assert printed.text == "step 2\r\n" and done.text == "done\n"
    assert set(slider.data) == {"text/plain"}
    assert "widgets" not in nbformat.read(notebooks / "01_live.ipynb", 4).metadata
    assert main(["--check"], notebooks) == 0

    root = Path(build.__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "QLORA_LAB_PROGRESS": str(tmp_path / "progress.json")}
    nbval = [sys.executable, "-m", "pytest", "-q", "--nbval", "-p", "no:cacheprovider", str(notebooks)]
    run = subprocess.run(nbval, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


CARD = """\
# %% [markdown]
# # A card
#
# | you need | |
# |---|---|
# | GPU | optional |

# %%
import torch
"""


def test_the_card_names_the_machine_of_the_outputs(tmp_path, capsys):
    notebooks = course(tmp_path, n01=CARD)
    paths = [notebooks / "01.ipynb", notebooks / "solutions" / "01.ipynb"]
    assert main([], notebooks) == 0 and all("outputs from" not in path.read_text() for path in paths)
    assert main(["--execute"], notebooks) == 0
    for path in paths:
        notebook = nbformat.read(path, 4)
        assert notebook.metadata["machine"] == name_machine()
        assert notebook.cells[0].source.endswith(f"| GPU | optional |\n| outputs from | {name_machine()} |")
    before = paths[0].read_bytes()
    assert main(["--check"], notebooks) == 0 and main([], notebooks) == 0 and paths[0].read_bytes() == before
    paths[0].write_text(before.decode().replace("| outputs from | ", "| outputs from | 9"), encoding="utf-8")
    assert main(["--check"], notebooks) == 1
    assert "differs from its source in the source of cell 1" in capsys.readouterr().err


FIGURE = """\
# %%{options}
import matplotlib.pyplot as plt

_ = plt.plot([1, 2])
"""


def test_a_figure_needs_a_description(tmp_path, capsys):
    notebooks = course(tmp_path, n01=FIGURE.format(options=""))
    assert main(["--execute"], notebooks) == 1
    assert "shows a figure without a description: # %% alt=" in capsys.readouterr().err
    write_source(notebooks, "01", FIGURE.format(options=' alt="A line that rises"'))
    assert main(["--execute"], notebooks) == 0 and main(["--check"], notebooks) == 0
    (figure,) = outputs(notebooks / "01.ipynb")[1]
    assert figure.metadata["image/png"] == {"alt": "A line that rises"}
    write_source(notebooks, "01", FIGURE.format(options=' alt="Another"'))  # the outputs are kept, the words are new
    assert main(["--check"], notebooks) == 1 and main([], notebooks) == 0 and main(["--check"], notebooks) == 0
    assert outputs(notebooks / "01.ipynb")[1][0].metadata["image/png"] == {"alt": "Another"}


# --- Outputs ------------------------------------------------------------------------------------------------------


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def show(**data):
    return nbformat.v4.new_output("display_data", {mime.replace("_", "/"): text for mime, text in data.items()})


def widget(**data):
    output = show(**data)
    output.data[WIDGET] = {"model_id": "abc", "version_major": 2, "version_minor": 0}
    return output


@pytest.mark.parametrize(
    "raw, clean",
    [
        ([stream("a"), stream("b\n"), stream("c")], [stream("ab\nc")]),
        ([stream("a"), stream("b", "stderr"), stream("c")], [stream("a"), stream("b", "stderr"), stream("c")]),
        ([stream("a"), show(text_plain="x"), stream("b")], [stream("a"), show(text_plain="x"), stream("b")]),
        ([stream("a"), widget(), stream("b")], [stream("ab")]),
        ([widget(text_plain="IntSlider()")], [show(text_plain="IntSlider()")]),
        ([stream("1%\r2%\r"), stream("3%\n"), stream("end")], [stream("3%\nend")]),
        ([stream("0\n1%\r\r100%\r\nend\n")], [stream("0\n100%\r\nend\n")]),
        ([stream("")], []),
    ],
)
def test_cleaning(raw, clean):
    untouched = [dict(output) for output in raw]
    assert clean_outputs(raw) == clean
    assert [dict(output) for output in raw] == untouched
    assert clean_outputs(clean) == clean

    def as_nbval_sees_it(outputs):
        merged = coalesce_streams([nbformat.from_dict(output) for output in outputs])
        return [(output.name, output.text) for output in merged if output.get("text")]

    assert as_nbval_sees_it(clean) == as_nbval_sees_it(raw)


HOME, REPOSITORY = str(Path.home()), str(build.REPOSITORY)


@pytest.mark.parametrize(
    "output, faulty",
    [
        (stream("all is well"), False),
        (stream("warning", "stderr"), True),
        (stream(f"saved in {HOME}/adapter"), True),
        (stream(f"'{REPOSITORY}'"), True),
        (stream(f"{sys.prefix}/lib"), True),
        (stream(f"{tempfile.gettempdir()}/x"), True),
        (show(text_plain=f"PosixPath('{HOME}')"), True),
        (show(text_plain="x", text_html=f"<b>{REPOSITORY}/data</b>"), True),
        (show(**{"image_svg+xml": f"<a>{HOME}/x</a>"}), True),
        (show(image_png=f"iVBOR{HOME}/x"), False),
        (stream(f"at{HOME}, {HOME}ed, a{HOME}/x, data/orders, 1/2"), False),
        (nbformat.v4.new_output("error", ename="E", evalue="", traceback=[f"File {HOME}/x.py"]), True),
    ],
)
def test_faults(output, faulty):
    assert bool(find_fault([stream("before\n"), output])) == faulty
