"""A new lesson, exercise and data set are whole as they are written, in a copy of the course; a lesson can go."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.classroom import scaffold
from qlora_lab.classroom.__main__ import main
from qlora_lab.errors import UserError
from qlora_lab.training.data import read_chats


@pytest.fixture
def course(tmp_path, copy_course) -> Path:
    copy_course(tmp_path)
    return tmp_path


def python(course: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in the copy, which then imports the copy's package."""
    env = os.environ | {"PYTHONPATH": str(course), "QLORA_LAB_PROGRESS": str(course / "progress.json")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=course, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_new_lesson_is_whole(course):
    new = ["-m", "qlora_lab.classroom", "new"]
    done = python(course, *new, "lesson", "98_bytes", "--title", "what does it cost?", "--write-only")
    assert done.returncode == 0, done.stderr
    assert "tests/classroom/lessons/n98/answers.py" in done.stdout.splitlines()
    arguments = ["--title", "bytes of weights", "--item", "memory", "--points", "2", "--write-only"]
    for lesson, name in (("98", "count_bytes"), ("98", "count_again"), ("05", "count_more")):
        done = python(course, *new, "exercise", lesson, name, *arguments)
        assert done.returncode == 0, done.stderr
    assert "**Exercise 98.2 ●●○ (3 minutes).** Bytes of" in (course / "notebooks/source/98_bytes.py").read_text()
    assert '@exercise("5.4", "bytes of weights", item="memory", points=2' in (
        course / scaffold.LESSONS / "n05/checks.py"
    ).read_text(encoding="utf-8")
    run = "from qlora_lab.classroom import scaffold as s; s.run(s.find_lesson('98', s.REPOSITORY), record=True)"
    done = python(course, "-c", run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (course / "notebooks/solutions/98_bytes.ipynb").read_text(encoding="utf-8").count("✓ 98.") == 2
    # `make check` ...
    assert python(course, "-m", "qlora_lab.classroom.build", "--check", "98").stderr == ""
    written = ["notebooks/source/98_bytes.py", "notebooks/source/05_double_quantization.py"]
    written += [f"{room}/{n}" for room in (scaffold.LESSONS, scaffold.ANSWERS) for n in ("n98", "n05")]
    for command in (["check"], ["format", "--check"]):
        done = python(course, "-m", "ruff", *command, *written)
        assert done.returncode == 0, done.stdout
    # ... and the tests: of lessons, of all answers, of the cards
    files = ["tests/classroom/test_lessons.py", "tests/classroom/test_checks.py", "tests/test_labels.py"]
    chosen = "lesson or answers or every_check or count_ or says or say or item"
    done = python(course, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", *files, "-k", chosen)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"check_count_\w+-?\S*\] PASSED", done.stdout)) >= 3 * 8
    assert "say_what_was_measured[98_bytes] PASSED" in done.stdout


def test_names_that_do_not_fit_are_told(course):
    cases = [
        (lambda: scaffold.new_lesson("mine", "what?", course), "'mine' is no name of a lesson: two digits"),
        (lambda: scaffold.new_lesson("05_mine", "what?", course), "the number is taken by 05_double_quantization"),
        (lambda: scaffold.new_lesson("98_mine", "a | b", course), "'a | b' is no title"),
        (lambda: scaffold.new_exercise("77", "f", "t", "memory", 1, course), "'77' is no lesson: there are 00_start"),
        (lambda: scaffold.new_exercise("0", "f", "t", "memory", 1, course), "'0' is no lesson: there are 00_start"),
        (lambda: scaffold.new_exercise("05", "F", "t", "memory", 1, course), "'F' is no name of a function"),
        (lambda: scaffold.new_exercise("05", "f", "{t}", "memory", 1, course), "'{t}' is no title"),
        (lambda: scaffold.new_exercise("05", "f", "t", "speed", 1, course), "the checklist has no item 'speed'"),
        (
            lambda: scaffold.new_exercise("05", "bnb_config", "t", "memory", 1, course),
            "n01 has a check_bnb_config already",
        ),
        (lambda: scaffold.new_dataset("orders", [], "me", course), "'orders' is taken"),
        (lambda: scaffold.new_dataset("mine", [], "", course), "where the data is from and under which licence"),
        (lambda: scaffold.new_dataset("mine", [course / "a.csv"], "me", course), "a.csv is not named as JSON lines"),
    ]
    before = {path: path.read_bytes() for path in course.rglob("*.py")}
    for call, told in cases:
        with pytest.raises(UserError, match=re.escape(told)):
            call()
    assert {path: path.read_bytes() for path in course.rglob("*.py")} == before
    assert not (course / "data" / "mine").exists()


def test_a_new_data_set_is_listed(course):
    (course / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(UserError, match="line 1"):
        scaffold.new_dataset("mine", [course / "train.jsonl"], "me", course)
    scaffold.new_dataset("sums", [], "written by hand, MIT", course)
    assert "| `sums/` | chats: 2 `test`, 2 `train` | written by hand, MIT |" in (course / "data/README.md").read_text()
    assert read_chats(course / "data" / "sums", "test")[1][1]["content"] == "48"
    runpy.run_path(str(course / "tests" / "test_data_files.py"))["test_sums_in_the_readme"]()


def test_a_dropped_lesson_leaves_nothing_but_what_speaks_of_it(course):
    with pytest.raises(UserError, match="only the beginning of dive_f_why_is_it_slow"):
        scaffold.drop_lesson("dive_f", course)
    lines = scaffold.drop_lesson("dive_f_why_is_it_slow", course)
    assert any(line.startswith("README.md:") for line in lines) is False
    assert any(line.startswith("notebooks/source/00_start_here.py:") and "dive_f" in line for line in lines)
    assert not list(course.rglob("*dive_f_why_is_it_slow*")) and not list(course.rglob("dive_f"))
    assert "dive_f_why_is_it_slow" not in json.loads((course / scaffold.RECORD).read_text())["notebooks"]
    files = ["tests/classroom/test_lessons.py", "tests/classroom/test_checks.py"]  # both are collected
    chosen = "each_notebook or mirrored or on_the_page"
    done = python(course, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files, "-k", chosen)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


def test_the_command_line_says_what_is_wrong(capsys):
    assert main(["new", "lesson", "mine", "--title", "what?"]) == 2
    assert "error: 'mine' is no name of a lesson" in capsys.readouterr().err
    assert main(["new", "exercise", "04", "f", "--title", "t", "--item", "speed"]) == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err
    assert main(["drop", "7"]) == 2
    assert "error: '7' is no lesson: there are 00_start_here, 01" in capsys.readouterr().err
