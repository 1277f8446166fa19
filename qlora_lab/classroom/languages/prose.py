"""The translator's file of a lesson, `05_double_quantization.md`: an entry for each text, see `entries.py`.

    %% 3f9a1c2b markdown
    % # 05 · What do the scales cost?
    % (the English text: a comment, which --extract writes)
    # 05 · ...
    (the translation, as many lines as it takes)

The id belongs to the English text that was translated. When that changes, the entry is stale: --extract gives it the
new id, writes `stale` behind it and shows, in lines with `%-`, what the English was:

    %% 77d0e4aa markdown stale
    %- # 05 · What do the scales cost?
    % # 05 · What do scales cost?
    # 05 · ...

Whoever has mended the translation deletes the word `stale`. Entries whose text is gone stand at the end, as `orphan`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_lab.classroom.languages.entries import Text
from qlora_lab.classroom.source import BuildError

HEAD = re.compile(r"%% (?P<id>[0-9a-f]{8}) (?P<kind>\w+)(?: (?P<state>stale|orphan))?")
ALIKE = 0.5  # of two English texts, the least likeness of one text before and after a change


@dataclass(frozen=True)
class Entry:
    """A translation. english: the text that it is of, as the file has it. before: of a stale entry, the old one."""

    id: str
    kind: str
    english: str
    translation: str
    state: str = ""
    before: str = ""


def read_prose(path: Path) -> list[Entry]:
    """The entries of a file, in its order; none without a file. Raises BuildError, with the line, for a mistake."""
    if not path.exists():
        return []
    entries, seen = [], set()
    lines = path.read_text(encoding="utf-8").split("\n")
    heads = [number for number, line in enumerate(lines) if line.startswith("%%")]
    if "".join(lines[: heads[0]] if heads else lines).strip():
        raise BuildError("line 1: the file begins with an entry: %% id kind")
    for start, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        head = HEAD.fullmatch(lines[start].rstrip())
        if not head:
            raise BuildError(f"line {start + 1}: `{lines[start]}` is no head of an entry: %% 3f9a1c2b markdown")
        if head["id"] in seen:
            raise BuildError(f"line {start + 1}: {head['id']} has two entries: delete one")
        seen.add(head["id"])
        body = start + 1
        while body < end and re.match(r"%(-?)( |$)", lines[body]):
            body += 1
        quoted = lines[start + 1 : body]
        english, before = (
            "\n".join(line.removeprefix(sign)[1:] for line in quoted if (line.startswith("%-")) == (sign == "%-"))
            for sign in ("%", "%-")
        )
        translation = "\n".join(lines[body:end]).strip("\n").rstrip()
        entries.append(Entry(head["id"], head["kind"], english, translation, head["state"] or "", before))
    return entries


def file_of_prose(entries: list[Entry]) -> str:
    """The content of a file."""
    parts = []
    for entry in entries:
        lines = [f"%% {entry.id} {entry.kind} {entry.state}".rstrip()]
        if entry.state == "stale" and entry.before:
            lines += [f"%- {line}".rstrip() for line in entry.before.split("\n")]
        lines += [f"% {line}".rstrip() for line in entry.english.split("\n")]
        parts.append("\n".join([*lines, *filter(None, [entry.translation])]))
    return "\n\n".join(parts) + "\n"


def renewed(texts: Sequence[Text], entries: Sequence[Entry]) -> list[Entry]:
    """An entry for each text of a lesson, in its order, and at the end those whose text is gone, as orphans.

    Where a text has changed, its entry is kept as stale.
    """
    by_id = {entry.id: entry for entry in entries}
    changed = pairs(texts, entries)
    renewed_entries = []
    for text in texts:
        if entry := by_id.get(text.id):
            state = "" if entry.state == "orphan" else entry.state
            renewed_entries.append(replace(entry, kind=text.kind, english=text.english, state=state))
        elif old := changed.get(text.id):
            before = old.before or old.english  # of the text that was translated, however often it has changed since
            state = "stale" if old.translation else ""
            renewed_entries.append(Entry(text.id, text.kind, text.english, old.translation, state, before))
        else:
            renewed_entries.append(Entry(text.id, text.kind, text.english, ""))
    used = {text.id for text in texts} | {old.id for old in changed.values()}
    orphans = [replace(entry, state="orphan") for entry in entries if entry.id not in used and entry.translation]
    return renewed_entries + orphans


def pairs(texts: Sequence[Text], entries: Sequence[Entry]) -> dict[str, Entry]:
    """By the id of a new text, the entry of the text that it was before: of its kind, alike, the likest first."""
    known, wanted = {entry.id for entry in entries}, {text.id for text in texts}
    new = [text for text in texts if text.id not in known]
    gone = [entry for entry in entries if entry.id not in wanted]
    likeness = [
        (difflib.SequenceMatcher(a=text.english, b=entry.english, autojunk=False).ratio(), text, entry)
        for text in new
        for entry in gone
        if text.kind == entry.kind
    ]
    found: dict[str, Entry] = {}
    used: set[str] = set()
    for ratio, text, entry in sorted(likeness, key=lambda each: -each[0]):
        if ratio >= ALIKE and text.id not in found and entry.id not in used:
            found[text.id] = entry
            used.add(entry.id)
    return found
