"""What instructors do with a course and a class, beside building and grading.

    python -m qlora_lab.classroom new lesson 90_my_lesson --title "what does it cost?"
    python -m qlora_lab.classroom new exercise 90 mean_scale --title "the mean scale" --item memory --points 2
    python -m qlora_lab.classroom new dataset tickets train.jsonl test.jsonl --made-by "written by hand, MIT"
    python -m qlora_lab.classroom drop 90_my_lesson

write (or delete) all files of a lesson, an exercise or a data set, and what must know of them, and run the notebook:
`make check` and the tests pass before you change a line.

    python -m qlora_lab.classroom publish https://github.com/you/qlora-lab

writes the address of one's copy into the notebooks' set-up cells, and badges for Colab and Kaggle into README.

    python -m qlora_lab.classroom merge FOLDER [--roster CSV] [--output FILE]

merges what students have exported with `progress().export` to one table, on standard output or in a file. Each student
has a folder in FOLDER, or the roster says whose the files are.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from qlora_lab.arguments import Parser, count, print_anywhere
from qlora_lab.classroom import scaffold
from qlora_lab.classroom.grading.classes import students_in
from qlora_lab.classroom.grading.progress import ENDINGS, merged
from qlora_lab.classroom.grading.tables import as_csv
from qlora_lab.classroom.judging import CHECKLIST
from qlora_lab.classroom.publish import publish
from qlora_lab.errors import UserError
from qlora_lab.places import require_checkout


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m qlora_lab.classroom", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="one table of what students have exported of their progress")
    merge.add_argument("folder", type=Path)
    merge.add_argument("--roster", type=Path, metavar="CSV", help="who is in the class; default: names of folders")
    merge.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    new = commands.add_parser("new", help="the files of a lesson, an exercise or a data set, ready to be changed")
    kinds = new.add_subparsers(dest="kind", required=True)
    lesson = kinds.add_parser("lesson", help="a notebook that runs, its figure, its folder of checks")
    lesson.add_argument("name", help="two digits and a word, such as 17_my_lesson")
    lesson.add_argument("--title", required=True, help='a question, such as "what does it cost?"')
    exercise = kinds.add_parser("exercise", help="a stub, its check, a right answer and two wrong ones")
    exercise.add_argument("lesson", help="beginning of its name, such as 90")
    exercise.add_argument("name", help="of the learner's function, such as mean_scale")
    exercise.add_argument("--title", required=True, help='such as "the mean scale"')
    exercise.add_argument("--item", required=True, choices=CHECKLIST, help="of the course's checklist")
    exercise.add_argument("--points", type=partial(count, most=3), default=1, help="1 to 3 (default: %(default)s)")
    for kind in (lesson, exercise):
        kind.add_argument("--write-only", action="store_true", help="do not run the notebook: you will change it first")
    dataset = kinds.add_parser("dataset", help="chats in data/NAME, listed with their sums")
    dataset.add_argument("name", help="such as tickets")
    dataset.add_argument("files", nargs="*", type=Path, help="named by their split: train.jsonl; default: an example")
    dataset.add_argument("--made-by", required=True, help="where it is from, and the licence")
    drop = commands.add_parser("drop", help="delete a lesson, and say which lines elsewhere still speak of it")
    drop.add_argument("lesson", help="its whole name, such as 90_my_lesson")
    publishing = commands.add_parser("publish", help="the address of your copy in set-up cells and README")
    publishing.add_argument("address", help="from which everybody can clone; empty to take it back")
    publishing.add_argument("--branch", default="main", help="which Colab and Kaggle open (default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what `main` was asked for, and return the exit code."""
    if args.command == "merge":
        table, faults = merged(students_in(args.folder, args.roster, ENDINGS))
        if args.output:
            args.output.write_text(as_csv(table), encoding="utf-8", newline="\n")
        else:
            print(as_csv(table), end="")
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2 if faults else 0
    require_checkout()
    if args.command == "publish":
        badges = publish(args.address, args.branch)
        told = "README has badges for Colab and Kaggle" if badges else "Colab and Kaggle open GitHub only: no badges"
        print(f"every set-up cell has the address; {told}; now commit and push" if args.address else "taken back")
        return 0
    if args.command == "drop":
        lines = scaffold.drop_lesson(args.lesson)
        print("\n".join(["deleted; these lines still speak of it, for you to edit:", *lines] if lines else ["deleted"]))
        return 0
    if args.kind == "lesson":
        files = scaffold.new_lesson(args.name, args.title)
    elif args.kind == "exercise":
        files = scaffold.new_exercise(args.lesson, args.name, args.title, args.item, args.points)
    else:
        files = scaffold.new_dataset(args.name, args.files, args.made_by)
    for path in files:
        print(path.relative_to(scaffold.REPOSITORY).as_posix(), flush=True)
    if args.kind != "dataset" and not args.write_only:
        scaffold.run(files[0], record=args.kind == "lesson")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 when a file was no export, or for a mistake in the arguments."""
    print_anywhere()
    try:
        return run(parser().parse_args(arguments))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
