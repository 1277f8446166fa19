"""nbval, as `make test` runs it, sees a number that is changed by hand, and lets the machine's own numbers differ."""

import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
MARKED = "# NBVAL_IGNORE_OUTPUT\n# because it depends on the machine\n"


def printed(text: str) -> list[dict]:
    return [{"output_type": "stream", "name": "stdout", "text": text + "\n"}]


def result(text: str) -> list[dict]:
    return [{"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": text}}]


CELLS = {  # what it shows: the code, the stored output, whether nbval accepts it
    "as it was": ("print('4.126953 bits')", printed("4.126953 bits"), True),
    "a printed digit changed": ("print('4.126953 bits')", printed("4.126954 bits"), False),
    "a result's last digit changed": ("2 / 3", result("0.6666666666666667"), False),
    "a printed line is gone": ("print('4.126953 bits')", [], False),
    "another time": ("print('trained in 93 s')", printed("trained in 95 s"), True),
    "marked": (MARKED + "print(1)", printed("2"), True),
    "marked, but it fails": (MARKED + "assert 4.126953 == 4.126954", [], False),
}


def test_what_nbval_accepts_and_what_not(tmp_path):
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": 1, "source": code, "outputs": outputs}
        for i, (code, outputs, _) in enumerate(CELLS.values())
    ]
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}))
    options = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", ROOT / "tests" / "nbval_sanitize.cfg"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "addopts=", *options, path]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=180)
    passed = [word == "PASSED" for word in re.findall(r"::Cell \d+ (PASSED|FAILED)", done.stdout)]
    assert dict(zip(CELLS, passed, strict=True)) == {name: accepted for name, (_, _, accepted) in CELLS.items()}
