"""What a translation must keep of the English text, and which words it must not use.

Kept: the values (`{{error:.3f}}`), the numbers, code up to the comments in blocks, links, formulas, tags, the arrows
that mark what a learner fills in, and the structure: headings, rows of tables, list items. A number may be written in
digits where English has it in words. `terms.json` lists for the course's terms the one translation, and words that it
is not translated by.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_lab.classroom.languages.texts import FIELD
from qlora_lab.classroom.source import BuildError
from qlora_lab.classroom.values import Value, split_text

FENCE = re.compile(r"^ *(`{3,}|~{3,})(?P<name>[^\n]*)\n.*?^ *\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`]+`|<code>.*?</code>", re.DOTALL)
EXPRESSION = re.compile(r"\{\{.*?\}\}", re.DOTALL)
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))|(?<=href=\")[^\"]+|(?<=src=\")[^\"]+|https?://[^\s)\"]+")
FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$", re.DOTALL)
TAG = re.compile(r"</?[a-z]+(?= |>)")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
STRUCTURE = {
    "headings": re.compile(r"^#+ ", re.MULTILINE),
    "rows of tables": re.compile(r"^\|", re.MULTILINE),
    "list items": re.compile(r"^ *(?:[-*]|\d+\.) ", re.MULTILINE),
}
CHINESE = re.compile(r"[\u4e00-\u9fff]")
WORDS = dict(
    zip("zero one two three four five six seven eight nine ten eleven twelve".split(), map(str, range(13)), strict=True)
) | {
    "sixteen": "16",
    "fifteen": "15",
    "twenty": "20",
    "thirty": "30",
    "fifty": "50",
    "hundred": "100",
    "thirteen": "13",
}
WORDS |= {"twice": "2", "once": "1", "half": "2", "thousand": "1000", "dozen": "12", "fourteen": "14", "first": "1"}
WORDS |= {"second": "2", "third": "3", "fourth": "4", "fifth": "5", "eighth": "8", "ninth": "9", "forty": "40"}
KINDS = ("markdown", "alt")  # whose texts are sentences, so that a translation has Chinese signs


def faults(kind: str, english: str, translation: str) -> Iterator[str]:
    """What is wrong with a translation, a phrase each."""
    if kind in KINDS and CHINESE.search(translation) is None and len(re.findall("[a-z]{2,}", english)) > 1:
        yield "is not translated"
    ours, theirs = parts(english), parts(translation)
    for name in ours:
        yield from compared(name, ours[name], theirs[name])
    for place in broken_bold(translation):
        yield f"has bold that Markdown does not see, at {place!r}: put a space outside of the stars"
    words = {WORDS[word] for word in re.findall("[a-z]+", english.lower()) if word in WORDS}
    for number in sorted(numbers_in(translation) - numbers_in(english) - words):
        yield f"has the number {number}, which the English text does not have"
    for number in sorted(numbers_in(english) - numbers_in(translation)):
        yield f"lacks the number {number}"
    for name, pattern in STRUCTURE.items():
        theirs_count, our_count = len(pattern.findall(translation)), len(pattern.findall(english))
        if theirs_count != our_count:
            yield f"has {theirs_count} {name}, the English text {our_count}"


def broken_bold(text: str) -> Iterator[str]:
    """Bold words whose signs Markdown would show: it wants a space or a sign outside where a sign stands inside."""
    pieces = split_text(text, 0)  # a value may have powers
    plain = CODE.sub("x", "".join(piece if isinstance(piece, str) else "0" for piece in pieces))
    for paragraph in re.split(r"\n\s*\n", plain):
        for number, found in enumerate(re.finditer(r"\*\*", paragraph)):
            before, after = paragraph[: found.start()][-1:], paragraph[found.end() :][:1]
            inside, outside = (after, before) if number % 2 == 0 else (before, after)
            if is_sign(inside) and outside and not outside.isspace() and not is_sign(outside):
                yield paragraph[max(0, found.start() - 8) : found.end() + 4]


def is_sign(character: str) -> bool:
    """Whether Markdown takes a character for punctuation."""
    return bool(character) and unicodedata.category(character)[0] in "PS"


def parts(text: str) -> dict[str, Counter | set]:
    """What stands in both languages alike, by name."""
    pieces = split_text(text, 0)
    plain = "".join(piece if isinstance(piece, str) else " " for piece in pieces)
    fences = {"\n".join(typed(found[0])) for found in FENCE.finditer(plain) if found["name"].strip()}
    plain = FENCE.sub(" ", plain)
    return {
        "value": {piece.text for piece in pieces if isinstance(piece, Value)},
        "code": fences | {" ".join(found.split()) for found in CODE.findall(plain)},
        "link": set(LINK.findall(plain)),
        "formula": set(FORMULA.findall(CODE.sub(" ", plain))),
        "tag": Counter(TAG.findall(CODE.sub(" ", plain))),
        "arrow": Counter(re.findall("[←→⇒]", plain)),
        "dots": Counter(re.findall("[●○]+", plain)),
    }


def typed(block: str) -> list[str]:
    """What one types, of a fenced block: its lines without their comments."""
    return [line.partition(" # ")[0].rstrip() for line in block.splitlines()]


def compared(name: str, ours, theirs) -> Iterator[str]:
    """What two sets or counts of things of one kind do not share."""
    for thing in sorted(ours - theirs):
        yield f"lacks the {name} {thing}"
    for thing in sorted(theirs - ours):
        yield f"has the {name} {thing}, which the English text does not have"


def numbers_in(text: str) -> set[str]:
    """The numbers in a text, apart from those in values, code, links and formulas."""
    plain = "".join(piece if isinstance(piece, str) else " " for piece in split_text(text, 0))
    plain = FENCE.sub(lambda found: " " if found["name"].strip() else found[0].replace(found[1], ""), plain)
    for pattern in (CODE, LINK, FORMULA):
        plain = pattern.sub(" ", plain)
    return {number.strip(",.") for number in NUMBER.findall(plain)}


def faults_of_label(english: str, translation: str) -> Iterator[str]:
    """What is wrong with the translation of a template, see `labels.py`."""
    ours, theirs = ({found[1] for found in FIELD.finditer(text)} for text in (english, translation))
    if ours != theirs:
        yield f"has the fields {shown(theirs)}, the English text {shown(ours)}"
    yield from faults("label", FIELD.sub(" ", english), FIELD.sub(" ", translation))


def shown(fields: set[str]) -> str:
    return ", ".join(f"{{{field}}}" for field in sorted(fields)) or "none"


# --- Terms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """english, and its translation. never: what it is not called. but: longer words in which these are right.

    always: whether each text that has the English term must have the translation, too.
    """

    english: str
    translation: str
    never: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    always: bool = False


def term_of(english: str, translation: str, never: Sequence = (), but: Sequence = (), always: bool = False) -> Term:
    return Term(english, translation, tuple(never), tuple(but), always)


def read_terms(path: Path) -> list[Term]:
    """The table of terms. Raises BuildError if it is damaged."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [term_of(**row) for row in rows]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BuildError(f"{path.name} is no table of terms: {error}") from None


def faults_of_terms(english: str, translation: str, terms: list[Term]) -> Iterator[str]:
    """Words in a translation that are not those of the table, or no Traditional Chinese."""
    plain = CODE.sub(" ", FENCE.sub(" ", translation))
    said = EXPRESSION.sub(" ", CODE.sub(" ", english))
    for term in terms:
        allowed = plain
        for word in (*term.but, term.translation):
            allowed = allowed.replace(word, " ")
        for word in term.never:
            if word in allowed:
                yield f"has {word}: {term.english} is {term.translation}"
        pattern = rf"(?<![\w`.-]){re.escape(term.english)}s?(?![\w`.-])"
        if term.always and re.search(pattern, said, re.IGNORECASE) and term.translation not in plain:
            yield f"lacks {term.translation}, the translation of {term.english}"
    for sign in sorted(set(CHINESE.findall(plain))):
        try:
            sign.encode("cp950")  # Big5, which has no simplified signs
        except UnicodeEncodeError:
            yield f"has {sign}, which is no sign of Traditional Chinese"
