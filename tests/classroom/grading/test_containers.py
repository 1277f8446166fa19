"""Hand-ins in containers. No engine is here: one of the same name takes its place, and notes what it was asked for.

What it is asked for is compared with what Docker's documentation says; docs/instructors.md tells what Docker did.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from qlora_lab.classroom import grade as command
from qlora_lab.classroom.grading import containers
from qlora_lab.classroom.grading.kernel import Limits
from qlora_lab.classroom.grading.reports import Grade, Report

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the engine in Docker's place is a script with a #!")
LIMITS = Limits()
REPORT = Report("elsewhere.ipynb", "05_double_quantization", [Grade("5.2", "bits", 2, 2, "right", "yes")])
AS_IN_A_CONTAINER = f"""\
#!{sys.executable}
import json, os, subprocess, sys
with open(os.environ["ASKED"], "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if sys.argv[1] == "run":
    module = sys.argv[sys.argv.index("-m") + 1]
    BODY
"""
RUNS = 'sys.exit(subprocess.run([sys.executable, "-m", module]).returncode)'


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Makes a program named docker that does `body` when a container is to be run; returns what it was asked for."""

    def make(body: str):
        program = tmp_path / "bin" / "docker"
        program.parent.mkdir(exist_ok=True)
        program.write_text(AS_IN_A_CONTAINER.replace("BODY", body), encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        monkeypatch.setenv("ASKED", str(tmp_path / "asked.jsonl"))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        return lambda: [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]

    return make


def says(report: dict) -> str:
    return f"print({json.dumps(report)!r})"


def hand_in(folder, *cells: str):
    path = folder / "ann" / "05.ipynb"
    path.parent.mkdir()
    cells = [{"cell_type": "code", "source": cell, "metadata": {}, "outputs": []} for cell in cells]
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}), encoding="utf-8")
    return path


def test_a_hand_in_is_graded_by_what_goes_in_and_comes_out(engine, tmp_path, capsys):
    asked = engine(RUNS)
    solved = "def bits(b, s): return 4 + 8 / b + 32 / (b * s)"
    path = hand_in(tmp_path, "from qlora_lab.classroom.checks import *", solved, "check_bits_per_parameter(bits)")
    results = tmp_path / "results"
    flags = ["--container", "qlora-lab", "--results", str(results), "--json"]
    assert command.main([str(path), *flags]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["notebook"] == str(path)
    assert {grade["id"]: grade["state"] for grade in report["grades"]}["5.2"] == "right"
    ran, removed = asked()
    assert removed[:2] == ["rm", "--force"] and f"--name={removed[2]}" in ran
    assert not any(str(tmp_path) in word for word in ran), "nothing of this machine is in the container"
    # graded once: the report is kept
    assert command.main([str(path), *flags]) == 0
    assert len(asked()) == 2


def test_a_container_has_no_network_no_home_and_limits():
    words = containers.command("docker", "qlora-lab", "x", Limits(memory=3e9))
    options = words[: words.index("qlora-lab")]
    for option in (
        "--network=none",
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--user=65534:65534",
        "--memory=4000000000",
        "--memory-swap=4000000000",
        "--pids-limit=350",
        "--env=HOME=/tmp",
    ):
        assert option in options
    assert not [word for word in options if word.startswith(("-v", "--volume", "--mount", "--privileged"))]


def test_a_container_starts_what_the_image_has():
    root = pathlib.Path(__file__).resolve().parents[3]
    script = root / ".devcontainer" / "setup.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and os.access(script, os.X_OK)
    (home,) = re.findall(r"^home=(\S+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    assert f"{home}/bin/python" in containers.command("docker", "qlora-lab", "x", LIMITS)
    dockerfile = (root / "Dockerfile").read_text(encoding="utf-8")
    assert f"PATH={home}/bin:" in dockerfile and f"QLORA_LAB_CACHE={home}/models" in dockerfile
    container = json.loads((root / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert (script.parent / container["build"]["dockerfile"]).samefile(root / "Dockerfile")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("print('docker: no such image'); sys.exit(125)", "docker: no such image"),
        ("pass", "it said nothing"),
        (says(REPORT.as_dict() | {"grades": [{"id": "5.2"}]}), '{"notebook"'),
        (says(REPORT.as_dict() | {"course": 7}), '{"notebook"'),
        (says({**REPORT.as_dict(), "grades": [{**REPORT.as_dict()["grades"][0], "points": 3}]}), '{"notebook"'),
        (says({**REPORT.as_dict(), "grades": [{**REPORT.as_dict()["grades"][0], "state": "great"}]}), '{"notebook"'),
        ("print('[1]')", "[1]"),
    ],
)
def test_whatever_a_container_says_there_is_a_report(engine, tmp_path, body, fault):
    engine(body)
    report = containers.grade_contained(hand_in(tmp_path, "1"), "qlora-lab", LIMITS, "", set())
    assert report.fault.startswith(f"grading it failed in its container: {fault}")


def test_a_good_report_is_taken(engine, tmp_path):
    engine(says(REPORT.as_dict()))
    path = hand_in(tmp_path, "1")
    report = containers.grade_contained(path, "qlora-lab", LIMITS, "", set())
    assert (report.fault, report.points, report.notebook) == ("", 2, str(path))


def test_a_container_that_never_ends_its_talk_is_removed(engine, tmp_path, monkeypatch):
    asked = engine("while True: print('spam' * 1000)")
    monkeypatch.setattr(containers, "LONGEST", 100_000)
    report = containers.grade_contained(hand_in(tmp_path, "1"), "qlora-lab", LIMITS, "", set())
    assert report.fault and asked()[-1][:2] == ["rm", "--force"]


def test_a_container_that_takes_too_long_is_removed(engine, tmp_path, monkeypatch):
    """Once because of the time, and once because all are. The container would end by itself after five minutes."""
    stop, told, remove = tmp_path / "stop", tmp_path / "asked.jsonl", containers.remove
    asked = engine(f"import time\n    for _ in range(6000): os.path.exists({str(stop)!r}) or time.sleep(0.05)")

    def remove_what_has_begun(*names):
        while not (told.exists() and told.read_text()):
            time.sleep(0.01)
        remove(*names)
        stop.touch()

    monkeypatch.setattr(containers, "START", 0.5)
    monkeypatch.setattr(containers, "GRACE", 0)
    monkeypatch.setattr(containers, "remove", remove_what_has_begun)
    report = containers.grade_contained(hand_in(tmp_path, "1"), "qlora-lab", Limits(seconds=0.5), "", set())
    assert report.fault.endswith("it said nothing")
    assert [words[0] for words in asked()] == ["run", "rm", "rm"]


def test_without_an_engine_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main([str(hand_in(tmp_path, "1")), "--container", "qlora-lab"]) == 2
    assert capsys.readouterr().err == "error: --container needs docker or podman, and neither is installed here\n"
