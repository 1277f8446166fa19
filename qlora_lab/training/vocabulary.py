"""How many tokens a tokenizer needs for the scripts of some texts.

A script is not a language: letters say that a text is in Cyrillic, not whether it is Russian or Bulgarian. But a
vocabulary that was not made for a script cuts its words to pieces, and each piece costs time and memory.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

NAMES = {"Cjk": "Han", "Fullwidth": "Latin"}  # by the first word of a letter's Unicode name
WITHOUT_BLANKS = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")  # no words without a dictionary


@dataclass(frozen=True)
class ScriptUse:
    """letters, words and tokens of a script; words is None where scripts are written without blanks.

    words: letters of the script in a row, with the marks and apostrophes between them.
    tokens: those whose first letter is of the script; a mark alone goes with the token before it.
    """

    script: str
    letters: int
    words: int | None
    tokens: int


def script_use(texts: Iterable[str], tokenizer) -> tuple[list[ScriptUse], int]:
    """Use of each script, the one with most letters first, and the number of tokens without a letter.

    Args:
        tokenizer: a fast one, that is one which can tell where in a text its tokens are.
    """
    letters, words, tokens = Counter(), Counter(), Counter()
    for text in texts:
        kinds = (kind for kind in map(script, text) if kind is not None)
        for name, run in itertools.groupby(kinds):
            letters[name] += sum(1 for _ in run)
            words[name] += 1
        name = ""
        for start, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]:
            parts = [script(character) for character in text[start:end]]
            name = next(filter(None, parts), name if None in parts else "")
            tokens[name] += 1
    letters.pop("", None)
    uses = [
        ScriptUse(name, count, None if name in WITHOUT_BLANKS else words[name], tokens[name])
        for name, count in letters.most_common()
    ]
    return uses, tokens[""]


@functools.lru_cache(maxsize=2**16)
def script(character: str) -> str | None:
    """The script of a letter, by the first word of its Unicode name; "" for other characters; None for what joins.

    That is marks upon letters, as vowels in Devanagari, and apostrophes: a word goes on after them.
    """
    if character in "'\u2019\u200c\u200d" or unicodedata.category(character).startswith("M"):
        return None
    if not character.isalpha():
        return ""
    name = unicodedata.name(character, "unnamed").split()[0].split("-")[0].capitalize()
    return NAMES.get(name, name)
