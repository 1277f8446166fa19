"""The labels on the notebooks' cards are those of the recorded run, and a run as CI's that breaks one fails."""

import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as `python -m pytest` has it

from tests import labels  # noqa: E402
from tests.notebook_runs import longest_first  # noqa: E402

RECORD = json.loads((ROOT / "data" / "records" / "notebooks.json").read_text(encoding="utf-8"))
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cards_say_what_was_measured(path):
    took = RECORD["notebooks"][path.stem]
    label = labels.labels(json.loads(path.read_text(encoding="utf-8")))
    assert took["seconds"] <= label["seconds"] < took["seconds"] + 120  # whole minutes, and one to spare
    assert label["gigabytes"] == math.ceil(took["gigabytes"])


def test_readme_says_the_same():
    rows = re.findall(r"^\| \[(\w+)\]\(.*\| (\d+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    cards = {path.stem: labels.labels(json.loads(path.read_text(encoding="utf-8"))) for path in NOTEBOOKS}
    expected = {name: label["seconds"] // 60 for name, label in cards.items()}
    assert {name: int(minutes) for name, minutes in rows} == expected


def test_what_exceeds_a_label():
    promised = {"seconds": 60, "gigabytes": 2}
    assert labels.exceeded(promised, {"seconds": 90.0, "gigabytes": 3.0}) == []
    assert labels.exceeded(promised, {"seconds": 91.0, "gigabytes": 3.1}) == [
        "91.0 seconds, promised are 60",
        "3.1 gigabytes, promised are 2",
    ]
    assert labels.exceeded({}, {"seconds": 1.0}) == ["its card promises no seconds"]


def test_a_slow_machine_may_take_longer_but_no_more_memory():
    promised, took = {"seconds": 60, "gigabytes": 2}, {"seconds": 170.0, "gigabytes": 3.1}
    assert labels.exceeded(promised, took, pace=2.0) == ["3.1 gigabytes, promised are 2"]
    assert labels.exceeded(promised, {"seconds": 190.0}, pace=2.0) == ["190.0 seconds, promised are 60"]


def test_the_pace_is_that_of_most_notebooks():
    recorded = dict.fromkeys("abcdef", 10.0)
    slow_and_one_much_slower = {"a": 21.0, "b": 19.0, "c": 20.0, "d": 20.0, "e": 90.0, "new": 500.0}
    assert labels.pace_of(slow_and_one_much_slower, recorded) == 2.0
    assert labels.pace_of(dict.fromkeys("abcdef", 5.0), recorded) == 1.0  # a faster machine keeps the labels, too
    assert labels.pace_of(dict.fromkeys("abcd", 20.0), recorded) == 1.0  # too few to tell
    assert labels.pace_of(dict.fromkeys("abcdef", 60.0), recorded) == labels.SLOWEST  # no machine, but a fault


def test_the_longest_notebooks_begin():
    names = ("02.ipynb", "solutions/01.ipynb", "new.ipynb", "01.ipynb")
    order = longest_first([pathlib.Path(name) for name in names], {"01": 187.0, "02": 4.7})
    assert list(map(str, order)) == ["new.ipynb", "01.ipynb", "solutions/01.ipynb", "02.ipynb"]


CARD = "| you need | |\n|---|---|\n| computing | up to 1 minute on two CPU cores |\n| memory | 1 GB |"
HUNGRY = "held = bytearray(1_700_000_000); del held"
SURROUNDINGS = "import os; print(os.environ['QLORA_LAB_STRICT'], os.path.basename(os.environ['QLORA_LAB_PROGRESS']))"


def run_with_labels(folder: pathlib.Path, **notebooks: tuple[str, ...]):
    """Run notebooks of a card and a cell each, (card, code, what it prints), as `make notebooks` does.

    A fourth string is the code of another cell, behind those of the learner.
    """
    for name, (card, code, printed, *more) in notebooks.items():
        stored = [{"output_type": "stream", "name": "stdout", "text": printed}] if printed else []
        cells = [
            {"cell_type": "markdown", "id": "a", "metadata": {}, "source": card},
            {"cell_type": "code", "id": "b", "metadata": {}, "execution_count": 1, "source": code, "outputs": stored},
        ]
        cells += [
            {"cell_type": "code", "id": "c", "metadata": {}, "execution_count": 2, "source": code, "outputs": []}
            for code in more
        ]
        metadata = {"cells_of_the_learner": 1} if more else {}
        path = folder / f"{name.replace('__', '/')}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}))
    options = ["-p", "no:cacheprovider", "-p", "tests.labels", "-p", "tests.notebook_runs", "-o", "addopts="]
    options += ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "--nbval", "--nbval-current-env"]
    options += [f"--rootdir={folder}", "--record-labels", folder / "record.json", folder]
    command = list(map(str, [sys.executable, "-m", "pytest", *options]))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    return done, json.loads((folder / "record.json").read_text(encoding="utf-8"))["notebooks"]


needs_peaks = pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="only Linux tells a process's peak of memory"
)


@needs_peaks
def test_each_notebook_runs_as_its_reader_has_it(tmp_path):
    learner = (CARD, SURROUNDINGS, "0 01_n.progress.json\n")
    solved = (CARD, SURROUNDINGS, "1 01_n.progress.json\n")
    done, took = run_with_labels(tmp_path, **{"01_n": learner, "solutions__01_n": solved})
    assert done.returncode == 0 and "2 passed" in done.stdout and "label broken" not in done.stdout, done.stdout
    assert list(took) == ["01_n"] and took["01_n"]["seconds"] > 0 and 0.02 < took["01_n"]["gigabytes"] < 1


@needs_peaks
def test_of_what_proves_the_solved_only_the_memory_counts(tmp_path):
    slow = "held = bytearray(900_000_000); del held; import time; time.sleep(2)"
    notebooks = {"01_n": (CARD, "print(1)", "1\n", slow), "02_n": (CARD, "print(2)", "2\n", HUNGRY)}
    done, took = run_with_labels(tmp_path, **notebooks)
    assert done.returncode == 1 and "4 passed" in done.stdout, done.stdout
    assert re.search(r"01_n .* s +0\.\d GB, then [2-9] s for the solved", done.stdout), done.stdout
    assert re.findall(r"label broken: (.*), promised", done.stdout) == ["02_n.ipynb, solved: 1.8 gigabytes"]
    assert max(one["gigabytes"] for one in took.values()) < 0.5


@needs_peaks
def test_a_run_that_breaks_its_label_fails(tmp_path):
    done, took = run_with_labels(
        tmp_path, **{"01_hungry": (CARD, HUNGRY, ""), "02_bare": ("no card", "print(1)", "1\n")}
    )
    assert done.returncode == 1 and "2 passed" in done.stdout, done.stdout
    assert re.search(r"label broken: 01_hungry\.ipynb: 1\.[789] gigabytes, promised are 1", done.stdout)
    assert "label broken: 02_bare.ipynb: its card promises no seconds" in done.stdout
    assert 1.7 < took["01_hungry"]["gigabytes"] < 2.2
