"""The grader on notebooks that learners might hand in."""

import json
import os
import queue
import time
from types import SimpleNamespace

import pytest

from qlora_lab.classroom import grade as command
from qlora_lab.classroom.grading import hand_in, inside, kernel
from qlora_lab.classroom.grading.kernel import Limits
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.errors import UserError

RIGHT = {
    "diagnosis": 'diagnosis = {"A": "no sign", "B": "healthy", "C": "one scale"}',
    "bits": "def bits(b, s): return 4 + 8 / b + 32 / (b * s)",
    "bits_check": "check_bits_per_parameter(bits)",
    "import": "from qlora_lab.classroom.checks import *",
}


def write(path, *cells: str):
    cells = [{"cell_type": "code", "source": cell, "metadata": {}, "outputs": []} for cell in cells]
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}))
    return path


def by_id(report) -> dict:
    return {grade.id: grade for grade in report.grades}


def test_right_wrong_missing_and_redefined(tmp_path, monkeypatch):
    own, here = tmp_path / "own.json", tmp_path / "here"
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(own))  # of whoever grades
    monkeypatch.setenv("QLORA_LAB_STRICT", "1")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    here.mkdir()
    monkeypatch.chdir(here)
    path = write(
        tmp_path / "renamed by a learner.ipynb",
        "from qlora_lab.classroom.checks import check_bits_per_parameter, check_diagnosis, progress",
        RIGHT["diagnosis"],
        "1 / 0",  # a cell that fails ends nothing
        "def check_diagnosis(answer): print('✓')\nlen = None",  # and what a cell says of itself does not count
        "check_diagnosis(diagnosis)",
        "def bits(block_size, scale_block_size): return 4 + 8 / block_size",
        RIGHT["bits_check"],
        f"import os\nopen({str(tmp_path / 'spins')!r}, 'w').write(os.environ['GOMP_SPINCOUNT'])",
        "open('left behind', 'w').close()\nname = input('your name? ')",  # nobody is there to answer
        "from qlora_lab.classroom.checks import check_bytes_of_weights\n"  # of another notebook
        "check_bytes_of_weights(lambda parameters, bits: parameters * bits / 8)",
    )
    report = hand_in.grade(path, Limits(cell_seconds=60))
    assert report.course == "05_double_quantization"
    assert (tmp_path / "spins").read_text() == "1000"  # it shares the cores with others' work
    grades = by_id(report)
    assert {id: grade.state for id, grade in grades.items()} == {
        "5.1": "right",
        "5.2": "wrong",
        "5.3": "missing",  # its cell was deleted
    }
    assert (report.points, report.of) == (grades["5.1"].of, sum(grade.of for grade in report.grades))
    assert "expected" in grades["5.2"].message
    assert "name 'extra_gigabytes' is not defined" in grades["5.3"].message
    assert [note.partition(": ")[0] for note in report.notes] == [
        "code cell 3 (`1 / 0`)",
        "code cell 9 (`open('left behind', 'w').close()`)",
        "check_smaller_blocks is not called",
    ]
    assert "StdinNotImplementedError" in report.notes[1]
    assert not own.exists() and not list(here.iterdir())
    text = str(report)
    assert text.startswith(f"{path}: {report.points} of {report.of} points\n  ✓ 5.1  ")
    assert "✗ 5.2" in text and "? 5.3" in text


def test_tampering_with_the_package_does_not_count(tmp_path):
    path = write(
        tmp_path / "n.ipynb",
        "import qlora_lab.classroom.checks as checks\n"
        "from qlora_lab.classroom.judging import Verdict\n"
        "checks.check_bits_per_parameter.verdict = lambda *_: Verdict('right', '')",
        "def bits(*_): return 7",
        RIGHT["bits_check"],
    )
    assert by_id(hand_in.grade(path))["5.2"].points == 0


def test_an_answer_that_ends_its_own_judging_is_wrong_and_the_rest_is_judged(tmp_path):
    """Neither does the verdict on the exercise before it stand for it."""
    path = write(
        tmp_path / "n.ipynb",
        RIGHT["import"],
        RIGHT["diagnosis"],
        "check_diagnosis(diagnosis)",
        "def bits(*_): raise SystemExit",
        RIGHT["bits_check"],
        "def extra_gigabytes(*numbers):\n    ...  # your code",
        "check_smaller_blocks(extra_gigabytes)",
    )
    report = hand_in.grade(path)
    grades = by_id(report)
    assert {id: grade.state for id, grade in grades.items()} == {"5.1": "right", "5.2": "wrong", "5.3": "open"}
    assert "· 5.3" in str(report)
    assert grades["5.2"].message.startswith("it could not be judged: SystemExit")


def test_an_endless_loop_is_interrupted_and_the_rest_counts(tmp_path):
    path = write(tmp_path / "n.ipynb", RIGHT["import"], "while True:\n    pass", RIGHT["bits"], RIGHT["bits_check"])
    report = hand_in.grade(path, Limits(cell_seconds=6))
    assert by_id(report)["5.2"].state == "right"
    assert "code cell 2 (`while True:`): it took longer than 6 s and was interrupted" in report.notes


def test_a_notebook_has_a_limit_of_its_own(monkeypatch):
    """Its time is over, and a cell with minutes to go runs on until it is interrupted."""
    calls = []

    class Client:
        def execute(self, code, allow_stdin, store_history, stop_on_error):
            return "request"

        def get_shell_msg(self, timeout):
            calls.append("look")
            assert len(calls) < 5, "it waits for the cell's own limit"
            if "interrupt" not in calls:
                raise queue.Empty
            return {"parent_header": {"msg_id": "request"}, "content": {"status": "ok"}}

    run = object.__new__(kernel.Kernel)
    run.limits, run.deadline = Limits(seconds=1800, cell_seconds=600), time.monotonic() - 1
    run.client, run.manager = Client(), SimpleNamespace(interrupt_kernel=lambda: calls.append("interrupt"))
    monkeypatch.setattr(run, "_watch", lambda: None, raising=False)
    with pytest.raises(kernel.Stopped, match="^the notebook took longer than 1800 s$"):
        run.run("while True: pass")
    assert calls == ["look", "interrupt", "look"]


def test_the_cell_after_one_that_failed_is_not_dropped(monkeypatch):
    """A kernel drops what arrives while it clears its queue after an error, unless it is told not to."""
    replies = []

    class Client:
        def execute(self, code, allow_stdin, store_history, stop_on_error):
            assert not stop_on_error
            return "request"

        def get_shell_msg(self, timeout):
            return {"parent_header": {"msg_id": "request"}, "content": replies.pop()}

    run = object.__new__(kernel.Kernel)
    run.limits, run.deadline, run.client = Limits(), time.monotonic() + 60, Client()
    for reply, error in (
        ({"status": "ok"}, ""),
        ({"status": "error", "ename": "SystemExit", "evalue": ""}, "SystemExit"),
        ({"status": "error", "ename": "NameError", "evalue": "x"}, "NameError: x"),
        ({"status": "aborted"}, "aborted"),
    ):
        replies.append(reply)
        assert run.run("x") == error


def test_what_is_over_time_stops_there_and_what_was_judged_counts(tmp_path, monkeypatch):
    """However long the kernel takes to start: the time is over when the endless cell has begun."""
    run_cell = hand_in.Run.run_cell

    def with_time_up(run, kernel, number, source):
        if source.startswith("while True"):
            run.deadline = kernel.deadline = time.monotonic() + 1
        run_cell(run, kernel, number, source)

    monkeypatch.setattr(hand_in.Run, "run_cell", with_time_up)
    path = write(tmp_path / "n.ipynb", RIGHT["import"], RIGHT["bits"], RIGHT["bits_check"], "while True: pass", "x = 1")
    report = hand_in.grade(path, Limits(seconds=900))
    assert {id: grade.state for id, grade in by_id(report).items()} == {
        "5.1": "not reached",
        "5.2": "right",
        "5.3": "not reached",
    }
    assert report.notes == ["stopped at code cell 4 (`while True: pass`): the notebook took longer than 900 s"]


def test_of_two_calls_of_a_check_the_last_one_counts(tmp_path):
    wrong = "def bits(b, s): return 4"
    for cells, state in (((wrong, RIGHT["bits"]), "right"), ((RIGHT["bits"], wrong), "wrong")):
        first, last = cells
        path = write(tmp_path / "n.ipynb", RIGHT["import"], first, RIGHT["bits_check"], last, RIGHT["bits_check"])
        assert by_id(hand_in.grade(path))["5.2"].state == state


def test_a_cell_keeps_what_stands_beside_its_check():
    wanted = {"check_bits_per_parameter"}
    cell = "check_bits_per_parameter(bits)  # (mine)\ncheck_other(1)\nx = (1)\n    check_bits_per_parameter(bits)"
    assert hand_in.without_checks(cell, wanted) == cell.replace("check_bits_per_parameter(bits)  # (mine)", "pass")
    more = "check_bits_per_parameter(bits); x = (1)"
    assert hand_in.without_checks(more, wanted) == more


def test_a_renamed_copy_is_found_by_its_cells():
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        notebook = hand_in.read_notebook(path)
        for cell in notebook["cells"]:
            if "check_" in cell["source"]:
                cell["source"] = "# deleted"
        name, wanted = hand_in.course_checks(notebook)
        assert name == path.stem
        assert set(wanted) == {check for check in wanted if check in inside.CHECKS}


def test_every_exercise_has_its_check_in_a_notebook():
    called = {
        name
        for path in (REPOSITORY / "notebooks").glob("*.ipynb")
        for name in hand_in.checks_in(hand_in.read_notebook(path))
    }
    assert called == set(inside.CHECKS)


def test_a_solved_notebook_gets_all_points():
    report = hand_in.grade(REPOSITORY / "notebooks" / "solutions" / "10_memory_comparison.ipynb")
    assert report.notes == []
    assert report.points == report.of > 0


def test_limits_are_read(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(command, "grade_all", lambda *given: seen.append(given) or iter(()))
    flags = "--minutes 1 --cell-minutes 0.5 --answer-minutes 0.25 --memory-gb 2 --jobs 3 --course 05 --results".split()
    assert command.main(["x.ipynb", *flags, str(tmp_path)]) == 0
    assert [given[1:] for given in seen] == [(Limits(60, 30, 15, 2e9), tmp_path, 3, "05", "")]


@pytest.mark.parametrize(
    "text, why",
    [
        ("hello", "it is no notebook of Jupyter"),
        ('{"worksheets": []}', "it is no notebook of Jupyter"),
        ('{"cells": [{"cell_type": "spell", "source": ""}]}', "cell of type 'spell'"),
        ("[" * 100_000, "it is no notebook of Jupyter"),
        ('{"cells": [{"cell_type": "code", "id": [], "source": "1"}]}', "it has no cell and no check of the course's"),
        (None, f"it cannot be read: {os.strerror(2)}"),
    ],
)
def test_what_is_no_notebook_is_told(tmp_path, text, why):
    path = tmp_path / "n.ipynb"
    if text is not None:
        path.write_text(text)
    report = hand_in.grade(path)
    assert why in report.fault and report.of == 0
    report = hand_in.grade(path, course="05")
    assert (why in report.fault) == ("no check" not in why)  # a strange notebook is held against the lesson asked for
    assert (report.points, report.of) == (0, 5)
    with pytest.raises(UserError, match="no notebook of the course begins with '99'"):
        hand_in.grade(path, course="99")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_does_no_harm(tmp_path, encoding):
    path = write(tmp_path / "n.ipynb", "# für")
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert hand_in.read_notebook(path)["cells"][0]["source"] == "# für"


@pytest.mark.parametrize(
    "arguments, why",
    [
        ([], "expected notebooks, or --class FOLDER, or --one"),
        (["a.ipynb", "--one", "b.ipynb"], "expected notebooks, or --class FOLDER, or --one"),
        (["--one", "a.ipynb"], "need --results FOLDER"),
        (["a.ipynb", "--roster", "r.csv"], "it needs --class FOLDER"),
        (["a.ipynb", "--minutes", "0"], "'0' is not a positive number"),
        (["--class", "nowhere", "--results", "r"], "nowhere is no folder"),
    ],
)
def test_arguments_that_do_not_fit_are_told_in_a_sentence(arguments, why, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert why in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())
