"""Scores of an answer beside exact match, each from 0 to 1: for free text, for a value in it, for JSON.

Normalizing and token F1 are SQuAD's, so they treat articles and punctuation as English does: Rajpurkar et al. 2016,
https://arxiv.org/abs/1606.05250, section 6.1, and for answers without a token the evaluation script of SQuAD 2.0.
"""

from __future__ import annotations

import collections
import decimal
import functools
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lab.errors import UserError
from qlora_lab.evaluation.reports import ANSWERED
from qlora_lab.training.formats import Chat


@dataclass(frozen=True)
class Score:
    """A way to score an answer.

    name: its key in a report. label: for people. of: takes an answer and its reference, returns 0 to 1. fault: takes a
    reference and says why no answer to it can be scored; "" if one can. advice: what to do then.
    """

    name: str
    label: str
    of: Callable[[str, str], float]
    fault: Callable[[str], str] = lambda reference: ""
    advice: str = ""


# ----------------------------------------------------------------------------------------------------------- free text


def normalized(text: str) -> str:
    """SQuAD's: lower case, without (ASCII) punctuation and the articles a, an, the, one space between words.

    >>> normalized("The  Eiffel tower!")
    'eiffel tower'
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalized_match(answer: str, reference: str) -> float:
    """1 if both are the same after `normalized`, else 0."""
    return float(normalized(answer) == normalized(reference))


def token_f1(answer: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the answer's words, both `normalized`; each word counts once a use.

    >>> token_f1("in the city of Paris", "Paris, France")  # precision 1/4, recall 1/2
    0.3333333333333333
    """
    said, expected = normalized(answer).split(), normalized(reference).split()
    if not said or not expected:  # as in SQuAD 2.0, where no answer may be the right one
        return float(said == expected)
    common = (collections.Counter(said) & collections.Counter(expected)).total()
    return 2 * common / (len(said) + len(expected))


# ------------------------------------------------------------------------------------------------------- a value in it


def found(pattern: re.Pattern, text: str) -> str | None:
    """What the pattern's last match in the text has in its first group, or as a whole if it has no group."""
    matches = list(pattern.finditer(text))
    return matches[-1][min(1, pattern.groups)] if matches else None


def same_value(one: str, other: str) -> bool:
    """Whether two texts are the same but for the spaces around them; numbers are the same by value.

    >>> same_value("1,000.", " 1000"), same_value("12a", "12")
    (True, False)
    """
    return _value(one) == _value(other)


def _value(text: str) -> str | decimal.Decimal:
    text = text.strip()
    if re.fullmatch(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?", text) and any(map(str.isdigit, text)):
        return decimal.Decimal(text.replace(",", ""))
    return text


def _pattern_score(pattern: re.Pattern, answer: str, reference: str) -> float:
    said, expected = found(pattern, answer), found(pattern, reference)
    return float(said is not None and expected is not None and same_value(said, expected))


def _pattern_fault(pattern: re.Pattern, reference: str) -> str:
    return "" if found(pattern, reference) is not None else f"{pattern.pattern!r} finds nothing in it"


# ---------------------------------------------------------------------------------------------------------------- JSON


def right_fields(answer: str, reference: str) -> dict[str, bool]:
    """By field of two JSON objects, whether the answer has it right. Nested fields have dotted names ("city.name").

    The fields are those of the reference, all wrong if the answer is no JSON object; and those that the answer adds,
    which are wrong. A list is one field. Numbers are the same by value, and true is not 1.
    """
    expected, said = _fields(reference) or {}, _fields(answer) or {}
    return {name: name in expected and name in said and _same(said[name], expected[name]) for name in expected | said}


def _json_score(answer: str, reference: str) -> float:
    right = right_fields(answer, reference)
    return sum(right.values()) / len(right) if right else float(_fields(answer) == {})


def _json_fault(reference: str) -> str:
    return "it is no JSON object" if _fields(reference) is None else ""


def field_shares(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """By field, the share of the references with this field whose answer has it right."""
    right = collections.defaultdict(list)
    for answer, reference in zip(answers, references, strict=True):
        expected = _fields(reference) or {}
        for name, is_right in right_fields(answer, reference).items():
            if name in expected:
                right[name].append(is_right)
    return {name: sum(values) / len(values) for name, values in right.items()}


def _fields(text: str) -> dict[str, Any] | None:
    """A JSON object's fields by dotted name; None if the text is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return dict(_flat(value)) if isinstance(value, dict) else None


def _flat(value: dict, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


# --------------------------------------------------------------------------------------------------------- by its name

PLAIN = {
    "normalized": Score("normalized_match", "normalized match", normalized_match),
    "f1": Score("f1", "token F1", token_f1),
    "json": Score("json", "JSON fields", _json_score, _json_fault, "leave such samples out, or judge free text by f1"),
}
PATTERN_ADVICE = (
    "give a pattern that finds something in each of them (A|B finds A or B), leave such samples out, or judge by f1"
)
NAMES = (*PLAIN, "regex:PATTERN")


def parse_score(text: str) -> Score:
    """The score of this name, one of `NAMES`. Raises UserError if there is none, or the pattern is no expression."""
    if text in PLAIN:
        return PLAIN[text]
    kind, colon, pattern = text.partition(":")
    if kind != "regex" or not colon or not pattern:
        raise UserError(f"no score is called {text!r}: choose from {', '.join(NAMES)}")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}") from error
    score, fault = functools.partial(_pattern_score, compiled), functools.partial(_pattern_fault, compiled)
    return Score(text, text, score, fault, PATTERN_ADVICE)


def require_scorable(scores: Sequence[Score], judged: Mapping[str, Sequence[Chat]]) -> None:
    """Raise UserError if there is no reference answer to score by, or one by which no answer can be scored.

    Args:
        scores: those asked for.
        judged: conversations by split, each with its reference as the last message. Plain text has none; how a tool
            call reads is up to the model's template, so it is not looked at here.
    """
    references = {
        split: [chat[-1]["content"] for chat in chats if chat[0]["role"] != "text" and not chat[-1].get("tool_calls")]
        for split, chats in judged.items()
        if split in ANSWERED
    }
    if scores and not any(references.values()):
        raise UserError(
            "--judge has no answers to score: the data has no test split, nor enough samples to hold one out"
        )
    for score in scores:
        for split, texts in references.items():
            faults = [(number, fault) for number, text in enumerate(texts, 1) if (fault := score.fault(text))]
            if faults:
                number, fault = faults[0]
                raise UserError(
                    f"{len(faults)} of {len(texts)} reference answers of {split} have no score '{score.label}', the "
                    f"first is number {number}, {texts[number - 1][:60]!r}: {fault}; {score.advice}"
                )
