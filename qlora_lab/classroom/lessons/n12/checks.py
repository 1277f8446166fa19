"""Exercises of 12_ship_it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_lab.classroom.judging import Mistake, Verdict, call, described, exercise, expect_number, right, wrong

if TYPE_CHECKING:
    from qlora_lab.training.chat import TokenizedSample

BITS = {  # of a weight in the linear layers, and of one in the vocabulary's tables
    "f16": (16.0, 16.0),
    "q8_0": (8.5, 8.5),
    "q4_0": (4.5, 8.5),
}


def size(linear: int, vocabulary: int, bits: tuple[float, float]) -> float:
    return (linear * bits[0] + vocabulary * bits[1]) / 8


@exercise("12.1", "how large the file will be", item="memory", points=2, todo="complete `file_bytes`")
def check_file_bytes(file_bytes: Callable[[int, int, str], float]) -> Verdict:
    """file_bytes(linear, vocabulary, kind): bytes of the weights in a GGUF file."""
    for linear, vocabulary in [(106_168_320, 28_311_552), (6_476_005_376, 262_144_000)]:
        for kind, bits in BITS.items():
            whole = {"f16": 16.0, "q8_0": 8.0, "q4_0": 4.0}[kind]
            mistakes = [
                (8 * size(linear, vocabulary, bits), "Those are bits: eight make a byte."),
                (size(linear, vocabulary, (bits[0], bits[0])), "Q4_0 holds the vocabulary in Q8_0."),
                (size(linear, vocabulary, (whole, max(whole, 8.0))), "Each block has a scale, too."),
                (size(linear, vocabulary, (whole + 1, 9.0)), "The scale has 16 bits, not 32."),
                (size(linear, 0, bits), "You left the vocabulary out."),
            ]
            came = call(file_bytes, linear, vocabulary, kind)
            expect_number(
                f"file_bytes({linear}, {vocabulary}, {kind!r})", came, size(linear, vocabulary, bits), mistakes
            )
    return right("Half a bit a weight goes to the scales.")


END, BLANK = 2, 10
SAMPLES = [  # ids, and how many of them are not learned
    [
        *[((5, 6, 7, END), 2), ((5, 6, 8, 9, END), 2), ((7, 6, 3), 1)],  # 3 is another end token
        *[((5, 6, END, BLANK), 1), ((6, END, BLANK, 11), 1), ((7, END, 11, 11), 1)],  # 11 is another blank
        *[((5, 6, END), 3), ((7, END), 2), ((9, 6, END), 3), ((4, 7, END), 3)],  # these learn nothing
        *[((5, END, 6), 1), ((7, END, 8, 9), 1)],
        *[((5, 6, 7), 1), ((5, 8, BLANK), 1), ((9, 8, 5), 2)],
    ],
    [((5, 6, END), 1), ((5, 6, 7), 1)],
]


@exercise("12.2", "is the end taught", item="train", points=2, todo="complete `ends_taught`")
def check_ends_taught(
    ends_taught: Callable[[Sequence[TokenizedSample], Sequence[int], Sequence[int]], float],
) -> Verdict:
    """ends_taught(samples, end_ids, blank_ids): share of samples whose last learned token, blanks aside, is an end."""
    from qlora_lab.training.chat import TokenizedSample

    ends, blanks = [END, 3], [BLANK, 11]
    for given in SAMPLES:
        samples = [TokenizedSample(ids, length) for ids, length in given]
        learned = [[label for label in sample.labels if label != -100] for sample in samples]
        without = [[label for label in labels if label not in blanks] for labels in learned]
        taught = sum(bool(labels) and labels[-1] in ends for labels in without)
        with_blanks = sum(bool(labels) and labels[-1] in ends for labels in learned)
        anywhere = sum(any(end in labels for end in ends) for labels in learned)
        by_ids = sum(sample.ids[-1] in ends for sample in samples)
        by_other_ids = sum(next(id for id in reversed(sample.ids) if id not in blanks) in ends for sample in samples)
        first = sum(bool(labels) and labels[-1] == END for labels in without)
        some = max(1, sum(map(bool, learned)))
        mistakes = [
            (taught, "That is a number of samples: divide by how many there are."),
            (100 * taught / len(samples), "That is in per cent: return a share between 0 and 1."),
            (1 - taught / len(samples), "That is the share that does not teach it."),
            (with_blanks / len(samples), "Blanks behind the end token do no harm: leave all of `blank_ids` out."),
            (first / len(samples), "There may be several end tokens: look at all of `end_ids`."),
            *[
                (count / len(samples), "An end token that is read but not learned teaches nothing: look at `labels`.")
                for count in (by_ids, by_other_ids)
            ],
            (anywhere / len(samples), "An end token in the middle does not count: look at the last learned one."),
            (taught / some, "A sample in which nothing is learned counts as one that does not teach the end."),
        ]
        expect_number(
            f"ends_taught({given}, {ends}, {blanks})",
            call(ends_taught, samples, ends, blanks),
            taught / len(samples),
            mistakes,
        )
    return right("Anything below 1 is worth a look before you train.")


SUSPECTS = {  # of the French riddle, and what clears them; the inputs are the culprit
    "template": "Clue 1: could another prompt have the very same text?",
    "tokens": "Clue 1: the prompt has the very same tokens in the file and in PyTorch.",
    "weights": "Clue 2 rounds the weights, and nothing else: is its answer ever French?",
    "inputs": "",
}
STATES = ("whole", "broken")


@exercise("12.3", "the French riddle", item="quantization", points=3, todo="name culprit and state in `riddle`")
def check_riddle(riddle: dict[str, str]) -> Verdict:
    """riddle: under "culprit" one of SUSPECTS, under "file" one of STATES."""
    for key, known in (("culprit", tuple(SUSPECTS)), ("file", STATES)):
        named = riddle.get(key) if isinstance(riddle, dict) else None
        if named not in known:
            raise Mistake(
                f"riddle is {described(riddle)}, expected a dict with {key!r}: one of {', '.join(map(repr, known))}."
            )
    if why := SUSPECTS[riddle["culprit"]]:
        return wrong(f"It was not: {riddle['culprit']}. {why}")
    if riddle["file"] == "broken":
        return wrong(
            "Yes, the inputs. But they are rounded while llama.cpp computes, and no clue accuses what the file holds: "
            "template, vocabulary and weights."
        )
    return right(
        "The rounded inputs let a tie fall either way, so the same file may answer in English on another computer. One "
        "answer proves nothing about a file: that is why `--check` compares many."
    )
