import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lab.classroom.source import REPOSITORY

PARTS = (
    "qlora_lab",
    "tests",
    "notebooks",
    "data",
    "examples",
    "README.md",
    "README.zh-TW.md",
    "pyproject.toml",
    "requirements.txt",
    "constraints.txt",
)


@pytest.fixture(scope="session")
def copy_course() -> Callable[[Path], None]:
    """Copies the course, as its tests need it, into a folder that is there."""

    def copy(folder: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__", "runs", ".*")
        for part in PARTS:
            if (REPOSITORY / part).is_dir():
                shutil.copytree(REPOSITORY / part, folder / part, ignore=ignored)
            else:
                shutil.copy(REPOSITORY / part, folder / part)

    return copy
