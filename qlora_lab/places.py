"""Where the course's files are: beside the package in a checkout, inside of it where pip has installed the wheel.

`setup.py` copies them into the wheel, as `qlora_lab/course/`. What is installed is only read: what changes the course
calls `require_checkout` first, and `qlora-lab course` works on a copy.
"""

from pathlib import Path

from qlora_lab.errors import UserError

PACKAGE = Path(__file__).resolve().parent
IMPORTED_FROM = PACKAGE.parent  # in PYTHONPATH, it gives another process this package
IS_INSTALLED = (PACKAGE / "course").is_dir()
ROOT = PACKAGE / "course" if IS_INSTALLED else PACKAGE.parent

DATA, EXAMPLES, NOTEBOOKS = ROOT / "data", ROOT / "examples", ROOT / "notebooks"
RECORDS = DATA / "records"


def require_checkout() -> None:
    """Raise UserError if this package was installed from a wheel, and so is without what its lessons are built from."""
    if IS_INSTALLED:
        raise UserError(
            "this changes the course itself, and the installed package has no sources of it: clone the course's "
            "repository and run it there"
        )
