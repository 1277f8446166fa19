"""Run a notebook, and make what it shows fit to be stored: clean, described, and free of what belongs to one machine.

Notebooks are plain dicts here, as JSON gives them.
"""

import copy
import os
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from qlora_lab import colab
from qlora_lab.classroom import values
from qlora_lab.classroom.checks import all_exercises
from qlora_lab.classroom.judging import Progress
from qlora_lab.classroom.languages.texts import ENGLISH, translate
from qlora_lab.classroom.source import REPOSITORY, BuildError
from qlora_lab.places import IMPORTED_FROM

WIDGET = "application/vnd.jupyter.widget-view+json"
MACHINE = "machine"  # in a notebook's metadata: what made its outputs
LAST_ROW = re.compile(r"^\| GPU \|.*$", re.MULTILINE)  # of a lesson's card


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def keep_outputs(notebook: dict, old: dict, language: str = ENGLISH) -> None:
    """Give the code cells of `notebook` the outputs of those in `old` that have the same source.

    The set-up cell shows nothing when it is run here, whatever address it has.
    """

    def known_by(cell: dict) -> str:
        return colab.TITLE if cell["source"].startswith(colab.TITLE) else cell["source"]

    by_source = defaultdict(list)
    for cell in code_cells(old):
        by_source[known_by(cell)].append(cell)
    for cell in code_cells(notebook):
        if by_source[known_by(cell)]:
            same = by_source[known_by(cell)].pop(0)
            cell |= {"outputs": same["outputs"], "execution_count": same["execution_count"]}
    count_anew(notebook, language)
    credit(notebook, old["metadata"].get(MACHINE, ""), language)


def restore_outputs(draft: dict, stored: dict, language: str = ENGLISH) -> None:
    """Give the code cells of a draft, but for the claims, the outputs of those of its notebook, one by one."""
    visible = [cell for cell in code_cells(draft) if not cell.get("claims")]
    for cell, old in zip(visible, code_cells(stored), strict=True):
        cell |= {"outputs": old["outputs"], "execution_count": old["execution_count"]}
    credit(draft, stored["metadata"].get(MACHINE, ""), language)


def credit(notebook: dict, machine: str, language: str = ENGLISH) -> None:
    """Name what made a notebook's outputs in its metadata, and below the card of its first cell; "" names nothing."""
    if machine:
        notebook["metadata"] = notebook["metadata"] | {MACHINE: machine}
        row = f"| {translate('outputs from', language)} | {machine} |"
        first = notebook["cells"][0]
        first["source"] = LAST_ROW.sub(lambda last: f"{last[0]}\n{row}", first["source"], count=1)


def tell_machine() -> None:
    """Print, in the kernel, what computes there; nothing where torch is not loaded, since nothing hangs on it then."""
    if "torch" in sys.modules:
        from qlora_lab.models.hardware import name_machine

        print(name_machine())


def count_anew(notebook: dict, language: str = ENGLISH) -> None:
    """Let stored outputs of `progress()` count the exercises that there are now; those that cells above solved, too.

    language: that of the notebook. Outputs in another one stay.
    """
    nothing = Progress((), frozenset(), language).summary()
    count = re.compile(re.sub(r"\d+", r"\\d+", re.escape(nothing)))  # what `progress()` says, with any numbers
    solved: set[str] = set()
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            solved |= set(re.findall(r"^✓ (\w+\.\d+) ", output.get("text", ""), re.MULTILINE))
            progress = Progress(all_exercises(), frozenset(solved), language)
            if count.match(output.get("data", {}).get("text/plain", "")):
                output["data"] |= {"text/plain": repr(progress), "text/html": progress._repr_html_()}
            elif "text" in output:
                output["text"] = count.sub(progress.summary(), output["text"])


def clean_outputs(outputs: list[dict]) -> list[dict]:
    """Return `outputs` as they are stored: no live widgets, streams merged, progress bars at their last line."""
    kept = []
    for output in copy.deepcopy(outputs):
        if output["output_type"] in ("display_data", "execute_result"):
            output["data"].pop(WIDGET, None)
            if not output["data"]:
                continue
        if output["output_type"] == "stream" and kept and kept[-1].get("name") == output["name"]:
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    for output in kept:
        if output["output_type"] == "stream":
            # What a terminal shows after the last carriage return; the pattern is nbval's, so that both agree.
            output["text"] = re.sub(r".*\r(?=[^\n])", "", output["text"])
    return [output for output in kept if output.get("text") != ""]


def describe_figures(notebook: dict) -> None:
    """Give each figure in the outputs its cell's description, where programs that show notebooks look for it."""
    for cell in code_cells(notebook):
        for output in figures(cell) if "alt" in cell["metadata"] else []:
            output["metadata"]["image/png"] = {"alt": cell["metadata"]["alt"]}


def find_fault(outputs: list[dict]) -> str:
    """Say what must not be stored: text on standard error, or a path of this machine. Empty if all is well."""
    for output in outputs:
        if output.get("name") == "stderr":
            return f"writes to standard error (the course is free of warnings):\n{output['text']}"
        for text in shown_texts(output):
            for path in machine_paths():
                # a path begins where no word or other path goes on, and ends with a whole folder name
                if re.search(rf"(?<![\w.~/+=-]){re.escape(path)}(?![\w.-])", text):
                    return f"shows a path of this machine, {path}:\n{text}"
    return ""


def find_silence(cell: dict) -> str:
    """Say that a code cell shows a figure which nothing describes to those who cannot see it. Empty if all is well."""
    silent = figures(cell) and not str(cell["metadata"].get("alt", "")).strip()
    return 'shows a figure without a description: # %% alt="Bars of ...: the second is ..."' if silent else ""


def find_other_words(cell: dict) -> str:
    """Say that a figure has another description than its cell. Empty if all is well."""
    alt = cell["metadata"].get("alt")
    described = [output["metadata"].get("image/png", {}) for output in figures(cell)]
    return "has a figure with another description than its source" if any(d != {"alt": alt} for d in described) else ""


def figures(cell: dict) -> list[dict]:
    """The outputs of a code cell that show a figure."""
    return [output for output in cell["outputs"] if "image/png" in output.get("data", {})]


def shown_texts(output: dict) -> list[str]:
    """Every text in `output`: of a stream, a traceback, or all representations that are not pixels."""
    data = output.get("data", {}).items()
    texts = [str(text) for mime, text in data if mime == "image/svg+xml" or not mime.startswith("image/")]
    return [*texts, output.get("text", ""), *output.get("traceback", [])]


def machine_paths() -> list[str]:
    """The folders that no output may name: repository, home, Python environment, temporary files."""
    paths = [REPOSITORY, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir())]
    return [str(path) for path in paths if len(path.parts) > 1]


def execute(
    draft: dict, folder: Path, *, strict: bool, language: str = ENGLISH
) -> list[tuple[list[values.Value], str]]:
    """Run a draft in the working folder `folder`, claims and all, and store its cleaned outputs in it.

    strict: an unsolved exercise is an error (QLORA_LAB_STRICT=1). Progress goes to a temporary file.
    The draft is credited with the machine, see `credit`.
    Returns the values that the text asks for, and what the kernel printed for them, for `values.answered`.
    Raises BuildError with the cell's source for an error, and for an output that `find_fault` refuses.
    """
    places = []  # for each cell to run: the draft's cell, or the values that are asked for; and the code
    for cell in draft["cells"]:
        if cell["cell_type"] == "code":
            places.append((cell, cell["source"]))
        if asked := values.values_of(cell):
            places.append((asked, values.asking(asked)))
    answers, count = [], 0
    told = f"__import__({__name__!r}, fromlist=['tell_machine']).tell_machine()"
    *shown, machine = run([*(code for _, code in places), told], folder, strict, language)
    for (place, code), outputs in zip(places, shown, strict=True):
        outputs = clean_outputs(outputs)
        if isinstance(place, list):
            answers.append((place, outputs[0]["text"]))
            continue
        if place.get("claims") and outputs:
            raise BuildError(f"the cell\n\n{code}\n\nshows something, but learners never see a claims cell")
        if not place.get("claims"):
            count += 1
            for output in outputs:
                if "execution_count" in output:
                    output["execution_count"] = count  # claims are not counted, since learners do not run them
            place |= {"outputs": outputs, "execution_count": count}
        if fault := find_fault(outputs) or find_silence(place):
            raise BuildError(f"the cell\n\n{code}\n\n{fault}")
    credit(draft, "".join(output["text"] for output in machine).strip(), language)
    return answers


def run(codes: list[str], folder: Path, strict: bool, language: str) -> list[list[dict]]:
    """Run code cells in one kernel, as `execute` says; the outputs of each."""
    import nbformat
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    empty = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    cells = [empty | {"id": f"cell-{number}", "source": code} for number, code in enumerate(codes)]
    running: Any = nbformat.from_dict({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells})
    client = NotebookClient(
        running,
        resources={"metadata": {"path": str(folder)}},
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # else each kernel warns that it talks over TCP
        timeout=None,
        record_timing=False,
        store_widget_state=False,
    )
    with tempfile.TemporaryDirectory() as temporary:
        env = {key: value for key, value in os.environ.items() if key not in ("QLORA_LAB_STRICT", "MPLBACKEND")}
        env["QLORA_LAB_PROGRESS"] = str(Path(temporary) / "progress.json")
        env["QLORA_LAB_LANGUAGE"] = language
        env["QLORA_LAB_TRY_SLIDERS"] = "1"  # a range that a figure cannot be drawn for is an error of the cell
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(IMPORTED_FROM), env.get("PYTHONPATH")]))
        if strict:
            env["QLORA_LAB_STRICT"] = "1"
        try:
            client.execute(env=env)
        except CellExecutionError as error:
            raise BuildError(without_colours(str(error))) from None
        except DeadKernelError:
            raise BuildError("the kernel died: out of memory?") from None
        except NoSuchKernel:
            raise BuildError("no Jupyter kernel named python3: pip install ipykernel") from None
    return [cell.outputs for cell in running.cells]


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
