"""Every exercise check refuses its stub and the mistakes it names, and accepts a right answer; progress is kept."""

import datetime
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_lab.classroom import checks
from qlora_lab.classroom.checks import check_bytes_of_weights, progress
from qlora_lab.classroom.judging import (
    CHECKLIST,
    Exercise,
    ExerciseUnsolved,
    Progress,
    progress_path,
    record,
)


def today() -> str:
    return datetime.date.today().isoformat()


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(tmp_path / "lab" / "progress.json"))
    monkeypatch.delenv("QLORA_LAB_STRICT", raising=False)
    return tmp_path / "lab" / "progress.json"


# lessons/n01/answers.py has RIGHT, pairs of a check and its arguments, and WRONG: a check, an answer, a piece of the
# message.
ANSWERS = [runpy.run_path(str(path)) for path in sorted((Path(__file__).parent / "lessons").glob("*/answers.py"))]
RIGHT = [case for answers in ANSWERS for case in answers["RIGHT"]]
WRONG = [case for answers in ANSWERS for case in answers["WRONG"]]
ALL_CHECKS = list({check: None for check, _ in RIGHT})
WITH_A_KERNEL = next((answers for answers in ANSWERS if "KERNEL_STUB" in answers), {"TRITON": False})
ANOTHER, ANSWER = next(case for case in RIGHT if case[0] is not check_bytes_of_weights)  # to solve a second exercise
KERNEL_CHECK, KERNEL_STUB = WITH_A_KERNEL.get("KERNEL_STUB", (None, None))  # the one that takes a Triton kernel
CHECKS_OF_FUNCTIONS = [
    c
    for c in ALL_CHECKS
    if callable(dict(RIGHT)[c][0]) and not isinstance(dict(RIGHT)[c][0], type) and c is not KERNEL_CHECK
]
TRITON = WITH_A_KERNEL["TRITON"]


@pytest.fixture(autouse=True)
def skip_kernels_without_triton(request):
    case = getattr(request.node, "callspec", None)
    if not TRITON and case and case.params.get("check") is KERNEL_CHECK:
        pytest.skip("no Triton here")


def stub(*arguments): ...  # your code here


def unpacked_stub(*arguments):
    input_ids = ...
    labels = ...
    return input_ids, labels


def broken(*arguments):
    nothing = 0
    return 1 / nothing


def others(check) -> tuple:
    """What a check takes besides the answer."""
    return dict(RIGHT)[check][1:]


def name(value):
    return getattr(value, "__name__", None)


def test_every_check_is_tested_here():
    assert {check.exercise for check in ALL_CHECKS} == set(checks.all_exercises())
    for check in ALL_CHECKS:
        assert sum(check is wrong_check for wrong_check, *_ in WRONG) >= 2, check.__name__
    ids = [exercise.id for exercise in checks.all_exercises()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("check, answer", RIGHT, ids=name)
def test_right_answer(check, answer, capsys):
    assert check.verdict(*answer).state == "right"
    assert capsys.readouterr().out == ""  # the verdict alone shows and records nothing
    assert not progress().solved

    assert check(*answer) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"✓ {check.exercise.id} ")
    assert progress().solved == {check.exercise.id}


@pytest.mark.parametrize("check, answer, told", WRONG, ids=name)
def test_wrong_answer_is_told_its_mistake(check, answer, told, capsys):
    answer = answer if isinstance(answer, tuple) else (answer,)
    assert check(*answer) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"✗ {check.exercise.id} ")
    assert told in lines[0]
    assert not progress().solved


@pytest.mark.parametrize("check", ALL_CHECKS, ids=name)
@pytest.mark.parametrize("answer", [None, ..., (..., ...), {"a": ..., "b": 1}], ids=repr)
def test_missing_answer(check, answer, capsys):
    check(answer, *others(check))
    assert capsys.readouterr().out.startswith(f"· {check.exercise.id} not attempted yet: ")
    assert not progress().solved


def not_implemented(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize("check", CHECKS_OF_FUNCTIONS, ids=name)
@pytest.mark.parametrize("answer", [stub, unpacked_stub, not_implemented], ids=name)
def test_function_that_is_a_stub(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith(f"· {check.exercise.id} not attempted yet: ")


@pytest.mark.parametrize("check", CHECKS_OF_FUNCTIONS, ids=name)
def test_function_that_raises(check, capsys):
    check(broken)
    line = capsys.readouterr().out
    assert line.startswith(f"✗ {check.exercise.id} broken(")
    assert "raised ZeroDivisionError: division by zero, in the line `return 1 / nothing`" in line


@pytest.mark.parametrize("check", [c for c in CHECKS_OF_FUNCTIONS if c.__name__ != "check_accumulate"], ids=name)
def test_function_that_gives_the_first_right_result_for_ever(check):
    """So every check asks more than once. (What `accumulate` does shows in the model, not in a result.)"""
    function, *rest = dict(RIGHT)[check]
    results = []
    assert check.verdict(lambda *given: results.append(function(*given)) or results[-1], *rest).state == "right"
    assert len(results) > 1
    assert check.verdict(lambda *given: results[0], *rest).state == "wrong"


def parse(text):
    return json.loads(text)["total"]


def test_the_line_shown_is_the_learners_own_and_the_innermost():
    message = check_bytes_of_weights.verdict(lambda parameters, bits: parse("{")).message
    assert "raised JSONDecodeError: " in message
    assert message.endswith('in the line `return json.loads(text)["total"]`')


@pytest.mark.parametrize("check", ALL_CHECKS, ids=name)
def test_no_answer_makes_a_check_raise(check):
    class Hostile:
        def __getattr__(self, attribute):
            raise OSError("no\nway")

    junk = [0, 3.5, "text", b"", [], {}, (1, 2), object(), int, print, torch.zeros(2, 2), float("nan"), 10**400]
    junk += [lambda *_, value=value: value for value in [*junk, Hostile(), (Hostile(), 1), ([[]], None)]]
    for answer in [*junk, Hostile()]:
        verdict = check.verdict(answer, *others(check))
        assert verdict.state in ("open", "wrong") and verdict.message


@pytest.mark.parametrize("check", ALL_CHECKS, ids=name)
def test_strict_mode_raises_unless_right(check, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_LAB_STRICT", "1")
    for answer in (None, "wrong"):
        with pytest.raises(ExerciseUnsolved, match=check.exercise.id):
            check(answer, *others(check))
        assert check.exercise.id in capsys.readouterr().out  # shown all the same
    check(*dict(RIGHT)[check])
    assert progress().solved == {check.exercise.id}


@pytest.mark.skipif(not TRITON, reason="no Triton here")
def test_kernel_that_is_a_stub(capsys):
    KERNEL_CHECK(KERNEL_STUB)
    assert capsys.readouterr().out.startswith(f"· {KERNEL_CHECK.exercise.id} not attempted yet: ")


@pytest.mark.skipif(KERNEL_CHECK is None, reason="the lesson with a kernel was dropped")
def test_without_triton_its_exercise_says_so_and_nothing_fails(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    monkeypatch.setenv("QLORA_LAB_STRICT", "1")
    KERNEL_CHECK(stub)
    line = capsys.readouterr().out
    assert line.startswith("· F.4 cannot be done here: Triton is not installed") and line.count("\n") == 1
    assert not progress().solved


def test_an_optional_exercise_does_not_hold_its_item_up(tmp_path):
    whole = [Exercise(f"{n}.1", "x", "memory", 1) for n in (0, 1, 8)]
    more = Progress((*whole, Exercise("1.2", "y", "memory", 1, optional=True)), frozenset(e.id for e in whole))
    assert more.rows()[4][:3] == ("☑", CHECKLIST["memory"], f"{len(whole)} of {len(whole) + 1}")
    assert "optional" not in more.export(tmp_path / "mine.json").read_text()


def test_an_exercise_belongs_to_the_checklist():
    with pytest.raises(ValueError, match="1.1.*'speed'"):
        Exercise("1.1", "a title", "speed", 1)


# --- Progress -----------------------------------------------------------------------------------------------------


def in_another_process(code: str, path: Path) -> subprocess.Popen:
    root = Path(checks.__file__).parents[2]
    env = os.environ | {"QLORA_LAB_PROGRESS": str(path), "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-c", f"from qlora_lab.classroom.checks import *; {code}"], env=env)


def test_progress_survives_a_restart_and_a_later_mistake(progress_file):
    assert in_another_process("check_bytes_of_weights(lambda p, bits: p * bits / 8)", progress_file).wait() == 0
    assert progress().solved == {"0.1"}
    check_bytes_of_weights(stub)
    ANOTHER(*ANSWER)
    assert progress().solved == {"0.1", ANOTHER.exercise.id}


RACER = """
import pathlib, time
from qlora_lab.classroom import judging

def everyone(name, seconds):  # wait until both are so far
    folder.joinpath(f"{name}-MINE").touch()
    end = time.monotonic() + seconds
    while len(list(folder.glob(f"{name}-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)

def read_slowly(path):  # without a lock both read before either writes
    solved = read(path)
    everyone("read", 1)
    return solved

folder, read, judging.read_progress = pathlib.Path("FOLDER"), judging.read_progress, read_slowly
everyone("there", 60)
judging.record("MINE")
"""


def test_notebooks_may_record_at_the_same_time(progress_file, tmp_path):
    """Two processes, each slow between reading the file and writing it: neither's exercise is lost."""
    code = RACER.replace("FOLDER", str(tmp_path))
    racers = [in_another_process(code.replace("MINE", name), progress_file) for name in ("1.1", "2.2")]
    assert [racer.wait(120) for racer in racers] == [0, 0]
    assert len(list(tmp_path.glob("there-*"))) == len(list(tmp_path.glob("read-*"))) == 2
    assert progress().solved == {"1.1", "2.2"}


@pytest.mark.parametrize(
    "text", ["", '{"solved": {"0.1"', "[]", "{}", '{"solved": 3}', '{"solved": {"0.1": 1}}', "\x00"]
)
def test_a_damaged_file_is_kept_aside(text, progress_file, capsys):
    progress_file.parent.mkdir()
    for n in (1, 2):
        progress_file.write_text(text)
        ANOTHER(*ANSWER)
        aside = progress_file.with_name(f"progress.damaged-{n}.json")
        assert aside.read_text() == text
        assert f"was damaged: counting starts anew, and the old file is kept as {aside}" in capsys.readouterr().out
        assert json.loads(progress_file.read_text()) == {"solved": {ANOTHER.exercise.id: today()}}


def test_progress_of_the_first_edition_is_kept_aside(progress_file, capsys):
    """Its lessons had other numbers: "4.1" was another exercise."""
    progress_file.parent.mkdir()
    progress_file.write_text('{"solved": ["4.1"]}')
    ANOTHER(*ANSWER)
    aside = progress_file.with_name("progress.first-edition-1.json")
    assert aside.read_text() == '{"solved": ["4.1"]}' and progress().solved == {ANOTHER.exercise.id}
    assert f"whose lessons had other numbers: counting starts anew, and the old file is kept as {aside}" in (
        capsys.readouterr().out
    )


def test_what_was_recorded_before_survives_a_full_disk(progress_file, monkeypatch, capsys):
    def no_space(*paths):
        raise OSError(28, "No space left on device")

    record("1.1")
    monkeypatch.setattr(os, "replace", no_space)
    record("2.2")
    assert json.loads(progress_file.read_text()) == {"solved": {"1.1": today()}}
    assert "could not be saved ([Errno 28] No space left on device)" in capsys.readouterr().out


def test_progress_that_cannot_be_saved_or_read_is_no_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(tmp_path / "file" / "progress.json"))
    ANOTHER(*ANSWER)
    assert progress().solved == set()
    shown = capsys.readouterr().out
    assert (
        shown.startswith(f"✓ {ANOTHER.exercise.id}") and "could not be saved" in shown and "could not be read" in shown
    )


def test_default_path_is_the_users_data_folder(monkeypatch):
    monkeypatch.setenv("QLORA_LAB_PROGRESS", "")
    assert progress_path().parts[-2:] == ("qlora-lab", "progress.json")


EXERCISES = (
    Exercise("1.1", "one", "memory", 1),
    Exercise("1.2", "two & a half", "memory", 3),
    Exercise("3.1", "three", "nf4", 2),
)


def test_progress_as_text():
    shown = repr(Progress(EXERCISES, frozenset({"1.1", "3.1", "9.9"}))).splitlines()
    assert shown[0] == "2 of 3 exercises solved, 3 of 6 points"
    assert len(shown) == 1 + len(CHECKLIST)
    assert [line.split("  ")[0][2:] for line in shown[1:]] == list(CHECKLIST.values())
    assert [line for line in shown if line.startswith("☑")] == [shown[2]] and "1 of 1" in shown[2]
    assert "1 of 2" in shown[5] and shown[5].endswith("next: 1.2 two & a half")
    assert shown[1].startswith("☐") and shown[1].endswith("no exercise yet")


def test_deep_dives_stand_apart():
    dives = (Exercise("A.1", "a", "memory", 3), Exercise("D.1", "d", "nf4", 3))
    progress = Progress((*EXERCISES, *dives), frozenset({"3.1", "D.1"}))
    lines = repr(progress).splitlines()
    assert lines[0] == progress.summary() == "1 of 3 exercises solved, 2 of 6 points"
    assert "0 of 2" in lines[5] and "1 of 1" in lines[2]  # items count what is on the path
    assert lines[-1].startswith("+ deep dives") and lines[-1].endswith("1 of 2")
    assert progress._repr_html_().count("<tr>") == 2 + len(CHECKLIST)


def test_progress_is_exported(tmp_path):
    exercises = (Exercise("0.1", "bytes, of weights", "memory", 1), Exercise("3.2", "level usage", "nf4", 2))
    progress = Progress(exercises, frozenset({"3.2"}))
    lines = progress.export(tmp_path / "mine.csv").read_text().splitlines()
    assert lines == [
        "id,title,item,points,solved",
        '0.1,"bytes, of weights",memory,1,False',
        "3.2,level usage,nf4,2,True",
    ]
    exported = json.loads(progress.export(str(tmp_path / "mine.json")).read_text())
    assert exported["summary"] == "1 of 2 exercises solved, 2 of 3 points"
    assert [exercise["solved"] for exercise in exported["exercises"]] == [False, True]
    with pytest.raises(ValueError, match=r"mine.txt: the name of an export ends in .csv or .json"):
        progress.export("mine.txt")


def test_progress_as_html():
    shown = Progress(EXERCISES, frozenset({"3.1"}))._repr_html_()
    assert shown.count("☑") == 1 and shown.count("☐") == 5
    assert "two &amp; a half" not in shown and "1.1 one" in shown  # only the next exercise is named
    assert "two &amp; a half" in Progress(EXERCISES, frozenset({"1.1"}))._repr_html_()
    assert "color" not in shown


def test_importing_is_light():
    code = "import sys; assert not {'torch', 'transformers', 'IPython', 'nbformat'} & set(sys.modules)"
    assert in_another_process(code, Path("unused")).wait() == 0
