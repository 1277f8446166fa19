"""What occurs twice, and what is nearly so. Slow set arithmetic over all pairs is the oracle."""

import itertools
import random

import pytest

from qlora_lab.training.likeness import (
    ASKED,
    NEAR,
    NEARLY,
    NUMBERS,
    SAME,
    Places,
    Repeats,
    Twin,
    Twins,
    question,
    shingles_of,
    template_of,
    text_of,
    words_of,
)

WORDS = ["".join(letters) for letters in itertools.product("abcdefg", repeat=3)][:300]


def chat(asked: str, answered: str = "yes", system: str = "") -> list[dict]:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def shingles(of: list[dict]) -> set[int]:
    return shingles_of(words_of(text_of(of)))


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
    nearly = asked.replace(WORDS[7], "other")
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
        mine = shingles(chat(text))
        shares = [len(mine & of) / len(mine | of) for of in (shingles(chat(other)) for other in trained)]
        if max(shares) >= NEARLY:
            expected[f"test, line {number}"] = max(shares)
    assert 5 < len(expected) < 30
    found = twins([chat(text) for text in judged], [chat(text) for text in trained])
    assert {twin.judged: twin.likeness for twin in found if twin.kind == NEAR} == expected


def test_what_many_samples_have_makes_no_twins():
    """Forty words of instruction before each question, in the system message or in the user's."""
    fixed = " ".join(WORDS[:40])
    for asked in (
        lambda n: chat(f"{fixed} {WORDS[-n]}", f"{WORDS[-n]}?"),
        lambda n: chat(WORDS[-n], f"{WORDS[-n]}?", fixed),
    ):
        assert twins([asked(n) for n in range(20)], [asked(n) for n in range(20, 60)]) == []


def test_likeness_is_that_of_the_rest():
    fixed, rest = " ".join(WORDS[:40]), " ".join(WORDS[100:120])
    judged = [chat(f"{fixed} {WORDS[-n]}", f"{WORDS[-n]}?") for n in range(20)] + [chat(f"{fixed} {rest}")]
    [twin] = twins(judged, [chat(f"{fixed} {rest.replace(WORDS[107], 'other')}")])
    assert twin.judged == "test, line 21"
    assert twin.likeness == pytest.approx(18 / 24)  # 59 shingles, 38 of them in all; three have the other word


def ticket(number: int, greeting: str = "Hello", of: str = "my parcel") -> list[dict]:
    return chat(f"{greeting}, where is {of} number {number}? Paid at once.", "Team: post")


def test_samples_from_one_template_are_alike_but_for_their_numbers():
    """As they are, the three shingles that hold the number differ: 11 of 17 are shared, too few."""
    [twin] = twins([ticket(4711)], [chat("What is the time?"), ticket(2), ticket(4, "Hi")])
    assert twin == Twin("test, line 1", "train, line 2", NUMBERS, 1.0)
    [twin] = twins([ticket(4711)], [ticket(4, "Hi")])  # one of 14 shingles holds the greeting
    assert twin.kind == NUMBERS and twin.likeness == pytest.approx(13 / 15)
    assert twins([ticket(4711)], [ticket(4, "Hi", "the green bicycle with seven gears of")]) == []


@pytest.mark.parametrize("count", [5, 40, 300])
def test_sums_are_alike_however_many_there_are(count):
    """All have the same words, so that none of their shingles tells anything: it is the whole that is compared."""
    draw = random.Random(1)
    asked = draw.sample([(a, b) for a in range(30) for b in range(30)], 2 * count)
    sums = [chat(f"What is {a} times {b}?", f"{a * b:,}") for a, b in asked]
    found = twins(sums[:count], sums[count:])
    assert len(found) == count and {twin.kind for twin in found} <= {NUMBERS, ASKED}
    assert twins([chat("What is 3 times 4?", "12")], [chat("What is 3 plus 4?", "7")]) == []


def test_what_is_alike_with_its_numbers_is_told_so():
    found = Twins([("test, line 1", ticket(1)), ("test, line 2", ticket(2))])
    assert found.see("train, line 1", ticket(3)) is False  # it stays when near-duplicates are left out
    assert found.see("train, line 2", ticket(2, "Hi")) is True
    assert [(twin.kind, twin.trained) for twin in found.found()] == [
        (NUMBERS, "train, line 1"),
        (NEAR, "train, line 2"),
    ]


def test_a_template_has_one_sign_for_each_number():
    assert template_of("no digits: two") is None
    assert template_of("A4711: 1,000.5 km on 3.") == ["a0", ":", "0", "km", "on", "0", "."]
    assert template_of("٣ + ๔ = 12-5") == ["0", "+", "0", "=", "0", "-", "0"]


def test_a_sample_is_no_twin_of_itself():
    found = Twins([("f, line 1", chat("a")), ("f, line 2", chat("b"))])
    for number, text in enumerate(["a", "b", "b"], 1):
        found.see(f"f, line {number}", chat(text))
    assert found.found() == [Twin("f, line 2", "f, line 3", SAME, 1)]
    tickets = [(f"f, line {n}", ticket(n)) for n in range(15)]
    found = Twins(tickets)
    for of in tickets:
        found.see(*of)
    pairs = [(twin.judged, twin.trained) for twin in found.found()]
    assert len(pairs) == 15 and all(judged != trained for judged, trained in pairs)


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
    assert len(shingles(chat(text))) == count


def test_case_and_white_space_make_no_shingle_of_another_kind():
    assert shingles(chat("Is  it\nIN?")) == shingles(chat("is it in?", system="be brief"))
    assert shingles(chat("is it in!")) != shingles(chat("is it in?"))


def test_a_question_is_all_before_the_last_answer():
    assert question(chat("a", "b")) == question(chat("a ", "c")) != question(chat("a", "b", system="s"))
