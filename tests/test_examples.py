"""The examples in the package's docstrings print what they say."""

import doctest
import importlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "qlora_lab"
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=module_name)
def test_examples_print_what_they_say(path, monkeypatch, tmp_path):
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(tmp_path / "progress.json"))
    monkeypatch.delenv("QLORA_LAB_STRICT", raising=False)
    module = importlib.import_module(module_name(path))
    told: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    examples = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    for test in examples:
        runner.run(test, out=told.append)
    assert not told, "".join(told)
    written = path.read_text(encoding="utf-8").count(">>> ")
    assert sum(len(test.examples) for test in examples) == written, "an example that no docstring of the module holds"


def test_there_are_examples():
    assert len(WITH_EXAMPLES) >= 8
