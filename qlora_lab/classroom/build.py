"""Make the course's notebooks from their sources.

    python -m qlora_lab.classroom.build              rebuild; outputs of unchanged cells are kept
    python -m qlora_lab.classroom.build --execute 07 rebuild 07_*.py and run it from top to bottom
    python -m qlora_lab.classroom.build --check      exit 1 and say which notebooks are out of step
    python -m qlora_lab.classroom.build --numbers    list the numbers in the text that no run fills in: ever fewer
    python -m qlora_lab.classroom.build --with-claims FOLDER     write the copies that CI runs; see --whole
    python -m qlora_lab.classroom.build --nbgrader FOLDER        write assignments for nbgrader
    python -m qlora_lab.classroom.build --no-solutions FOLDER    write the students' copy; --hints none: without hints
    python -m qlora_lab.classroom.build --language zh-TW 07   an edition, see languages/edition.py

`notebooks/source/01_first_run.py` is a script in jupytext's percent format. It becomes `notebooks/01_first_run.ipynb`,
for the learner, and `notebooks/solutions/01_first_run.ipynb`, where the exercises are solved.

    # %% [markdown]               a markdown cell, every line a comment
    # %% tags=["exercise"]        a code cell; options such as tags are JSON
    # %% alt="Two bars: ..."      a code cell that shows a figure, described for those who cannot see it
    # %% machinery "Imports"      a code cell that is folded away under its title, in JupyterLab and in Colab
    # %% claims                   assertions that keep the text true, see below
    # %pip install qlora_lab      a magic is written as a comment, so that the source remains Python

An exercise is a code cell with a solution in it, followed by the cell that checks it:

    # %%
    def mask_prompt(prompt_ids, response_ids):
        ### BEGIN SOLUTION (about 2 lines)
        labels = [-100] * len(prompt_ids) + response_ids
        return prompt_ids + response_ids, labels
        ### END SOLUTION

    # %%
    check_labels(mask_prompt)

After the title comes the set-up cell for Colab, see `qlora_lab/colab.py`.

In the learner's notebook the region becomes `...  # your code (about 2 lines)`; without the hint in brackets,
`...  # your code here`. Where another stub serves better, write it in `### STUB:` lines at the top of the region. They
replace the region, at its indentation:

    ### BEGIN SOLUTION
    ### STUB: answer = ...  # bits per parameter
    answer = 4 + 32 / 64
    ### END SOLUTION

A number in the text, or in a figure's description, is not typed but taken from the run:

    # %% [markdown]
    # Blocks of 64 have an error of {{error:.4f}}, and a step takes {{milliseconds:.0f ±30%}} ms.

Expression and format are as in an f-string, evaluated below the code above; the tolerance, relative or absolute
(`±0.02`), is for what differs from machine to machine. `--execute` fills the values in and keeps them beside the
source, in `01_first_run.json`; see `values.py`. It also names the machine that made the outputs, below the card. A
number that is no result is declared in the same way: {{2023}}. Others fail `--check`, but for those that stood there
before, see `numbers.py`. What else the text says is asserted in a claims cell:

    # %% claims
    assert error < previous_error

It shows nothing, and assigns no name that a later visible cell reads. (That it changes no object which they use, random
generators among them, is left to you.) The stored notebooks have no claims. CI runs copies that have them
(`--with-claims`), and a generated claim for the values of each text.

Hints are markdown cells that begin with `<details>`, after the check cell, and hold nothing else. The build adds the
solution, folded away, after them.

A cell whose output differs from run to run is marked for nbval, with the reason on the next line:

    # NBVAL_IGNORE_OUTPUT
    # because tokens per second depend on the machine

Learners do not see these lines: in the notebooks the cell has nbval's tag, `nbval-ignore-output`.
"""

import argparse
import sys
import time
from pathlib import Path

from qlora_lab.classroom import numbers, values
from qlora_lab.classroom.assignments import CONFIGURATION, assignment
from qlora_lab.classroom.drafts import finish, values_in
from qlora_lab.classroom.files import (
    errors_at,
    find_difference,
    find_sources,
    read_notebook,
    show_path,
    targets,
    write,
    write_notebook,
    write_values,
)
from qlora_lab.classroom.languages import edition
from qlora_lab.classroom.needs import cells_to_prove
from qlora_lab.classroom.outputs import code_cells, describe_figures, execute, keep_outputs, restore_outputs
from qlora_lab.classroom.source import REPOSITORY, BuildError
from qlora_lab.classroom.students import copy_course, without_solutions
from qlora_lab.errors import UserError
from qlora_lab.places import require_checkout

SOLVED_FROM_HERE = """# What proves the solved notebook
import os as _os, tempfile as _tempfile
_os.environ["QLORA_LAB_STRICT"] = "1"
_os.environ["QLORA_LAB_PROGRESS"] = _os.path.join(_tempfile.mkdtemp(), "progress.json")"""


def build(source: Path, *, run: bool) -> None:
    """Write both notebooks of `source`, executed if `run`, else with the outputs and values that are still valid."""
    drafts = targets(source)
    with errors_at(f"{show_path(source)}, "):
        wanted = values_in(drafts[0][1])
        kept = [] if run else values.recall(wanted, values.read_values(source))
    for path, draft in drafts:
        is_learners = path == drafts[0][0]
        if run:
            start = time.perf_counter()
            with errors_at(f"{show_path(path)}: "):
                answers = execute(draft, source.parents[1], strict=path.parent.name == "solutions")
            with errors_at(f"{show_path(source)}, "):
                now = [what for asked, printed in answers for what in values.answered(asked, printed)]
                kept = now if is_learners else kept
                for value, in_learners, in_solved in zip(wanted, kept, now, strict=True):
                    if not values.agree(value, in_learners, in_solved):
                        raise BuildError(
                            f"line {value.line}: {value.text} is {values.shown(value, in_learners)} in the learner's "
                            f"notebook and {values.shown(value, in_solved)} in the solved one: a value must not depend "
                            "on an answer"
                        )
            print(f"{show_path(path)} ran in {time.perf_counter() - start:.0f} s", flush=True)
        elif path.exists():
            keep_outputs(draft, read_notebook(path))
        if is_learners:
            write_values(source, wanted, kept)
        write_notebook(finish(draft, kept), path)


def check(source: Path) -> None:
    """Raise BuildError if a notebook of `source` is out of step with it."""
    drafts = targets(source)
    with errors_at(f"{show_path(source)}, "):
        wanted = values_in(drafts[0][1])
        pairs = values.read_values(source)
        kept = values.recall(wanted, pairs)
    differences = [
        f"{show_path(path)} {difference}"
        for path, draft in drafts
        if (difference := find_difference(path, finish(draft, kept)))
    ]
    excess = numbers.find_excess(
        numbers.undeclared(drafts[0][1]), numbers.allowed(source.parents[1]).get(source.stem, [])
    )
    differences += [f"{show_path(source)}, {told}" for told in excess]
    if [text for text, _ in pairs] != [value.text for value in wanted]:
        differences.append(f"{show_path(values.path_of_values(source))} has other values than its source: build again")
    if differences:
        raise BuildError("\n".join(differences))


def copy_with_claims(source: Path, folder: Path, *, whole: bool = False) -> None:
    """Write a copy of the notebooks of `source`, as CI runs them, into a folder.

    It is the learner's, and behind it the solved one's cells that this does not prove, see `needs.cells_to_prove`. If
    `whole`, both are written whole, the solved one into a folder "solutions". Copies hold the claims, and generated
    ones after each text with values; all other cells have their stored outputs.
    Raises BuildError if a notebook is out of step with its source.
    """
    check(source)
    copies = []
    for path, draft in targets(source):
        restore_outputs(draft, read_notebook(path))
        kept = values.recall(values_in(draft), values.read_values(source))
        copies.append((finish(draft, kept, with_claims=True), folder / path.relative_to(source.parents[1])))
    if not whole:
        (learner, _), (solved, _) = copies
        add_what_proves(learner, solved)
        del copies[1]
    for notebook, path in copies:
        write_notebook(notebook, path)


def add_what_proves(learner: dict, solved: dict) -> None:
    """Put the solved notebook's cells that the learner's does not prove behind its own, and write down how many it has.

    From there on an exercise that is not right is an error, and progress begins anew.
    """
    cells, own = code_cells(solved), code_cells(learner)
    places = sorted(cells_to_prove(own, cells))
    if not places:
        return
    learner["metadata"] = learner["metadata"] | {"cells_of_the_learner": len(own)}
    turn = {**own[0], "id": "what-proves-the-solved", "metadata": {}, "source": SOLVED_FROM_HERE, "outputs": []}
    learner["cells"] += [turn, *(cells[place] | {"id": f"{cells[place]['id'][:56]}-solved"} for place in places)]


def write_assignment(source: Path, folder: Path) -> None:
    """Write what `source` is for nbgrader into its course folder, which gets a configuration if it has none."""
    with errors_at(f"{show_path(source)}, "):
        notebook = assignment(source)
    write_notebook(notebook, folder / "source" / source.stem / f"{source.stem}.ipynb")
    if not (folder / "nbgrader_config.py").exists():
        write(CONFIGURATION, folder / "nbgrader_config.py")


def write_students(source: Path, folder: Path, hints: str) -> None:
    """Write the learner's notebook of `source` into the students' copy, without solutions, with its stored outputs.

    Raises BuildError if a notebook is out of step with its source.
    """
    check(source)
    path, draft = targets(source)[0]
    draft = without_solutions(draft, hints)
    notebook = finish(draft, values.recall(values_in(draft), values.read_values(source)))
    keep_outputs(notebook, read_notebook(path))
    describe_figures(notebook)
    write_notebook(notebook, folder / "notebooks" / path.name)


def write_numbers(sources: list[Path], *, all_lessons: bool) -> None:
    """List the undeclared numbers of `sources`, as `numbers.shrink` says, and print how many there are."""
    notebooks = sources[0].parents[1]
    found = {source.stem: numbers.undeclared(targets(source)[0][1]) for source in sources}
    write(numbers.shrink(notebooks, found, all_lessons=all_lessons), numbers.list_of(notebooks))
    print(f"{sum(map(len, numbers.allowed(notebooks).values()))} undeclared numbers are left")


def find_orphans(notebooks: Path) -> list[Path]:
    """Notebooks, and files of values, that have no source."""
    stored = [*notebooks.glob("*.ipynb"), *notebooks.glob("solutions/*.ipynb"), *notebooks.glob("source/*.json")]
    return sorted(path for path in stored if not (notebooks / "source" / f"{path.stem}.py").exists())


def main(arguments: list[str] | None = None, notebooks: Path = REPOSITORY / "notebooks") -> int:
    """Run the command line and return its exit code: 1 if anything is wrong, which standard error then says."""
    parser = argparse.ArgumentParser(
        prog="python -m qlora_lab.classroom.build", description="Make the course's notebooks from notebooks/source."
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing; exit 1 if a notebook is out of step")
    mode.add_argument("--numbers", action="store_true", help="list the numbers in the text that are no values")
    mode.add_argument("--execute", action="store_true", help="run the notebooks and store their outputs")
    mode.add_argument("--with-claims", type=Path, metavar="FOLDER", help="write copies that CI runs, with the claims")
    parser.add_argument("--whole", action="store_true", help="with --with-claims: all cells of the solved ones, too")
    parser.add_argument("names", nargs="*", metavar="name", help="beginning of a name, such as 07; default: all")
    mode.add_argument("--nbgrader", type=Path, metavar="FOLDER", help="write a course folder of nbgrader's")
    mode.add_argument("--no-solutions", type=Path, metavar="FOLDER", help="write the students' copy of the course")
    mode.add_argument("--extract", action="store_true", help="with --language: write what is to be translated")
    parser.add_argument("--language", metavar="zh-TW", help="of an edition: make its notebooks, in notebooks/zh-TW")
    parser.add_argument("--hints", choices=("all", "none"), help="in the students' copy (default: all)")
    options = parser.parse_args(arguments)
    if options.hints and not options.no_solutions:
        parser.error("--hints goes with --no-solutions FOLDER")
    if options.whole and not options.with_claims:
        parser.error("--whole goes with --with-claims FOLDER")
    if options.extract and not options.language:
        parser.error("--extract goes with --language, such as --language zh-TW")
    if options.language and (options.numbers or options.with_claims or options.nbgrader or options.no_solutions):
        parser.error("--language goes with --extract, --execute or --check")
    if options.language:
        return edition.work(notebooks, options)

    errors = []
    try:
        require_checkout()
        sources = find_sources(notebooks, options.names)
        if options.no_solutions:
            copy_course(notebooks.parent, options.no_solutions)
        if options.numbers:
            write_numbers(sources, all_lessons=not options.names)
            return 0
    except (BuildError, UserError) as error:
        sources, errors = [], [str(error)]
    for source in sources:
        try:
            if options.check:
                check(source)
            elif options.with_claims:
                copy_with_claims(source, options.with_claims, whole=options.whole)
                edition.copy_all_with_claims(notebooks, source, options.with_claims)
            elif options.no_solutions:
                write_students(source, options.no_solutions, options.hints or "all")
            elif options.nbgrader:
                write_assignment(source, options.nbgrader)
            else:
                build(source, run=options.execute)
        except (BuildError, OSError) as error:
            errors.append(str(error))
    if options.check and not options.names:
        errors += [f"{show_path(path)} has no source" for path in find_orphans(notebooks)]
    if options.check:
        errors += edition.check_all(notebooks, sources, whole=not options.names)
    for error in errors:
        print(error, file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
