"""Exercises of 11_accuracy_comparison."""

import math
import statistics
from collections.abc import Callable

from qlora_lab.classroom.judging import (
    Verdict,
    call,
    described,
    exercise,
    expect_diagnosis,
    expect_number,
    is_stub,
    right,
    wrong,
)

VERDICTS = {
    "shown": "the interval lies on the claim's side",
    "refuted": "the interval lies on the other side",
    "open": "the interval has both",
}
CLAIMS = {
    "A": "On these 200 orders, INT4 gets more right than NF4.",
    "B": "On these 200 orders, INT4 costs less than 3 points against bf16.",
    "C": "On orders to other cities, too, FP4 costs exact answers against bf16.",
    "D": "On these 200 orders, double quantization costs exact answers, on top of NF4.",
    "E": "On prose, NF4 ends with a lower loss than FP4.",
    "F": "On prose, FP4 costs less than 0.1 nats against bf16.",
}
TRUTH = {"A": "open", "B": "shown", "C": "shown", "D": "open", "E": "shown", "F": "refuted"}
CLUES = {
    ("A", "shown"): "Compare int4 with nf4, seed by seed: +0.44 ± 1.62 has both signs.",
    ("A", "refuted"): "Compare int4 with nf4, seed by seed: +0.44 ± 1.62 has both signs.",
    ("B", "open"): "The interval's lower end is -2.62: where is -3?",
    ("B", "refuted"): "The interval's lower end is -2.62: where is -3?",
    ("C", "open"): "That was NF4. For FP4 take by_group(changes(...), city), and then the interval.",
    ("C", "refuted"): "A negative difference is a loss.",
    ("D", "shown"): "Compare nf4-double with nf4, not with lora-bf16: -0.31 ± 0.63 has both signs.",
    ("D", "refuted"): "-0.31 ± 0.63 has both signs. Not seen is not the same as not there.",
    ("E", "open"): "Two intervals against lora-bf16 may overlap: compare nf4 with fp4, seed by seed.",
    ("E", "refuted"): "These are losses: lower is better.",
    ("F", "shown"): "The interval is +0.258 ± 0.046: on which side of 0.1?",
    ("F", "open"): "The interval is +0.258 ± 0.046: on which side of 0.1?",
}


@exercise("11.1", "what the data say", item="accuracy", points=3, todo="judge each of the claims")
def check_claims(verdict: dict[str, str]) -> Verdict:
    """verdict: for each of CLAIMS, a key of VERDICTS."""
    expect_diagnosis(verdict, TRUTH, VERDICTS, CLUES)
    return right("Three shown, one refuted, two open: honest tables have open ones.")


# Two adapters' answers to the same samples, and the samples' groups, which are of unequal size.
ANSWERS = [
    ([1, 0, 0, 0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0, 0, 1, 1], list("aaaabbccd")),
    ([1, 1, 1, 0, 1, 0, 1, 1], [0, 0, 1, 0, 1, 1, 1, 0], [7, 7, 8, 8, 9, 3, 3, 7]),
]


@exercise("11.2", "your own comparison", item="accuracy", points=2, todo="complete `compare_answers`, fill in `mine`")
def check_my_comparison(compare_answers: Callable[..., tuple[float, float]], mine: dict | None = None) -> Verdict:
    """compare_answers(first, second, groups): second less first in points, and half the width of its 95 % interval.

    mine: the learner's own "first" and "second" answers (1 right, 0 wrong), and the "groups" that they fall into.
    """
    from qlora_lab.evaluation.intervals import by_group, paired_interval

    for first, second, groups in ANSWERS:
        each = [100.0 * (b - a) for a, b in zip(first, second, strict=True)]
        mean, half = paired_interval(by_group(each, groups))
        came = call(compare_answers, list(first), list(second), list(groups))
        if not isinstance(came, (tuple, list)) or len(came) != 2:
            return wrong(f"compare_answers gives {described(came)}, expected the pair mean, half.")
        by_name = {group: [x for x, g in zip(each, groups, strict=True) if g == group] for group in groups}
        mistakes = [
            (-mean, "The sign: second less first."),
            (mean / 100, "That is a share: points are asked for, so multiply by 100."),
            (statistics.fmean(map(statistics.fmean, by_name.values())), "A small group counts as much as a large one."),
            (statistics.fmean(map(sum, by_name.values())), "Those are sums of groups: `by_group` keeps the mean."),
        ]
        expect_number("The mean of compare_answers, on made-up answers,", came[0], mean, mistakes, tolerance=1e-3)
        alone = paired_interval(each)[1]
        mistakes = [
            (alone, "You took each answer for a coin of its own: use `by_group` first."),
            (half / 100, "That is a share: points are asked for, so multiply by 100."),
            (2 * half, "That is the whole width: return half of it."),
        ]
        expect_number("The half width of compare_answers", came[1], half, mistakes, tolerance=1e-3)
    if mine is None or is_stub(mine):
        raise NotImplementedError
    return judge_comparison(mine)


def judge_comparison(mine: dict) -> Verdict:
    """What the learner's own comparison says, by groups and by single answers."""
    from qlora_lab.evaluation.intervals import by_group, paired_interval

    keys = ("first", "second", "groups")
    if not isinstance(mine, dict) or not all(isinstance(mine.get(key), (list, tuple)) for key in keys):
        return wrong(f'mine is {described(mine)}, expected a dict of three lists: "first", "second", "groups".')
    first, second, groups = (list(mine[key]) for key in keys)
    if not len(first) == len(second) == len(groups):
        return wrong(f"mine has lists of {len(first)}, {len(second)} and {len(groups)}: expected one entry a sample.")
    if any(value not in (0, 1) for value in first + second):
        return wrong("mine has an answer that is neither 1, right, nor 0, wrong.")
    if len(set(groups)) < 2:
        return wrong(f"mine has {len(set(groups))} group(s): expected at least 2.")
    each = [100.0 * (b - a) for a, b in zip(first, second, strict=True)]
    (mean, half), (_, alone) = paired_interval(by_group(each, groups)), paired_interval(each)
    if math.isclose(half, 0, abs_tol=1e-9):
        return right(
            f"{mean:+.0f} points, ± 0: all your groups changed alike, so they show no spread. Do not believe the 0: "
            f"by the rule of three, up to about 3 in {len(set(groups))} groups may be of another kind."
        )
    verdict = "a difference is shown" if abs(mean) > half else "open"
    return right(
        f"{mean:+.0f} ± {half:.0f} points if your {len(set(groups))} groups are the luck: {verdict}. Taken as single "
        f"answers it would be ± {alone:.0f}."
    )
