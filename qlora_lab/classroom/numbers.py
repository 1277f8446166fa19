"""Numbers in the text that no run fills in: named with their cell, and held to a list that only shrinks.

A number in markdown, tables and descriptions of figures is a value (`{{error:.3f}}`, see `values.py`), which every run
of CI compares. What is no result (a year, a price, what somebody claims) is declared by being written as one:
`{{2023}}`. What stands in the text as it is, beside names ("NF4", "LLaMA-65B", "4-bit", "notebook 03", "Exercise 4.2")
and code, is undeclared: `build --check` fails for each that `notebooks/undeclared.json` does not list, in its order.
The list holds what was there when it was begun. `build --numbers` writes it anew, and refuses to let it grow.

Numbers in words ("one in nine") are not seen.
"""

import difflib
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qlora_lab.classroom.source import BuildError
from qlora_lab.classroom.values import split_text, text_with_values

NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z]-)\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")
FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1", re.MULTILINE | re.DOTALL)
NO_CLAIMS = [  # what a number in it says nothing that a run could contradict
    FENCE,
    re.compile(r"`[^`\n]+`|<code>.*?</code>"),  # code
    re.compile(r"(?<=\])\([^)\s]*\)|https?://\S+|<[a-z][^>\n]*>"),  # addresses, tags
    re.compile(r"^#+ (\d+ · |\d+\.)", re.MULTILINE),  # headings
    re.compile(r"^ *\d+\. ", re.MULTILINE),  # lists
    re.compile(r"\[\d\d · "),  # links to lessons
    re.compile(
        r"\b(notebook|lesson|section|exercise|hint|step|claim)s? \d+(\.\d+)?((, | and | to )\d+(\.\d+)?)*",
        re.IGNORECASE,
    ),
    re.compile(r"[●○]+ \(\d+ minutes?\)"),
    re.compile(r"^\| (time|computing|memory|GPU) \|.*", re.MULTILINE),  # the card: tests/test_labels.py
    re.compile(r"\b\d+(\.\d+)?[BM]\b"),  # sizes of models
    re.compile(r"(?<![.,\d])\d+-bit\b|(?<![.,\d])(2|4|8|16|32)\s+bits\b"),  # widths
]


@dataclass(frozen=True)
class Undeclared:
    """text: the number as it is written. line: in the source. cell: its number in the learner's notebook, from 1."""

    text: str
    line: int
    cell: int
    around: str


def undeclared(draft: dict) -> list[Undeclared]:
    """The undeclared numbers of a draft of the learner's notebook, in order."""
    found, count = [], 0
    for cell in draft["cells"]:
        count += not cell.get("claims")
        text, first_line = text_with_values(cell)
        if not text:
            continue
        pieces = split_text(text, first_line)
        text = plain = "".join(piece if isinstance(piece, str) else "{{}}" for piece in pieces)
        for pattern in NO_CLAIMS:
            plain = pattern.sub(lambda match: re.sub(r"\d", "x", match[0]), plain)  # as long as before
        is_alt = cell["cell_type"] == "code"
        for number in NUMBER.finditer(plain):
            line = first_line + (0 if is_alt else plain.count("\n", 0, number.start()))
            around = " ".join(text[max(0, number.start() - 30) : number.end() + 20].split())
            found.append(Undeclared(number[0], line, count, around))
    return found


def list_of(notebooks: Path) -> Path:
    """The file that lists the undeclared numbers of all lessons."""
    return notebooks / "undeclared.json"


def allowed(notebooks: Path) -> dict[str, list[str]]:
    """By lesson, the undeclared numbers that may stand in it; none where there is no file."""
    path = list_of(notebooks)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise BuildError(f"{path.name} is damaged: take it back from git") from None


def find_excess(found: list[Undeclared], may: list[str]) -> list[str]:
    """What differs from the list: each number that it does not have there, with its cell, and those that are gone."""
    told = []
    numbers = [number.text for number in found]
    for kind, start, end, begin, stop in difflib.SequenceMatcher(a=may, b=numbers, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        for number in found[begin:stop]:
            told.append(
                f"line {number.line}: cell {number.cell} states {number.text}, which no run fills in (... "
                f"{number.around} ...): write a value, {{{{error:.3f}}}}, or declare it, {{{{2023}}}}"
            )
        if begin == stop:
            told.append(f"{', '.join(may[start:end])}: no longer in the text; build --numbers takes it from the list")
    return told


def shrink(notebooks: Path, found: dict[str, list[Undeclared]], *, all_lessons: bool) -> str:
    """The list's new content, from what was found in some lessons.

    all_lessons: lessons that were not found are gone from the course. Without a file, one is begun.

    Raises BuildError, with their cells, for numbers that the list does not have.
    """
    old = allowed(notebooks)
    for stem, numbers in found.items():
        more = Counter(number.text for number in numbers) - Counter(old.get(stem, []))
        if more and list_of(notebooks).exists():
            news = [f"line {n.line}, cell {n.cell}: ... {n.around} ..." for n in numbers if n.text in more]
            raise BuildError(
                f"{stem} has more undeclared numbers than its list, which only shrinks:\n" + "\n".join(news)
            )
    new = {} if all_lessons else dict(old)
    new |= {stem: [number.text for number in numbers] for stem, numbers in found.items()}
    lines = [f"{json.dumps(stem)}: {json.dumps(numbers)}" for stem, numbers in sorted(new.items()) if numbers]
    return "{\n " + ",\n ".join(lines) + "\n}\n" if lines else "{}\n"
