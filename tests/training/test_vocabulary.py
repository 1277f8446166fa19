"""Scripts, and what they cost in tokens."""

import unicodedata

import pytest

from qlora_lab.training.vocabulary import script, script_use


def use(texts, tokenizer) -> dict[str, tuple]:
    uses, without = script_use(texts, tokenizer)
    return {of.script: (of.letters, of.words, of.tokens) for of in uses} | {"": without}


def test_letters_words_and_tokens_are_counted_by_script(tokenizer):
    texts = ["Hello, 12 worlds", "да нет", "咖啡!"]
    counted = use(texts, tokenizer)
    tokens = {text: len(tokenizer(text)["input_ids"]) for text in texts}
    assert counted["Latin"] == (11, 2, 2)
    assert counted["Cyrillic"] == (5, 2, tokens["да нет"])
    assert counted["Han"] == (2, None, tokens["咖啡!"] - 1)
    assert counted[""] == tokens["Hello, 12 worlds"] - 2 + 1
    assert list(counted) == ["Latin", "Cyrillic", "Han", ""]


@pytest.mark.parametrize(
    "text", ["Ça va? l'été, naïve — don’t", "हिन्दी में", "e\u0301te\u0301 1", "  ", "", "☕☕", "日本語 kana かな"]
)
def test_no_token_is_lost(tokenizer, text):
    counted = use([text], tokenizer)
    without = counted.pop("")
    assert sum(tokens for _, _, tokens in counted.values()) + without == len(tokenizer(text)["input_ids"])
    letters = sum(1 for character in text if character.isalpha())
    assert sum(letters for letters, _, _ in counted.values()) == letters


def test_words_go_on_over_marks_and_apostrophes(tokenizer):
    assert use(["don't don’t l'été"], tokenizer)["Latin"][1] == 3
    assert use(["हिन्दी में"], tokenizer)["Devanagari"][1] == 2
    assert use(["हिन्दी में"], tokenizer)[""] == 0  # marks alone in a token go with the letters before them
    assert use(["e\u0301te\u0301"], tokenizer)["Latin"][1] == 1
    assert use(["snake_case two-part x2y"], tokenizer)["Latin"][1] == 6
    assert use(['{"a":"b"}'], tokenizer)["Latin"][1] == 2


def test_a_mark_does_not_go_with_the_text_before(tokenizer):
    assert use(["abc", "\u0301"], tokenizer)[""] == use(["\u0301"], tokenizer)[""] > 0


def test_scripts_have_the_names_that_unicode_gives():
    names = {"a": "Latin", "ß": "Latin", "Ａ": "Latin", "ж": "Cyrillic", "中": "Han", "か": "Hiragana", "한": "Hangul"}
    assert {character: script(character) for character in names} == names
    assert [script(character) for character in "1 _☕\n"] == [""] * 5
    assert script("\u0301") is None and script("\u200d") is None
    assert unicodedata.category("\ue000") == "Co" and script("\ue000") == ""
