"""Many hand-ins, some side by side, each in a process of its own. Reports are kept as they come.

A report is kept in the results folder under the sha256 of the hand-in. Whoever grades the same file once more under the
same limits, on this machine or on another that has the folder, is given the report that is there: so a run that was
killed goes on where it was, and one that is spread over machines is put together by a last one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from qlora_lab import __version__
from qlora_lab.classroom.grading.containers import grade_contained
from qlora_lab.classroom.grading.hand_in import read_hand_in
from qlora_lab.classroom.grading.kernel import GRACE, MARK, START, Crowd, Limits, python_path
from qlora_lab.classroom.grading.reports import Report
from qlora_lab.errors import UserError

WORKER = "qlora_lab.classroom.grading.worker"


def grade_all(
    hand_ins: Sequence[Path], limits: Limits, results: Path, jobs: int = 1, course: str = "", image: str = ""
) -> Iterator[tuple[Path, Report]]:
    """Yield each hand-in with its report, in the order in which they are done.

    results: a folder, made if need be, where reports are kept. course: as in `hand_in.grade`. image: of
    the containers that they are graded in, each in its own; default: processes of this machine.
    Every hand-in is yielded, whatever happens to it: a report that could not be made says so in its `fault`, and is not
    kept.
    """
    (results / "hand_ins").mkdir(parents=True, exist_ok=True)
    same = defaultdict(list)  # hand-ins by key; two that are equal are graded once
    for path in hand_ins:
        try:
            same[hashlib.sha256(read_hand_in(path)).hexdigest()].append(path)
        except UserError as error:
            yield path, Report(str(path), "", fault=str(error))
    running: set[subprocess.Popen] = set()

    def grade_one(path: Path, key: str) -> Report:
        if not image:
            return _grade_apart(path, key, limits, results, course, running)
        report = grade_contained(path, image, limits, course, running)
        if not report.fault:
            keep(results, key, report, limits, course)
        return report

    waiting = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for key, paths in same.items():
                if report := kept(results, key, limits, course):
                    yield from ((path, replace(report, notebook=str(path))) for path in paths)
                else:
                    waiting[pool.submit(grade_one, paths[0], key)] = paths
            for done in as_completed(waiting):
                yield from ((path, replace(done.result(), notebook=str(path))) for path in waiting[done])
        finally:  # nobody wants the rest
            for future in waiting:
                future.cancel()
            for process in list(running):
                process.terminate()


def _grade_apart(path: Path, key: str, limits: Limits, results: Path, course: str, running: set) -> Report:
    """Grade one hand-in in a process of its own."""
    mark = uuid.uuid4().hex
    crowd = Crowd(mark)
    order = {"path": str(path), "limits": asdict(limits), "course": course, "key": key}
    order["results"] = str(results.absolute())
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(path)],
            env=os.environ | {MARK: mark, "PYTHONPATH": python_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        running.add(process)
        try:
            process.communicate(json.dumps(order).encode(), timeout=limits.seconds + START + 5 * GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            running.discard(process)
            crowd.end()  # it has done so itself, unless it was killed
        said.seek(0)
        lines = said.read().decode("utf-8", errors="replace").strip().splitlines()
    why = lines[-1] if lines else f"its process ended with {process.returncode}"
    return kept(results, key, limits, course) or Report(str(path), "", fault=f"grading it failed: {why}")


# ------------------------------------------------------------------------------------------------------ what was graded


def keep(results: Path, key: str, report: Report, limits: Limits, course: str) -> None:
    """Write a report in one step: whatever happens, it is there whole or not at all."""
    path = _path(results, key)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    stored = {"report": report.as_dict(), **_conditions(limits, course), "graded": time.strftime("%Y-%m-%d %H:%M:%S")}
    temporary.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def kept(results: Path, key: str, limits: Limits, course: str) -> Report | None:
    """The report that is kept of a hand-in, or None if it was not graded under these conditions."""
    try:
        stored = json.loads(_path(results, key).read_text(encoding="utf-8"))
        if any(stored.get(name) != value for name, value in _conditions(limits, course).items()):
            return None
        return Report.from_dict(stored["report"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _path(results: Path, key: str) -> Path:
    return results / "hand_ins" / f"{key[:32]}.json"


def _conditions(limits: Limits, course: str) -> dict:
    return {"limits": asdict(limits), "course": course, "version": __version__}
