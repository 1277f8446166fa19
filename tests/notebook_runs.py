"""A pytest plugin beside nbval: several notebooks at a time (`-n 2 --dist loadfile`), each as its reader has it.

Those that took longest when they were recorded begin, so that no core waits at the end. Each kernel has a file of its
own for progress, beside its notebook; in those of a folder "solutions", an exercise that is not right is an error.
"""

import json
import os
import pathlib

import pytest

RECORD = pathlib.Path(__file__).resolve().parent.parent / "data" / "records" / "notebooks.json"


def longest_first(paths: list[pathlib.Path], seconds: dict[str, float]) -> list[pathlib.Path]:
    """The notebooks by the recorded seconds of the learner's; those without a record begin."""
    return sorted(paths, key=lambda path: (-seconds.get(path.stem, float("inf")), str(path)))


def pytest_collection_modifyitems(items):
    record = json.loads(RECORD.read_text(encoding="utf-8"))["notebooks"]
    order = longest_first(list({item.path for item in items}), {name: took["seconds"] for name, took in record.items()})
    items.sort(key=lambda item: order.index(item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    os.environ["QLORA_LAB_PROGRESS"] = str(item.path.with_suffix(".progress.json"))
    os.environ["QLORA_LAB_STRICT"] = str(int(item.path.parent.name == "solutions"))
