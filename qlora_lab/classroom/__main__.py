"""What instructors do with a class, beside building and grading.

    python -m qlora_lab.classroom merge FOLDER [--roster CSV] [--output FILE]

merges what students have exported with `progress().export` to one table, on standard output or in a file. Each student
has a folder in FOLDER, or the roster says whose the files are.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qlora_lab.arguments import Parser, print_anywhere
from qlora_lab.classroom.grading.classes import students_in
from qlora_lab.classroom.grading.progress import ENDINGS, merged
from qlora_lab.classroom.grading.tables import as_csv
from qlora_lab.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 when a file was no export, or for a mistake in the arguments."""
    parser = Parser(prog="python -m qlora_lab.classroom", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="one table of what students have exported of their progress")
    merge.add_argument("folder", type=Path)
    merge.add_argument("--roster", type=Path, metavar="CSV", help="who is in the class; default: names of folders")
    merge.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    print_anywhere()
    try:
        args = parser.parse_args(arguments)
        table, faults = merged(students_in(args.folder, args.roster, ENDINGS))
        if args.output:
            args.output.write_text(as_csv(table), encoding="utf-8", newline="\n")
        else:
            print(as_csv(table), end="")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
