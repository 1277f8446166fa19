"""The set-up cell: nothing here; on Colab and Kaggle (simulated) a course that runs from an empty folder."""

import base64
import http.server
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import threading
import types
import zipfile

import ipywidgets
import matplotlib

matplotlib.use("agg")

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from qlora_lab import colab
from qlora_lab.classroom import judging, widgets
from qlora_lab.classroom.outputs import code_cells
from qlora_lab.classroom.plots import new_axes
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
    for part in ("qlora_lab", "notebooks", "data", "examples"):
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
    cell = colab.cell((folder / "course").as_uri())
    code = (
        f"{cell}\n"
        "import os, peft, torch, qlora_lab.quantization\n"
        "print(os.getcwd(), qlora_lab.__file__, peft.__version__, peft.__file__, sep='\\n')"
    )
    done = run(machine, code, tmp_path)
    assert done.returncode == 0, done.stderr
    kept, installing, cwd, package, version, file = done.stdout.splitlines()
    assert kept.startswith("your progress is kept as long as this session; to have it in your Drive, run `from google")
    assert installing.startswith("installing ") and all(name in installing for name in LACKING)
    assert "torch" not in installing
    assert cwd == str(tmp_path / "qlora-lab" / "notebooks")
    assert package == str(tmp_path / "qlora-lab" / "qlora_lab" / "__init__.py")
    assert version == importlib.metadata.version("peft") and file.startswith(str(packages))
    assert run(machine, state, tmp_path).stdout == before
    again = run(machine, code, tmp_path)  # after a restart of the session, in the first folder again
    assert again.stdout.splitlines() == [kept, cwd, package, version, file]
    twice = run(machine, f"{cell}\n{code}", tmp_path)  # the cell run twice in one session
    assert twice.stdout.splitlines() == [kept, kept, cwd, package, version, file]


def test_a_first_notebook_runs_there(machine, tmp_path):
    """All cells of 03 in the simulated Colab's kernel, begun in an empty folder."""
    folder, python, _ = machine
    notebook = json.loads((ROOT / "notebooks" / "04_nf4.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in code_cells(notebook)]
    cells[0] = colab.cell((folder / "course").as_uri())
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


def test_kaggle_gets_the_course_beside_its_output(machine, tmp_path):
    """Kaggle's machines may have Colab's library, too. (The simulated one has no folder for output.)"""
    folder, _, _ = machine
    (tmp_path / "working").mkdir()
    code = f"{colab.cell((folder / 'course').as_uri())}\nimport os, peft\nprint(os.getcwd())"
    places = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "TMPDIR": str(tmp_path)}
    done = run(machine, code, tmp_path / "working", **places)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "your progress is kept as long as this session"
    assert done.stdout.splitlines()[-1] == str(tmp_path / "qlora-lab" / "notebooks")
    assert list((tmp_path / "working").iterdir()) == []


def test_a_chinese_notebook_is_in_its_folder_and_speaks_chinese(machine, tmp_path):
    """Also when its cell is run twice."""
    folder, _, _ = machine
    cell = colab.cell((folder / "course").as_uri(), "zh-TW")
    code = f"{cell}\n{cell}\nimport os\nfrom qlora_lab.classroom.languages.texts import language\n"
    done = run(machine, f"{code}print(os.getcwd(), language())", tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'qlora-lab' / 'notebooks' / 'zh-TW'} zh-TW"


@pytest.fixture
def sessions():
    """Colab's service that knows what was opened: its address, and the path that it tells."""
    path = ["fileId=1a2b3c"]

    class Service(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/api/sessions"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([{"path": path[0], "name": "04.ipynb", "kernel": {}}]).encode())

        def log_message(self, *_): ...

    with http.server.HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", path
        server.shutdown()


def test_where_a_notebook_was_opened_from_is_found_out(machine, tmp_path, sessions):
    """Opened from GitHub, it names its repository; git is told to fetch it, and the branch, from here instead."""
    folder, _, _ = machine
    address, path = sessions
    path[0] = "fileId=https%3A//github.com/some-one/my.qlora/blob/spring/notebooks/05_double_quantization.ipynb"
    instead = f'[url "{(folder / "course").as_uri()}"]\n\tinsteadOf = https://github.com/some-one/my.qlora\n'
    (tmp_path / ".gitconfig").write_text(instead)
    subprocess.run(["git", "branch", "--force", "spring"], cwd=folder / "course", check=True)
    cell = colab.cell("").replace("http://172.28.0.12:9000", address)
    code = f"{cell}\nimport os, subprocess\nprint(os.getcwd(), subprocess.getoutput('git branch'))"
    done = run(machine, code, tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'qlora-lab' / 'notebooks'} * spring"


@pytest.mark.parametrize("here", ["on Colab, opened from a Drive", "on Colab, without that service", "on Kaggle"])
def test_an_address_that_nobody_knows_is_asked_for(machine, tmp_path, sessions, here):
    address = sessions[0] if "Drive" in here else "http://127.0.0.1:9"
    more = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"} if "Kaggle" in here else {}
    done = run(machine, colab.cell("").replace("http://172.28.0.12:9000", address), tmp_path, **more)
    assert done.stderr.splitlines()[-1] == (
        "RuntimeError: this notebook cannot find out where its course is: write the address of the course's git "
        "repository into the field `address` of this cell (between the quotes in its second line), and run it again"
    )


def test_a_wrong_address_is_told(machine, tmp_path):
    done = run(machine, colab.cell("https://127.0.0.1:9/nobody"), tmp_path)
    assert "RuntimeError: git cannot fetch 'https://127.0.0.1:9/nobody': is this the address" in done.stderr


# ------------------------------------------------------------------------------------------------------------ progress


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A home, a Drive that is not mounted yet, and no place for progress."""
    monkeypatch.setattr(colab.pathlib.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(colab, "DRIVE", str(tmp_path / "drive"))
    monkeypatch.setattr(colab, "OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("QLORA_LAB_PROGRESS", "")
    monkeypatch.delenv("QLORA_LAB_PROGRESS")
    return tmp_path


def test_progress_moves_to_the_drive_once_it_is_mounted(there, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    colab.keep_progress()
    passing = there / "qlora-lab-progress.json"
    assert os.environ["QLORA_LAB_PROGRESS"] == str(passing)
    assert "as long as this session; to have it in your Drive, run `from google.colab" in capsys.readouterr().out
    judging.record("4.1")
    (there / "drive").mkdir()
    colab.keep_progress()
    kept = there / "drive" / "qlora-lab" / "progress.json"
    assert capsys.readouterr().out == f"your progress is kept in {kept}\n"
    assert judging.progress_path() == kept and set(judging.read_progress(kept)) == {"4.1"}
    judging.record("4.2")
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(passing))  # another session, on the same machine
    colab.keep_progress()
    assert set(judging.read_progress(judging.progress_path())) == {"4.1", "4.2"}


def test_progress_is_kept_in_kaggles_output(there, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    (there / "output").mkdir()
    colab.keep_progress()
    kept = there / "output" / "qlora-lab" / "progress.json"
    assert os.environ["QLORA_LAB_PROGRESS"] == str(kept)
    assert capsys.readouterr().out.startswith(f"your progress is kept in {kept}, in this notebook's output: save")


def test_a_place_that_the_learner_has_chosen_stays(there, monkeypatch, capsys):
    monkeypatch.setenv("QLORA_LAB_PROGRESS", str(there / "mine.json"))
    colab.keep_progress()
    assert (os.environ["QLORA_LAB_PROGRESS"], capsys.readouterr().out) == (str(there / "mine.json"), "")


# ------------------------------------------------------------------------------------------------------------- widgets


def test_colabs_own_widgets_are_kept_since_its_page_shows_no_others(monkeypatch, there):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    versions = {"ipywidgets": "7.7.1"}
    monkeypatch.setattr(colab, "installed", lambda name: versions.get(name))
    monkeypatch.setattr(colab, "lacking", lambda _: ["ipywidgets>=8.1.5,<9"])
    monkeypatch.setattr(colab.subprocess, "run", lambda *_, **__: pytest.fail("nothing may be installed"))
    colab.prepare()
    assert colab.shows_widgets()
    versions["ipywidgets"] = "8.1.9"
    assert not colab.shows_widgets()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert colab.shows_widgets()


def test_where_sliders_do_not_show_the_call_stands_in_their_place(monkeypatch):
    InteractiveShell.instance()
    monkeypatch.setattr(colab, "shows_widgets", lambda: False)

    def draw_blocks(size, exact, name):
        return new_axes()

    sliders = {
        "size": ipywidgets.SelectionSlider(options=[32, 64], value=64),
        "exact": ipywidgets.Checkbox(value=False),
        "name": ipywidgets.IntSlider(value=2, min=1, max=9),
    }
    try:
        with capture_output() as shown:
            still = widgets.explore(draw_blocks, **sliders)
            box = widgets.ask_box(lambda question: {}, first="Who?")
    finally:
        InteractiveShell.clear_instance()
    assert len(shown.outputs) == 1  # the first figure
    said = repr(still)
    assert "\n    draw_blocks(size=64, exact=False, name=2)\n" in said
    assert said.endswith("size is one of 32, 64; exact is True or False; name is from 1 to 9")
    assert repr(box).endswith("('Who?')")
