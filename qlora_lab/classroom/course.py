"""The course in a folder of the learner's: `qlora-lab course`, or `python -m qlora_lab.classroom.course`.

It copies the notebooks, and the pages that they link, into the folder, and opens JupyterLab there. What is in the
folder already stays as it is, so the same command opens the course again, with the learner's work in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from qlora_lab.arguments import Parser, print_anywhere
from qlora_lab.errors import CANNOT_WRITE, UserError
from qlora_lab.places import ROOT

FIRST = "00_start_here.ipynb"
NOT_FOR_LEARNERS = ("source", "solutions", "undeclared.json", "runs", "__pycache__", ".ipynb_checkpoints")


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qlora-lab course",
        usage="%(prog)s [FOLDER] [--copy-only] [-- flags of JupyterLab, such as --no-browser]",
        description=(__doc__ or "").partition(":")[0],
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("qlora-lab"), help="default: %(default)s, here")
    parser.add_argument("--copy-only", action="store_true", help="do not open JupyterLab")
    return parser


def split_at_dashes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first `--`, and those after it."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


def copy_course(folder: Path) -> list[Path]:
    """Copy notebooks and docs to a folder, without replacing a file that is there; return the new files.

    Raises UserError if the folder is a file, or is in the course's own.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the course")
    if any(folder.resolve().is_relative_to(ROOT / name) for name in ("docs", "notebooks")):
        raise UserError(f"{folder} is in the course's own files: name another folder")
    new = []
    for name in ("docs", "notebooks"):
        for source in sorted((ROOT / name).rglob("*")):
            inside = source.relative_to(ROOT)
            target = folder / inside
            if source.is_file() and not target.exists() and not set(inside.parts) & set(NOT_FOR_LEARNERS):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                new.append(target)
    return new


def open_lab(folder: Path, flags: list[str]) -> int:
    """Open the notebooks of a copy in JupyterLab, until that is closed; return its exit code."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder.resolve() / 'notebooks'}"]
    command += [f"--LabApp.default_url=/lab/tree/{FIRST}", *flags]
    if getattr(os, "geteuid", lambda: 1)() == 0:
        command.append("--allow-root")
    return subprocess.run(command).returncode


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: JupyterLab's, or 2 for a user's error."""
    print_anywhere()
    try:
        own, lab_flags = split_at_dashes(sys.argv[1:] if arguments is None else arguments)
        args = parser().parse_args(own)
        new = copy_course(args.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None or error.errno not in CANNOT_WRITE:
            raise
        print(f"error: cannot write to {args.folder}: {os.strerror(error.errno)}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {len(new)} new files; what was there has stayed as it was", flush=True)
    return 0 if args.copy_only else open_lab(args.folder, lab_flags)


if __name__ == "__main__":
    sys.exit(main())
