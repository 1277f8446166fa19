"""The grader on notebooks that learners might hand in."""

import json
import os
import queue
import re
import stat
import time
from types import SimpleNamespace

import pytest

from qlora_lab.classroom import grade as grader
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.errors import UserError

RIGHT = {
    "diagnosis": 'diagnosis = {"A": "wrong block", "B": "no sign", "C": "healthy", "D": "one scale"}',
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


def test_right_wrong_open_missing_and_redefined(tmp_path, monkeypatch):
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
        "def extra_gigabytes(*numbers):\n    ...  # your code",
        "check_zero_point_cost(extra_gigabytes)",
        f"import os\nopen({str(tmp_path / 'spins')!r}, 'w').write(os.environ['GOMP_SPINCOUNT'])",
        "open('left behind', 'w').close()\nname = input('your name? ')",  # nobody is there to answer
        "from qlora_lab.classroom.checks import check_bytes_of_weights\n"  # of another notebook
        "check_bytes_of_weights(lambda parameters, bits: parameters * bits / 8)",
    )
    report = grader.grade(path, grader.Limits(cell_seconds=60))
    assert report.course == "04_double_quantization"
    assert (tmp_path / "spins").read_text() == "1000"  # it shares the cores with others' work
    grades = by_id(report)
    assert {id: grade.state for id, grade in grades.items()} == {
        "4.1": "right",
        "4.2": "wrong",
        "4.3": "open",
        "4.4": "missing",  # its cell was deleted
    }
    assert (report.points, report.of) == (grades["4.1"].of, sum(grade.of for grade in report.grades))
    assert "expected" in grades["4.2"].message
    assert "name 'third_saving' is not defined" in grades["4.4"].message
    assert [note.partition(": ")[0] for note in report.notes] == [
        "code cell 3 (`1 / 0`)",
        "code cell 9 (`check_zero_point_cost(extra_gigabytes)`)",  # which it has not imported: judged all the same
        "code cell 11 (`open('left behind', 'w').close()`)",
        "check_triple_quantization is not called",
    ]
    assert "StdinNotImplementedError" in report.notes[2]
    assert not own.exists() and not list(here.iterdir())
    text = str(report)
    assert text.startswith(f"{path}: {report.points} of {report.of} points\n  ✓ 4.1  ")
    assert "✗ 4.2" in text and "· 4.3" in text and "? 4.4" in text


def test_tampering_with_the_package_does_not_count(tmp_path):
    path = write(
        tmp_path / "n.ipynb",
        "import qlora_lab.classroom.checks as checks\n"
        "from qlora_lab.classroom.judging import Verdict\n"
        "checks.check_bits_per_parameter.verdict = lambda *_: Verdict('right', '')",
        "def bits(*_): return 7",
        RIGHT["bits_check"],
    )
    assert by_id(grader.grade(path))["4.2"].points == 0


def test_an_answer_that_ends_its_own_judging_is_wrong_and_the_rest_counts(tmp_path):
    """Neither does the verdict on the exercise before it stand for it."""
    path = write(
        tmp_path / "n.ipynb",
        RIGHT["import"],
        RIGHT["diagnosis"],
        "check_diagnosis(diagnosis)",
        "def bits(*_): raise SystemExit",
        RIGHT["bits_check"],
        "extra_gigabytes = lambda n: n * (8 / 64 + 32 / (64 * 256)) / 8 / 1e9\ncheck_zero_point_cost(extra_gigabytes)",
    )
    grades = by_id(grader.grade(path))
    assert {id: grade.state for id, grade in grades.items()} == {
        "4.1": "right",
        "4.2": "wrong",
        "4.3": "right",
        "4.4": "missing",
    }
    assert grades["4.2"].message.startswith("it could not be judged: SystemExit")


def test_an_endless_loop_is_interrupted_and_the_rest_counts(tmp_path):
    path = write(tmp_path / "n.ipynb", RIGHT["import"], "while True:\n    pass", RIGHT["bits"], RIGHT["bits_check"])
    report = grader.grade(path, grader.Limits(cell_seconds=6))
    assert by_id(report)["4.2"].state == "right"
    assert "code cell 2 (`while True:`): it took longer than 6 s and was interrupted" in report.notes


def test_a_notebook_has_a_limit_of_its_own(monkeypatch):
    """Its time is over, and a cell with minutes to go runs on until it is interrupted."""
    calls = []

    class Client:
        def execute(self, code, allow_stdin):
            return "request"

        def get_iopub_msg(self, timeout):
            calls.append("look")
            assert len(calls) < 5, "it waits for the cell's own limit"
            if "interrupt" not in calls:
                raise queue.Empty
            content = {"execution_state": "idle"}
            return {"parent_header": {"msg_id": "request"}, "msg_type": "status", "content": content}

    kernel = object.__new__(grader.Kernel)
    kernel.limits, kernel.deadline = grader.Limits(seconds=1800, cell_seconds=600), time.monotonic() - 1
    kernel.client, kernel.manager = Client(), SimpleNamespace(interrupt_kernel=lambda: calls.append("interrupt"))
    monkeypatch.setattr(kernel, "_watch", lambda: None, raising=False)
    with pytest.raises(grader.Stopped, match="^the notebook took longer than 1800 s$"):
        kernel.run("while True: pass")
    assert calls == ["look", "interrupt", "look"]


def test_what_will_not_stop_is_ended_and_what_was_judged_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(grader, "GRACE", 2)
    stubborn = "import time\nwhile True:\n    try:\n        time.sleep(1)\n    except KeyboardInterrupt:\n        pass"
    path = write(tmp_path / "n.ipynb", RIGHT["import"], RIGHT["bits"], RIGHT["bits_check"], stubborn, "x = 1")
    report = grader.grade(path, grader.Limits(cell_seconds=6))
    assert {grade.id: grade.state for grade in report.grades}["4.2"] == "right"
    assert by_id(report)["4.1"].state == "not reached"
    assert report.notes == ["stopped at code cell 4: it did not stop when it was interrupted after 6 s"]


@pytest.mark.parametrize(
    "cell, note",
    [
        (  # the kernel and a child of its own, neither of which exceeds the limit alone
            "import subprocess, sys\nhoard = bytearray(b'1') * 1_300_000_000\n"
            "more = 'import time; hoard = bytearray(b\"1\") * 1_300_000_000; time.sleep(60)'\n"
            "subprocess.run([sys.executable, '-c', more])",
            r"it used 2\.\d GB, more than 2 GB",
        ),
        ("import os\nos._exit(1)", "the kernel died"),
    ],
)
def test_a_kernel_that_dies_or_eats_memory(tmp_path, cell, note):
    path = write(tmp_path / "n.ipynb", RIGHT["import"], RIGHT["bits"], RIGHT["bits_check"], cell)
    report = grader.grade(path, grader.Limits(memory=2e9))
    assert by_id(report)["4.2"].state == "right"
    assert len(report.notes) == 1
    assert re.fullmatch(f"stopped at code cell 4: {note}", report.notes[0])


def test_no_notebook_is_told_and_the_others_are_graded(tmp_path, capsys):
    (tmp_path / "text.ipynb").write_text("hello")
    (tmp_path / "old.ipynb").write_text('{"worksheets": []}')
    write(tmp_path / "other.ipynb", "print('a notebook of something else')")
    good = write(tmp_path / "good.ipynb", RIGHT["bits"], RIGHT["bits_check"])
    good.chmod(stat.S_IRUSR)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)  # a read-only folder
    names = ["text.ipynb", "old.ipynb", "other.ipynb", "none.ipynb", "good.ipynb"]
    code = grader.main([*(str(tmp_path / name) for name in names), "--json"])
    tmp_path.chmod(stat.S_IRWXU)
    out, err = capsys.readouterr()
    assert code == 2
    (report,) = json.loads(out)
    assert report["notebook"].endswith("good.ipynb")
    assert {"points", "of", "grades", "notes", "course"} <= set(report)
    lines = err.splitlines()
    assert "text.ipynb is no notebook of Jupyter" in lines[0]
    assert "old.ipynb is no notebook of Jupyter" in lines[1]
    assert "other.ipynb: it has no cell and no check of the course's notebooks" in lines[2]
    assert f"none.ipynb cannot be read: {os.strerror(2)}" in lines[3]


def test_a_renamed_copy_is_found_by_its_cells():
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        notebook = grader.read_notebook(path)
        for cell in notebook["cells"]:
            if "check_" in cell["source"]:
                cell["source"] = "# deleted"
        name, wanted = grader.course_checks(notebook)
        assert name == path.stem
        assert set(wanted) == {check for check in wanted if check in grader.CHECKS}


def test_every_exercise_has_its_check_in_a_notebook():
    called = {
        name
        for path in (REPOSITORY / "notebooks").glob("*.ipynb")
        for name in grader.checks_in(grader.read_notebook(path))
    }
    assert called == set(grader.CHECKS)


def test_a_solved_notebook_gets_all_points():
    report = grader.grade(REPOSITORY / "notebooks" / "solutions" / "04_double_quantization.ipynb")
    assert report.notes == []
    assert report.points == report.of > 0


def test_limits_are_read(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(grader, "grade", lambda path, limits: seen.append(limits) or grader.Report(str(path), ""))
    grader.main(["x.ipynb", "--minutes", "1", "--cell-minutes", "0.5", "--memory-gb", "2"])
    assert seen == [grader.Limits(60, 30, 2e9)]


def test_a_bad_cell_type_is_refused(tmp_path):
    path = tmp_path / "n.ipynb"
    path.write_text('{"cells": [{"cell_type": "spell", "source": ""}]}')
    with pytest.raises(UserError, match="cell of type 'spell'"):
        grader.read_notebook(path)
