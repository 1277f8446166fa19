"""Values in prose: what is a value, how it is filled in, and how a number that is typed over is found out."""

import json
import math
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from qlora_lab.classroom import values
from qlora_lab.classroom.build import main


def course(folder: Path, source: str, kept: str = "") -> Path:
    """A course in `folder` with one lesson, 01, and what was kept of its values. Returns its notebooks folder."""
    (folder / "notebooks" / "source").mkdir(parents=True)
    (folder / "notebooks" / "source" / "01.py").write_text(source, encoding="utf-8")
    if kept:
        (folder / "notebooks" / "source" / "01.json").write_text(kept, encoding="utf-8")
    return folder / "notebooks"


# --- In the source ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expression, specification, tolerance",
    [
        ("{{error:.3f}}", "error", ".3f", ""),
        ("{{ error : .3f}}", "error", " .3f", ""),
        ("{{n}}", "n", "", ""),
        ("{{sizes[1:3]}}", "sizes[1:3]", "", ""),
        ("{{errors['a:b', 4]:.1%}}", "errors['a:b', 4]", ".1%", ""),
        ('{{{"a": 1}["a"]:d}}', '{"a": 1}["a"]', "d", ""),
        ("{{when:%H:%M}}", "when", "%H:%M", ""),
        ("{{error:.3f ±2%}}", "error", ".3f", "2%"),
        ("{{error:.3f ± 0.02}}", "error", ".3f", "0.02"),
        ("{{n ±5}}", "n", "", "5"),
    ],
)
def test_what_a_value_is(text, expression, specification, tolerance):
    before, value, after = values.split_text(f"a {text} b", 7)
    assert (before, after) == ("a ", " b")
    assert value == values.Value(text, expression, specification, tolerance, 7)


def test_text_around_values_is_kept():
    text = r"{one} \{{ two }} $x_{a}$" + "\n\n{{x}}{{y}}\n"
    pieces = values.split_text(text, 1)
    assert [piece.line for piece in pieces if isinstance(piece, values.Value)] == [3, 3]
    filled = "".join(piece if isinstance(piece, str) else piece.expression for piece in pieces)
    assert filled == "{one} {{ two }} $x_{a}$\n\nxy\n"


@pytest.mark.parametrize(
    "text, told",
    [
        ("# {{x:.3f\n# }}", "line 3: `{{` without `}}` on its line: plain braces are written \\{{"),
        ("# {{}}", "line 3: `{{}}` holds no expression"),
        ("# a\n# {{the error}}", "line 4: `{{the error}}` holds no expression"),
        ("# {{x:.3f ±two}}", "line 3: `±two` is no tolerance: write ±2% or ±0.02"),
        ("# {{x:.3f ±}}", "line 3: `±` is no tolerance"),
        ("# {{x:.3f ±0%}}", "line 3: `±0%` is no tolerance"),
        ("# {{x:.3f ±-1}}", "line 3: `±-1` is no tolerance"),
        ("# {{x:.3f}}", "line 3: {{x:.3f}} has no value yet: build with --execute"),
        ('# y\n# %% alt="{{x}}"\nx', "line 4: {{x}} has no value yet"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--check"]], ids=["build", "check"])
def test_values_that_are_not_understood_or_not_there(tmp_path, capsys, text, told, arguments):
    notebooks = course(tmp_path, f"\n# %% [markdown]\n{text}\n")
    assert main(arguments, notebooks) == 1
    assert f"01.py, {told}" in capsys.readouterr().err
    assert not list(notebooks.glob("**/*.ipynb"))


# --- Kept values ------------------------------------------------------------------------------------------------------


TEXT = '# %% [markdown]\n# {{x:.2f}} and {{x:.2f}}, {{y:.1f ±10%}}\n# %% alt="up to {{x}}"\nx\n'
KEPT = '[["{{x:.2f}}", "0.10"], ["{{x:.2f}}", "0.20"], ["{{y:.1f ±10%}}", 5.04], ["{{x}}", "7"]]'


def texts(notebooks: Path) -> list[str]:
    first, _, figure = json.loads((notebooks / "01.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(first["source"]), figure["metadata"]["alt"]]


def test_a_rebuild_keeps_values_and_new_words_around_them(tmp_path, capsys):
    notebooks = course(tmp_path, TEXT, KEPT)
    assert main([], notebooks) == 0
    assert texts(notebooks) == ["0.10 and 0.20, 5.0", "up to 7"]
    source = notebooks / "source" / "01.py"
    source.write_text(TEXT.replace("{{x:.2f}} and", "First").replace("±10%}}", "±10%}}, later"), encoding="utf-8")
    assert main(["--check"], notebooks) == 1
    assert "01.json has other values than its source" in capsys.readouterr().err
    assert main([], notebooks) == 0
    assert texts(notebooks) == ["First 0.10, 5.0, later", "up to 7"]
    assert len(json.loads((notebooks / "source" / "01.json").read_text())) == 3
    source.write_text("# %%\nx\n")
    assert main([], notebooks) == 0 and not (notebooks / "source" / "01.json").exists()


def test_a_constant_needs_no_run(tmp_path, capsys):
    text = '# %% [markdown]\n# {{2023}}, {{"4,096"}}, {{0.5:.2f}}\n# %% alt="x"\nx\n'
    notebooks = course(tmp_path, text, "[]")
    assert main([], notebooks) == 0
    assert texts(notebooks)[0] == "2023, 4,096, 0.50"
    for computed in ("{{x}}", "{{2 * 3}}", "{{5 ±10%}}"):
        (notebooks / "source" / "01.py").write_text(text.replace("{{2023}}", computed), encoding="utf-8")
        assert main([], notebooks) == 1
        assert f"{computed} has no value yet: build with --execute" in capsys.readouterr().err


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("0.20", "0.02", "differs from its source in the source of cell 1: '0.10 and 0.02, 5.0'"),
        ("5.0", "5.1", "differs from its source in the source of cell 1: '0.10 and 0.20, 5.1'"),
        ("up to 7", "up to 8", "differs from its source in the metadata of cell 3"),
    ],
)
@pytest.mark.parametrize("side", [".", "solutions"])
def test_check_finds_a_value_typed_over(tmp_path, capsys, old, new, told, side):
    notebooks = course(tmp_path, TEXT, KEPT)
    assert main([], notebooks) == 0
    path = notebooks / side / "01.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert main(["--check"], notebooks) == 1
    assert f"{Path(side) / '01.ipynb'} {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kept, told",
    [
        ("{", "01.json is damaged"),
        ("[1]", "01.json is damaged"),
        ('[["{{x}}", null]]', "01.json is damaged"),
        (KEPT.replace("5.04", '"5.0"'), "line 2: what was kept of {{y:.1f ±10%}} is damaged"),
        (KEPT.replace('"7"', "7"), "line 3: what was kept of {{x}} is damaged"),
    ],
)
def test_damaged_values(tmp_path, capsys, kept, told):
    assert main([], course(tmp_path, TEXT, kept)) == 1
    assert told in capsys.readouterr().err


def test_values_without_a_source(tmp_path, capsys):
    notebooks = course(tmp_path, "# %%\nx\n")
    (notebooks / "source" / "02.json").write_text("[]")
    assert main(["--check"], notebooks) == 1
    assert "02.json has no source" in capsys.readouterr().err


# --- In the kernel ----------------------------------------------------------------------------------------------------


def guard(specification: str, tolerance: str, kept, now) -> None:
    values.guard((lambda: now, kept, astuple(values.Value("{{x}}", "x", specification, tolerance, 3))))


@pytest.mark.parametrize(
    "specification, tolerance, kept, now, holds",
    [
        (".3f", "", "0.112", 0.1124, True),
        (".3f", "", "0.112", 0.1126, False),
        (".3f", "", "0.012", 0.1124, False),
        ("", "", "[1, 2]", [1, 2], True),
        (".3f", "2%", 0.1, 0.1019, True),
        (".3f", "2%", 0.1, 0.0979, False),
        (".3f", "2%", -0.1, -0.1019, True),
        (".3f", "0.02", 0.1, 0.119, True),
        (".3f", "0.02", 0.1, 0.121, False),
        (",", "5", 1000, torch.tensor(1004), True),
    ],
)
def test_what_a_generated_claim_accepts(specification, tolerance, kept, now, holds):
    if holds:
        guard(specification, tolerance, kept, now)
    else:
        with pytest.raises(AssertionError, match=r"line 3: \{\{x\}\} is .*, the text says "):
            guard(specification, tolerance, kept, now)


@pytest.mark.parametrize("now", ["word", None, math.nan, math.inf, torch.ones(2)])
def test_a_tolerance_wants_a_finite_number(now):
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        guard("", "2%", 1.0, now)


@pytest.mark.parametrize(
    "text, told",
    [
        ("{{answer:.1f}}", "is 1.0 in the learner's notebook and 2.0 in the solved one: a value must not depend on an"),
        ("{{answer:.1f ±40%}}", "is 1.0 in the learner's notebook and 2.0 in the solved one"),
        ("{{later}}", "line 14: {{later}} has no value there: NameError: name 'later' is not defined"),
        ("{{answer:.3q}}", "line 14: {{answer:.3q}} has no value there: ValueError: "),
        ("{{str(answer):s ±2%}}", "has no value there: ValueError: '1.0' is no finite number, so it cannot have a tol"),
    ],
)
def test_values_that_a_run_refuses(tmp_path, capsys, text, told):
    source = f"""\
# %%
### BEGIN SOLUTION
### STUB: answer = 1.0
answer = 2.0
### END SOLUTION

# %%
def check_answer(answer):
    pass

check_answer(answer)

# %% [markdown]
# {text}
# %%
later = 1
"""
    notebooks = course(tmp_path, source)
    assert main(["--execute"], notebooks) == 1
    error = capsys.readouterr().err
    assert "01.py, line 14: " in error and told in error and error.count("\n") == 1
    assert not (notebooks / "solutions").exists()
