"""A pytest plugin beside nbval: what each notebook takes, held against the label on its card.

    pytest -p tests.labels --nbval ... notebooks/*.ipynb                   fails if a run exceeds its label by half, at
                                                                           the pace of the machine that was recorded
    pytest -p tests.labels --record-labels FILE --nbval ... notebooks/*.ipynb   and writes down what was measured; what
                                                                               the file says of others stays

`make notebooks` gives it copies of the notebooks that hold the course's claims as well: the time of these counts, too.
Those in a folder are held against their cards as well, but not written down.

A card promises `| computing | up to 3 minutes on two CPU cores |` and `| memory | 4 GB |`. Measured are the seconds of
all its cells and of starting the kernel, and the most memory that the kernel's process ever held (Linux only; on other
systems memory is not judged). GB are 10^9 bytes. The record is made as `make test` runs the notebooks, two at a time:
a learner who has both cores waits less.

Of what CI runs of a solved notebook behind the learner's own cells (`build --with-claims`) only the memory counts.

CI's machines differ by a factor of two. What all notebooks together take longer than recorded is the machine's (or a
library's: the pace is printed), up to SLOWEST; a notebook that takes longer than its fellows is told.
"""

import datetime
import json
import os
import pathlib
import platform
import re
import statistics
from importlib.metadata import version

LABEL = {  # in English and in Chinese
    "seconds": re.compile(
        r"^\| (?:computing \| up to |運算 \| 在兩個 CPU 核心上最多 )(?P<number>\d+) (?:minutes? on two CPU cores|分鐘)",
        re.MULTILINE,
    ),
    "gigabytes": re.compile(r"^\| (?:memory|記憶體) \| (?P<number>\d+) GB \|", re.MULTILINE),
}
UNIT = {"seconds": 60, "gigabytes": 1}
TOLERATED = 1.5
RECORD = pathlib.Path(__file__).resolve().parent.parent / "data" / "records" / "notebooks.json"
FEWEST = 5  # notebooks whose median tells a machine's pace
SLOWEST = 3.0  # the pace of a machine that still counts as one

measured: dict[pathlib.Path, dict[str, float]] = {}
behind: dict[pathlib.Path, dict[str, float]] = {}  # of what came behind the learner's own cells
broken: list[str] = []
paces: list[float] = []


def labels(notebook: dict) -> dict[str, float]:
    """What a notebook's card promises: seconds and gigabytes."""
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    found = {name: pattern.search(text) for name, pattern in LABEL.items()}
    return {name: int(match["number"]) * UNIT[name] for name, match in found.items() if match}


def peak_gigabytes(pid: int) -> float | None:
    """The most memory that the process has held so far; None where the system does not say."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9


def pace_of(seconds: dict[str, float], recorded: dict[str, float]) -> float:
    """How many times as long as the record's this machine takes: the median over the notebooks of both.

    At least 1 and at most SLOWEST; 1 where they are fewer than FEWEST. seconds, recorded: by the notebook's name.
    """
    ratios = [seconds[name] / recorded[name] for name in seconds.keys() & recorded.keys()]
    return min(max(1.0, statistics.median(ratios)), SLOWEST) if len(ratios) >= FEWEST else 1.0


def exceeded(promised: dict[str, float], took: dict[str, float], pace: float = 1.0) -> list[str]:
    """What a run took of more than TOLERATED times what was promised, in words; also if nothing was promised.

    pace: of this machine (`pace_of`): it may take so many times the seconds.
    """
    told = []
    for name, value in took.items():
        if name not in promised:
            told.append(f"its card promises no {name}")
        elif value > TOLERATED * promised[name] * (pace if name == "seconds" else 1):
            told.append(f"{value:.1f} {name}, promised are {promised[name]}")
    return told


def pytest_addoption(parser):
    parser.addoption("--record-labels", metavar="FILE", help="write what the notebooks took")


def pytest_runtest_logreport(report):
    path = pathlib.Path(report.nodeid.partition("::")[0])
    if path.suffix != ".ipynb":
        return
    told = dict(report.user_properties)
    of_learners = told.pop("learners", True)
    took = (measured if of_learners else behind).setdefault(path, {"seconds": 0.0})
    took["seconds"] += report.duration
    took.update(told)


def is_learners(item) -> bool:
    """Whether a cell is one of the learner's notebook: in a copy with more behind them, one of the first."""
    own = getattr(item.parent, "nb", {}).get("metadata", {}).get("cells_of_the_learner")
    return own is None or item.cell_num < own


def pytest_runtest_setup(item):
    if not is_learners(item):
        item.user_properties.append(("learners", False))


def pytest_runtest_teardown(item):
    kernel = getattr(item.parent, "kernel", None)
    if kernel is not None and (peak := peak_gigabytes(kernel.km.provisioner.pid)) is not None:
        item.user_properties.append(("gigabytes", peak))  # goes with the report to the process that sums up


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):  # one of xdist's processes: it has sent its reports
        return
    if not measured:
        return
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["notebooks"]
    of_learners = {path.stem: took["seconds"] for path, took in measured.items() if len(path.parts) == 1}
    pace = pace_of(of_learners, {name: took["seconds"] for name, took in recorded.items()})
    paces.append(pace)
    for path, took in measured.items():
        promised = labels(json.loads((session.config.rootpath / path).read_text(encoding="utf-8")))
        broken.extend(f"{path}: {told}" for told in exceeded(promised, took, pace))
        of_both = {name: value for name, value in behind.get(path, {}).items() if name == "gigabytes"}
        broken.extend(f"{path}, solved: {told}" for told in exceeded(promised, of_both))
    if broken and session.exitstatus == 0:
        session.exitstatus = 1
    if target := session.config.getoption("record_labels"):
        record = {
            "command": "make labels",
            "device": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU",
            "date": datetime.date.today().isoformat(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        }
        learners = {path.stem: took for path, took in measured.items() if len(path.parts) == 1}
        now = {stem: {name: round(value, 2) for name, value in took.items()} for stem, took in learners.items()}
        file = pathlib.Path(target)
        before = json.loads(file.read_text(encoding="utf-8"))["notebooks"] if file.exists() else {}
        record["notebooks"] = dict(sorted({**before, **now}.items()))
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter):
    if measured:
        terminalreporter.section("what the notebooks took")
    for path, took in sorted(measured.items()):
        memory = f"{took['gigabytes']:5.1f} GB" if "gigabytes" in took else ""
        more = f", then {behind[path]['seconds']:.0f} s for the solved" if path in behind else ""
        terminalreporter.write_line(f"{path.with_suffix('')!s:<38} {took['seconds']:6.0f} s {memory}{more}")
    for pace in paces:
        terminalreporter.write_line(f"{pace:.2f} times the seconds that were recorded (median)")
    for told in broken:
        terminalreporter.write_line(f"label broken: {told}", red=True)
