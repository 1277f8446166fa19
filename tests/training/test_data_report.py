"""What is said of a data set before anything is trained on it."""

import json
import random
import tracemalloc

import pytest

from qlora_lab.errors import UserError
from qlora_lab.training import data_report
from qlora_lab.training.chat import tokenize_chat
from qlora_lab.training.data import read_chats
from qlora_lab.training.data_report import Draw, Spread, describe, report_on
from qlora_lab.training.likeness import ASKED, NEAR, SAME

LONG = "Please tell me whether the book about the history of printing is on the shelf in the reading room upstairs"


def lines(path, *rows) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def qa(prompt: str, response: str = "Yes.") -> dict[str, str]:
    return {"prompt": prompt, "response": response}


def test_spread_is_of_the_numbers_themselves():
    assert Spread.of([5]) == Spread(5, 5, 5, 5)
    assert Spread.of(range(1, 101)) == Spread(1, 50, 95, 100)
    assert Spread.of([1, 2]) == Spread(1, 1, 2, 2)


def test_a_draw_gives_everything_the_same_chance():
    few = Draw(5)
    for number in range(4):
        few.see(number)
    assert (few.seen, few.things) == (4, [0, 1, 2, 3])
    counts = dict.fromkeys(range(20), 0)
    for seed in range(2000):
        draw = Draw(5, seed)
        for number in range(20):
            draw.see(number)
        assert draw.seen == 20 and len(set(draw.things)) == 5
        for number in draw.things:
            counts[number] += 1
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())


def test_samples_turns_and_tokens_are_those_that_training_would_have(tmp_path, tokenizer):
    turns = [{"role": ("user", "assistant")[n % 2], "content": "word " * n + "end"} for n in range(4)]
    rows = [qa("Is it in?"), {"messages": turns}, qa("Is it out?", ""), qa("Where?", "Shelf 4.")]
    path = lines(tmp_path / "mine.jsonl", *rows)
    report = report_on(path, tokenizer, "tiny", max_length=50)
    samples = [tokenize_chat(chat, tokenizer) for chat in read_chats(path)]
    lengths, learned = [len(sample.ids) for sample in samples], [sample.target_count for sample in samples]
    assert (report.drawn, report.understood.samples) == (3, 3)
    assert report.messages == Spread(2, 2, 4, 4) and report.answers == Spread(1, 1, 2, 2)
    assert report.characters == Spread(13, 14, 42, 42)
    assert report.tokens == Spread.of(lengths) and report.learned == Spread.of(learned)
    assert (report.token_sum, report.learned_sum) == (sum(lengths), sum(learned))
    assert report.too_long == sum(length > 50 for length in lengths) == 1
    assert report.first == ("mine.jsonl, line 1", samples[0])
    last = report_on(path, tokenizer, "tiny", learn="last")
    assert last.learned_sum < report.learned_sum and last.token_sum == report.token_sum
    text = describe(report, tokenizer)
    assert "left out: 1 sample (mine.jsonl, line 3) with an empty response" in text
    assert f"1 of 3 samples are longer than --max-length 50 and would be left out: --max-length {max(lengths)}" in text
    assert f"{sum(lengths)} tokens of tiny, {sum(learned) / sum(lengths):.0%} of them learned: every turn" in text
    assert "mine.jsonl, line 1, token by token (· is a blank):\n  read     <|im_start|> system" in text
    assert text.endswith("  learned  Yes . <|im_end|>")


def test_what_is_judged_on_and_known_from_training_is_told(tmp_path, tokenizer):
    lines(tmp_path / "train.jsonl", qa("Is it in?"), qa(LONG), qa("Where is it?"), qa("Is it in?"))
    test = [qa("Is it in?"), qa("Where is it?", "Upstairs."), qa(LONG.replace("history", "art")), qa("Who?", "Ann.")]
    lines(tmp_path / "test.jsonl", *test)
    lines(tmp_path / "validation.jsonl", qa("How much?", "Four."))
    report = report_on(tmp_path, tokenizer, "tiny")
    assert list(report.compared) == ["validation", "test"]
    assert [twin.kind for twin in report.compared["test"].twins] == [SAME, ASKED, NEAR]
    text = describe(report, tokenizer)
    assert "validation (1 sample): none is in the training data, not even nearly" in text
    assert (
        "test (4 samples): some are in the training data\n"
        "  1 word for word (test.jsonl, line 1 and train.jsonl, line 1)\n"
        "  1 with another answer (test.jsonl, line 2 and train.jsonl, line 3)\n"
        "  1 nearly the same (test.jsonl, line 3 is 74% like train.jsonl, line 2)"
    ) in text
    assert "numbers aside" not in text
    assert "1 sample repeats an earlier one (train.jsonl, line 4 repeats train.jsonl, line 1)" in text


def test_samples_that_differ_in_a_number_are_told_without_blame(tmp_path, tokenizer):
    """Tickets from a template; and sums, which differ in nothing else, and are none the worse for it."""
    lines(tmp_path / "train.jsonl", qa("Where is order 4711?"), qa("What is 3 times 4?", "12"), qa("Who?"))
    lines(tmp_path / "test.jsonl", qa("Where is order 12?"), qa("What is 5 times 6?", "30"), qa("Why not?"))
    text = describe(report_on(tmp_path, tokenizer, "tiny"), tokenizer)
    assert (
        "test (3 samples): some are nearly in the training data\n"
        "  2 nearly the same, numbers aside (test.jsonl, line 1 and train.jsonl, line 1)\n"
        "  (If the numbers are what is asked about, as in sums, each of these is a task of its own. If they are not,\n"
    ) in text


def test_a_file_without_splits_is_compared_with_itself(tmp_path, tokenizer):
    words = "sun moon rain snow wind fog hail storm cloud frost thaw flood drought breeze gale sleet".split()
    rows = [qa(f"What is {word}?", f"A kind of {word}.") for word in words[:10]]
    path = lines(tmp_path / "mine.jsonl", *rows * 2)
    text = describe(report_on(path, tokenizer, "tiny"), tokenizer)
    assert "10 samples repeat an earlier one" in text
    assert (
        "a run would hold out 4 of 20 samples to judge on, drawn at random, and 2 more to validate on, if it has "
        "--validate-every\n(a share of 4 answers is uncertain by up to 0.98 / sqrt(4) = 49 percentage points, up and "
        "down)\n"
    ) in text
    assert "those 4 to judge on: some are among the others\n  4 word for word (mine.jsonl, line " in text
    by_kind = lines(tmp_path / "kinds.jsonl", *[{**row, "kind": row["prompt"]} for row in rows * 2])
    text = describe(report_on(by_kind, tokenizer, "tiny", split_by="kind"), tokenizer)
    assert "hold out 4 of 20 samples to judge on, drawn by kind" in text
    assert "those 4 to judge on: none is among the others, not even nearly" in text
    text = describe(report_on(path, tokenizer, "tiny", most=0), tokenizer)
    assert "a run would hold out none of these samples to judge on: --eval-samples 0" in text
    path = lines(tmp_path / "mine.jsonl", *rows[:9])
    text = describe(report_on(path, tokenizer, "tiny"), tokenizer)
    assert "a run would hold out none of these samples to judge on: fewer than 10 samples" in text


def test_which_answer_of_several_is_judged_is_said(tmp_path, tokenizer):
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"word {n}"} for n in range(4)]
    said = "of a conversation with several answers the last is judged"
    path = lines(tmp_path / "mine.jsonl", *[{"messages": turns}] * 10)
    assert said in describe(report_on(path, tokenizer, "tiny"), tokenizer)
    path = lines(tmp_path / "mine.jsonl", *[qa("Is it in?")] * 10)
    assert said not in describe(report_on(path, tokenizer, "tiny"), tokenizer)


def test_the_score_of_one_answer_to_everything_is_told(tmp_path, tokenizer):
    answers = ["Ann.", "Upstairs.", "Four.", "Upstairs.", "Ann.", "Upstairs.\n"]
    path = lines(tmp_path / "mine.jsonl", *[qa(f"What is {n}?", answer) for n, answer in enumerate(answers)])
    text = describe(report_on(path, tokenizer, "tiny"), tokenizer)
    said = "always giving the most frequent answer (mine.jsonl, line 2) would be right for 3 of 6 samples (50%)\n"
    assert said in text
    path = lines(tmp_path / "mine.jsonl", *[qa(f"What is {n}?", "DABCABCD"[n]) for n in range(8)])
    assert "(mine.jsonl, line 1) would be right for 2 of 8" in describe(report_on(path, tokenizer, "tiny"), tokenizer)
    path = lines(tmp_path / "mine.jsonl", *[qa(f"What is {n}?", f"{n}.") for n in range(6)])
    assert "most frequent answer" not in describe(report_on(path, tokenizer, "tiny"), tokenizer)
    path = lines(tmp_path / "mine.jsonl", *[{"text": LONG}] * 6)
    assert "most frequent answer" not in describe(report_on(path, tokenizer, "tiny"), tokenizer)


def test_large_data_is_drawn_from_and_that_is_said(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data_report, "DRAWN", 20)
    monkeypatch.setattr(data_report, "COMPARED", 10)
    path = lines(tmp_path / "mine.jsonl", *[qa(f"Is number {n} in?") for n in range(100)])
    report = report_on(path, tokenizer, "tiny")
    assert (report.drawn, report.understood.samples, report.held_out) == (20, 100, (20, 10))
    text = describe(report, tokenizer)
    assert "tokens of tiny of 20 samples drawn at random, " in text
    lines(tmp_path / "train.jsonl", qa("Is it in?"))
    lines(tmp_path / "test.jsonl", *[qa(f"Is number {n} in?") for n in range(30)])
    assert "test (30 samples, 10 of them drawn): " in describe(report_on(tmp_path, tokenizer, "tiny"), tokenizer)


def test_what_the_template_cannot_serve_is_told_and_the_rest_still_is(tmp_path, tokenizer):
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    called = {"messages": [{"role": "user", "content": "Warm?"}, {"role": "assistant", "tool_calls": [call]}]}
    path = lines(tmp_path / "mine.jsonl", called, called)
    report = report_on(path, tokenizer, "tiny")
    assert report.tokens is None and report.first is None and report.understood.samples == 2
    text = describe(report, tokenizer)
    assert "2 of 2 samples would be left out: the chat template drops tool calls" in text
    assert "1 sample repeats an earlier one" in text and "token by token" not in text and "tokens of tiny" not in text


def test_the_words_of_scripts_are_compared_with_english(tmp_path, tokenizer):
    path = lines(tmp_path / "mine.jsonl", qa("Это не так", "да ☕"))
    text = describe(report_on(path, tokenizer, "tiny"), tokenizer)
    assert "\nCyrillic                   100.0%" in text and "2.75 a word\n" in text
    assert "(English prose, to compare with: 1.04 a word)" in text
    assert "(· is a blank; (2): two tokens that only together make a character):" in text and "☕(3)" in text


def test_a_malformed_line_is_one_sentence_as_in_training(tmp_path, tokenizer):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(qa("a")) + "\n{")
    with pytest.raises(UserError, match="mine.jsonl, line 2 is not valid JSON"):
        report_on(path, tokenizer, "tiny")


def test_memory_grows_by_a_few_bytes_a_sample(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data_report, "DRAWN", 50)
    monkeypatch.setattr(data_report, "COMPARED", 50)
    draw, peaks = random.Random(0), []
    for samples in (400, 400, 2_400):  # the first time, caches are filled
        rows = [qa(" ".join(str(draw.randrange(10**6)) for _ in range(120))) for _ in range(samples)]
        path = lines(tmp_path / "mine.jsonl", *rows)
        del rows
        tracemalloc.start()
        try:
            report_on(path, tokenizer, "tiny")
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert path and peaks[2] - peaks[1] < 2_000 * 200  # a sample has about 900 bytes here
