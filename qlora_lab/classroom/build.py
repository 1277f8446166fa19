"""Make the course's notebooks from their sources.

    python -m qlora_lab.classroom.build              rebuild; outputs of unchanged cells are kept
    python -m qlora_lab.classroom.build --execute 07 rebuild 07_*.py and run it from top to bottom
    python -m qlora_lab.classroom.build --check      exit 1 and say which notebooks are out of step

`notebooks/source/07_qlora_run.py` is a script in jupytext's percent format. It becomes `notebooks/07_qlora_run.ipynb`,
for the learner, and `notebooks/solutions/07_qlora_run.ipynb`, where the exercises are solved.

    # %% [markdown]               a markdown cell, every line a comment
    # %% tags=["exercise"]        a code cell; options such as tags are JSON
    # %% alt="Two bars: ..."      a code cell that shows a figure, described for those who cannot see it
    # %pip install qlora_lab      a magic stands in a comment, so that the source remains Python

An exercise is a code cell with a solution in it, followed by the cell that checks it:

    # %%
    def mask_prompt(prompt_ids, response_ids):
        ### BEGIN SOLUTION (about 2 lines)
        labels = [-100] * len(prompt_ids) + response_ids
        return prompt_ids + response_ids, labels
        ### END SOLUTION

    # %%
    check_labels(mask_prompt)

Behind the title comes the set-up cell for Colab, see `qlora_lab/colab.py`.

In the learner's notebook the region becomes `...  # your code (about 2 lines)`; without the hint in brackets,
`...  # your code here`. Where another stub serves better, write it in `### STUB:` lines at the top of the region. They
stand in for the region, at its indentation:

    ### BEGIN SOLUTION
    ### STUB: answer = ...  # bits per parameter
    answer = 4 + 32 / 64
    ### END SOLUTION

Hints are yours: markdown cells that begin with `<details>`, behind the check cell. The solution, folded away, follows
them by itself.

A cell whose output differs from run to run is marked for nbval, with the reason. nbval wants the marker alone on its
line (it silently ignores `# NBVAL_IGNORE_OUTPUT: reason`), so the reason is the next line and starts with "because":

    # NBVAL_IGNORE_OUTPUT
    # because tokens per second depend on the machine
"""

import argparse
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from qlora_lab import colab

# Notebooks are plain dicts here, as JSON gives them. nbformat and jupytext take two seconds to import and to read the
# course, which --check cannot spare; the tests hold `read_cells` against jupytext.

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # what Colab and JupyterLab call it
WIDGET = "application/vnd.jupyter.widget-view+json"

CELL = re.compile(r"# %%(?: \[(?P<type>markdown)\])?(?P<options>(?: \w+=.*)?)\s*")
MAYBE_CELL = re.compile(r"#\s*%%(?![a-zA-Z])")  # `# %%time` is a magic
HEADER = re.compile(r"# ---\n.*?\n# ---\n", re.DOTALL)
MAGIC = re.compile(r"^(\s*)# ?(?=%%?[a-zA-Z]|![a-zA-Z])", re.MULTILINE)

BEGIN = re.compile(r"(?P<indent>\s*)### BEGIN SOLUTION(?: \((?P<size>[^()]+)\))?\s*")
STUB = re.compile(r"\s*### STUB: (?P<stub>.*\S)\s*")
END = re.compile(r"\s*### END SOLUTION\s*")
NEARLY_A_MARKER = re.compile(r"\s*#+\s*(BEGIN|END)[\s_]+SOLUTION|\s*##+\s*STUB\b", re.IGNORECASE)
NBVAL_MARKER = re.compile(r"\s*#+\s*(NBVAL_(?:IGNORE_OUTPUT|SKIP|RAISES_EXCEPTION))\b\s*(?P<rest>.*)")
NBVAL_REASON = re.compile(r"\s*#\s*because\s+\S")


class BuildError(Exception):
    """A source, a notebook or a run that must not become part of the course. The message says where and why."""


# --- From source to cells ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell of a source. type: "code" or "markdown". line: where `source` begins in the script, counted from 1."""

    type: str
    source: str
    metadata: dict
    line: int


def read_cells(text: str) -> list[Cell]:
    """Return the cells of a script in percent format. Raises BuildError, with the line, for what is not understood."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if MAYBE_CELL.match(line)]
    if not starts or HEADER.sub("", "\n".join(lines[: starts[0]]) + "\n").strip():
        raise BuildError("line 1: the script must begin with # %% or # %% [markdown] (or with jupytext's header)")
    cells = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        line = start + 2  # of the first line below the marker; people count from 1
        if not (marker := CELL.fullmatch(lines[start])):
            raise BuildError(f"line {start + 1}: `{lines[start]}` is no cell: # %%, # %% [markdown] or # %% tags=[...]")
        source = "\n".join(lines[start + 1 : end]).rstrip()
        source = read_markdown(source, line) if marker["type"] else MAGIC.sub(r"\1", source)
        if source:
            cells.append(Cell(marker["type"] or "code", source, read_options(marker["options"], start + 1), line))
    return cells


def read_markdown(source: str, first_line: int) -> str:
    """Take the comment signs from the lines of a markdown cell."""
    lines = source.split("\n")
    for number, line in enumerate(lines, start=first_line):
        if line.strip() not in ("", "#") and not line.startswith("# "):
            raise BuildError(f"line {number}: in a markdown cell every line begins with `# `, unlike `{line}`")
    return "\n".join(line[2:] for line in lines)


def read_options(text: str, line: int) -> dict:
    """Read the options of a cell: ` tags=["a"] other=1` gives {"tags": ["a"], "other": 1}."""
    options = {}
    while text.strip():
        try:
            name, _, rest = text.strip().partition("=")
            options[name], end = json.JSONDecoder().raw_decode(rest)
            text = rest[end:]
        except ValueError:
            raise BuildError(
                f'line {line}: {text.strip()} is not understood: write name=JSON, as in tags=["a"]'
            ) from None
    return options


def split_solutions(source: str, first_line: int = 1) -> tuple[str, str]:
    """Return a code cell as the learner sees it (stubs) and as it is solved (no marker lines).

    Raises BuildError, with the line, for a marker that is unbalanced, nested, misplaced or misspelt.
    """
    learner, solved = [], []
    region = None  # the line number and the match of the open BEGIN, if any
    stubs, body_started = [], False
    for number, line in enumerate(source.split("\n"), start=first_line):
        if begin := BEGIN.fullmatch(line):
            if region:
                raise BuildError(f"line {number}: BEGIN SOLUTION inside the solution that begins in line {region[0]}")
            region, stubs, body_started = (number, begin), [], False
        elif stub := STUB.fullmatch(line):
            if not region or body_started:
                raise BuildError(f"line {number}: a STUB line belongs directly below BEGIN SOLUTION")
            stubs.append(region[1]["indent"] + stub["stub"])
        elif END.fullmatch(line):
            if not region:
                raise BuildError(f"line {number}: END SOLUTION without BEGIN SOLUTION in the same cell")
            if not body_started:
                raise BuildError(f"line {number}: the solution that begins in line {region[0]} is empty")
            hint = f"({region[1]['size']})" if region[1]["size"] else "here"
            learner += stubs or [f"{region[1]['indent']}...  # your code {hint}"]
            region = None
        elif NEARLY_A_MARKER.match(line):
            raise BuildError(
                f"line {number}: `{line.strip()}` is no marker: write ### BEGIN SOLUTION, ### BEGIN SOLUTION "
                "(about 2 lines), ### STUB: ... or ### END SOLUTION"
            )
        else:
            solved.append(line)
            if region:
                body_started = True
            else:
                learner.append(line)
    if region:
        raise BuildError(f"line {region[0]}: BEGIN SOLUTION without END SOLUTION in the same cell")
    return "\n".join(learner), "\n".join(solved)


def check_nbval_markers(cell: Cell) -> None:
    """Raise BuildError for an nbval marker that nbval would overlook, or that gives no reason."""
    lines = [*cell.source.split("\n"), ""]
    for number, (line, following) in enumerate(zip(lines, lines[1:], strict=False), start=cell.line):
        if marker := NBVAL_MARKER.match(line):
            if marker["rest"]:
                raise BuildError(f"line {number}: nbval overlooks {marker[1]} unless it is alone on its line")
            if not NBVAL_REASON.match(following):
                raise BuildError(f"line {number}: {marker[1]} needs its reason on the next line: # because ...")
    if any(tag.startswith("nbval-") for tag in cell.metadata.get("tags", [])):
        raise BuildError(f"line {cell.line - 1}: mark cells for nbval in a comment, with the reason, not by a tag")


def folded(solutions: list[str]) -> str:
    """Markdown that hides `solutions`, each the source of a solved cell, until the learner opens it."""
    code = "\n\n".join(solutions)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))  # longer than any fence in the code
    return f"<details><summary>Solution</summary>\n\n{fence}python\n{code}\n{fence}\n\n</details>"


def make_notebooks(source: Path) -> tuple[dict, dict]:
    """Return the learner's and the solved notebook, both without outputs, of the script `source`."""
    learner, solved = [], []
    exercise, waiting = None, []  # a cell with a solution, and the solutions whose check is still to come
    checked = []  # solutions that are to be shown behind the hints that follow their check
    for cell in read_cells(source.read_text(encoding="utf-8")):
        if checked and not (cell.type == "markdown" and cell.source.startswith("<details>")):
            learner.append(new_cell("markdown", folded(checked), {}))
            checked = []
        if cell.type == "markdown":
            learner.append(new_cell("markdown", cell.source, cell.metadata))
            solved.append(new_cell("markdown", cell.source, cell.metadata))
            continue
        check_nbval_markers(cell)
        stub, solution = split_solutions(cell.source, cell.line)
        learner.append(new_cell("code", stub, cell.metadata))
        solved.append(new_cell("code", solution, cell.metadata))
        if stub != solution:
            exercise = cell
            waiting.append(solution)
        elif waiting and "check_" in solution:
            checked, waiting = waiting, []
        elif waiting:
            break
    if checked:
        learner.append(new_cell("markdown", folded(checked), {}))
    if waiting:
        raise BuildError(f"line {exercise.line}: the next code cell must check this exercise: check_...(answer)")
    for cells in (learner, solved):
        behind_the_title = int(cells[0]["cell_type"] == "markdown")
        cells.insert(behind_the_title, new_cell("code", colab.CELL, FOLDED))
    return new_notebook(learner, source.stem), new_notebook(solved, source.stem)


def new_cell(cell_type: str, source: str, metadata: dict) -> dict:
    """A cell without outputs. Its id is given by `new_notebook`."""
    cell = {"cell_type": cell_type, "source": source, "metadata": metadata}
    return cell | {"execution_count": None, "outputs": []} if cell_type == "code" else cell


def new_notebook(cells: list[dict], name: str) -> dict:
    """A notebook with `cells`, whose ids follow from their content: the same source always gives the same file."""
    seen = defaultdict(int)
    for cell in cells:
        content = f"{name}\n{cell['cell_type']}\n{cell['source']}"
        seen[content] += 1
        cell["id"] = hashlib.sha256(f"{content}\n{seen[content]}".encode()).hexdigest()[:12]
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": NOTEBOOK_METADATA, "cells": cells}


# --- Outputs ----------------------------------------------------------------------------------------------------------


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def keep_outputs(notebook: dict, old: dict) -> None:
    """Give the code cells of `notebook` the outputs of those in `old` that have the same source."""
    by_source = defaultdict(list)
    for cell in code_cells(old):
        by_source[cell["source"]].append(cell)
    for cell in code_cells(notebook):
        if by_source[cell["source"]]:
            same = by_source[cell["source"]].pop(0)
            cell |= {"outputs": same["outputs"], "execution_count": same["execution_count"]}


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
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}) and "alt" in cell["metadata"]:
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
    figures = any("image/png" in output.get("data", {}) for output in cell["outputs"])
    silent = figures and not str(cell["metadata"].get("alt", "")).strip()
    return 'shows a figure without a description: # %% alt="Bars of ...: the second is ..."' if silent else ""


def shown_texts(output: dict) -> list[str]:
    """Every text in `output`: of a stream, a traceback, or all representations that are not pixels."""
    data = output.get("data", {}).items()
    texts = [str(text) for mime, text in data if mime == "image/svg+xml" or not mime.startswith("image/")]
    return [*texts, output.get("text", ""), *output.get("traceback", [])]


def machine_paths() -> list[str]:
    """The folders that no output may name: repository, home, Python environment, temporary files."""
    paths = [REPOSITORY, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir())]
    return [str(path) for path in paths if len(path.parts) > 1]


def execute(notebook: dict, folder: Path, *, strict: bool) -> None:
    """Run `notebook` in the working folder `folder` and store its cleaned outputs in it.

    strict: an unsolved exercise is an error (QLORA_LAB_STRICT=1). Progress goes to a temporary file.
    Raises BuildError with the cell's source for an error, and for an output that `find_fault` refuses.
    """
    import nbformat
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    running = nbformat.from_dict(notebook)  # a copy, with which nbclient can do as it likes
    client = NotebookClient(
        running,
        resources={"metadata": {"path": str(folder)}},
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # or each kernel warns that it talks over TCP
        timeout=None,
        record_timing=False,
        store_widget_state=False,
    )
    with tempfile.TemporaryDirectory() as temporary:
        env = {key: value for key, value in os.environ.items() if key not in ("QLORA_LAB_STRICT", "MPLBACKEND")}
        env["QLORA_LAB_PROGRESS"] = str(Path(temporary) / "progress.json")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
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
    for cell, ran in zip(code_cells(notebook), code_cells(running), strict=True):
        cell |= {"outputs": clean_outputs(ran.outputs), "execution_count": ran.execution_count}
        if fault := find_fault(cell["outputs"]) or find_silence(cell):
            raise BuildError(f"the cell\n\n{cell['source']}\n\n{fault}")


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# --- Files ------------------------------------------------------------------------------------------------------------


def show_path(path: Path) -> str:
    """`path` relative to the working folder, where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def find_sources(notebooks: Path, names: list[str]) -> list[Path]:
    """The scripts in `notebooks`/source, or those whose names begin with one of `names`."""
    sources = sorted((notebooks / "source").glob("[0-9]*.py"))
    if not sources:
        raise BuildError(f"no sources in {show_path(notebooks / 'source')}")
    chosen = set()
    for name in names:
        found = [source for source in sources if source.stem.startswith(Path(name).stem)]
        if not found:
            raise BuildError(f"no source begins with {name}: there are {', '.join(path.stem for path in sources)}")
        chosen.update(found)
    return sorted(chosen) if names else sources


def read_notebook(path: Path) -> dict | None:
    """The notebook at `path`; None if there is none."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["source"] = joined(cell["source"])
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                data.update({mime: joined(text) for mime, text in data.items()})
                if "text" in output:
                    output["text"] = joined(output["text"])
        return notebook
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise BuildError(f"{show_path(path)} is not a readable notebook: delete it and build again") from None


def joined(text):
    """A text that nbformat stored as a list of lines, whole again; anything else as it is."""
    return "".join(text) if isinstance(text, list) and all(isinstance(line, str) for line in text) else text


def write_notebook(notebook: dict, path: Path) -> None:
    """Write `path` in one step: whatever happens, the old file or the new one is there, whole."""
    import nbformat

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        text = nbformat.writes(nbformat.from_dict(notebook)) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_difference(path: Path, expected: dict) -> str:
    """Say how the notebook at `path` differs from what its source gives, or is unfit to be stored. Empty if fine."""
    actual = read_notebook(path)
    if actual is None:
        return "is missing"
    if actual["metadata"] != expected["metadata"]:
        return f"has other notebook metadata: {', '.join(actual['metadata']) or 'none'}"
    for number, (cell, wanted) in enumerate(zip(actual["cells"], expected["cells"], strict=False), start=1):
        for part in ("cell_type", "source", "metadata", "id"):
            if cell.get(part) != wanted[part]:
                return f"differs from its source in the {part} of cell {number}: {cell['source'][:60]!r}"
    if len(actual["cells"]) != len(expected["cells"]):
        return f"has {len(actual['cells'])} cells, its source gives {len(expected['cells'])}"
    cells = code_cells(actual)
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        return "was not executed from top to bottom: build it with --execute"
    for number, cell in enumerate(cells, start=1):
        if cell["outputs"] != clean_outputs(cell["outputs"]):
            return f"has outputs that were not cleaned in [{number}]: build it with --execute"
        if fault := find_fault(cell["outputs"]) or find_silence(cell):
            return f"[{number}] {fault}"
    return ""


# --- Command line -----------------------------------------------------------------------------------------------------


def build(source: Path, *, run: bool) -> None:
    """Write both notebooks of `source`, executed if `run`, else with the outputs that are still valid."""
    for path, notebook in targets(source):
        if run:
            start = time.perf_counter()
            try:
                execute(notebook, source.parents[1], strict=path.parent.name == "solutions")
            except BuildError as error:
                raise BuildError(f"{show_path(path)}: {error}") from None
            print(f"{show_path(path)} ran in {time.perf_counter() - start:.0f} s", flush=True)
        elif old := read_notebook(path):
            keep_outputs(notebook, old)
        describe_figures(notebook)
        write_notebook(notebook, path)


def check(source: Path) -> None:
    """Raise BuildError if a notebook of `source` is out of step with it."""
    differences = [
        f"{show_path(path)} {difference}"
        for path, expected in targets(source)
        if (difference := find_difference(path, expected))
    ]
    if differences:
        raise BuildError("\n".join(differences))


def targets(source: Path) -> list[tuple[Path, dict]]:
    """Where the two notebooks of `source` belong, and what they are."""
    try:
        learner, solved = make_notebooks(source)
    except BuildError as error:
        raise BuildError(f"{show_path(source)}, {error}") from None
    notebooks = source.parents[1]
    return [(notebooks / f"{source.stem}.ipynb", learner), (notebooks / "solutions" / f"{source.stem}.ipynb", solved)]


def find_orphans(notebooks: Path) -> list[Path]:
    """Notebooks that have no source."""
    stored = [*notebooks.glob("*.ipynb"), *notebooks.glob("solutions/*.ipynb")]
    return sorted(path for path in stored if not (notebooks / "source" / f"{path.stem}.py").exists())


def main(arguments: list[str] | None = None, notebooks: Path = REPOSITORY / "notebooks") -> int:
    """Run the command line and return its exit code: 1 if anything is wrong, said on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_lab.classroom.build", description="Make the course's notebooks from notebooks/source."
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing; exit 1 if a notebook is out of step")
    mode.add_argument("--execute", action="store_true", help="run the notebooks and store their outputs")
    parser.add_argument("names", nargs="*", metavar="name", help="beginning of a name, such as 07; default: all")
    options = parser.parse_args(arguments)

    errors = []
    try:
        sources = find_sources(notebooks, options.names)
    except BuildError as error:
        sources, errors = [], [str(error)]
    for source in sources:
        try:
            check(source) if options.check else build(source, run=options.execute)
        except (BuildError, OSError) as error:
            errors.append(str(error))
    if options.check and not options.names:
        errors += [f"{show_path(path)} has no source" for path in find_orphans(notebooks)]
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
