"""What is read and what is learned, for people."""

import pytest

from qlora_lab.training.chat import IGNORED, TokenizedSample, tokenize_chat
from qlora_lab.training.picture import in_short, picture, pieces, stretches, visible

CHAT = [
    {"role": "user", "content": "Is it in?"},
    {"role": "assistant", "content": "Yes, shelf 4."},
    {"role": "user", "content": "Reserve\tit"},
    {"role": "assistant", "content": "Done."},
]


def test_stretches_part_the_sample_where_learning_begins_and_ends(tokenizer):
    sample = tokenize_chat(CHAT, tokenizer)
    parts = stretches(sample)
    assert [learned for learned, _ in parts] == [False, True, False, True]
    assert tuple(token for _, ids in parts for token in ids) == sample.ids
    assert [token for learned, ids in parts if learned for token in ids] == [
        label for label in sample.labels if label != IGNORED
    ]


def test_a_picture_has_a_line_for_what_is_read_and_one_for_what_is_learned(tokenizer):
    shown = picture(tokenize_chat(CHAT[:-2], tokenizer), tokenizer).splitlines()
    assert shown == [
        "  read     <|im_start|> system \\n You ·are ·a ·helpful ·AI ·assistant ·named ·Sm ol LM , ·trained",
        "           ·by ·H ugging ·Face <|im_end|> \\n <|im_start|> user \\n Is ·it ·in ? <|im_end|> \\n",
        "           <|im_start|> ass istant \\n",
        "  learned  Yes , ·shelf · 4 . <|im_end|>",
    ]
    shown = picture(tokenize_chat(CHAT, tokenizer), tokenizer).splitlines()
    assert shown[3:] == [
        "  learned  Yes , ·shelf · 4 . <|im_end|>",
        "  read     \\n <|im_start|> user \\n Res erve \\t it <|im_end|> \\n <|im_start|> ass istant \\n",
        "  learned  Done . <|im_end|>",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two words", ["two", "·words"]),
        ("a\n  b", ["a", "\\n·", "·b"]),
        ("☕", ["☕(3)"]),
        ("喜", ["喜(3)"]),
        ("a\u200bb", ["a", "\\u200b(2)", "b"]),
    ],
)
def test_pieces_show_every_token_and_no_halves_of_characters(tokenizer, text, expected):
    assert pieces(tokenizer(text)["input_ids"], tokenizer) == expected


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    assert pieces(tokenizer("☕")["input_ids"][:2], tokenizer) == ["\ufffd(2)"]


class SentencePiece:
    """Decodes as LLaMA 2's tokenizer does: a blank at the beginning is dropped."""

    words = ("\u2581the", "\u2581cat", "s")

    def convert_ids_to_tokens(self, token):
        return self.words[token]

    def decode(self, ids, **_):
        return "".join(self.words[token] for token in ids).replace("\u2581", " ").removeprefix(" ")


def test_blanks_that_sentencepiece_drops_are_shown():
    assert pieces([0, 1, 2], SentencePiece()) == ["·the", "·cat", "s"]


def test_what_cannot_be_seen_is_written_out():
    assert visible("a\n\u202eb é☕") == "a\\n\\u202eb é☕"


def test_long_stretches_are_cut_in_their_middle_and_lines_are_short(tokenizer):
    sample = TokenizedSample(tuple(tokenizer(" word" * 1000)["input_ids"]), 500)
    shown = picture(sample, tokenizer, width=60, most=20)
    assert max(map(len, shown.splitlines())) <= 60
    assert " ".join(shown.split()).count("... 480 more ...") == 2 and shown.count("·word") == 40


def test_in_short_says_how_much_is_learned_and_of_what(tokenizer):
    head, *lines = in_short(tokenize_chat(CHAT, tokenizer), tokenizer).splitlines()
    assert head.startswith("a sample as it is trained on, ") and head.endswith("(every turn of the assistant):")
    assert " 10 of its 58 " in head
    assert lines[1:] == [
        "  learned  Yes, shelf 4.<|im_end|>",
        r"  read     \n<|im_start|>user\nReserve\tit<|im_end|>\n<|im_start|>assistant\n",
        "  learned  Done.<|im_end|>",
    ]
    last = in_short(tokenize_chat(CHAT, tokenizer, "last"), tokenizer, "last")
    assert "(the assistant's last turn):" in last and last.count("\n  learned ") == 1
    text = tokenize_chat([{"role": "text", "content": "Once"}], tokenizer)
    assert "(all of a text):" in in_short(text, tokenizer)
    assert "others say" in in_short(tokenize_chat(CHAT, tokenizer, "everything"), tokenizer, "everything")


def test_in_short_is_short_whatever_the_sample(tokenizer):
    chat = [{**message, "content": 50 * message["content"]} for message in CHAT] * 20
    lines = in_short(tokenize_chat(chat, tokenizer), tokenizer, width=50).splitlines()
    assert len(lines) == 8 and lines[4] == "  ... 74 more ..."
    assert max(map(len, lines[1:])) <= 62
    assert lines[-1].startswith("  learned  Done.Done.") and lines[-1].endswith("Done.<|im_end|>")
    assert lines[-1].count(" ... ") == 1
