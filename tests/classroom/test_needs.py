"""What CI runs of a solved notebook: what the learner's, run whole, does not prove."""

import json
import pathlib

import pytest

from qlora_lab.classroom.needs import cells_to_prove, names_of
from qlora_lab.classroom.outputs import code_cells

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def cell(source: str, shown: str = "") -> dict:
    outputs = [{"output_type": "stream", "name": "stdout", "text": shown}] if shown else []
    return {"source": source, "outputs": outputs}


def sides_of(path: pathlib.Path) -> list[list[dict]]:
    """The code cells of a learner's notebook and of the solved one."""
    sides = [
        code_cells(json.loads(file.read_text(encoding="utf-8")))
        for file in (path, path.parent / "solutions" / path.name)
    ]
    return [[each | {"source": "".join(each["source"])} for each in side] for side in sides]


# source of both, or of the learner's and the solved one; and whether the solved one has to run
CELLS = [
    ("import torch", False),  # the learner's notebook ends with it
    ("model = torch.nn.Linear(2, 2)", True),  # and with another of these
    ("trained = slow(torch)", False),
    ("model.eval()", True),  # it may change what is needed
    ("data = slow(trained)", False),
    ("other = torch.ones(3)", False),
    (("def f(x): ...", "def f(x): return model(data)"), True),
    (("check_f(f)  # open", "check_f(f)  # right"), True),
    ("print(trained)", False),
    ("g = [f(x) for x in range(3)]", True),  # it reads the answer
    ("h = 2", False),
    ("def later(): return g", True),  # and so does what this returns, when it is called
    ("later()", True),
    ("g = 1", False),  # another value, the same in both
    ("model = None", False),
    ("print(g)", False),
    ("assert other.sum() == 3", False),
]


def test_what_has_to_run():
    pairs = [(source if isinstance(source, tuple) else (source, source)) for source, _ in CELLS]
    learner, solved = ([cell(pair[side]) for pair in pairs] for side in (0, 1))
    assert cells_to_prove(learner, solved) == {place for place, (_, wanted) in enumerate(CELLS) if wanted}


@pytest.mark.parametrize("solution", ["model.train()", "model.bias = None", "model[0] = 1", "model += 1"])
def test_what_a_solution_may_change_is_followed(solution):
    pairs = [("model = 1", "model = 1"), ("...", solution), ("check_x(1)", "check_x(1)"), ("print(model)",) * 2]
    learner, solved = ([cell(pair[side]) for pair in pairs] for side in (0, 1))
    assert cells_to_prove(learner, solved) == {1, 3}
    later = [cell("model = 2")]  # not what the solution is to change
    assert cells_to_prove(learner + later, solved + later) == {0, 1, 3}


def test_what_a_cell_that_runs_again_overwrites_is_made_again():
    corrected = [("...", "x = 5"), ("x = 7", "x = 7"), ("...", "check_a(x)")]
    changed = [
        ("model, tokens = load()",) * 2,
        ("model.eval()",) * 2,
        ("...", "read(model, tokens)"),
        ("tokens = 0",) * 2,
    ]
    for pairs in (corrected, changed):
        assert cells_to_prove(*([cell(pair[side]) for pair in pairs] for side in (0, 1))) == {0, 1, 2}


def test_a_generator_is_set_again():
    pairs = [("import torch",) * 2, ("torch.manual_seed(0)",) * 2, ("...", "y = torch.randn(3)")]
    assert cells_to_prove(*([cell(pair[side]) for pair in pairs] for side in (0, 1))) == {0, 1, 2}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_that_is_read_is_as_the_solved_notebook_has_it(path):
    """Each name that a cell reads comes from the very cell that made or changed it last in the solved notebook."""
    learner, solved = sides_of(path)
    names = [names_of(each["source"]) for each in solved]
    run = sorted(cells_to_prove(learner, solved))
    last_there = {}
    for place, each in enumerate(learner):
        _, bound, changed = names_of(each["source"])
        last_there |= dict.fromkeys(bound | changed, (place, each["source"]))
    now = dict(last_there)
    for place in run:
        for name in names[place][0]:
            makers = [p for p in range(place) if name in names[p][1] | names[p][2]]
            if makers:
                assert now[name] == (makers[-1], solved[makers[-1]]["source"]), (place, name)
        now |= dict.fromkeys(names[place][1] | names[place][2], (place, solved[place]["source"]))


def test_another_output_is_proven_and_other_pixels_are_not():
    learner, solved = [cell("progress()", "0 of 2"), cell("a = 1")], [cell("progress()", "2 of 2"), cell("a = 1")]
    assert cells_to_prove(learner, solved) == {0}
    pictures = [
        [{"source": "draw()", "outputs": [{"output_type": "display_data", "data": {"image/png": pixels}}]}]
        for pixels in ("AB", "CD")
    ]
    assert cells_to_prove(*pictures) == set()


def test_outputs_that_nbval_ignores_prove_nothing_and_a_function_that_shows_changes_nothing():
    ignored = {"metadata": {"tags": ["nbval-ignore-output"]}}
    sides = []
    for rate, solution in (("52 tokens/s", "..."), ("36 tokens/s", "show_answers(row)")):
        sides.append([cell("run()", rate) | ignored, cell("show_answers(slow)"), cell("row = 1"), cell(solution)])
    assert cells_to_prove(*sides) == {3}
    del sides[1][0]["metadata"]
    assert cells_to_prove(*sides) == {0, 3}


def test_magics_are_no_python_and_claims_of_values_change_nothing():
    assert names_of("%matplotlib inline\nif 1:\n  !ls\nx = y")[:2] == ({"y"}, {"x"})
    assert names_of("__import__('a').guard((lambda: x, 1))") == ({"__import__", "x"}, set(), set())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_exercises_and_their_checks_run(path):
    learner, solved = sides_of(path)
    run = cells_to_prove(learner, solved)
    exercises = {
        place for place, pair in enumerate(zip(learner, solved, strict=True)) if pair[0]["source"] != pair[1]["source"]
    }
    checks = {place for place, each in enumerate(solved) if each["source"].startswith("check_")}
    assert exercises | checks <= run
    assert len(run) < len(solved), "nothing is saved"
