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


def runs_of(scores: dict[str, dict[int, float]]) -> list[dict]:
    """Runs like those of the record, with a score each."""
    return [
        {"method": method, "seed": seed, "score": score}
        for method, by_seed in scores.items()
        for seed, score in by_seed.items()
    ]


# Luck of the seed is large, the difference small; one seed has no partner; the orders of the seeds differ.
SCORES = [
    {
        "lora-bf16": {0: 90.0, 1: 96.0, 2: 93.0, 3: 98.5, 4: 91.0},
        "nf4": {3: 96.0, 0: 88.5, 4: 90.5, 2: 92.0, 1: 93.0},
        "fp4": {0: 70.0, 1: 71.0},
    },
    {
        "nf4": {5: 71.0, 1: 60.5, 7: 66.0, 2: 81.0, 9: 40.0},
        "lora-bf16": {7: 69.0, 2: 80.0, 4: 99.0, 1: 64.5, 5: 71.5},
    },
]


@exercise("11.1", "a paired interval", item="accuracy", points=2, todo="complete `paired_difference`")
def check_paired_difference(paired_difference: Callable[[list[dict], str, Callable], tuple[float, float]]) -> Verdict:
    """paired_difference(runs, method, score): mean of score(run) less lora-bf16's at the same seed, and half the width
    of its 95 % t interval.
    """
    from qlora_lab.evaluation.intervals import t_quantile

    for scores in SCORES:
        mine, base = scores["nf4"], scores["lora-bf16"]
        pairs = [mine[seed] - base[seed] for seed in mine if seed in base]
        count, mean, spread = len(pairs), statistics.fmean(pairs), statistics.stdev(pairs)
        half = t_quantile(count - 1) * spread / math.sqrt(count)
        came = call(paired_difference, runs_of(scores), "nf4", lambda run: run["score"])
        if not isinstance(came, (tuple, list)) or len(came) != 2:
            return wrong(f"paired_difference gives {described(came)}, expected the pair mean, half.")
        name = "The mean of paired_difference, on a small made-up record,"
        expect = [
            (-mean, "The sign: a method that does worse than lora-bf16 has a negative difference."),
            (statistics.fmean(mine.values()), "That is the method's own mean: subtract lora-bf16's."),
            (
                statistics.fmean(mine.values()) - statistics.fmean(base.values()),
                "A seed without a partner slipped in: only seeds that both methods have make a pair.",
            ),
            (mean - half, "That is the interval's lower end: return its middle and half its width."),
            (mean / 100, "The scores are points already: do not divide by 100."),
            (
                100 * (mean / statistics.fmean(base.values())),
                "That is per cent of lora-bf16's score: points are asked for.",
            ),
            (statistics.median(pairs), "That is the median of the differences."),
        ]
        expect_number(name, came[0], mean, expect, tolerance=1e-3)
        by_place = [a - b for a, b in zip(mine.values(), base.values(), strict=True)]
        a, b = (statistics.variance(values.values()) for values in (mine, base))
        apart = math.sqrt(a / len(mine) + b / len(base))
        root, t = math.sqrt(count), t_quantile(count - 1)
        unpaired = "You treated the two methods as strangers: take the difference at each seed, then its spread."
        mistakes = [
            (t * statistics.stdev(by_place) / math.sqrt(len(by_place)), "You paired by place: pair by `seed`."),
            (1.96 * spread / root, f"1.96 is for hundreds of seeds: with {count} take t_quantile({count - 1})."),
            (2 * spread / root, f"2 is for dozens of seeds: with {count} take t_quantile({count - 1})."),
            (t_quantile(count) * spread / root, "The degrees of freedom are n - 1: the mean has used up one."),
            (t * statistics.pstdev(pairs) / root, "The spread of a sample divides by n - 1: `statistics.stdev`."),
            (t * spread, "That is the spread of single differences: the mean's is √n times smaller."),
            (t * spread / count, "You divided by n: the mean's spread is √n times smaller."),
            (t * spread / math.sqrt(count - 1), "Divide by √n; stdev has taken care of the n - 1."),
            (t * spread**2 / root, "That is the variance: take its square root."),
            (2 * half, "That is the whole width: return half of it."),
            (spread / root, "That is one standard error: how many of them hold 95 %? See `t_quantile`."),
            (mean + half, "That is the interval's upper end: return half its width."),
            (t * apart, unpaired),
            (t_quantile(len(mine) + len(base) - 2) * apart, unpaired),
            (t_quantile(2 * count - 2) * apart, unpaired),
            (1.96 * apart, unpaired),
        ]
        expect_number(name.replace("mean", "half width"), came[1], half, mistakes, tolerance=1e-3)
    return right("On the H100's record: -2.19 ± 1.77 points for NF4.")


@exercise("11.2", "what the data say", item="accuracy", points=3, todo="judge each of the claims")
def check_claims(verdict: dict[str, str]) -> Verdict:
    """verdict: for each of CLAIMS, a key of VERDICTS."""
    expect_diagnosis(verdict, TRUTH, VERDICTS, CLUES)
    return right("Two shown, one refuted, three open: honest tables have open ones.")


@exercise("11.3", "your own test set", item="accuracy", points=2, todo="complete `known_to`, describe your test set")
def check_my_share(known_to: Callable[[int, int], float], mine: dict[str, int] | None = None) -> Verdict:
    """known_to(right, asked): half the width, in points, of the 95 % interval of a share of right answers.

    mine: the learner's own numbers: "asked", "right" of these, and the "groups" that they come from.
    """
    for correct, asked in [(190, 200), (60, 120), (380, 500)]:
        spread = 100 * math.sqrt(correct * (asked - correct)) / asked
        half = factor(asked) * spread / math.sqrt(asked - 1)
        mistakes = [
            (half / 100, "That is a share: points are asked for, so multiply by 100."),
            (2 * half, "That is the whole width: return half of it."),
            (spread, "That is the spread of single answers: the mean's is √n times smaller."),
            (factor(asked) * spread, "That is the spread of single answers: the mean's is √n times smaller."),
            (spread / math.sqrt(asked), "That is one standard error: how many of them hold 95 %? See `t_quantile`."),
            (factor(asked) * spread / asked, "You divided by n: the mean's spread is √n times smaller."),
            (100 * correct / asked, "That is the share itself: how far off may it be?"),
        ]
        came = call(known_to, correct, asked)
        expect_number(f"known_to({correct}, {asked})", came, half, mistakes, tolerance=0.02)
    if mine is None or is_stub(mine):
        raise NotImplementedError
    return judge_test_set(mine)


def factor(count: int) -> float:
    """How many standard errors enclose 95 %, for a mean of so many values."""
    from qlora_lab.evaluation.intervals import t_quantile

    return t_quantile(count - 1)


def judge_test_set(mine: dict[str, int]) -> Verdict:
    """How well the learner's own share is known, if answers are the luck, and if whole groups are."""
    if not isinstance(mine, dict) or not all(type(mine.get(key)) is int for key in ("asked", "right", "groups")):
        return wrong(f'mine is {described(mine)}, expected a dict of three whole numbers: "asked", "right", "groups".')
    asked, correct, groups = (mine[key] for key in ("asked", "right", "groups"))
    if not 0 <= correct <= asked:
        return wrong(f"mine has {correct} right answers of {asked} asked: expected a number from 0 to {asked}.")
    if not 2 <= groups <= asked:
        return wrong(f"mine has {groups} groups of {asked} answers: expected at least 2, and no more than answers.")
    share = correct / asked
    if correct in (0, asked):
        return right(
            f"{share:.0%} of {asked}: the spread is 0, so this formula has nothing to say. By the rule of three, about "
            f"3 in {asked} may still go the other way; if whole groups do, 3 in {groups}."
        )
    alone, together = (100 * factor(n) * math.sqrt(share * (1 - share) / (n - 1)) for n in (asked, groups))
    return right(
        f"Your {correct} of {asked} are {share:.0%}, ± {alone:.0f} points if each answer has luck of its own. If your "
        f"{groups} groups stand or fall as a whole, it is ± {together:.0f}."
    )


VERDICTS = {
    "shown": "the interval lies on the claim's side",
    "refuted": "the interval lies on the other side",
    "open": "the interval has both, or the data say nothing of it",
}
CLAIMS = {
    "A": "On these 200 orders, NF4 costs exact answers.",
    "B": "On these 200 orders, NF4 costs less than 2 points.",
    "C": "On these 200 orders, INT4 costs less than 3 points.",
    "D": "On orders to other cities, too, NF4 costs exact answers.",
    "E": "Double quantization, on top of NF4, costs exact answers on these 200 orders.",
    "F": "On prose, NF4 ends no better than FP4.",
}
TRUTH = dict.fromkeys("AC", "shown") | {"F": "refuted"} | dict.fromkeys("BDE", "open")
TRUTH = {name: TRUTH[name] for name in CLAIMS}
CLUES = {
    ("A", "open"): "Over seeds, the whole interval, from -3.96 to -0.41 points, lies below 0.",
    ("A", "refuted"): "A negative difference is a loss.",
    ("B", "refuted"): "The mean is -2.19, but the interval reaches up to -0.41: a loss of 1 point would fit as well.",
    ("B", "shown"): "The interval reaches down to -3.96: a loss of 3 points would fit as well.",
    ("C", "open"): "The interval's lower end is -2.62: where is -3?",
    ("C", "refuted"): "The interval's lower end is -2.62: where is -3?",
    ("D", "shown"): "An interval over seeds holds the 200 orders fixed. What does the one over cities say?",
    ("D", "refuted"): "Over cities, losses and gains are both inside.",
    ("E", "shown"): "Compare nf4-double with nf4, not with lora-bf16: -0.31 ± 0.63 has both signs.",
    ("E", "refuted"): "-0.31 ± 0.63 has both signs. Not seen is not the same as not there.",
    ("F", "shown"): "These are losses: lower is better.",
    ("F", "open"): "Two intervals against lora-bf16 may overlap; compare nf4 with fp4, seed by seed.",
}
