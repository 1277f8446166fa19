"""The page of a run: whole, its own, and nothing on it but text that somebody else has written."""

import html.parser
import re

import pytest

from qlora_lab.evaluation.judge import Judge, Judgement
from qlora_lab.evaluation.kept_answers import before_only, joined, rows_of
from qlora_lab.evaluation.page import page

EVIL = """<script>document.title = "gone"</script><img src=x onerror="document.title='gone'">'"&amp;"""
REPORT = {
    "model": "tiny",
    "method": "qlora",
    "steps": 4,
    "losses": [4.0, 3.0, 2.0, 1.5],
    "validation_losses": [[2, 3.5], [3, 2.25], [4, 2.75]],
    "adapter_step": 3,
    "out_of_patience": False,
    "interrupted": False,
    "before": {"exact_match": {"test": 0.0}, "perplexity": {"prose": 40.0}, "f1": {"test": 0.25}},
    "after": {"exact_match": {"test": 0.5}, "perplexity": {"prose": 41.5}, "f1": {"test": 0.75}},
    "tokens_per_second": 139.4,
    "train_seconds": 12.3,
    "peak_memory_bytes": 2_219_421_696,
    "trainable_parameters": 4_884_480,
    "adapter": "runs/latest/adapter",
    "processes": 1,
    "device": "cpu",
    "compute_dtype": "float32",
    "samples_left_out": 0,
    "resumed_at": 0,
}


def row(before: bool, after: bool | None, answer: str = "an answer", split: str = "test") -> dict:
    moments = {"before": before, "after": after}
    judged = {
        moment: {"answer": f"{answer} {moment}", "exact": exact, "scores": {"f1": 0.5}}
        for moment, exact in moments.items()
        if exact is not None
    }
    return {"split": split, "asked": [{"role": "user", "content": "a question"}], "expected": "the reference", **judged}


class Reader(html.parser.HTMLParser):
    """Collects tags, their attributes, and the text of the page; checks that tags are closed in order."""

    EMPTY = ("meta", "input", "!doctype")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def test_what_others_wrote_is_text():
    """Wherever it stands: a tag in an answer, a prompt, a reference, a name, a setting is shown and does nothing."""
    evil = row(False, True, EVIL)
    evil.update(asked=[{"role": EVIL, "content": EVIL}], expected=EVIL)
    for moment in ("before", "after"):
        evil[moment]["scores"] = {EVIL: 0.5}
    scores = {**REPORT["before"], "json": {"test": 0}, "json_fields": {"test": {EVIL: 0}}}
    report = {**REPORT, "model": EVIL, "device": EVIL, "adapter": EVIL, "before": scores, "after": scores}
    plain = Reader(page(REPORT, {"data": "orders"}, [row(False, True)]))
    read = Reader(page(report, {EVIL: EVIL}, [evil]))
    assert set(read.tags) == set(plain.tags) and not {"script", "img"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on") or name in ("src", "srcdoc", "action")]
    shown = read.text.count(EVIL)
    assert shown == 14, shown  # title, heading, device, a field, role, prompt, 2 scores, 2 answers, reference, settings


def test_nothing_is_loaded_from_elsewhere():
    text = page(REPORT, {"data": "orders"}, [row(False, True)])
    for name, value in Reader(text).attributes:
        if name in ("href", "xlink:href"):
            assert value.startswith("#"), value  # within the curve
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'; style-src 'unsafe-inline'" in text


@pytest.mark.parametrize(
    ("before", "after", "words", "kind"),
    [
        (False, True, ["before: ✗ wrong", "after: ✓ right"], "right"),
        (True, False, ["before: ✓ right", "after: ✗ wrong"], "wrong"),
        (False, None, ["before: ✗ wrong"], "wrong"),  # interrupted
    ],
)
def test_answers_stand_side_by_side(before, after, words, kind):
    read = Reader(page(REPORT, {}, [row(before, after)]))
    text = read.text
    places = [text.index(part) for part in ("a question", *words, "the reference")]
    assert places == sorted(places)
    assert ("an answer after" in text) is (after is not None)
    assert ("after: " in text) is (after is not None)
    assert text.count("token F1 50%") == len(words)
    assert ("class", kind) in read.attributes


def test_each_split_counts_its_own():
    rows = [row(False, True), row(True, True), row(False, False), row(False, True, split="shifted")]
    text = Reader(page(REPORT, {}, rows)).text
    assert "test: of 3 answers, 1 exactly right before, 2 exactly right after" in text
    assert "shifted: of 1 answers, 0 exactly right before, 1 exactly right after" in text


def test_the_curve_is_told_in_words_too():
    read = Reader(page(REPORT, {}, []))
    words = "Training loss: 4.0000 at step 1, 1.5000 at step 4. "
    words += "Validation loss: lowest at step 3, 2.2500; at last 2.7500."
    assert ("role", "img") in read.attributes and ("aria-label", words) in read.attributes
    assert words in read.text and "optimizer step" in read.text and "validation" in read.text
    alone = Reader(page({**REPORT, "validation_losses": [], "adapter_step": 4}, {}, []))
    assert "Validation" not in alone.text and "validation" not in alone.text.split("Settings")[0]
    drawn_in = {
        colour for name, value in read.attributes if name == "style" for colour in re.findall("#[0-9a-f]+", value)
    }
    assert drawn_in == set()  # the page's own colours, light or dark, and no ground


def test_scores_and_settings_are_there():
    text = Reader(page(REPORT, {"learning": "0.1"}, [])).text
    for part in ("exact match, test0%50%", "token F1, test25%75%", "perplexity, prose40.00041.500", "learning0.1"):
        assert part in text
    assert "dullest guess" not in text  # a report of before it was worked out
    assert "The adapter is that of step 3, whose validation loss was the lowest." in text
    assert "Interrupted" not in text and "Stopped early" not in text and "Answers" not in text


def test_the_dullest_guess_stands_beside_the_scores():
    scores = {r"regex:<b>(\d+)": {"test": 0.25}}
    report = {**REPORT, "dullest_guess": {"exact_match": {"test": 0.45}, "f1": {"test": 0.6}, **scores}}
    for moment in ("before", "after"):
        report[moment] = {**REPORT[moment], **scores}
    text = Reader(page(report, {}, [])).text
    for part in ("beforeafterdullest guess", "exact match, test0%50%45%", "token F1, test25%75%60%", "40.00041.500-"):
        assert part in text
    assert r"regex:<b>(\d+), test25%25%25%" in text
    assert "Dullest guess: one and the same answer to all, the reference that scores most." in text


def test_a_run_that_took_no_step_and_judged_nothing_has_a_page():
    nothing = {"exact_match": {}, "perplexity": {}}
    report = {**REPORT, "steps": 0, "losses": [], "validation_losses": [], "adapter_step": 0, "interrupted": True}
    text = Reader(page({**report, "before": nothing, "after": nothing}, {}, [])).text
    assert "Interrupted: the model was not judged after training." in text
    assert "Scores" not in text and "Loss" not in text


# ------------------------------------------------------------------------------------------------------ what is kept


def test_rows_are_those_of_the_judgement(tokenizer):
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    judge = Judge({"test": [chat, chat], "shifted": [chat]}, {}, tokenizer)
    answers = {"test": ["A", "b"], "shifted": ["c"]}
    judgement = Judgement({"test": "10", "shifted": "0"}, {}, answers, {"f1": {"test": [1.0, 0.5], "shifted": [0.25]}})
    rows = rows_of(judge, judgement, "after")
    assert [(r["split"], r["after"]["answer"], r["after"]["exact"], r["after"]["scores"]["f1"]) for r in rows] == [
        ("test", "A", True, 1.0),
        ("test", "b", False, 0.5),
        ("shifted", "c", False, 0.25),
    ]
    assert all((r["asked"], r["expected"]) == ([{"role": "user", "content": "Q"}], "A") for r in rows)


def test_rows_of_before_and_after_are_joined_if_they_are_of_the_same():
    both = [row(False, True), row(True, True, split="shifted")]
    before, after = before_only(both), [{k: v for k, v in r.items() if k != "before"} for r in both]
    assert all("after" not in r and "before" in r for r in before)
    assert joined(before, after) == both
    for other in ([], before[:1], before[::-1], [{**r, "expected": "else"} for r in before]):
        assert joined(other, after) == after
