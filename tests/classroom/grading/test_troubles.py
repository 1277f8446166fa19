"""Forty hand-ins with all kinds of trouble: each gets its row and its points, and nothing is left running."""

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from qlora_lab.classroom.source import REPOSITORY

POSIX = pytest.mark.skipif(os.name != "posix", reason="forks, signals and sessions are POSIX'")

# what raises, in a cell and in an answer of the same hand-in, and what the note and the message say of it
RAISED = {
    "exits": ("raise SystemExit", "SystemExit"),
    "interrupts itself": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "raises what is no Exception": ("raise type('Odd', (BaseException,), {})('odd')", "Odd: odd"),
}
# what else happens, in a cell of one hand-in and in an answer of another; LEFT stands for a path by which a process is
# recognized
TROUBLES = {
    "quits": ("get_ipython().ask_exit()\nimport os; os._exit(0)", "the kernel died"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "the kernel died"),
    "loops": ("while True: pass", "longer than 6 s and was interrupted"),
    "loops on when it is interrupted": (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: time.sleep(0.1)",
        "it did not stop when it was interrupted after 6 s",
    ),
    "stops itself": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "it did not stop when it was interrupted after 6 s",
    ),
    "prints without end": ("while True: print('spam' * 1000)", "longer than 6 s and was interrupted"),
    "eats memory": (  # no faster than the grader looks, however fast the machine is
        "import time\nhoard = []\nwhile True: hoard.append(bytearray(b'1') * 50_000_000); time.sleep(0.05)",
        r"it used [\d.]+ GB, more",
    ),
    "starts too much": (  # 310 of 1.8 MB each: a few more, and it would be their memory that is too much
        "import subprocess\nsubprocess.run(['sh', '-c', 'for i in $(seq 310); do sleep 600 & done; wait'])",
        "processes, more than 300",
    ),
    "kills its grader": (
        "import os, signal, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', LEFT], start_new_session=True)\n"
        "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)",
        None,
    ),
}
# what goes unnoticed, in a cell and in an answer of the same hand-in, and is right all the same, but must not stay
QUIET = {
    "forks": "import os, time\nif os.fork() == 0: pass",
    "forks and waits": "import os, time\nif os.fork() == 0: time.sleep(600)",
    "leaves a thread": "import threading\n"
    "def spam():\n    while True: print('spam')\nthreading.Thread(target=spam).start()",
    "leaves a child": "import subprocess, sys\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', LEFT], start_new_session=True)",
    "leaves a daemon without environment": "import subprocess, sys\n"
    'daemon = \'import subprocess, sys; subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", \'\n'
    "daemon += 'sys.argv[1]], env={}, start_new_session=True)'\n"
    "subprocess.run([sys.executable, '-c', daemon, LEFT], env={}, start_new_session=True)",
    "removes its folder": "import contextlib, os, shutil\n"
    "with contextlib.suppress(OSError): shutil.rmtree(os.getcwd())",
}
FILES = {  # what is no notebook, or is one in another encoding
    "text": b"print('hello')",
    "nested": b"[" * 100_000,
    "of something else": json.dumps({"nbformat": 4, "cells": []}).encode(),
    "empty": b"",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "cut off": b'{"nbformat": 4, "cells": [{"cell_type": "code", "sour',
    "a list": b"[]",
    "null": b"null",
    "of version 3": json.dumps({"nbformat": 3, "worksheets": [{"cells": []}]}).encode(),
    "with a cell of no kind": json.dumps({"nbformat": 4, "cells": [{"cell_type": "poem", "source": "x"}]}).encode(),
    "with a cell that is a number": json.dumps({"nbformat": 4, "cells": [7]}).encode(),
    "with a source that is a number": json.dumps(
        {"nbformat": 4, "cells": [{"cell_type": "code", "source": 7}]}
    ).encode(),
}
IMPORT = "from qlora_lab.classroom.checks import *"
BITS = ("def bits(b, s): return 4 + 8 / b + 32 / (b * s)", "check_bits_per_parameter(bits)")
GIGABYTES = "extra_gigabytes = lambda n: n * (8 / 64 + 32 / (64 * 256)) / 8 / 1e9"
ASKED = "check_smaller_blocks(extra_gigabytes)"
FLAGS = "--minutes 10 --cell-minutes 0.1 --answer-minutes 0.1 --memory-gb 0.8 --jobs 2".split()
PATIENT = "--memory-gb 0.8 --jobs 2".split()  # where nothing loops: a busy machine may need 6 s to import torch
LIMIT, PROCESS = 0.8e9, 0.4e9


def notebook(*cells: str) -> bytes:
    cells = [{"cell_type": "code", "source": cell, "metadata": {}, "outputs": []} for cell in cells]
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}).encode()


def hand_ins(left: str) -> dict[str, tuple[bytes, dict[str, str], str]]:
    """By student: the file, the states of exercises 5.2 and 4.3 (None: no grade at all), and what is said."""
    students = {}
    for name, (code, said) in RAISED.items():
        answer = f"def extra_gigabytes(n):\n    {code}"
        twice = rf"(?s){said}.*{said}"
        students[name] = (notebook(IMPORT, *BITS, code, answer, ASKED), {"5.2": "right", "5.3": "wrong"}, twice)
    for name, (code, said) in TROUBLES.items():
        code = code.replace("LEFT", repr(left))
        body = "def extra_gigabytes(n):\n" + "\n".join(f"    {line}" for line in code.split("\n"))
        in_a_cell = notebook(IMPORT, BITS[0], BITS[1], code, GIGABYTES, ASKED)
        in_an_answer = notebook(IMPORT, body, ASKED, *BITS)
        right = {"5.2": "right", "5.3": "right"}
        students[f"{name} in a cell"] = (in_a_cell, right if said else {}, said or "grading it failed")
        wrong = {"5.2": "right", "5.3": "wrong"}
        students[f"{name} in an answer"] = (in_an_answer, wrong if said else {}, said or "grading it failed")
    for name, code in QUIET.items():
        code = code.replace("LEFT", repr(left))
        answer = f"def extra_gigabytes(n):\n    exec({code!r}, {{}})\n    return {GIGABYTES.partition(': ')[2]}"
        right = {"5.2": "right", "5.3": "right"}
        often = [code] * (40 if name == "forks" else 1)  # one that goes on as a second kernel may be lucky
        students[name] = (notebook(IMPORT, *often, answer, ASKED, *BITS), right, "")
    for name, content in FILES.items():
        students[name] = (content, {}, "not graded")
    students["with a mark"] = (b"\xef\xbb\xbf" + notebook(IMPORT, *BITS), {"5.2": "right", "5.3": "missing"}, "")
    return students


def written(folder: Path, students: dict) -> Path:
    for name, (content, _, _) in students.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "04.ipynb").write_bytes(content)
    return folder


def start(folder: Path, results: Path, temporary: Path, *arguments: str) -> subprocess.Popen:
    """The command; what it starts names the folder `temporary` in its own command line, kernels for one."""
    temporary.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "qlora_lab.classroom.grade", "--results", str(results)]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [*command, *(arguments or ["--class", str(folder), *FLAGS])],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder.parent,
    )


def still_running(place: Path) -> list[str]:
    """The command lines that name something in the folder `place`: kernels by their connection file, and children."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                line = " ".join(process.cmdline())
                found += [line] if str(place) in line else []
    return found


def wait_until(true, seconds: float = 300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, true
        time.sleep(0.1)


class Peak(threading.Thread):
    """The most resident memory, in bytes, that a process and its descendants are seen to use."""

    def __init__(self, process: subprocess.Popen):
        super().__init__(daemon=True)
        self.process, self.bytes = psutil.Process(process.pid), 0
        self.start()

    def run(self):
        while self.process.is_running():
            with contextlib.suppress(psutil.Error):
                family = [self.process, *self.process.children(recursive=True)]
                self.bytes = max(self.bytes, sum(member.memory_info().rss for member in family))
            time.sleep(0.2)


@POSIX
@pytest.mark.slow
def test_forty_hand_ins_of_all_kinds(tmp_path):
    students = hand_ins(str(tmp_path / "left"))
    assert len(students) == 40
    folder = written(tmp_path / "handed_in", students)
    begin = time.monotonic()
    process = start(folder, tmp_path / "results", tmp_path / "temporary")
    peak = Peak(process)
    said, _ = process.communicate(timeout=1800)
    seconds = time.monotonic() - begin
    print(f"{seconds:.0f} s, {peak.bytes / 1e9:.2f} GB at most")
    assert still_running(tmp_path) == []
    assert process.returncode == 2, said.decode()  # some could not be graded
    assert seconds < 600
    assert peak.bytes < 2 * (LIMIT + PROCESS) + PROCESS
    rows = json.loads((tmp_path / "results" / "grades.json").read_text(encoding="utf-8"))
    assert [row["student"] for row in rows] == sorted(students)
    came = {}
    for row in rows:
        (report,) = row["hand_ins"]
        came[row["student"]] = {g["id"]: g["state"] for g in report["grades"] if g["id"] in ("5.2", "5.3")}
    assert came == {name: states for name, (_, states, _) in students.items()}
    table = list(csv.DictReader((tmp_path / "results" / "grades.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["student"] for row in table] == ["points possible", *sorted(students)]
    page = (tmp_path / "results" / "grades.html").read_text(encoding="utf-8")
    for row, line in zip(table[1:], rows, strict=True):
        _, states, said = students[row["student"]]
        messages = [grade["message"] for grade in line["hand_ins"][0]["grades"]]
        assert re.search(said, " ".join([row["comments"], *messages])), row
        points = {"5.2": 1, "5.3": 2}
        assert int(row["points"]) == sum(points[id] for id, state in states.items() if state == "right")
        assert f">{row['student']}: {row['points']} of {5 if states else 0} points<" in page


@POSIX
@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_tables(tmp_path):
    every = hand_ins(str(tmp_path / "left"))
    names = ["exits", "leaves a child", "text", "nested", "of something else", "with a mark"]
    students = {name: every[name] for name in names}
    folder = written(tmp_path / "handed_in", students)
    flags = ["--class", str(folder), *PATIENT]
    process = start(folder, tmp_path / "killed", tmp_path / "temporary", *flags)
    kept = tmp_path / "killed" / "hand_ins"
    wait_until(lambda: len(list(kept.glob("*.json"))) >= 3)
    process.kill()
    process.communicate()
    wait_until(lambda: still_running(tmp_path) == [])  # what grades has seen that nobody waits for it
    done = {path: path.stat().st_mtime_ns for path in kept.glob("*.json")}
    assert 3 <= len(done) < len(students)
    tables = {}
    for results in ("killed", "whole"):
        process = start(folder, tmp_path / results, tmp_path / "temporary", *flags)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 2, said.decode()
        files = [path for path in (tmp_path / results).iterdir() if path.is_file()]
        tables[results] = {path.name: path.read_bytes().splitlines() for path in files}  # a line that differs is shown
    assert tables["killed"] == tables["whole"]
    assert {path: path.stat().st_mtime_ns for path in done} == done  # not graded twice


@POSIX
@pytest.mark.slow
def test_what_grades_ends_when_nobody_waits_for_it(tmp_path):
    path = tmp_path / "04.ipynb"
    path.write_bytes(notebook("import time; time.sleep(600)"))
    process = start(tmp_path, tmp_path / "results", tmp_path / "temporary", "--one", str(path), "--course", "04")
    wait_until(lambda: any("ipykernel" in line for line in still_running(tmp_path)))
    wait_until(lambda: len(still_running(tmp_path)) == 3)  # the command, the process that grades, and the kernel
    process.kill()
    process.communicate()
    wait_until(lambda: still_running(tmp_path) == [])
