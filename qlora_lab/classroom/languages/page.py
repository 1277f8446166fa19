"""The course's page, README.md, in the edition's language: `README.zh-TW.md` beside it, and what is out of step there.

The page has the English one's blocks up to LAST, in order. Before each stands `<!-- 3f9a1c2b -->`, the id of the
English text that was translated: a block that changes in README is named until its translation is mended. The table
of lessons needs none, since its rows are compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from qlora_lab.classroom.languages import rules
from qlora_lab.classroom.languages.entries import Text

LAST = "\n## What is where"  # from here on, README is for those who read the English code
BLOCK = re.compile(
    r"(?:<!-- (?P<id>[0-9a-f]{8}) -->\n)?(?P<text>```.*?^```$|\S.*?)(?=\n\n|\n*\Z)", re.MULTILINE | re.DOTALL
)
ROW = re.compile(r"^\| \[(?P<name>\w+)\]\((?P<link>\S+?\.ipynb)\).*\| (?P<minutes>\d+) \|$", re.MULTILINE)
OTHER = re.compile(r"\[[^]]+\]\(README(\.[\w-]+)?\.md\)")  # the line with the link to the other language


class Edition(Protocol):
    """What is asked of an edition; edition.py has it, and imports this file."""

    @property
    def notebooks(self) -> Path: ...
    @property
    def language(self) -> str: ...
    @property
    def sources(self) -> Path: ...
    def lessons(self) -> list[str]: ...


def page_of(edition: Edition) -> Path:
    return edition.notebooks.parent / f"README.{edition.language}.md"


def blocks(text: str) -> list[tuple[str, str]]:
    """The id (empty if there is none) and the text of each block that is translated."""
    found = [(block["id"] or "", block["text"].strip("\n")) for block in BLOCK.finditer(text)]
    left_out = re.compile(rf"# |{OTHER.pattern}")
    return [(id, block) for id, block in found if not left_out.match(block) and not ROW.search(block)]


def relink(edition: Edition) -> None:
    """Let the page's links lead to the edition's notebooks, where it has them."""
    path = page_of(edition)
    if path.exists():
        text = path.read_text(encoding="utf-8")
        path.write_text(
            ROW.sub(lambda row: row[0].replace(row["link"], link_of(row["name"], edition)), text), encoding="utf-8"
        )


def link_of(lesson: str, edition: Edition) -> str:
    folder = f"{edition.language}/" if lesson in edition.lessons() else ""
    return f"notebooks/{folder}{lesson}.ipynb"


def find_faults(edition: Edition) -> Iterator[str]:
    """What is missing, stale or wrong in the page; nothing without one."""
    path, readme = page_of(edition), edition.notebooks.parent / "README.md"
    if not path.exists() or not readme.exists():
        return
    page, english = path.read_text(encoding="utf-8"), readme.read_text(encoding="utf-8").partition(LAST)[0]
    terms = rules.read_terms(edition.sources / "terms.json")
    theirs = {Text("markdown", block).id: block for _, block in blocks(english)}
    ours = dict(blocks(page))
    for id, block in theirs.items():
        where, begin = f"{path.name}, {id}", " ".join(block.split())[:60]
        if id not in ours:
            yield f"{where}: missing, or another text of README.md was translated there ({begin} ...)"
            continue
        kind = "label" if block.startswith("```") else "markdown"  # commands may have no comments
        yield from (f"{where}: {fault}" for fault in rules.faults(kind, block, ours[id]))
        yield from (f"{where}: {fault}" for fault in rules.faults_of_terms(block, ours[id], terms))
        if commands(block) != commands(ours[id]):
            yield f"{where}: has other commands than README.md"
    for id, block in ours.items():
        if id not in theirs:
            begin = " ".join(block.split())[:40]
            yield f"{path.name}, {id or 'no id'}: stale, README.md has no such text ({begin} ...)"
    if [id for id in ours if id in theirs] != [id for id in theirs if id in ours]:
        yield f"{path.name}: its blocks stand in another order than in README.md"
    yield from faults_of_rows(page, english, path.name, edition)


def commands(block: str) -> list[str]:
    """What one types, of a block that is a fenced one."""
    return rules.typed(block) if block.startswith("```") else []


def faults_of_rows(page: str, english: str, name: str, edition: Edition) -> Iterator[str]:
    """What is wrong with the table of lessons: it has all that the edition has, with README's minutes."""
    theirs = {row["name"]: row["minutes"] for row in ROW.finditer(english)}
    ours = {row["name"]: row for row in ROW.finditer(page)}
    for lesson, minutes in theirs.items():
        link = link_of(lesson, edition)
        if lesson not in ours:
            if lesson in edition.lessons():
                yield f"{name}: its table lacks {lesson}"
        elif ours[lesson]["minutes"] != minutes:
            yield f"{name}: {lesson} takes {ours[lesson]['minutes']} minutes there, in README.md {minutes}"
        elif ours[lesson]["link"] != link:
            yield f"{name}: {lesson} leads to {ours[lesson]['link']}, not to {link}: build --language does it"
    for lesson in ours:
        if lesson not in theirs:
            yield f"{name}: its table has {lesson}, which README.md does not have"
    if [lesson for lesson in ours if lesson in theirs] != [lesson for lesson in theirs if lesson in ours]:
        yield f"{name}: its lessons stand in another order than in README.md"
