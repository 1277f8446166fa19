"""Grade what learners hand in: each notebook in a process of its own, under limits.

    python -m qlora_lab.classroom.grade 05_double_quantization.ipynb [more.ipynb] [--json | --csv]
        [--minutes 30] [--cell-minutes 10] [--answer-minutes 2] [--memory-gb 8]
    python -m qlora_lab.classroom.grade --class handed_in --results grades --jobs 4 [--roster roster.csv]
    python -m qlora_lab.classroom.grade --one handed_in/ann/04.ipynb --results grades

The first prints a table, a list of reports or lines of CSV as the hand-ins are graded. The second writes tables of a
class and a page with comments to a folder, as they come; started once more, it goes on. The third grades one of its
hand-ins, for a scheduler or a CI matrix: the second, when all are done, puts them together.

`grading/hand_in.py` says how a notebook is graded. This guards against accidents and idle tricks. For strangers' code,
`--container IMAGE` grades each hand-in in a container of its own (`grading/containers.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_lab.arguments import Parser, count, positive, print_anywhere
from qlora_lab.classroom.grading.classes import Student, students_in
from qlora_lab.classroom.grading.containers import find_engine
from qlora_lab.classroom.grading.kernel import Limits
from qlora_lab.classroom.grading.reports import Report
from qlora_lab.classroom.grading.runs import grade_all
from qlora_lab.classroom.grading.tables import LINE, as_csv, canvas, lines, matrix, moodle, row_of, statistics
from qlora_lab.classroom.grading.webpage import class_page
from qlora_lab.errors import UserError


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m qlora_lab.classroom.grade", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--class", dest="folder", type=Path, metavar="FOLDER", help="what a class handed in")
    parser.add_argument("--roster", type=Path, metavar="CSV", help="who is in the class; default: names of folders")
    parser.add_argument("--one", type=Path, metavar="NOTEBOOK", help="grade it and keep its report, without tables")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="keep reports, and go on with those kept there")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="side by side (default: %(default)s)")
    parser.add_argument("--course", default="", metavar="NAME", help="the lesson asked for, such as 04")
    parser.add_argument("--container", metavar="IMAGE", default="", help="grade each in a container: strangers' code")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="a list of reports on standard output, instead of tables")
    shown.add_argument("--csv", action="store_true", help="a line for each exercise on standard output")
    parser.add_argument("--minutes", type=positive, default=30, help="for a notebook (default: %(default)s)")
    parser.add_argument("--cell-minutes", type=positive, default=10, help="for a cell (default: %(default)s)")
    parser.add_argument("--answer-minutes", type=positive, default=2, help="for an answer (default: %(default)s)")
    parser.add_argument("--memory-gb", type=positive, default=8, help="10^9 bytes, resident (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    """What `main` does with the arguments. Raises UserError for those that do not fit together, and a class' names."""
    limits = Limits(60 * args.minutes, 60 * args.cell_minutes, 60 * args.answer_minutes, 1e9 * args.memory_gb)
    ways = [bool(args.notebooks), args.folder is not None, args.one is not None]
    if sum(ways) != 1:
        raise UserError("expected notebooks, or --class FOLDER, or --one NOTEBOOK (see --help)")
    if args.container:
        find_engine()
    if not args.notebooks and args.results is None:
        raise UserError("--class and --one need --results FOLDER, where the reports are kept")
    if args.roster and not args.folder:
        raise UserError("--roster says who is in a class: it needs --class FOLDER")
    students = students_in(args.folder, args.roster) if args.folder else []
    hand_ins = [path for student in students for path in student.with_ending(".ipynb")]
    hand_ins = hand_ins or args.notebooks or [path for path in [args.one] if path]
    with tempfile.TemporaryDirectory() as temporary:
        results = args.results or Path(temporary)
        done = show(grade_all(hand_ins, limits, results, args.jobs, args.course, args.container), args, students)
        reports: dict[Path, Report] = {}
        if args.folder:
            write_class(results, args.folder, students, reports)  # who has handed in nothing stands there, too
        for path, report in done:
            reports[path] = report
            if args.folder:
                write_class(results, args.folder, students, reports)
    return 2 if any(report.fault for report in reports.values()) else 0


def show(
    done: Iterator[tuple[Path, Report]], args: argparse.Namespace, students: Sequence[Student]
) -> Iterator[tuple[Path, Report]]:
    """Print each report as it comes, in the form that was asked for, and pass it on."""
    owners = {path: student.name for student in students for path in student.files}
    if args.csv:
        print(as_csv([LINE]), end="", flush=True)
    separator = "["
    for path, report in done:
        if report.fault:
            print(f"error: {path}: {report.fault}", file=sys.stderr, flush=True)
        if args.json:
            print(separator + json.dumps(report.as_dict(), indent=1, ensure_ascii=False), end="", flush=True)
            separator = ",\n"
        elif args.csv:
            print(as_csv(lines(owners.get(path, ""), report)), end="", flush=True)
        elif args.folder:
            name = f"{owners[path]}, {path.name}"
            print(f"{name}: " + ("not graded" if report.fault else f"{report.points} of {report.of}"), flush=True)
        else:
            print(report, flush=True)
        yield path, report
    if args.json:
        print("[]" if separator == "[" else "]")


def write_class(results: Path, folder: Path, students: Sequence[Student], reports: dict[Path, Report]) -> None:
    """Write the tables of a class, each in one step, from the reports that there are so far."""
    theirs = defaultdict(list)
    for student in students:
        theirs[student.name] = [reports[path] for path in student.files if path in reports]
    rows = [row_of(student, theirs[student.name]) for student in students]
    long = [line for student in students for report in theirs[student.name] for line in lines(student.name, report)]
    texts = {
        "grades.csv": as_csv(matrix(rows)),
        "exercises.csv": as_csv([LINE, *long]),
        "statistics.csv": as_csv(statistics(rows)),
        "grades.html": class_page(f"Grades of {folder.name}", rows),
        "grades.json": json.dumps(
            [
                {"student": student.name, "hand_ins": [report.as_dict() for report in theirs[student.name]]}
                for student in students
            ],
            indent=1,
            ensure_ascii=False,
        ),
    }
    for name, table in (("moodle.csv", moodle(rows)), ("canvas.csv", canvas(rows))):
        if table:
            texts[name] = as_csv(table)
    results.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        temporary = results / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, results / name)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 when all notebooks were graded, whatever their points; 2 when one could not be."""
    print_anywhere()
    try:
        return run(parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: with --results, the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
