"""Values in prose: the `{{error:.3f}}` of a source's text, filled in from a run and compared with every later one.

A value is an expression and a format, as in an f-string, and, where machines differ, a tolerance: `{{error:.3f ±2%}}`
or `{{error:.3f ±0.02}}`. It may stand in markdown and in the description of a figure. A run of the notebook evaluates
it in the kernel, below the code that stands above it (a figure's description: below the figure's own cell). The
result is kept beside the lesson's source, in a JSON file: as a text, or with a tolerance as a number. From then on the
build writes it into the notebook, and CI's copy of the notebook compares each new run with it. `\\{{` stands for two
braces.
"""

import ast
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from qlora_lab.classroom.source import BuildError

BRACES = re.compile(r"\\\{\{|\{\{(?P<inside>.*?)\}\}|(?P<open>\{\{)")
TOLERANCE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<percent>%?)")
Kept = str | int | float  # what is kept of a value: its text, or with a tolerance its number


@dataclass(frozen=True)
class Value:
    """A value as a source has it: text with its braces, line in the script. tolerance: "2%", "0.02", or "" for none."""

    text: str
    expression: str
    format: str
    tolerance: str
    line: int


# --- In the source ----------------------------------------------------------------------------------------------------


def split_text(text: str, first_line: int) -> list[str | Value]:
    """Return the pieces of a text: plain ones, and the values in it. Raises BuildError, with the line."""
    pieces = []
    for number, line in enumerate(text.split("\n"), start=first_line):
        end = 0
        for found in BRACES.finditer(line):
            if found["open"]:
                raise BuildError(f"line {number}: `{{{{` without `}}}}` on its line: plain braces are written \\{{{{")
            pieces += [line[end : found.start()], "{{" if found["inside"] is None else read_value(found, number)]
            end = found.end()
        pieces.append(line[end:] + "\n")
    pieces[-1] = pieces[-1][:-1]
    return pieces


def read_value(found: re.Match, line: int) -> Value:
    content, sign, tolerance = found["inside"].partition("±")
    tolerance = tolerance.strip()
    if sign and not (TOLERANCE.fullmatch(tolerance) and float(tolerance.rstrip("%"))):
        raise BuildError(f"line {line}: `±{tolerance}` is no tolerance: write ±2% or ±0.02")
    # as in an f-string, the format begins at the first colon after a complete expression
    colons = [place for place, sign in enumerate(content) if sign == ":"]
    for place in [*colons, len(content)]:
        try:
            ast.parse(content[:place].strip(), mode="eval")
        except SyntaxError:
            continue
        return Value(found[0], content[:place].strip(), content[place + 1 :].rstrip(), tolerance, line)
    raise BuildError(f"line {line}: `{found[0]}` holds no expression: write a value as in {{{{error:.3f}}}}")


def values_of(cell: dict) -> list[Value]:
    """The values in a cell of a draft, see `drafts.draft_notebooks`."""
    return [piece for piece in split_text(*text_with_values(cell)) if isinstance(piece, Value)]


def text_with_values(cell: dict) -> tuple[str, int]:
    """The text of a cell of a draft that may hold values, and its first line in the source."""
    if "line" not in cell:  # the build wrote it
        return "", 0
    if cell["cell_type"] == "markdown":
        return cell["source"], cell["line"]
    return cell["metadata"].get("alt", ""), cell["line"] - 1


def filled(cell: dict, kept: list[Kept]) -> dict:
    """The part of a draft's cell that may hold values, with the kept ones, in order, in their places."""
    following = iter(kept)
    pieces = split_text(*text_with_values(cell))
    text = "".join(shown(piece, next(following)) if isinstance(piece, Value) else piece for piece in pieces)
    if not text:
        return {}
    return {"source": text} if cell["cell_type"] == "markdown" else {"metadata": cell["metadata"] | {"alt": text}}


def shown(value: Value, kept: Kept) -> str:
    """The value as the notebook shows it."""
    return format(kept, value.format) if value.tolerance else str(kept)


def agree(value: Value, kept: Kept, now: Kept) -> bool:
    """Whether a value is still what was kept of it, within its tolerance."""
    if not value.tolerance or isinstance(kept, str) or isinstance(now, str):
        return now == kept
    number = float(value.tolerance.rstrip("%"))
    return abs(now - kept) <= (abs(kept) * number / 100 if value.tolerance.endswith("%") else number)


# --- In the kernel ----------------------------------------------------------------------------------------------------


def asking(values: list[Value]) -> str:
    """Code that evaluates values in the kernel and prints, as JSON, what to keep of each, or its error."""
    asked = ", ".join(f"(lambda: {value.expression}, {value.format!r}, {value.tolerance!r})" for value in values)
    return f"__import__({__name__!r}, fromlist=['answer']).answer({asked})"


def answer(*asked: tuple[Callable, str, str]) -> None:
    """Print, for `asking`, a pair for each value: what to keep of it, and what went wrong."""
    answers = []
    for evaluate, specification, tolerance in asked:
        try:
            answers.append([measure(evaluate, specification, tolerance), ""])
        except Exception as error:  # whatever an author's expression raises
            answers.append([None, f"{type(error).__name__}: {error}"])
    print(json.dumps(answers))


def measure(evaluate: Callable, specification: str, tolerance: str) -> Kept:
    """What to keep of a value: its text, or with a tolerance its number. Raises ValueError if that is not finite."""
    value = evaluate()
    if not tolerance:
        return format(value, specification)
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{number!r} is no finite number, so it cannot have a tolerance")
    format(number, specification)  # raises for a wrong one
    return number


def answered(values: list[Value], printed: str) -> list[Kept]:
    """What the kernel printed for `asking`. Raises BuildError, with the line, for what it could not evaluate."""
    kept = []
    for value, (what, error) in zip(values, json.loads(printed), strict=True):
        if error:
            raise BuildError(f"line {value.line}: {value.text} has no value there: {error}")
        kept.append(what)
    return kept


def guarding(values: list[Value], kept: list[Kept]) -> str:
    """The generated claim: code that fails, with the line, where a value is no longer what the text says."""
    lines = [f"__import__({__name__!r}, fromlist=['guard']).guard("]
    for value, what in zip(values, kept, strict=True):
        lines.append(f"    (lambda: {value.expression}, {what!r}, {astuple(value)!r}),")
    return "\n".join([*lines, ")"])


def guard(*claims: tuple[Callable, Kept, tuple]) -> None:
    """Raise AssertionError with all values that the text states wrongly."""
    wrong = []
    for evaluate, kept, fields in claims:
        value = Value(*fields)
        now = measure(evaluate, value.format, value.tolerance)
        if not agree(value, kept, now):
            wrong.append(f"line {value.line}: {value.text} is {shown(value, now)}, the text says {shown(value, kept)}")
    assert not wrong, "\n".join(wrong)


# --- Beside the source ------------------------------------------------------------------------------------------------


def path_of_values(source: Path) -> Path:
    """The file beside a source that keeps its values."""
    return source.with_suffix(".json")


def read_values(source: Path) -> list[list]:
    """Pairs of a value's text and what was kept of it, from the file beside a source; none if there is no file."""
    path = path_of_values(source)
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(text, str) and isinstance(kept, Kept) for text, kept in pairs):
            raise ValueError
        return pairs
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise BuildError(f"{path.name} is damaged: delete it and build with --execute") from None


def recall(values: list[Value], pairs: list[list]) -> list[Kept]:
    """What was kept of each value; equal texts match in order. A constant, such as {{2023}}, needs no run.

    Raises BuildError for a value that was not kept.
    """
    by_text = defaultdict(list)
    for text, kept in pairs:
        by_text[text].append(kept)
    recalled = []
    for value in values:
        if not by_text[value.text] and (constant := text_of_constant(value)) is not None:
            by_text[value.text].append(constant)
        if not by_text[value.text]:
            raise BuildError(f"line {value.line}: {value.text} has no value yet: build with --execute")
        recalled.append(by_text[value.text].pop(0))
        if isinstance(recalled[-1], str) == bool(value.tolerance):
            raise BuildError(f"line {value.line}: what was kept of {value.text} is damaged: build with --execute")
    return recalled


def text_of_constant(value: Value) -> str | None:
    """How a literal is shown; None for what has to be computed, or compared within a tolerance."""
    try:
        return None if value.tolerance else format(ast.literal_eval(value.expression), value.format)
    except (ValueError, TypeError, SyntaxError):
        return None


def file_of_values(values: list[Value], kept: list[Kept]) -> str:
    """The content of the JSON file beside the source: a line for each value."""
    pairs = (json.dumps([value.text, what], ensure_ascii=False) for value, what in zip(values, kept, strict=True))
    return "[\n " + ",\n ".join(pairs) + "\n]\n"
