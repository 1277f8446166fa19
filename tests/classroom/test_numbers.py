"""A number in the text that no run fills in fails the check, with its cell; the list of today's only shrinks."""

import json
import re
import shutil
from pathlib import Path

from qlora_lab.classroom import numbers
from qlora_lab.classroom.build import main
from qlora_lab.classroom.drafts import draft_notebooks
from qlora_lab.classroom.source import REPOSITORY

SOURCE = """\
# %% [markdown]
# # 03 · What do 4-bit weights cost?
#
# In 2023 NF4 took {{3.5}} hours on 12 A100s, LLaMA-65B, notebooks 02 and 04, Exercise 4.2 ●○○ (2 minutes), `x = 5`.
# Claim 3 is of 16 bits, and of 0.37 bits.
#
# | you need | |
# |---|---|
# | time | 20 minutes |

# %% [markdown]
# ## 1 · A table
#
# 1. See [04 · Next](04_next_7.ipynb), <a name="9">section 2</a>, or https://example.org/8.
#
# ```
# y = 66
# ```
#
# | bits | error |
# |---|---|
# | 16 | 1.5e-3 |
# | {{4}} | 0.25 |

# %% claims
assert 17

# %% alt="A line from {{1}} to 1,024: it falls by 30 %."
plot = 18  # 19
"""


def course(folder: Path, source: str = SOURCE) -> Path:
    (folder / "notebooks" / "source").mkdir(parents=True, exist_ok=True)
    path = folder / "notebooks" / "source" / "03_demo.py"
    path.write_text(source, encoding="utf-8")
    path.with_suffix(".json").write_text('[["{{3.5}}", "3.5"], ["{{4}}", "4"], ["{{1}}", "1"]]', encoding="utf-8")
    return folder / "notebooks"


def told(notebooks: Path, capsys) -> list[str]:
    """What --check says of numbers; that nothing was executed is another matter."""
    assert main(["--check"], notebooks) == 1
    lines = capsys.readouterr().err.splitlines()
    return [line.partition("03_demo.py, ")[2] for line in lines if "03_demo.py, " in line]


def test_numbers_that_no_run_fills_in_are_found_with_their_cells(tmp_path):
    draft, _ = draft_notebooks(course(tmp_path) / "source" / "03_demo.py")
    found = [(number.text, number.line, number.cell) for number in numbers.undeclared(draft)]
    assert found == [
        ("2023", 4, 1),
        ("12", 4, 1),
        ("0.37", 5, 1),
        ("16", 22, 3),  # the second cell is the set-up's, which the build writes
        ("1.5e-3", 22, 3),
        ("0.25", 23, 3),
        ("1,024", 28, 4),
        ("30", 28, 4),
    ]


def test_a_false_number_fails_the_check_named_with_its_cell(tmp_path, capsys):
    notebooks = course(tmp_path)
    assert main(["--numbers"], notebooks) == 0
    assert capsys.readouterr().out == "8 undeclared numbers are left\n"
    assert json.loads((notebooks / "undeclared.json").read_text())["03_demo"][:2] == ["2023", "12"]
    assert told(notebooks, capsys) == []
    for right, wrong, where in (
        (
            "on 12 A100s",
            "on 13 A100s",
            "line 4: cell 1 states 13, which no run fills in (... n 2023 NF4 took {{}} hours on 13 A100s, LL",
        ),
        ("| 1.5e-3 |", "| 1.6e-3 |", "line 22: cell 3 states 1.6e-3, which no run fills in (... "),
        ("to 1,024", "to 2,048", "line 28: cell 4 states 2,048, which no run fills in (... A line from"),
        ("it falls by 30 %", "it falls by 30 %, to 5", "line 28: cell 4 states 5, which no run fills in"),
        ("2023 NF4 took {{3.5}} hours on 12", "12 NF4 took {{3.5}} hours on 2023", "line 4: cell 1 states"),  # swapped
    ):
        course(tmp_path, SOURCE.replace(right, wrong))
        said = told(notebooks, capsys)
        assert any(line.startswith(where) for line in said), said
        assert "write a value, {{error:.3f}}, or declare it, {{2023}}" in "".join(said)


def test_the_list_only_shrinks(tmp_path, capsys):
    notebooks = course(tmp_path)
    assert main(["--numbers"], notebooks) == 0
    before = (notebooks / "undeclared.json").read_text()
    course(tmp_path, SOURCE.replace("0.25", "0.25 or 0.5"))
    assert main(["--numbers"], notebooks) == 1
    said = capsys.readouterr().err
    assert "03_demo has more undeclared numbers than its list, which only shrinks:\nline 23, cell 3: ..." in said
    assert (notebooks / "undeclared.json").read_text() == before
    course(tmp_path, SOURCE.replace("In 2023 NF4", "NF4"))
    assert told(notebooks, capsys) == ["2023: no longer in the text; build --numbers takes it from the list"]
    assert main(["--numbers", "03"], notebooks) == 0
    assert capsys.readouterr().out == "7 undeclared numbers are left\n"
    assert told(notebooks, capsys) == []
    course(tmp_path)
    assert told(notebooks, capsys)[0].startswith("line 4: cell 1 states 2023")
    (notebooks / "undeclared.json").write_text("[")
    assert main(["--numbers"], notebooks) == 1
    assert "undeclared.json is damaged" in capsys.readouterr().err


def test_the_course_itself_is_held_to_its_list(tmp_path, capsys):
    """False numbers are put into the text, a table and a description of a lesson: each is named with its cell."""
    stem = "05_double_quantization"
    notebooks = tmp_path / "notebooks"
    for path in (
        f"source/{stem}.py",
        f"source/{stem}.json",
        f"{stem}.ipynb",
        f"solutions/{stem}.ipynb",
        "undeclared.json",
    ):
        (notebooks / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / "notebooks" / path, notebooks / path)
    assert main(["--check", "05"], notebooks) == 0
    source = notebooks / "source" / f"{stem}.py"
    text = source.read_text(encoding="utf-8")
    text = text.replace(
        "\n#\n", "\n#\n# It is 98,765 times as fast.\n#\n# | a | b |\n# |---|---|\n# | 98,766 | x |\n#\n", 1
    )
    text = text.replace('alt="', 'alt="98,767 bars. ', 1)
    source.write_text(text, encoding="utf-8")
    assert main(["--check", "05"], notebooks) == 1
    said = capsys.readouterr().err
    for number, cell in (("98,765", "1"), ("98,766", "1"), ("98,767", r"\d+")):
        line = text.count("\n", 0, text.index(number)) + 1
        assert re.search(rf"{stem}.py, line {line}: cell {cell} states {number}, which no run fills in", said), said
