"""The course on Colab: the set-up cell that begins every notebook, and what it calls there.

Colab opens a single notebook in an empty folder, beside libraries of its own. The cell fetches the course's repository
and calls `prepare`, which installs what `requirements.txt` asks for and Colab lacks. Colab's torch, which fits its GPU,
stays as it is. Everywhere else the cell does nothing.

`classroom.build` writes the cell. An instructor gives ADDRESS a value, once, and rebuilds: learners then need not
fill in the form's field.
"""

import importlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tempfile

ADDRESS = ""  # of the course's git repository
CELL = f"""\
# @title Set-up (does nothing on your own machine)
address = "{ADDRESS}"  # @param {{type:"string", placeholder:"on Colab: the address of the course's git repository"}}
import sys

if "google.colab" in sys.modules:
    import os
    import subprocess

    if not os.path.isfile("../qlora_lab/colab.py"):
        git = ["git", "clone", "--quiet", "--depth=1", address, "qlora-lab"]
        if not os.path.isdir("qlora-lab") and subprocess.run(git).returncode:
            raise RuntimeError(f"git cannot fetch {{address!r}}: fill in the form's field, and run this cell again")
        os.chdir("qlora-lab/notebooks")
    sys.path.insert(0, os.path.abspath(".."))
    from qlora_lab.colab import prepare

    prepare()\
"""
REQUIREMENTS = pathlib.Path(__file__).resolve().parent.parent / "requirements.txt"
KEPT = ("torch", "torchvision", "torchaudio", "triton", "numpy")  # built for each other, and some already imported


def prepare() -> None:
    """Install missing requirements with pip, and report it.

    Raises:
        RuntimeError: Colab's torch does not fit, or pip fails; one sentence. (A notebook would show SystemExit with a
            warning, and `qlora_lab.errors` is for command lines.)
    """
    wanted = lacking(REQUIREMENTS.read_text(encoding="utf-8"))
    if not wanted:
        return
    for requirement in wanted:
        if name_of(requirement) in KEPT:
            raise RuntimeError(
                f"this course needs {requirement}, and here is {installed(name_of(requirement)) or 'none'}, which it "
                "does not replace: take a newer runtime (Runtime > Change runtime type)"
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
