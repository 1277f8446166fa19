"""Read a lesson's source: a script in jupytext's percent format, with claims, machinery and the marks of exercises.

`build.py` shows the whole syntax. Mistakes in it are reported here, with the line.
"""

import ast
import dis
import json
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_lab.places import ROOT

REPOSITORY = ROOT  # commands that change what is in it call `places.require_checkout` first
NAME = re.compile(
    r"(?:(?P<number>\d\d)|dive_(?P<letter>[a-z]))_[a-z0-9_]+"
)  # of a lesson on the path, or of a deep dive

CELL = re.compile(
    r'# %%(?: (?P<title>claims|machinery "[^"={}\[\]]+"))?(?: \[(?P<type>markdown)\])?(?P<options>(?: \w+=.*)?)\s*'
)
CELLS = '# %%, # %% [markdown], # %% claims, # %% machinery "Title" or # %% tags=[...]'
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


@dataclass(frozen=True)
class Cell:
    """A cell of a source. type: "code" or "markdown". line: where `source` begins in the script, counted from 1."""

    type: str
    source: str
    metadata: dict
    line: int

    @property
    def is_claims(self) -> bool:
        return self.metadata.get("title") == "claims"

    @property
    def machinery(self) -> str:
        """The title of a machinery cell, empty for others."""
        title = self.metadata.get("title", "")
        return title.split('"')[1] if title.startswith("machinery") else ""


def find_all(notebooks: Path) -> list[Path]:
    """The sources of a course in its order: the path, then the deep dives."""
    return sorted((notebooks / "source").glob("*.py"))


def room(stem: str) -> str:
    """The folder of a lesson below classroom/lessons: "n04" for 04_nf4, "dive_a" for dive_a_better_codebooks."""
    return f"n{stem[:2]}" if stem[:1].isdigit() else stem[:6]


def exercises_of(stem: str) -> str:
    """What the numbers of a lesson's exercises begin with: "4" for 04_nf4, "A" for dive_a_better_codebooks."""
    return str(int(stem[:2])) if stem[:1].isdigit() else stem[5].upper()


def read_cells(text: str) -> list[Cell]:
    """Return the cells of a script in percent format. Raises BuildError, with the line, for a mistake."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if MAYBE_CELL.match(line)]
    if not starts or HEADER.sub("", "\n".join(lines[: starts[0]]) + "\n").strip():
        raise BuildError("line 1: the script must begin with # %% or # %% [markdown] (or with jupytext's header)")
    cells = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        line = start + 2  # of the first line below the marker; people count from 1
        marker = CELL.fullmatch(lines[start])
        if not marker or (marker["title"] and marker["type"]):
            raise BuildError(f"line {start + 1}: `{lines[start]}` is no cell: {CELLS}")
        source = "\n".join(lines[start + 1 : end]).rstrip()
        source = read_markdown(source, line) if marker["type"] else MAGIC.sub(r"\1", source)
        if source:
            metadata = read_options(marker["options"], start + 1)
            if marker["title"]:
                metadata["title"] = marker["title"]  # as jupytext has it
            cells.append(Cell(marker["type"] or "code", source, metadata, line))
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
    return versions(source, first_line)[:2]


def versions(source: str, first_line: int = 1) -> tuple[str, str, str]:
    """What `split_solutions` returns and, third, stubs and after them the solution between its marks.

    The third is Python, too, and does what the solution does.
    """
    learner, solved, both = [], [], []
    region = None  # the line number and the match of the open BEGIN, if any
    stubs, body_started, start = [], False, 0  # start: where the region begins in `both`
    for number, line in enumerate(source.split("\n"), start=first_line):
        if begin := BEGIN.fullmatch(line):
            if region:
                raise BuildError(f"line {number}: BEGIN SOLUTION inside the solution that begins in line {region[0]}")
            region, stubs, body_started = (number, begin), [], False
            start = len(both)
            both.append(line)
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
            stubs = stubs or [f"{region[1]['indent']}...  # your code {hint}"]
            learner += stubs
            both[start:start] = stubs
            both.append(line)
            region = None
        elif NEARLY_A_MARKER.match(line):
            raise BuildError(
                f"line {number}: `{line.strip()}` is no marker: write ### BEGIN SOLUTION, ### BEGIN SOLUTION "
                "(about 2 lines), ### STUB: ... or ### END SOLUTION"
            )
        else:
            solved.append(line)
            both.append(line)
            if region:
                body_started = True
            else:
                learner.append(line)
    if region:
        raise BuildError(f"line {region[0]}: BEGIN SOLUTION without END SOLUTION in the same cell")
    return "\n".join(learner), "\n".join(solved), "\n".join(both)


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


def split_nbval_markers(source: str) -> tuple[str, list[str]]:
    """A cell's source without its markers for nbval and their reasons, and the tags that say the same to nbval."""
    lines, tags = [], []
    following = iter(source.split("\n"))
    for line in following:
        if marker := NBVAL_MARKER.match(line):
            tags.append(marker[1].lower().replace("_", "-"))
            next(following)  # the reason, see check_nbval_markers
        else:
            lines.append(line)
    return "\n".join(lines), tags


# --- Claims -----------------------------------------------------------------------------------------------------------


def check_claims(cells: list[Cell]) -> None:
    """Raise BuildError, with the line, for a claims cell that learners would miss: they open a notebook without it.

    It must show nothing, hold no exercise, always run, and assign no name that a visible cell reads later, be it in a
    function that a cell above defines. (That it changes no object is left to its author.)
    """
    if not any(cell.is_claims for cell in cells):
        return
    given = {}  # names whose value is from a claims cell, and that cell's line
    in_functions = set()  # names that functions of visible cells read when they are called
    for cell in cells:
        if cell.type != "code":
            continue
        read, bound, in_its_functions = names_in(cell)
        if cell.is_claims:
            refuse_in_claims(cell)
            given |= dict.fromkeys(bound, cell.line)
            leaks = dict.fromkeys(bound & in_functions, cell.line)
        else:
            leaks = {name: given[name] for name in read & set(given)}
            given = {name: line for name, line in given.items() if name not in bound}
            in_functions |= in_its_functions
        for name, line in leaks.items():
            reader = "a function above" if cell.is_claims else f"the cell in line {cell.line}"
            raise BuildError(
                f"line {line}: a claims cell gives `{name}` a value that {reader} reads, but learners open a notebook "
                "without claims: take another name, or put the line into a cell in sight"
            )


def refuse_in_claims(cell: Cell) -> None:
    """Raise BuildError, with the line, for what a claims cell must not hold."""
    for number, line in enumerate(cell.source.split("\n"), start=cell.line):
        if NBVAL_MARKER.match(line) or BEGIN.fullmatch(line):
            raise BuildError(f"line {number}: a claims cell always runs and holds no exercise, so no `{line.strip()}`")
    tree = parsed(cell)
    printing = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "display")
    ]
    shown = printing + [node for node in tree.body[-1:] if isinstance(node, ast.Expr)]
    if shown:
        line = cell.line + shown[0].lineno - 1
        raise BuildError(f"line {line}: a claims cell shows nothing, since learners never see it: assert, or move it")


def names_in(cell: Cell) -> tuple[set[str], set[str], set[str]]:
    """The names that a cell reads from earlier cells, those that it assigns, and those that its functions read."""
    read, bound, in_functions = set(), set(), set()
    for code, is_called_later in codes_of(compile(parsed(cell), "cell", "exec")):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
                if instruction.argval not in bound:
                    read.add(instruction.argval)
                if is_called_later:
                    in_functions.add(instruction.argval)
            elif instruction.opname in ("STORE_NAME", "STORE_GLOBAL"):
                bound.add(instruction.argval)
    return read, bound, in_functions


def codes_of(code: types.CodeType, is_called_later: bool = False) -> Iterator[tuple[types.CodeType, bool]]:
    """Yield a cell's code and the codes in it, and whether each runs later: functions do, comprehensions do not."""
    yield code, is_called_later
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            is_comprehension = constant.co_name.startswith("<") and constant.co_name != "<lambda>"
            yield from codes_of(constant, is_called_later or not is_comprehension)


def parsed(cell: Cell) -> ast.Module:
    """The syntax tree of a code cell; a magic in it counts as a comment."""
    try:
        return ast.parse(re.sub(r"^(\s*)([%!])", r"\1# \2", cell.source, flags=re.MULTILINE))
    except SyntaxError as error:
        raise BuildError(f"line {cell.line + (error.lineno or 1) - 1}: this is no Python: {error.msg}") from None
