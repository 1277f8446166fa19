"""The set-up cell: nothing here, and on Colab (simulated) a course that runs from an empty folder."""

import base64
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from qlora_lab import colab
from qlora_lab.classroom.build import code_cells
from qlora_lab.models.bundled import cache_folder

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/solutions/*.ipynb")])
LACKING = ("gguf", "jupytext", "peft")  # pure Python, which the simulated Colab does not have


def test_every_notebook_begins_with_the_same_cell():
    assert len(NOTEBOOKS) >= 22
    for path in NOTEBOOKS:
        first = code_cells(json.loads(path.read_text(encoding="utf-8")))[0]
        assert "".join(first["source"]) == colab.CELL, path.name
        assert first["outputs"] == [] and first["metadata"]["jupyter"]["source_hidden"]


def test_on_ones_own_machine_it_does_nothing(tmp_path):
    code = (
        f"import sys\nbefore = sys.path[:]\n{colab.CELL}\nassert sys.path == before and 'qlora_lab' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_what_is_lacking():
    version = importlib.metadata.version("peft")
    requirements = f"""
# models
peft=={version}    # as it is
torch>=99,<100     # newer than any
no-such-project>=1 # not there
no-such-project ; python_version < '3'
"""
    assert colab.lacking(requirements) == ["torch<100,>=99", "no-such-project>=1"]


def test_torch_is_never_replaced(tmp_path, monkeypatch):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("torch>=99\nno-such-project\n")
    monkeypatch.setattr(colab, "REQUIREMENTS", requirements)
    monkeypatch.setattr(colab.subprocess, "run", lambda *_, **__: pytest.fail("nothing may be installed"))
    with pytest.raises(RuntimeError, match=r"this course needs torch>=99, and here is \d.*: take a newer runtime"):
        colab.prepare()


def test_what_pip_cannot_do_is_told(tmp_path, monkeypatch):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("no-such-project>=1\n")
    monkeypatch.setattr(colab, "REQUIREMENTS", requirements)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="pip could not install no-such-project>=1: (?s:.*)No matching distribution"):
        colab.prepare()


# --------------------------------------------------------------------------------------------------- a simulated Colab


def repacked(name: str, folder: pathlib.Path) -> list[str]:
    """Make a wheel of an installed pure Python project in `folder`; the top entries of its files."""
    project = importlib.metadata.distribution(name)
    inside = [file for file in project.files if ".." not in file.parts and file.suffix != ".pyc"]
    stem = f"{project.metadata['Name'].replace('-', '_')}-{project.version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for file in inside:
            wheel.write(file.locate(), file.as_posix())
    return sorted({file.parts[0] for file in inside})


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A Python with everything but LACKING and the course, which believes to be Colab's; how to call it."""
    folder = tmp_path_factory.mktemp("colab")
    wheels, libraries = folder / "wheels", folder / "libraries"
    wheels.mkdir(), libraries.mkdir()
    hidden = {entry for name in LACKING for entry in repacked(name, wheels)}
    for entry in pathlib.Path(sysconfig.get_paths()["purelib"]).iterdir():
        ours = "qlora_lab" in entry.name
        if entry.name not in hidden and not ours and entry.name not in ("sitecustomize.py", "__pycache__"):
            (libraries / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = pathlib.Path(subprocess.run([python, "-c", show], capture_output=True, text=True).stdout.strip())
    (packages / "libraries.pth").write_text(f"{libraries}\n")
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").write_text("")
    (packages / "sitecustomize.py").write_text("import google.colab\n")  # as Colab's kernel does

    course = folder / "course"
    for part in ("qlora_lab", "notebooks", "data"):
        shutil.copytree(ROOT / part, course / part, ignore=shutil.ignore_patterns("__pycache__", "runs", ".*"))
    shutil.copy(ROOT / "requirements.txt", course)
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for git in (["init", "--quiet"], ["add", "-A"], [*author, "commit", "--quiet", "-m", "course"]):
        subprocess.run(["git", *git], cwd=course, check=True)
    return folder, python, packages


def run(machine, code: str, cwd: pathlib.Path, **more: str) -> subprocess.CompletedProcess:
    """Run `code` in the simulated Colab; the environment is bare, so that nothing of this one leaks in."""
    folder, python, _ = machine
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels")}
    return subprocess.run([python, "-c", code], cwd=cwd, env={**env, **more}, capture_output=True, text=True)


def test_colab_gets_the_course_and_what_it_lacks_and_keeps_its_torch(machine, tmp_path):
    folder, _, packages = machine
    state = "import sys, torch; print(torch.__version__, torch.__file__)"
    before = run(machine, state, tmp_path).stdout
    cell = colab.CELL.replace(f'address = "{colab.ADDRESS}"', f'address = "{(folder / "course").as_uri()}"')
    code = (
        f"{cell}\n"
        "import os, peft, torch, qlora_lab.quantization\n"
        "print(os.getcwd(), qlora_lab.__file__, peft.__version__, peft.__file__, sep='\\n')"
    )
    done = run(machine, code, tmp_path)
    assert done.returncode == 0, done.stderr
    installing, cwd, package, version, file = done.stdout.splitlines()
    assert installing.startswith("installing ") and all(name in installing for name in LACKING)
    assert "torch" not in installing
    assert cwd == str(tmp_path / "qlora-lab" / "notebooks")
    assert package == str(tmp_path / "qlora-lab" / "qlora_lab" / "__init__.py")
    assert version == importlib.metadata.version("peft") and file.startswith(str(packages))
    assert run(machine, state, tmp_path).stdout == before
    again = run(machine, code, tmp_path)  # after a restart of the session, in the first folder again
    assert again.stdout.splitlines() == [cwd, package, version, file]
    twice = run(machine, f"{cell}\n{code}", tmp_path)  # the cell run twice in one session
    assert twice.stdout.splitlines() == [cwd, package, version, file]


def test_a_first_notebook_runs_there(machine, tmp_path):
    """All cells of 03 in the simulated Colab's kernel, begun in an empty folder."""
    folder, python, _ = machine
    notebook = json.loads((ROOT / "notebooks" / "03_nf4.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in code_cells(notebook)]
    cells[0] = cells[0].replace('address = ""', f'address = "{(folder / "course").as_uri()}"')
    script = (
        "import base64, json, sys\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        f"for cell in json.loads(base64.b64decode('{base64.b64encode(json.dumps(cells).encode()).decode()}')):\n"
        "    result = shell.run_cell(cell)\n"
        "    if result.error_in_exec or result.error_before_exec:\n"
        "        sys.exit(1)\n"
    )
    places = {"QLORA_LAB_CACHE": str(cache_folder()), "QLORA_LAB_PROGRESS": str(tmp_path / "progress.json")}
    done = run(machine, script, tmp_path, MPLBACKEND="agg", **places)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_wrong_address_is_told(machine, tmp_path):
    done = run(machine, colab.CELL, tmp_path)
    assert "RuntimeError: git cannot fetch '': fill in the form's field, and run this cell again" in done.stderr
