"""An edition follows its sources: what is missing, stale, orphaned or wrong is named; its code is the English one."""

import json
import re
import shutil
from pathlib import Path

import pytest

from qlora_lab import colab
from qlora_lab.classroom.build import main
from qlora_lab.classroom.grading.hand_in import course_checks, read_notebook
from qlora_lab.classroom.languages import edition
from qlora_lab.classroom.languages.entries import same_code
from qlora_lab.classroom.languages.rules import broken_bold
from qlora_lab.classroom.outputs import code_cells
from qlora_lab.classroom.source import REPOSITORY
from tests.labels import labels

NOTEBOOKS = REPOSITORY / "notebooks"
SOURCE = '''\
# %% [markdown]
# # 99 · What does a demo cost?
#
# It takes {{a + 1}} of {{7}} bytes.
# See [lesson 05](05_double_quantization.ipynb) and [the page](../docs/x.md), [here](99_demo.ipynb), `x = 5`.
#
# | you need | |
# |---|---|
# | time | 5 minutes |

# %% machinery "A table of numbers"
a = 2  # bytes
print(a)

# %%
def twice(x):
    """The number, two times."""
    ### BEGIN SOLUTION (about 1 line)
    return 2 * x  # twice as much
    ### END SOLUTION

# %%
check_ = twice(a)

# %% [markdown]
# <details><summary>Hint</summary>Add it to itself.</details>

# %% [markdown]
# The end.
'''
CHINESE = {
    "99 · What": """\
# 99 · 示範要花多少？

{{7}} 個位元組裡占 {{a + 1}} 個。
請看[第 05 課](05_double_quantization.ipynb)和[那一頁](../docs/x.md)，[這裡](99_demo.ipynb)，`x = 5`。

| 你需要 | |
|---|---|
| 時間 | 5 分鐘 |""",
    "A table": "數字表",
    "bytes": "位元組",
    "The number": "這個數的兩倍。",
    "twice as": "兩倍",
    "<details>": "<details><summary>提示</summary>自己加自己。</details>",
    "The end": "結束。",
}


def write_source(notebooks: Path, source: str = SOURCE) -> None:
    (notebooks / "source" / "99_demo.py").write_text(source, encoding="utf-8")


def prose(notebooks: Path) -> Path:
    return notebooks / "source" / "zh-TW" / "99_demo.md"


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def fill(notebooks: Path) -> None:
    """Write the translations below their English texts."""
    lines = []
    for line in prose(notebooks).read_text(encoding="utf-8").split("\n\n%% "):
        english = next(text for text in CHINESE if re.search(rf"^% #* ?{re.escape(text)}", line, re.MULTILINE))
        lines.append(f"{line.rstrip()}\n{CHINESE[english]}")
    prose(notebooks).write_text("\n\n%% ".join(lines) + "\n", encoding="utf-8")


def pretend_to_run(path: Path, text: str = "2\n") -> None:
    """Give a notebook the outputs of a run."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for number, cell in enumerate(code_cells(notebook), start=1):
        shown = (
            [{"output_type": "stream", "name": "stdout", "text": text}] if "print" in "".join(cell["source"]) else []
        )
        cell |= {"execution_count": number, "outputs": [] if number == 1 else shown}
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture
def notebooks(tmp_path) -> Path:
    """A course of one lesson, built in English and in Chinese; nothing is run."""
    notebooks = tmp_path / "notebooks"
    (notebooks / "source" / "zh-TW").mkdir(parents=True)
    write_source(notebooks)
    (notebooks / "source" / "99_demo.json").write_text('[["{{a + 1}}", "3"], ["{{7}}", "7"]]', encoding="utf-8")
    for name in ("terms.json", "common.labels.json"):
        shutil.copy(NOTEBOOKS / "source" / "zh-TW" / name, notebooks / "source" / "zh-TW")
    (notebooks / "source" / "zh-TW" / "edition.json").write_text('{"lessons": ["99_demo"]}', encoding="utf-8")
    assert main([], notebooks) == 0
    for path in notebooks.glob("**/*.ipynb"):
        pretend_to_run(path)
    assert main(["--language", "zh-TW", "--extract"], notebooks) == 0
    fill(notebooks)
    assert main(["--language", "zh-TW"], notebooks) == 0
    return notebooks


def told(notebooks: Path, capsys, *arguments: str) -> list[str]:
    """What the check says."""
    capsys.readouterr()
    code = main(["--check", *arguments], notebooks)
    lines = capsys.readouterr().err.splitlines()
    assert code == bool(lines)
    return lines


def sources(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def test_an_edition_in_step_says_nothing_and_is_the_english_one_in_other_words(notebooks, capsys):
    assert told(notebooks, capsys) == told(notebooks, capsys, "--language", "zh-TW") == []
    title, setup, table, stub, check, hint, solution, end = sources(notebooks / "zh-TW" / "99_demo.ipynb")
    assert title.startswith("# 99 · 示範要花多少？\n\n7 個位元組裡占 3 個。")  # in another order
    assert "(../05_double_quantization.ipynb)和[那一頁](../../docs/x.md)" in title  # the edition has no lesson 05
    assert "(99_demo.ipynb)" in title  # but this one
    assert '"notebooks", "zh-TW"' in setup and colab.cell(colab.ADDRESS, "zh-TW") == setup
    assert table == "# @title 數字表\na = 2  # 位元組\nprint(a)"
    assert stub == 'def twice(x):\n    """這個數的兩倍。"""\n    ...  # 你的程式碼（約 1 行）'
    assert check == "check_ = twice(a)" and end == "結束。" and "自己加自己" in hint
    assert "<summary>解答</summary>" in solution and "return 2 * x  # 兩倍" in solution
    solved = sources(notebooks / "zh-TW" / "solutions" / "99_demo.ipynb")
    assert solved[3].endswith("return 2 * x  # 兩倍") and "(../../solutions/05_double_quantization.ipynb)" in solved[0]
    english, chinese = (
        json.loads((notebooks / folder / "99_demo.ipynb").read_text(encoding="utf-8"))["cells"]
        for folder in ("", "zh-TW")
    )
    assert [cell["id"] for cell in english] == [cell["id"] for cell in chinese]
    assert "".join(chinese[2]["outputs"][0]["text"]) == "2\n" and chinese[2]["execution_count"] == 2  # borrowed


def test_outputs_of_its_own_are_kept(notebooks):
    pretend_to_run(notebooks / "zh-TW" / "99_demo.ipynb", "兩\n")
    assert main(["--language", "zh-TW", "99"], notebooks) == 0
    cells = code_cells(json.loads((notebooks / "zh-TW" / "99_demo.ipynb").read_text(encoding="utf-8")))
    assert "".join(cells[1]["outputs"][0]["text"]) == "兩\n"


def test_a_changed_sentence_makes_its_entry_stale_until_it_is_mended(notebooks, capsys):
    write_source(notebooks, SOURCE.replace("Add it to itself", "Add the number to itself"))
    before = prose(notebooks).read_text(encoding="utf-8")
    (old,) = re.findall(r"%% (\w+) markdown\n% <details>", before)
    (line,) = [line for line in told(notebooks, capsys) if "99_demo.md" in line]
    assert "zh-TW" in line and "stale" in line and old in line
    assert main(["--language", "zh-TW", "--extract", "99"], notebooks) == 0
    assert "0 missing, 1 stale, 0 orphans" in capsys.readouterr().out
    text = prose(notebooks).read_text(encoding="utf-8")
    entry = next(part for part in text.split("\n\n") if "stale" in part)
    new, *lines = entry.splitlines()
    assert new.endswith("markdown stale") and old not in new
    assert lines == [
        "%- <details><summary>Hint</summary>Add it to itself.</details>",
        "% <details><summary>Hint</summary>Add the number to itself.</details>",
        CHINESE["<details>"],
    ]
    assert [line for line in told(notebooks, capsys) if "99_demo.md" in line and "delete the word" in line]
    change(prose(notebooks), " stale", "")
    assert main([], notebooks) == main(["--language", "zh-TW", "--extract"], notebooks) == 0
    assert "%-" not in prose(notebooks).read_text(encoding="utf-8")
    assert main(["--language", "zh-TW"], notebooks) == 0 and told(notebooks, capsys) == []


def test_a_new_text_is_missing_and_one_that_is_gone_is_an_orphan(notebooks, capsys):
    write_source(notebooks, SOURCE.replace("# The end.", "# Something else, which resembles nothing."))
    lines = [line for line in told(notebooks, capsys) if "99_demo.md" in line]
    assert [": missing" in line for line in lines] == [True, False] and ": orphaned" in lines[1]
    assert main(["--language", "zh-TW", "--extract", "99"], notebooks) == 0
    assert prose(notebooks).read_text(encoding="utf-8").endswith(" markdown orphan\n% The end.\n結束。\n")
    write_source(notebooks)  # back again
    assert main(["--language", "zh-TW", "--extract", "99"], notebooks) == 0
    assert told(notebooks, capsys) == []


def test_other_line_breaks_change_nothing(notebooks, capsys):
    write_source(notebooks, SOURCE.replace("Add it to itself.", "Add it\n# to itself."))
    assert [line for line in told(notebooks, capsys) if "zh-TW" in line and ".md" in line] == []


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("{{a + 1}}", "{{a + 2}}", "lacks the value {{a + 1}}"),
        ("{{a + 1}}", "3", "has the number 3, which the English text does not have"),
        ("| 5 分鐘", "| 6 分鐘", "has the number 6"),
        ("| 5 分鐘", "| 幾分鐘", "lacks the number 5"),
        ("(05_double_quantization.ipynb)", "(06_lora.ipynb)", "lacks the link 05_double_quantization.ipynb"),
        ("`x = 5`", "`x = 7`", "has the code `x = 7`"),
        ("\n| 時間 | 5 分鐘 |", "\n時間 5 分鐘", "has 2 rows of tables, the English text 3"),
        ("自己加自己", "用算法加自己", "has 算法: algorithm is 演算法"),
        ("結束。", "结束。", "has 结, which is no sign of Traditional Chinese"),
        ("結束。", "The end.", "is not translated"),
        ("結束。", "**結束。**了", "has bold that Markdown does not see"),
    ],
)
def test_what_a_translation_must_keep(notebooks, capsys, before, after, says):
    change(
        prose(notebooks), f"\n{before}" if before[0] == "結" else before, f"\n{after}" if before[0] == "結" else after
    )
    lines = told(notebooks, capsys)
    assert all(re.search(r"zh-TW/99_demo\.md, \w{8}: ", line) for line in lines)
    assert [line for line in lines if says in line], lines


def test_powers_in_a_value_are_no_bold():
    """Else lesson 03 could not be translated."""
    text = "**甲：** 兩者是 {{a**2:.3f}} 和 **{{b**2}}，\n乙。** 丙"
    assert list(broken_bold(text)) == [] and len(list(broken_bold(text.replace("** 丙", "**丙")))) == 1


def test_a_docstring_that_would_become_code_is_refused(notebooks, capsys):
    change(prose(notebooks), "這個數的兩倍。", '兩倍"""\nx = 1')
    assert main(["--language", "zh-TW"], notebooks) == 1
    assert "99_demo.md: a comment or docstring becomes code in" in capsys.readouterr().err


def test_what_the_edition_lacks_or_has_too_much_is_named(notebooks, capsys):
    folder = notebooks / "source" / "zh-TW"
    (folder / "98_other.md").write_text("", encoding="utf-8")
    (notebooks / "zh-TW" / "97_old.ipynb").write_text("{}", encoding="utf-8")
    change(folder / "edition.json", '"99_demo"', '"99_demo", "96_gone"')
    change(folder / "common.labels.json", '"Solution"', '"Solutions"')
    lines = told(notebooks, capsys)
    for name, says in (
        ("98_other.md", "belongs to no lesson"),
        ("97_old.ipynb", "belongs to no lesson"),
        ("edition.json", "96_gone, which is no lesson"),
        ("common.labels.json, 'Solution'", "missing"),
        ("common.labels.json, 'Solutions'", "orphaned"),
    ):
        assert [line for line in lines if name in line and says in line], (name, lines)
    prose(notebooks).unlink()
    assert [line for line in told(notebooks, capsys, "99") if "99_demo.md is missing" in line]


def test_a_notebook_out_of_step_is_named(notebooks, capsys):
    change(notebooks / "zh-TW" / "99_demo.ipynb", "數字表", "數目表")
    (line,) = told(notebooks, capsys)
    assert str(Path("zh-TW/99_demo.ipynb")) in line and "differs from its source in the source of cell 3" in line


@pytest.mark.parametrize("arguments", [["--extract"], ["--language", "zh-TW", "--numbers"]])
def test_flags_that_do_not_go_together(notebooks, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments, notebooks)
    assert exit_.value.code == 2


def test_a_language_that_there_is_not(notebooks, capsys):
    assert main(["--language", "fr"], notebooks) == 1
    assert "there is no edition in fr (there are: zh-TW)" in capsys.readouterr().err


STORED = sorted(path for each in edition.editions(NOTEBOOKS) for path in (NOTEBOOKS / each.language).rglob("*.ipynb"))


def test_there_are_two_notebooks_for_each_lesson():
    lessons = sum(len(each.lessons()) for each in edition.editions(NOTEBOOKS))
    assert len([path for path in STORED if ".ipynb_checkpoints" not in path.parts]) == 2 * lessons > 0


def card(path: Path) -> dict[str, float]:
    """What the notebook promises, in a language in which the tests find it."""
    return labels(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.relative_to(NOTEBOOKS).as_posix())
def test_the_code_of_a_stored_notebook_is_the_english_one(path):
    """Up to comments and docstrings; the set-up cell knows its folder."""
    language, *place = path.relative_to(NOTEBOOKS).parts
    ours, theirs = (
        code_cells(json.loads(each.read_text(encoding="utf-8"))) for each in (path, NOTEBOOKS.joinpath(*place))
    )
    assert [cell["id"] for cell in ours] == [cell["id"] for cell in theirs]
    assert card(path) == card(NOTEBOOKS.joinpath(*place))
    for cell, english in zip(ours, theirs, strict=True):
        code, wanted = "".join(cell["source"]), "".join(english["source"])
        if wanted.startswith(colab.TITLE):
            assert code == colab.cell(colab.ADDRESS, language)
        else:
            assert same_code(code, wanted), code


def test_a_translated_notebook_can_be_handed_in():
    """The grader knows cells by their ids, which are the same in all languages."""
    notebook = read_notebook(NOTEBOOKS / "zh-TW" / "solutions" / "05_double_quantization.ipynb")
    name, checks = course_checks(notebook)
    assert name == "05_double_quantization" and len(checks) == 3
