"""One's own address in every notebook, without running them again; and the tests that pass in that copy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_lab import colab
from qlora_lab.classroom import publish
from qlora_lab.classroom.__main__ import main
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.errors import UserError

ADDRESS = "https://github.com/some-one/my.qlora"


@pytest.fixture(scope="module")
def published(tmp_path_factory, copy_course) -> Path:
    """A copy of the course with an address."""
    folder = tmp_path_factory.mktemp("published")
    copy_course(folder)
    assert publish.publish(f"{ADDRESS}.git/", "spring", folder)
    return folder


def notebooks(folder: Path) -> list[Path]:
    return sorted((folder / "notebooks").glob("**/*.ipynb"))


def files(folder: Path) -> dict[str, bytes]:
    names = ["README.md", "qlora_lab/colab.py", *(str(path.relative_to(folder)) for path in notebooks(folder))]
    return {name: (folder / name).read_bytes() for name in names}


def test_the_address_is_in_every_notebook_and_nothing_else_has_changed(published):
    assert len(notebooks(published)) == len(notebooks(REPOSITORY)) > 30
    for path in notebooks(published):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        before = json.loads((REPOSITORY / path.relative_to(published)).read_text(encoding="utf-8"))["cells"]
        different = [(a, b) for a, b in zip(cells, before, strict=True) if a != b]
        language = "zh-TW" if "zh-TW" in path.parts else ""
        assert ["".join(a["source"]) for a, _ in different] == [colab.cell(ADDRESS, language)]
        assert {**different[0][0], "source": "", "id": ""} == {**different[0][1], "source": "", "id": ""}


def test_readme_has_badges_for_every_lesson(published):
    readme = (published / "README.md").read_text(encoding="utf-8")
    for path in (published / "notebooks").glob("*.ipynb"):
        place = f"{ADDRESS.removeprefix('https://')}/blob/spring/notebooks/{path.name}"
        assert f"(https://colab.research.google.com/{place.replace('github.com', 'github')}) [!" in readme
        assert f"(https://kaggle.com/kernels/welcome?src=https://{place}) | " in readme


@pytest.mark.slow
def test_the_tests_pass_in_that_copy(published):
    """Those that know of the set-up cell and of README's table."""
    env = os.environ | {"PYTHONPATH": str(published)}
    build = [sys.executable, "-m", "qlora_lab.classroom.build", "--check"]
    done = subprocess.run(build, cwd=published, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    chosen = "same_cell or own_machine or asked_for or wrong_address or readme or learners_cells or solved_cells"
    named = ["tests/test_colab.py", "tests/test_labels.py", "tests/classroom/test_build.py"]
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *named, "-k", chosen]
    done = subprocess.run(pytest_, cwd=published, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "9 passed" in done.stdout


def test_it_can_be_done_again_elsewhere_and_taken_back(published, capsys, monkeypatch):
    first = files(published)
    publish.publish("https://git.example.org:8443/course", root=published)
    elsewhere = files(published)
    assert elsewhere["README.md"] == (REPOSITORY / "README.md").read_bytes()  # no badges: Colab opens GitHub's only
    assert b"git.example.org:8443/course" in elsewhere["notebooks/05_double_quantization.ipynb"]
    publish.publish(ADDRESS, "spring", published)
    assert files(published) == first
    publish.publish("", root=published)
    assert files(published) == files(REPOSITORY)
    publish.publish(ADDRESS, "spring", published)
    with pytest.raises(UserError, match="is no name of a branch"):
        publish.publish(ADDRESS, "a b", published)
    assert main(["publish", "git@github.com:some-one/my.qlora"]) == 2
    assert "is no address that everybody can clone from: https://github.com/you" in capsys.readouterr().err
    assert files(published) == first
