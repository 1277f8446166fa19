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


@exercise("11.2", "how many seeds", item="accuracy", points=2, todo="complete `seeds_needed`")
def check_seeds_needed(seeds_needed: Callable[[float, float], int]) -> Verdict:
    """seeds_needed(spread, margin): the smallest n >= 2 whose 95 % t interval is within ± margin."""
    from qlora_lab.evaluation.intervals import t_quantile

    def smallest(half: Callable[[int], float], margin: float) -> int:
        return next(n for n in range(2, 5000) if half(n) <= margin)

    for spread, margin in [(2.0, 1.0), (2.0, 0.5), (1.0, 4.0), (1.0, 20.0)]:
        expected = smallest(lambda n, s=spread: t_quantile(n - 1) * s / math.sqrt(n), margin)
        z = (1.96 * spread / margin) ** 2
        mistakes = [
            (
                math.ceil(z),
                "That is (1.96 · spread / margin)²: with few seeds 1.96 is too small, take t_quantile(n - 1).",
            ),
            (z, "That is (1.96 · spread / margin)²: take t_quantile(n - 1), and try n = 2, 3, ... in turn."),
            (
                smallest(lambda n, s=spread: t_quantile(n) * s / math.sqrt(n), margin),
                "The degrees of freedom are n - 1.",
            ),
            (
                smallest(lambda n, s=spread: 2 * t_quantile(n - 1) * s / math.sqrt(n), margin),
                "You compared the whole width with the margin: half of it counts.",
            ),
            (
                smallest(lambda n, s=spread: t_quantile(n - 1) * s / n, margin),
                "You divided by n: the mean's spread is √n times smaller.",
            ),
            (math.ceil((spread / margin) ** 2), "That holds one standard error: 95 % takes more."),
            (expected - 1, "One too few: the half width is still above the margin."),
            (expected + 1, "One too many: one seed less is enough. (Did you divide by √(n - 1)? By √n.)"),
            (1, "One difference has no spread: at least 2 are needed."),
        ]
        came = call(seeds_needed, spread, margin)
        expect_number(f"seeds_needed({spread:g}, {margin:g})", came, expected, mistakes)
    return right("Half the margin costs four times the seeds, nearly.")


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
    "G": "On the held-out orders (validation), INT4 ends with a lower loss than NF4.",
    "H": "On prose, FP4 costs less than 0.1 nats.",
}
TRUTH = dict.fromkeys("ACG", "shown") | dict.fromkeys("FH", "refuted") | dict.fromkeys("BDE", "open")
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
    ("G", "open"): "Two intervals against lora-bf16 may overlap; compare int4 with nf4, seed by seed.",
    ("G", "refuted"): "These are losses: lower is better.",
    ("H", "shown"): "The interval is +0.258 ± 0.046: on which side of 0.1?",
    ("H", "open"): "The interval is +0.258 ± 0.046: on which side of 0.1?",
}


@exercise("11.3", "what the data say", item="accuracy", points=3, todo="judge each of the claims")
def check_claims(verdict: dict[str, str]) -> Verdict:
    """verdict: for each of CLAIMS, a key of VERDICTS."""
    expect_diagnosis(verdict, TRUTH, VERDICTS, CLUES)
    return right("Three shown, two refuted, three open: honest tables have open ones.")
