"""The course on Colab and on Kaggle: the set-up cell that begins every notebook, and what it calls there.

Both open a single notebook in an empty folder, beside libraries of their own. The cell fetches the course's repository
and calls `prepare`, which installs what `requirements.txt` asks for and they lack, and keeps the learner's progress
where the learner's files are. Their torch, which fits their GPU, stays as it is. Everywhere else the cell does nothing.

Where the repository is, the cell knows if `make publish ADDRESS=...` has written it in; else, on Colab, from the
service that knows where the notebook was opened from, if that was GitHub; else it asks for it, in one sentence.

`classroom.build` writes the cell. Never run on Colab or Kaggle themselves: the tests simulate both.
"""

import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ADDRESS = ""  # of the course's git repository; `make publish ADDRESS=...` writes it
TITLE = "# @title Set-up (does nothing on your own machine)"


def cell(address: str, language: str = "") -> str:
    """The set-up cell of a course whose repository has this address; empty: not known.

    language: of an edition, such as "zh-TW", whose notebooks are in a folder of that name; empty: of the English one.
    """
    folders, root = ('"notebooks"', "..") if not language else (f'"notebooks", "{language}"', "../..")
    return f"""\
{TITLE}
address = "{address}"  # @param {{type:"string", placeholder:"the address of the course's git repository"}}
import os
import sys

on_kaggle = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
on_colab = "google.colab" in sys.modules and not on_kaggle
if on_colab or on_kaggle:
    import re
    import subprocess
    import tempfile
    import urllib.parse
    import urllib.request

    if not os.path.isfile("{root}/qlora_lab/colab.py"):
        branch = []
        if not address and on_colab:  # where was this notebook opened from?
            try:
                with urllib.request.urlopen("http://172.28.0.12:9000/api/sessions", timeout=5) as answer:
                    opened = urllib.parse.unquote(answer.read().decode())
            except OSError:
                opened = ""
            if found := re.search(r"github\\.com/([\\w.-]+/[\\w.-]+)/blob/([^/]+)/", opened):
                address, branch = f"https://github.com/{{found[1]}}", ["--branch", found[2]]
        if not address:
            raise RuntimeError(
                "this notebook cannot find out where its course is: write the address of the course's git repository "
                "into the field `address` of this cell (between the quotes in its second line), and run it again"
            )
        place = os.getcwd() if on_colab else tempfile.gettempdir()  # not into Kaggle's output
        course = os.path.join(place, "qlora-lab")
        git = ["git", "clone", "--quiet", "--depth=1", *branch, address, course]
        if not os.path.isdir(course) and subprocess.run(git).returncode:
            raise RuntimeError(
                f"git cannot fetch {{address!r}}: is this the address of the course, and is the internet switched on "
                "(on Kaggle: Settings)? Then run this cell again"
            )
        os.chdir(os.path.join(course, {folders}))
    sys.path.insert(0, os.path.abspath("{root}"))
    from qlora_lab.colab import prepare

    prepare()\
"""


CELL = cell(ADDRESS)
REQUIREMENTS = pathlib.Path(__file__).resolve().parent.parent / "requirements.txt"
KEPT = ("torch", "torchvision", "torchaudio", "triton", "numpy")  # built for each other, and some already imported
DRIVE, OUTPUT = "/content/drive/MyDrive", "/kaggle/working"  # where the learner's files are, on Colab and on Kaggle


def prepare() -> None:
    """Install missing requirements with pip, say where progress is kept, and report both.

    Raises:
        RuntimeError: Colab's torch does not fit, or pip fails; one sentence. (A notebook would show SystemExit with a
            warning, and `qlora_lab.errors` is for command lines.)
    """
    keep_progress()
    wanted = lacking(REQUIREMENTS.read_text(encoding="utf-8"))
    if on_colab() and (installed("ipywidgets") or "").startswith("7."):
        wanted = [requirement for requirement in wanted if name_of(requirement) != "ipywidgets"]  # see `shows_widgets`
    if not wanted:
        return
    for requirement in wanted:
        if name_of(requirement) in KEPT:
            raise RuntimeError(
                f"this course needs {requirement}, and here is {installed(name_of(requirement)) or 'none'}, which it "
                "does not replace: take a newer runtime (Colab: Runtime > Change runtime type; Kaggle: Settings > "
                "Environment)"
            )
    before = {name_of(requirement): installed(name_of(requirement)) for requirement in wanted}
    print(f"installing {', '.join(wanted)} ...")
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as constraints:
        constraints.writelines(f"{name}=={version}\n" for name in KEPT if (version := installed(name)))
        constraints.flush()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints.name, *wanted]
        done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip could not install {', '.join(wanted)}: {done.stderr.strip()[-1000:]}")
    importlib.invalidate_caches()
    stale = [name for name, version in before.items() if version and name.replace("-", "_") in sys.modules]
    if stale:
        print(f"{', '.join(stale)} had been imported before: Runtime > Restart session, then run this cell again")


def on_colab() -> bool:
    """Whether this is a kernel of Colab's."""
    return "google.colab" in sys.modules and not on_kaggle()


def on_kaggle() -> bool:
    """Whether this is a kernel of Kaggle's. (Its machines may have Colab's library, too.)"""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def shows_widgets() -> bool:
    """Whether sliders made here appear. Colab's page knows those of ipywidgets 7, which it brings, not those of 8.

    Source: https://github.com/googlecolab/colabtools/issues/498
    """
    return not on_colab() or (installed("ipywidgets") or "").startswith("7.")


def keep_progress() -> None:
    """Keep progress where the learner's files are, and say so. What was solved before is taken along, once.

    On Colab that is the Drive, if it is mounted; else a file that is lost with the runtime. On Kaggle it is the output.
    """
    passing = pathlib.Path.home() / "qlora-lab-progress.json"
    if os.environ.get("QLORA_LAB_PROGRESS", str(passing)) != str(passing):
        return
    kept = pathlib.Path(DRIVE if on_colab() else OUTPUT)
    path = kept / "qlora-lab" / "progress.json" if kept.is_dir() else passing
    if path != passing:
        path.parent.mkdir(exist_ok=True)
        if passing.exists() and not path.exists():
            shutil.copyfile(passing, path)
        lasts = "" if on_colab() else ", in this notebook's output: save a version, or switch persistence of files on"
        print(f"your progress is kept in {path}{lasts}")
    else:
        mount = "from google.colab import drive; drive.mount('/content/drive')"
        lasts = f"; to have it in your Drive, run `{mount}` and then this cell again" if on_colab() else ""
        print(f"your progress is kept as long as this session{lasts}")
    os.environ["QLORA_LAB_PROGRESS"] = str(path)


def lacking(requirements: str) -> list[str]:
    """The requirements (text as in requirements.txt) that this environment does not meet, as pip understands them."""
    from packaging.requirements import Requirement

    wanted = []
    for line in requirements.splitlines():
        if text := line.partition("#")[0].strip():
            requirement = Requirement(text)
            version = installed(requirement.name)
            applies = requirement.marker is None or requirement.marker.evaluate()
            if applies and (version is None or not requirement.specifier.contains(version, prereleases=True)):
                wanted.append(str(requirement))
    return wanted


def name_of(requirement: str) -> str:
    """The project's name in a requirement such as "torch>=2.8,<3"."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def installed(name: str) -> str | None:
    """The version of a project that is installed here; None if it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
