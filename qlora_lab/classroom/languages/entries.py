"""Which texts of a lesson are translated, and where their translations go.

They are found in the lesson's drafts, see `drafts.py`: whole markdown cells (prose, cards, hints), descriptions of
figures, titles of folded cells, and in code cells the comments and docstrings. A text that occurs twice is one entry.
An entry's id follows from its kind and its text, without regard to line breaks: it stays when other cells change.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qlora_lab.classroom.drafts import folded

TITLE = "# @title "
GENERATED = re.compile(r"your code (here|\(.*\))")  # the build's own, in common.labels.json
NO_TEXT = re.compile(r"fmt: \w+|type: ignore.*|noqa.*|@.*")
MAGIC = re.compile(r"^(\s*)([%!])", re.MULTILINE)
Say = Callable[[str, str], str]  # (kind, English text) -> the text; kind "phrase": see labels.PHRASES


@dataclass(frozen=True)
class Text:
    """A text to be translated. kind: "markdown", "alt", "title", "comment" or "docstring"."""

    kind: str
    english: str

    @property
    def id(self) -> str:
        return hashlib.sha256(f"{self.kind}\n{' '.join(self.english.split())}".encode()).hexdigest()[:8]


def texts_of(*drafts: dict) -> list[Text]:
    """The texts of a lesson's drafts, learner's and solved, each once, in the order of their cells."""
    found: dict[str, Text] = {}

    def note(kind: str, english: str) -> str:
        text = Text(kind, english)
        if kind != "phrase":
            found.setdefault(text.id, text)
        return english

    by_line: dict[int, list[dict]] = {}
    for draft in drafts:
        for cell in draft["cells"]:
            by_line.setdefault(cell.get("line", -1), []).append(cell)
    for line in sorted(by_line):
        for cell in by_line[line] if line >= 0 else []:
            in_language(cell, note)
    return list(found.values())


def in_language(cell: dict, say: Say) -> dict:
    """A draft's cell with its texts as `say` has them. Claims, and the set-up cell, have none."""
    if cell.get("claims"):
        return cell
    if cell.get("part") == "solution":
        solutions = [code_in_language(code, say) for code in cell["solutions"]]
        return cell | {"source": folded(solutions, say("phrase", "Solution"))}
    if "line" not in cell:
        return cell
    if cell["cell_type"] == "markdown":
        return cell | {"source": say("markdown", cell["source"])}
    title, code = split_title(cell["source"])
    if title:
        title = f"{TITLE}{say('title', title)}\n"
    metadata = dict(cell["metadata"])
    if "alt" in metadata:
        metadata["alt"] = say("alt", metadata["alt"])
    return cell | {"source": title + code_in_language(code, say), "metadata": metadata}


def split_title(source: str) -> tuple[str, str]:
    """The title of a folded cell, empty for others, and the rest of its source."""
    if not source.startswith(TITLE):
        return "", source
    first, _, rest = source.partition("\n")
    return first.removeprefix(TITLE), rest


# --- Comments and docstrings ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a text stands in code, in characters from its beginning; `write` gives what is to stand there instead."""

    start: int
    end: int
    kind: str
    english: str
    write: Callable[[str], str]


def code_in_language(code: str, say: Say) -> str:
    """Python code with its comments and docstrings as `say` has them. Magics stay as they are."""
    plain = MAGIC.sub(r"\1#", code)  # Python, of the same length
    pieces, end = [], 0
    for place in sorted([*comments(plain, code), *docstrings(plain)], key=lambda place: place.start):
        kind = "phrase" if GENERATED.fullmatch(place.english) else place.kind
        said = say(kind, place.english)
        pieces += [
            code[end : place.start],
            code[place.start : place.end] if said == place.english else place.write(said),
        ]
        end = place.end
    return "".join([*pieces, code[end:]])


def comments(plain: str, code: str) -> Iterator[Place]:
    """The comments; those on neighbouring lines of their own, equally indented, are one text. Not those of tools."""
    starts = line_starts(plain)
    block: list[tuple[int, int, str, bool]] = []  # line, column, text, stands alone
    for token in tokenize.generate_tokens(io.StringIO(plain).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        text = re.sub(r"^#+ ?", "", token.string)
        alone = not token.line[:column].strip()
        is_magic = code[starts[line] + column] != "#"
        if block and not (alone and block[-1][3] and block[-1][:2] == (line - 1, column) and not is_magic):
            yield place_of_comment(block, starts)
            block = []
        if text.strip() and not is_magic and not NO_TEXT.fullmatch(text):
            block.append((line, column, text, alone))
        elif block:
            yield place_of_comment(block, starts)
            block = []
    if block:
        yield place_of_comment(block, starts)


def place_of_comment(block: list[tuple[int, int, str, bool]], starts: list[int]) -> Place:
    (line, column, _, _), (last, _, text, _) = block[0], block[-1]

    def write(said: str) -> str:
        return f"\n{' ' * column}".join(f"# {each}" for each in said.split("\n"))

    start = starts[line] + column
    # "## x" and "#x" are no style of this course: a comment is a sign, a space and its text
    return Place(start, starts[last] + column + len(f"# {text}"), "comment", "\n".join(b[2] for b in block), write)


def docstrings(plain: str) -> Iterator[Place]:
    """The docstrings of functions and classes that are written in plain triple quotes."""
    starts, lines = line_starts(plain), plain.split("\n")
    for node in ast.walk(ast.parse(plain)):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or ast.get_docstring(node) is None:
            continue
        literal = node.body[0]
        assert isinstance(literal, ast.Expr) and literal.end_lineno and literal.end_col_offset is not None
        start = starts[literal.lineno] + characters(lines[literal.lineno - 1], literal.col_offset)
        end = starts[literal.end_lineno] + characters(lines[literal.end_lineno - 1], literal.end_col_offset)
        if not plain[start:end].startswith('"""') or "\\" in plain[start:end]:
            continue
        indent = " " * literal.col_offset

        def write(said: str, indent: str = indent) -> str:
            first, *rest = said.split("\n")
            return '"""' + "\n".join([first, *(textwrap.indent(line, indent) for line in rest)]) + '"""'

        first, _, rest = plain[start + 3 : end - 3].partition("\n")
        english = f"{first}\n{textwrap.dedent(rest)}".rstrip() if rest else first
        yield Place(start, end, "docstring", english, write)


def line_starts(text: str) -> list[int]:
    """Where each line begins, by its number from 1."""
    starts = [0, 0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    return starts


def characters(line: str, in_bytes: int) -> int:
    """A column that ast counts in UTF-8's bytes, in characters."""
    return len(line.encode()[:in_bytes].decode())


def same_code(code: str, other: str) -> bool:
    """Whether two pieces of code do the same: they differ in comments and docstrings at most."""
    try:
        return skeleton(code) == skeleton(other)
    except SyntaxError:
        return False


def skeleton(code: str) -> str:
    """The syntax tree of a cell, without docstrings, and its magics."""
    tree = ast.parse(MAGIC.sub(r"\1#", code))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    magics = [line.strip() for line in code.split("\n") if MAGIC.match(line)]
    return "\n".join([ast.dump(tree), *magics])
