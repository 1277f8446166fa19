"""What occurs twice, and what is nearly so. Slow set arithmetic over all pairs is the oracle."""

import random

import pytest

from qlora_lab.training.likeness import (
    ASKED,
    NEAR,
    NEARLY,
    SAME,
    Places,
    Repeats,
    Twin,
    Twins,
    question,
    shingles_of,
)

WORDS = [f"word{n}" for n in range(300)]


def chat(asked: str, answered: str = "yes", system: str = "") -> list[dict]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def twins(judged: list[list[dict]], trained: list[list[dict]]) -> list[Twin]:
    found = Twins([(f"test, line {n}", chat) for n, chat in enumerate(judged, 1)])
    for number, of in enumerate(trained, 1):
        found.see(f"train, line {number}", of)
    return found.found()


def test_places_are_given_back_as_they_came():
    places, told = Places(), [f"{name}, line {n}" for name in ("a b.jsonl", "c", "a b.jsonl") for n in range(1, 4)]
    for where in told:
        places.append(where)
    assert [places[number] for number in range(9)] == told


def test_repeats_are_counted_with_the_place_of_the_first():
    repeats = Repeats()
    told = [chat("a"), chat("b"), chat("a"), chat(" a\n"), chat("b", "no"), chat("b"), chat("b", "maybe"), chat("A")]
    for number, of in enumerate(told, 1):
        repeats.see(f"f, line {number}", of)
    found = repeats.found()
    assert (found.repeats, found.example) == (3, ("f, line 3", "f, line 1"))
    assert (found.disagreeing, found.disagreement) == (1, ("f, line 5", "f, line 2"))


def test_what_is_said_before_and_who_says_it_makes_another_sample():
    repeats = Repeats()
    swapped = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "yes"}]
    for number, of in enumerate([chat("a"), chat("a", system="be brief"), swapped, chat("2+2"), chat("2-2")]):
        repeats.see(f"f, line {number}", of)
    found = repeats.found()
    assert (found.repeats, found.example, found.disagreeing, found.disagreement) == (0, None, 0, None)


def test_plain_texts_ask_nothing_and_do_not_disagree():
    repeats = Repeats()
    for number, text in enumerate(["once", "twice", "once"]):
        repeats.see(f"f, line {number}", [{"role": "text", "content": text}])
    assert (repeats.found().repeats, repeats.found().disagreeing) == (1, 0)
    assert twins([[{"role": "text", "content": "a"}]], [[{"role": "text", "content": "b"}]]) == []


def test_the_strongest_kind_of_likeness_is_told():
    asked = " ".join(WORDS[:20])
    nearly = asked.replace("word7", "other")
    assert twins([chat(asked)], [chat(nearly), chat(asked, "no"), chat(asked)]) == [
        Twin("test, line 1", "train, line 3", SAME, 1)
    ]
    assert twins([chat(asked)], [chat(asked, "no"), chat(nearly)]) == [Twin("test, line 1", "train, line 1", ASKED, 1)]
    [twin] = twins([chat("x"), chat(asked)], [chat("y"), chat(nearly)])
    assert (twin.judged, twin.trained, twin.kind) == ("test, line 2", "train, line 2", NEAR)
    assert twin.likeness == pytest.approx(16 / 22)  # 21 words: 19 shingles, three of which have the other word


def test_likeness_is_that_of_all_pairs():
    """Samples of which parts are rewritten; none has what many have."""
    draw = random.Random(0)

    def rewritten(text: str) -> str:
        words = text.split()
        for _ in range(draw.randrange(1, 6)):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        return " ".join(words)

    judged = [" ".join(draw.choices(WORDS, k=draw.randrange(15, 40))) for _ in range(30)]
    trained = [rewritten(draw.choice(judged)) for _ in range(200)]
    expected = {}
    for number, text in enumerate(judged, 1):
        mine = shingles_of(chat(text))
        shares = [len(mine & of) / len(mine | of) for of in (shingles_of(chat(other)) for other in trained)]
        if max(shares) >= NEARLY:
            expected[f"test, line {number}"] = max(shares)
    assert 5 < len(expected) < 30
    found = twins([chat(text) for text in judged], [chat(text) for text in trained])
    assert {twin.judged: twin.likeness for twin in found if twin.kind == NEAR} == expected


def test_what_many_samples_have_makes_no_twins():
    """Forty words of instruction before each question, in the system message or in the user's."""
    fixed = " ".join(WORDS[:40])
    for asked in (
        lambda n: chat(f"{fixed} number{n}", f"answer{n}"),
        lambda n: chat(f"number{n}", f"answer{n}", fixed),
    ):
        assert twins([asked(n) for n in range(20)], [asked(n) for n in range(20, 60)]) == []


def test_a_sample_is_no_twin_of_itself():
    found = Twins([("f, line 1", chat("a")), ("f, line 2", chat("b"))])
    for number, text in enumerate(["a", "b", "b"], 1):
        found.see(f"f, line {number}", chat(text))
    assert found.found() == [Twin("f, line 2", "f, line 3", SAME, 1)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One, two; three!", 5),  # one , two ; three ! yes
        ("我喜欢咖啡", 4),
        ("go在go", 2),
        ("สวัสดี", 5),
        ("", 1),
        ("e\u0301te\u0301", 3),  # marks count as signs
    ],
)
def test_shingles_are_of_words_signs_and_characters_of_scripts_without_blanks(text, count):
    assert len(shingles_of(chat(text))) == count


def test_case_and_white_space_make_no_shingle_of_another_kind():
    assert shingles_of(chat("Is  it\nIN?")) == shingles_of(chat("is it in?", system="be brief"))
    assert shingles_of(chat("is it in!")) != shingles_of(chat("is it in?"))


def test_a_question_is_all_before_the_last_answer():
    assert question(chat("a", "b")) == question(chat("a ", "c")) != question(chat("a", "b", system="s"))
