"""A hand-in in a container of its own, for strangers' code: `grade --container IMAGE`.

The container has no network, no home, no capabilities, a file system that cannot be written to but for a folder in
memory, and limits on memory, processes and cores, which the operating system holds it to. Nothing of this machine is
in it: the hand-in goes in by standard input, and the report comes back by standard output. A hand-in can still lie
about its own points, since it is run in the process that judges it, but about nobody else's.

`Dockerfile` makes the image. Docker is asked, or Podman where there is no Docker.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import threading
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_lab.classroom.grading.hand_in import read_hand_in
from qlora_lab.classroom.grading.kernel import GRACE, MARK, PROCESSES, START, Limits
from qlora_lab.classroom.grading.reports import STATES, Report
from qlora_lab.errors import UserError

ENGINES = ("docker", "podman")
SCRATCH = 2_000_000_000  # bytes that a hand-in may write; they count as its memory
LONGEST = 10_000_000  # bytes of what is read from a container: a report has some thousands
ROOM = 1_000_000_000  # bytes of memory for the process that judges


def find_engine() -> str:
    """The program that runs containers. Raises UserError if there is none."""
    for name in ENGINES:
        if program := shutil.which(name):
            return program
    raise UserError(f"--container needs {' or '.join(ENGINES)}, and neither is installed here")


def command(engine: str, image: str, name: str, limits: Limits) -> list[str]:
    """The command line that grades what it gets on standard input, in a new container."""
    memory = int(limits.memory + ROOM)
    return [
        engine,
        "run",
        "--rm",
        "--init",  # so that a signal ends it
        "--interactive",
        f"--name={name}",
        "--network=none",
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--user=65534:65534",  # nobody
        f"--memory={memory}",
        f"--memory-swap={memory}",  # of both together, so there is no swap
        f"--pids-limit={PROCESSES + 50}",
        "--cpus=2",
        f"--tmpfs=/tmp:rw,mode=1777,size={SCRATCH}",
        "--workdir=/tmp",
        "--env=HOME=/tmp",
        image,
        "/opt/qlora-lab/bin/python",
        "-m",
        "qlora_lab.classroom.grading.contained",
    ]


def grade_contained(path: Path, image: str, limits: Limits, course: str, running: set) -> Report:
    """Grade one hand-in in a new container of the image. What goes wrong there stands in the report's `fault`.

    running: holds the process meanwhile; whoever ends that ends the container, too.

    Raises:
        UserError: there is no engine, or the hand-in cannot be read.
    """
    engine, name = find_engine(), f"{MARK.lower().replace('_', '-')}-{uuid.uuid4().hex}"
    content = base64.b64encode(read_hand_in(path)).decode()
    order = {"content": content, "limits": asdict(limits), "course": course, "mark": uuid.uuid4().hex}
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(order).encode())
        given.seek(0)
        process = subprocess.Popen(
            command(engine, image, name, limits), stdin=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    running.add(process)
    late = threading.Timer(limits.seconds + START + 5 * GRACE, remove, (engine, name))
    late.start()
    assert process.stdout is not None
    try:
        said = process.stdout.read(LONGEST)
    finally:
        late.cancel()
        remove(engine, name)  # where it has ended, it is gone already
        process.kill()  # the engine's command, should it still be there
        process.wait()
        process.stdout.close()
        running.discard(process)
    return read_report(said, path)


def remove(engine: str, name: str) -> None:
    """End a container, and delete it. One that is gone is fine."""
    subprocess.run([engine, "rm", "--force", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read_report(said: bytes, path: Path) -> Report:
    """The report in what a container said, or one with a fault: it may have said anything."""
    lines = said.decode("utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    try:
        content: Any = json.loads(lines[-1])
        report = Report.from_dict(content | {"notebook": str(path)})
        texts = [report.course, report.fault, *report.notes]
        for grade in report.grades:
            texts += [grade.id, grade.title, grade.message]
            if grade.state not in STATES or not 0 <= int(grade.points) <= int(grade.of):
                raise ValueError(grade)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(texts)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Report(str(path), "", fault=f"grading it failed in its container: {lines[-1][:300]}")
    return report
