"""The labels on the notebooks' cards are those of the recorded run, and a run that breaks one fails."""

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


CARD = "| you need | |\n|---|---|\n| computing | up to 1 minute on two CPU cores |\n| memory | 1 GB |"
HUNGRY = "held = bytearray(1_700_000_000); del held"


@pytest.mark.parametrize(
    ("card", "code", "told"),
    [
        (CARD, "print(1)", ""),
        (CARD, HUNGRY, "gigabytes, promised are 1"),
        ("no card", "print(1)", "its card promises no seconds"),
    ],
)
@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="only Linux tells a process's peak of memory"
)
def test_a_run_that_breaks_its_label_fails(tmp_path, card, code, told):
    printed = [{"output_type": "stream", "name": "stdout", "text": "1\n"}] if "print" in code else []
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": card},
        {"cell_type": "code", "id": "b", "metadata": {}, "execution_count": 1, "source": code, "outputs": printed},
    ]
    path = tmp_path / "01_n.ipynb"
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}))
    options = ["-p", "no:cacheprovider", "-p", "tests.labels", "-o", "addopts=", "--nbval", "--nbval-current-env"]
    options += [f"--rootdir={tmp_path}", "--record-labels", tmp_path / "record.json"]
    command = [sys.executable, "-m", "pytest", *options, path]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert (done.returncode, "label broken: 01_n.ipynb: " in done.stdout) == ((1, True) if told else (0, False))
    assert told in done.stdout and "1 passed" in done.stdout
    took = json.loads((tmp_path / "record.json").read_text())["notebooks"]["01_n"]
    assert took["seconds"] > 0 and (1.7 < took["gigabytes"] < 2.2) == (code == HUNGRY)
