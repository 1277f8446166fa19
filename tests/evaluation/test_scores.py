"""Scores of answers, held against values worked out by hand."""

import json

import pytest

from qlora_lab.errors import UserError
from qlora_lab.evaluation.scores import (
    field_shares,
    normalized,
    normalized_match,
    parse_score,
    require_scorable,
    right_fields,
    same_value,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("The  Eiffel\n tower!", "eiffel tower"),
        ("an apple, a pear and THE theory", "apple pear and theory"),  # an article is a word, not its letters
        ("a-b", "ab"),  # punctuation goes, and leaves no space; only then are articles looked for
        ("A.", ""),
        ("Straße „heute“", "straße „heute“"),  # only ASCII's punctuation
        ("", ""),
    ],
)
def test_text_is_normalized_as_in_squad(text, becomes):
    assert normalized(text) == becomes


def test_normalized_match():
    assert normalized_match(" The Answer: 42.", "answer 42") == 1
    assert normalized_match("answer 43", "answer 42") == 0
    assert normalized_match("42 answer", "answer 42") == 0  # the order counts


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("Paris", "paris.", 1),
        ("in the city of Paris", "Paris, France", 2 * (1 / 4) * (1 / 2) / (1 / 4 + 1 / 2)),
        ("no no no yes", "no yes yes", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),  # a word counts as often as in both
        ("yes no", "no yes", 1),  # the order does not count
        ("London", "Paris", 0),
        ("", "Paris", 0),
        ("the", "a", 1),  # both have no word left
    ],
)
def test_token_f1(answer, reference, f1):
    assert token_f1(answer, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("72", " 72. ", True),
        ("1,000", "1000.00", True),
        ("-3", "3", False),
        ("+.5", "0.5", True),
        ("0.1", "0.10000000000000000001", False),  # no rounding
        ("1,00", "100", False),  # that comma does not stand between thousands
        ("1.", "1", True),
        (".", ".", True),
        ("twelve", "12", False),
        ("Twelve", "twelve", False),
    ],
)
def test_values_are_the_same(one, other, same):
    assert same_value(one, other) is same is same_value(other, one)


@pytest.mark.parametrize(
    ("pattern", "answer", "right"),
    [
        (r"#### (-?[\d.,]+)", "5 + 5 = 10\n#### 10", True),
        (r"#### (-?[\d.,]+)", "#### 3, no: #### 10.0", True),  # the last one counts
        (r"#### (-?[\d.,]+)", "#### 10, no: #### 3", False),
        (r"#### (-?[\d.,]+)", "it is 10", False),
        (r"-?\d+", "so 5 and 5 make 10", True),  # no group: the whole match
        (r"(?:####|is) (\d+)(\s|$)", "it is 10", True),  # the first of several groups
        (r"#### 10|(nothing)", "#### 10", False),  # a group that was not taken has found nothing
    ],
)
def test_a_value_is_found_by_a_pattern(pattern, answer, right):
    assert parse_score(f"regex:{pattern}").of(answer, "5 + 5 = 10\n#### 10") == right


REFERENCE = json.dumps(
    {"item": "towel", "quantity": 2, "gift": True, "to": {"name": "Ada", "city": "Rome"}, "sizes": [1]}
)


@pytest.mark.parametrize(
    ("changed", "wrong", "score"),
    [
        ({}, [], 1),
        ({"quantity": 2.0, "gift": True}, [], 1),
        ({"quantity": "2", "gift": 1}, ["gift", "quantity"], 4 / 6),
        ({"to": {"city": "Rome", "name": "Eve"}}, ["to.name"], 5 / 6),
        ({"to": "Ada, Rome"}, ["to", "to.city", "to.name"], 4 / 7),
        ({"sizes": [1, 2]}, ["sizes"], 5 / 6),
        ({"sizes": [True]}, ["sizes"], 5 / 6),
        ({"note": ""}, ["note"], 6 / 7),  # what is added is wrong
    ],
)
def test_fields_of_json(changed, wrong, score):
    answer = json.dumps({**json.loads(REFERENCE), **changed})
    right = right_fields(answer, REFERENCE)
    assert sorted(name for name, is_right in right.items() if not is_right) == wrong
    assert parse_score("json").of(answer, REFERENCE) == pytest.approx(score)


@pytest.mark.parametrize(
    "answer", ["", "towel", "[1]", REFERENCE + ".", "[" * 100_000, '{"quantity": 1' + "0" * 9999 + "}"]
)
def test_what_is_no_object_has_no_field_right(answer):
    assert parse_score("json").of(answer, REFERENCE) == 0
    assert set(right_fields(answer, REFERENCE)) == {"item", "quantity", "gift", "to.name", "to.city", "sizes"}


def test_an_empty_object_is_right_when_it_is_expected():
    assert [parse_score("json").of(answer, "{}") for answer in ("{}", "", '{"a": 1}')] == [1, 0, 0]
    assert parse_score("json").of('{"a": {}}', '{"a": {}}') == 1


def test_shares_by_field_are_of_those_that_have_it():
    references = ['{"a": 1, "b": 1}', '{"a": 1}', '{"a": 1}']
    answers = ['{"a": 1, "b": 2}', '{"a": 1, "c": 3}', "no"]
    assert field_shares(answers, references) == {"a": pytest.approx(2 / 3), "b": 0}


def test_a_reference_that_cannot_be_scored_is_named():
    chats = {"test": [asked(text) for text in ("#### 1", "2", "three")]}
    with pytest.raises(UserError, match=r"2 of 3 .* of test have no score 'regex:#### \(\\d\+\)', the first is"):
        require_scorable([parse_score(r"regex:#### (\d+)")], chats)
    with pytest.raises(
        UserError, match="is number 3, 'three': '.*' finds nothing in it; give a pattern that finds something"
    ):
        require_scorable([parse_score(r"regex:\d+")], chats)
    with pytest.raises(
        UserError, match="is number 1, '#### 1': it is no JSON object; leave such samples out, or judge free"
    ):
        require_scorable([parse_score("f1"), parse_score("json")], chats)
    require_scorable([parse_score("f1"), parse_score("normalized")], chats)


def asked(answer: str, **more) -> list[dict]:
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer, **more}]


def test_only_answers_are_asked_for_a_score():
    """Not texts, nor splits that are read and not answered, nor tool calls, whose text is up to the template."""
    text, call = [{"role": "text", "content": "Once"}], asked("", tool_calls=[{"name": "f"}])
    json_score = [parse_score("json")]
    require_scorable(json_score, {"test": [asked("{}"), text, call], "validation": [asked("no JSON")]})
    for judged in ({}, {"validation": [asked("{}")]}, {"test": [text, call]}):
        require_scorable([], judged)
        with pytest.raises(UserError, match="--judge has no answers to score: the data has no test split, nor"):
            require_scorable(json_score, judged)


@pytest.mark.parametrize("text", ["bleu", "F1", "regex", "regex:", "", "exact:f1"])
def test_unknown_scores_are_refused(text):
    with pytest.raises(UserError, match="no score is called .*: choose from normalized, f1, json, regex:PATTERN"):
        parse_score(text)
    with pytest.raises(UserError, match="no regular expression: "):
        parse_score("regex:[")
