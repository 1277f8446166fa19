"""The command `qlora-lab`: a short name for what the package's modules do, and a way into the course.

    qlora-lab run --data FILE --output runs/mine     python -m qlora_lab.train_qlora
    qlora-lab export runs/mine --to my-model         python -m qlora_lab.export
    qlora-lab preflight owner/name                   python -m qlora_lab.models preflight
    qlora-lab data FILE                              python -m qlora_lab.data
    qlora-lab grade NOTEBOOK                         python -m qlora_lab.classroom.grade
    qlora-lab fetch                                  python -m qlora_lab.models fetch
    qlora-lab course [FOLDER]                        copy the notebooks into FOLDER, and open JupyterLab there

`qlora-lab COMMAND --help` lists the flags of each.
"""

from __future__ import annotations

import importlib
import sys

from qlora_lab import __version__

# command: the module whose `main` runs it, and what comes before the user's arguments
COMMANDS = {
    "run": ("qlora_lab.train_qlora", []),
    "export": ("qlora_lab.export.__main__", []),
    "preflight": ("qlora_lab.models.__main__", ["preflight"]),
    "data": ("qlora_lab.data", []),
    "grade": ("qlora_lab.classroom.grade", []),
    "fetch": ("qlora_lab.models.__main__", ["fetch"]),
    "course": ("qlora_lab.classroom.course", []),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 for a user's error, which standard error then says."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    if name == "--version":
        print(f"qlora-lab {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}: choose {', '.join(COMMANDS)} (see --help)", file=sys.stderr)
        return 2
    module, first = COMMANDS[name]
    return importlib.import_module(module).main([*first, *rest])


if __name__ == "__main__":
    sys.exit(main())
