"""What the classroom says, in the language of the running kernel: labels, verdicts, progress.

The code says everything in English. Where a text leaves for the learner, `translate` looks for the English template
that the finished text was made from ("{0:.1f} GB saved by {1}"), and fills the translated one with the same fields. The
templates are in `notebooks/source/LANGUAGE/*.labels.json`. A text without translation stays as it is.

A kernel's language is that of the folder in which its notebook lies, `notebooks/zh-TW/`, or the value of the
environment variable QLORA_LAB_LANGUAGE ("en" for English).
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

from qlora_lab.errors import UserError
from qlora_lab.places import NOTEBOOKS

SOURCES = NOTEBOOKS / "source"
ENGLISH = "en"
FIELD = re.compile(r"\{(\d+)(?::([^{}]*))?\}")  # of a template
NUMBER = r" *[-+−]?[\d.,]*\d(?:e[-+]?\d+)?%?|[-+−]?(?:inf|nan)"  # what a field with a format is
NAME = r"\S+?|(?:(?![a-z]{2}|: ).)+?"  # what a field of a short template is: one word, or names and numbers
WORD = re.compile(r"[A-Za-z]{2}")
LOWER = re.compile(r"[a-z]{2}")  # in a word of English; names of formats and units are in capitals
SIGNS = {": ": "：", ", ": "，", "  ": "  ", " · ": " · ", "\n": "\n"}  # between the parts of a label
LEAST_LETTERS = 4  # of a template with a field that is not a number
LEAST_SIGNS = 5  # of a template in which such a field can be any text: one with fewer would match too much


def started_in() -> Path:
    """The working folder; the root folder where it has been deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path(os.sep)


STARTED_IN = started_in()  # at import: a notebook may change its folder later


@functools.lru_cache(maxsize=4)
def editions(sources: Path = SOURCES) -> list[str]:
    """The languages, beside English, in which there are lessons: "zh-TW". None in the students' copy."""
    return sorted(path.parent.name for path in sources.glob("*/edition.json"))


def find_language(folder: Path, asked: str, languages: list[str]) -> str:
    """The language of a kernel that runs in a folder. asked: the value of QLORA_LAB_LANGUAGE, or empty.

    Raises UserError if that is no language of the course.
    """
    if asked:
        known = [ENGLISH, *languages]
        if asked not in known:
            raise UserError(
                f"QLORA_LAB_LANGUAGE is {asked!r}, and the course is in {' and '.join(known)}: set one of them"
            )
        return asked
    names = folder.parts[-1:] if folder.name != "solutions" else folder.parts[-2:-1]
    return next((name for name in names if name in languages), ENGLISH)


def language() -> str:
    """The language of this kernel: "en" or, for example, "zh-TW". Raises UserError, see `find_language`."""
    return find_language(STARTED_IN, os.environ.get("QLORA_LAB_LANGUAGE", ""), editions())


def translate(text: str, into: str = "") -> str:
    """The text in a language, by default the kernel's; as it is where nobody has translated it."""
    into = into or language()
    return text if into == ENGLISH else translated(text, into)


@functools.lru_cache(maxsize=4096)
def translated(text: str, into: str) -> str:
    """The same, remembered: figures show the same few labels again and again."""
    if not WORD.search(text):
        return text
    exact, patterns = catalogue(into)
    if text in exact:
        return exact[text]
    for pattern, names, template in patterns:
        if match := pattern.fullmatch(text):
            fields = dict(zip(names, match.groups(), strict=True))
            # a field may be a sentence of its own; single words are what the learner or the code named
            fields = {name: translated(field, into) if " " in field else field for name, field in fields.items()}
            return FIELD.sub(lambda found, fields=fields: fields[found[1]], template)
    return composed(text, into)


def composed(text: str, into: str) -> str:
    """A label made of labels, names and numbers ("no adapter: 1.512"), if all its words are known; else as it is."""
    for sign, translation in SIGNS.items():
        first, found, rest = text.partition(sign)
        if not found or not first.strip() or not rest.strip():
            continue
        if (end := translated(found + rest, into)) != found + rest:  # a template may begin with the sign
            rest, translation = found + rest, ""
        else:
            end = translated(rest, into)
        begin = translated(first, into)
        unknown = any(said == part and LOWER.search(part) for part, said in ((first, begin), (rest, end)))
        if (begin, end) != (first, rest) and not unknown:
            return begin + translation + end
    return text


@functools.lru_cache(maxsize=4)
def catalogue(into: str) -> tuple[dict[str, str], list[tuple[re.Pattern, list[str], str]]]:
    """The translations into a language: of texts without fields, and of templates, the longest first."""
    exact: dict[str, str] = {}
    patterns = []
    for path in sorted((SOURCES / into).glob("*.labels.json"), key=lambda path: (path.stem != "common.labels", path)):
        for english, template in json.loads(path.read_text(encoding="utf-8")).items():
            if template and not FIELD.search(english):
                if (
                    exact.get(english, english) == english
                ):  # where one lesson keeps the English, another's translation wins
                    exact[english] = template
            elif template:
                patterns.append(
                    (pattern_of(english), [found[1] for found in FIELD.finditer(english)], template, english)
                )
    patterns.sort(key=lambda entry: -len(FIELD.sub("", entry[-1])))
    return exact, [entry[:-1] for entry in patterns]


def pattern_of(template: str) -> re.Pattern:
    """What the finished texts of a template look like; a field with a format is a number, others are any text.

    In a short template ("{0} bits") they are names: it would match the end of a sentence otherwise.
    """
    text = ".*?" if len(re.sub(r"\s", "", FIELD.sub("", template))) >= LEAST_SIGNS else NAME
    parts, end = [], 0
    for found in FIELD.finditer(template):
        parts += [re.escape(template[end : found.start()]), f"({NUMBER if is_number(found[2]) else text})"]
        end = found.end()
    return re.compile("".join([*parts, re.escape(template[end:])]), re.DOTALL)


def is_number(specification: str | None) -> bool:
    """Whether a field's format, such as ".3f" or ",", is one of numbers."""
    return bool(specification) and bool(re.fullmatch(r"[-+,.\d]*[defgn%]|,|\+?,?", specification))


def is_specific(template: str) -> bool:
    """Whether a template says enough to be found in finished texts."""
    fields = [found[2] for found in FIELD.finditer(template)]
    letters = len(re.findall("[A-Za-z]", FIELD.sub("", template)))
    return letters >= (2 if all(map(is_number, fields)) else LEAST_LETTERS)
