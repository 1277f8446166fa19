"""What `pip install qlora-lab` gives: sdist and wheel are built, the wheel is installed into a fresh environment.

That environment has the libraries of this one (installing them anew takes minutes), and the package from the wheel.
"""

import ast
import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from qlora_lab import __version__
from qlora_lab.__main__ import COMMANDS, main

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = "import setuptools.build_meta as backend, sys; backend.build_sdist(sys.argv[1])"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
LARGEST = 9_000_000  # bytes of the wheel; PyPI takes 100 MB


def run(*command, folder: pathlib.Path, **environment) -> subprocess.CompletedProcess[str]:
    """Run a command that has no PYTHONPATH and writes no bytecode."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def tracked(*folders: str) -> list[str]:
    """The files of the repository in some of its folders. Where there is no git, there is nothing to compare with."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(path for path in set(listed.split("\0")) if path and (ROOT / path).is_file())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel, built from the sdist, which was built from a copy: what the sdist lacks is missing here, too."""
    folder = tmp_path_factory.mktemp("built")
    for path in tracked():
        (folder / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / "copy" / path)
    done = run(sys.executable, "-c", BUILD, folder, folder=folder / "copy")
    assert done.returncode == 0, done.stderr
    (sdist,) = folder.glob("*.tar.gz")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    done = run(*PIP, "wheel", *flags, sdist, folder=folder)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """The folder of programs in a fresh environment that has the wheel."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    where = run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder)
    libraries = pathlib.Path(where.stdout.strip()) / "libraries.pth"
    libraries.write_text(sysconfig.get_path("purelib"), encoding="utf-8")  # not its .pth files, ours among them
    flags = ["--python", programs / "python", "install", "--quiet", "--no-deps", "--no-index"]
    done = run(*PIP, *flags, wheel, folder=folder)
    assert done.returncode == 0, done.stderr
    return programs


def is_for_learners(path: str) -> bool:
    """Whether the wheel has a file: no solutions, and of the sources only what the code says in other languages."""
    if path.startswith("notebooks/source/"):
        return path.endswith((".labels.json", "/edition.json"))
    return "/solutions/" not in path and path != "notebooks/undeclared.json"


def test_the_wheel_has_data_and_lessons_and_not_their_solutions(wheel):
    with zipfile.ZipFile(wheel) as archive:
        course = [name for name in archive.namelist() if name.startswith("qlora_lab/course/")]
        assert archive.read("qlora_lab/course/data/README.md") == (ROOT / "data" / "README.md").read_bytes()
    expected = [
        f"qlora_lab/course/{path}" for path in tracked("data", "docs", "examples", "notebooks") if is_for_learners(path)
    ]
    assert sorted(course) == expected
    assert wheel.stat().st_size < LARGEST


def test_the_wheel_trains_from_any_folder_and_writes_only_there(installed, tmp_path):
    site = next(installed.parent.rglob("qlora_lab/course"))
    before = {path: path.stat().st_mtime_ns for path in site.parent.rglob("*")}
    flags = ["--steps", "2", "--batch-size", "1", "--eval-samples", "0", "--output", "runs/mine", "--quiet"]
    done = run(installed / "qlora-lab", "run", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "mine" / "report.json").read_text(encoding="utf-8"))
    assert len(report["losses"]) == 2
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()
    assert {path: path.stat().st_mtime_ns for path in site.parent.rglob("*")} == before


NOTEBOOK = """
import nbformat, sys
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, resources={"metadata": {"path": sys.argv[2]}}, kernel_name="python3").execute()
"""


def test_a_lesson_of_the_copy_runs_on_the_wheel(installed, tmp_path):
    """Notebook 10 shows recorded measurements, which are in the package."""
    done = run(installed / "qlora-lab", "course", "mine", "--copy-only", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    notebooks = tmp_path / "mine" / "notebooks"
    learners = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/zh-TW/*.ipynb")]
    copied = {path.relative_to(notebooks) for path in notebooks.rglob("*") if path.is_file()}
    assert copied == {path.relative_to(ROOT / "notebooks") for path in learners}
    progress = {"QLORA_LAB_PROGRESS": str(tmp_path / "progress.json")}
    lesson = notebooks / "10_memory_comparison.ipynb"
    done = run(installed / "python", "-c", NOTEBOOK, lesson, notebooks, folder=tmp_path, **progress)
    assert done.returncode == 0, done.stderr


def test_a_copy_keeps_the_learners_work_and_opens_in_jupyterlab(installed, tmp_path):
    assert run(installed / "qlora-lab", "course", "mine", "--copy-only", folder=tmp_path).returncode == 0
    lesson = tmp_path / "mine" / "notebooks" / "00_start_here.ipynb"
    lesson.write_text("my own", encoding="utf-8")
    (tmp_path / "mine" / "notebooks" / "glossary.ipynb").unlink()
    done = run(installed / "qlora-lab", "course", "mine", "--", "--version", folder=tmp_path)
    said, version = done.stdout.splitlines()
    assert (done.returncode, said) == (0, "mine: 1 new files; what was there has stayed as it was"), done.stderr
    assert version == importlib.metadata.version("jupyterlab")
    assert lesson.read_text(encoding="utf-8") == "my own"


@pytest.mark.parametrize(
    "command",
    [["classroom", "new", "dataset", "x", "--made-by", "me"], ["classroom.build"], ["classroom.website", "s"]],
)
def test_what_changes_the_course_asks_for_a_checkout(installed, tmp_path, command):
    module, *arguments = command
    done = run(installed / "python", "-m", f"qlora_lab.{module}", *arguments, folder=tmp_path)
    assert done.returncode == (1 if module == "classroom.build" else 2)
    assert "clone the course's repository" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_main_and_is_explained(name, capsys):
    module, first = COMMANDS[name]
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ") and all(word in shown for word in first)
    assert main(["--help"]) == 0
    assert f"    qlora-lab {name}" in capsys.readouterr().out


def test_a_command_that_is_none_is_named(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no command 'trian': choose run, export, ")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qlora-lab {__version__}\n"


def test_a_folder_that_cannot_be_the_course_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["course", str(tmp_path / "file"), "--copy-only"]) == 2
    assert main(["course", str(ROOT / "notebooks"), "--copy-only"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("file is a file: name a folder for the course")
    assert second.endswith("notebooks is in the course's own files: name another folder")


def test_only_places_asks_where_the_package_is():
    """Elsewhere, `__file__` would be right in a checkout and wrong in an installed package."""
    asking = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "qlora_lab").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if "__file__" in (getattr(node, "id", ""), getattr(node, "attr", ""))
    }
    # both run where nothing is installed: in a room without internet, and on Colab
    assert asking == {"qlora_lab/places.py", "qlora_lab/wheelhouse.py", "qlora_lab/colab.py"}
