"""One folder a lesson: it is found without being listed, it is whole, and its notebook alone uses it."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab.classroom import checks, lessons
from qlora_lab.classroom.source import NAME, exercises_of, find_all, room

FOLDER = Path(lessons.__file__).parent
ROOT = FOLDER.parents[2]
LESSONS = sorted((path.parent.name for path in FOLDER.glob("*/__init__.py")), key=lambda n: (n[0] == "d", n))
SOURCES = {room(path.stem): path for path in find_all(ROOT / "notebooks") if NAME.fullmatch(path.stem)}


def functions(path: Path, beginning: str) -> list[str]:
    """Names of the functions at the top of a module that begin so, as they are written there."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith(beginning)]


def test_each_notebook_has_a_folder_and_each_folder_a_notebook():
    assert list(SOURCES) == LESSONS


def test_the_way_back_to_the_path_names_the_lesson_by_its_title():
    texts = {lesson: path.read_text(encoding="utf-8") for lesson, path in SOURCES.items()}
    back = re.compile(r"^# \*\*Back to the path:\*\* \[(.+?)\]\((\w+)\.ipynb\)", re.MULTILINE)
    links = [link for text in texts.values() for link in back.findall(text)]
    titles = {lesson: re.findall(r"^# # (.+)$", text, re.MULTILINE)[0] for lesson, text in texts.items()}
    assert len(links) >= 6 and links == [(titles[room(stem)], stem) for _, stem in links]


def test_every_check_that_a_lesson_defines_is_on_the_page_once():
    """Functions that the decorator was forgotten on, and names that two lessons use, show here."""
    defined = {lesson: functions(FOLDER / lesson / "checks.py", "check_") for lesson in LESSONS}
    assert list(checks.CHECKS) == [name for lesson in LESSONS for name in defined[lesson]]
    for lesson, names in defined.items():
        module = importlib.import_module(f"{lessons.__name__}.{lesson}.checks")
        for name in names:
            assert getattr(checks, name) is getattr(module, name)
            assert checks.CHECKS[name].exercise.id.split(".")[0] == exercises_of(SOURCES[lesson].stem)


def test_answers_are_mirrored():
    mirrored = {path.parent.name for path in Path(__file__).parent.glob("lessons/*/answers.py")}
    assert mirrored == set(LESSONS)


NEW_CHECKS = """
from qlora_lab.classroom.judging import Verdict, exercise, right, wrong


@exercise("99.1", "half of 84", item="memory", points=1, todo="halve it")
def check_half(answer) -> Verdict:
    return right("As found.") if answer == 42 else wrong("Halve it.")


def no_check(answer): ...
"""
TAKE_THEM = """
import sys
from qlora_lab.classroom import lessons
lessons.__path__.append(sys.argv[1])
from qlora_lab.classroom import checks
from qlora_lab.classroom.checks import *
check_half(41), check_half(42)
path = progress().parts()[0]  # it is the last of the path: the deep dives come after it
print(progress().summary(), path[-1].title, list(checks.CHECKS)[len(path) - 1], hasattr(checks, "no_check"))
"""


def test_a_lesson_that_is_added_is_found(tmp_path):
    lesson = tmp_path / "lessons" / "n99"
    lesson.mkdir(parents=True)
    (lesson / "__init__.py").write_text("")
    (lesson / "checks.py").write_text(NEW_CHECKS)
    env = os.environ | {"QLORA_LAB_PROGRESS": str(tmp_path / "progress.json"), "QLORA_LAB_STRICT": ""}
    command = [sys.executable, "-c", TAKE_THEM, str(lesson.parent)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    path, _ = checks.progress().parts()
    points = sum(exercise.points for exercise in path)
    assert done.stdout.splitlines() == [
        "✗ 99.1 Halve it.",
        "✓ 99.1 As found.",
        f"1 of {len(path) + 1} exercises solved, 1 of {points + 1} points half of 84 check_half False",
    ]


def test_a_name_that_no_lesson_has_is_an_import_error():
    with pytest.raises(ImportError, match="cannot import name 'check_level_use' from 'qlora_lab.classroom.checks'"):
        exec("from qlora_lab.classroom.checks import check_level_use")


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lessons_folder_is_its_notebooks_own(lesson):
    """What two notebooks use is not in a lesson's folder; what is in it, its notebook uses."""
    source = SOURCES[lesson].read_text(encoding="utf-8")
    assert set(re.findall(r"classroom\.lessons\.(\w+)", source)) <= {lesson}
    used = functions(FOLDER / lesson / "checks.py", "check_")
    if (FOLDER / lesson / "figures.py").exists():
        used += functions(FOLDER / lesson / "figures.py", "plot_")
    assert [name for name in used if not re.search(rf"\b{name}\(", source)] == []
