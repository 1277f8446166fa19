"""Answers to the exercises of dive_c_small_differences: right ones, found by another way, and likely mistakes."""

import itertools
import math
import statistics

import numpy

from qlora_lab.classroom.checks import (
    check_by_hand,
    check_coin,
    check_finds_something,
    check_my_pilot,
    check_paired_difference,
    check_seeds_for_margin,
)
from qlora_lab.evaluation.intervals import t_quantile


def by_seed(runs, method, score):
    return {run["seed"]: score(run) for run in runs if run["method"] == method}


def pairs_of(runs, method, score):
    return [
        score(a) - score(b)
        for a in runs
        for b in runs
        if (a["method"], b["method"], a["seed"]) == (method, "lora-bf16", b["seed"])
    ]


def half_of(d, freedom=0):
    return t_quantile(len(d) - 1 + freedom) * statistics.stdev(d) / math.sqrt(len(d))


def with_numpy(runs, method, score):
    d = numpy.array(pairs_of(runs, method, score))
    return d.mean(), t_quantile(d.size - 1) * d.std(ddof=1) / d.size**0.5


def by_hand(runs, method, score):
    """The table of t, and the sum of squares."""
    d = pairs_of(runs, method, score)
    mean = sum(d) / len(d)
    squares = sum((x - mean) ** 2 for x in d)
    return [mean, {3: 3.18245, 4: 2.77645}[len(d) - 1] * math.sqrt(squares / len(d) / (len(d) - 1))]


def mistaken(half=half_of, mean=statistics.fmean):
    """An answer that pairs rightly, with its own mean and half width."""

    def answer(runs, method, score):
        d = pairs_of(runs, method, score)
        return mean(d), half(d)

    return answer


def values_of(runs, method, score):
    return list(by_seed(runs, method, score).values())


def by_place(runs, method, score):
    d = [a - b for a, b in zip(values_of(runs, method, score), values_of(runs, "lora-bf16", score), strict=True)]
    return statistics.fmean(d), half_of(d)


def unpaired(runs, method, score):
    a, b = values_of(runs, method, score), values_of(runs, "lora-bf16", score)
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    return statistics.fmean(a) - statistics.fmean(b), t_quantile(len(a) + len(b) - 2) * error


def own_mean(runs, method, score):
    return statistics.fmean(values_of(runs, method, score)), half_of(pairs_of(runs, method, score))


def all_seeds(runs, method, score):
    a, b = values_of(runs, method, score), values_of(runs, "lora-bf16", score)
    return statistics.fmean(a) - statistics.fmean(b), half_of(pairs_of(runs, method, score))


def per_cent(runs, method, score):
    d, base = pairs_of(runs, method, score), values_of(runs, "lora-bf16", score)
    return 100 * statistics.fmean(d) / statistics.fmean(base), half_of(d)


def both_ends(runs, method, score):
    d = pairs_of(runs, method, score)
    return statistics.fmean(d) - half_of(d), statistics.fmean(d) + half_of(d)


def ends(half):
    return 3 - half, 3 + half


def outside(differences, factor=None):
    d = numpy.array(differences)
    return abs(d.mean()) > (factor or t_quantile(d.size - 1)) * d.std(ddof=1) / d.size**0.5


def every_look(differences):
    return any(outside(differences[:count]) for count in range(2, len(differences) + 1))


def doubling(spread, margin):
    """By halving the bracket instead of counting up."""
    low, high = 1, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        fits = t_quantile(middle - 1) * spread <= margin * middle**0.5
        low, high = (low, middle) if fits else (middle, high)
    return high


def first(half):
    """seeds_for_margin with another half width, half(n, spread)."""
    return lambda spread, margin: next(n for n in itertools.count(2) if half(n, spread) <= margin)


def by_lists(lost, gained):
    """By going through all ways in which the coins can fall."""
    n, gap = lost + gained, abs(lost - gained)
    ways = [abs(n - 2 * sum(fallen)) >= gap for fallen in itertools.product((0, 1), repeat=n)]
    return sum(ways) / len(ways)


def tail(n, few):
    return sum(math.comb(n, k) for k in range(few + 1)) / 2**n


RIGHT = [
    (check_by_hand, (ends(4.30265 * math.sqrt(7 / 3)),)),
    (check_paired_difference, (with_numpy,)),
    (check_paired_difference, (by_hand,)),
    (check_finds_something, (every_look,)),
    (check_seeds_for_margin, (doubling,)),
    (check_seeds_for_margin, (first(lambda n, s: t_quantile(n - 1) * s / n**0.5),)),
    (check_my_pilot, ({"differences": [-1.0, 2.0, 3.0], "minutes": 4},)),
    (check_my_pilot, ({"differences": [2.0, 2.1, 2.2], "minutes": 0.5},)),
    (check_my_pilot, ({"differences": [-1, 1], "minutes": 30},)),
    (check_coin, (by_lists,)),
]

WRONG = [
    (check_by_hand, list(ends(4.30265 * math.sqrt(7))), "left out √3"),
    (check_by_hand, list(ends(math.sqrt(7 / 3))), "one standard error"),
    (check_by_hand, list(ends(1.96 * math.sqrt(7 / 3))), "1.96 is for hundreds"),
    (check_by_hand, list(ends(4.30265 * math.sqrt(14 / 9))), "divide by n - 1"),
    (check_by_hand, list(ends(4.30265 * 7 / math.sqrt(3))), "forgot the root"),
    (check_by_hand, list(ends(4.30265 * math.sqrt(7 / 3)))[::-1], "the lower one first"),
    (check_by_hand, 3.0, "expected two numbers"),
    (check_paired_difference, by_place, "pair by `seed`"),
    (check_paired_difference, unpaired, "as strangers"),
    (check_paired_difference, own_mean, "subtract lora-bf16's"),
    (
        check_paired_difference,
        lambda runs, m, s: all_seeds(runs, m, s) if any(r["seed"] == 9 for r in runs) else with_numpy(runs, m, s),
        "A seed without a partner",
    ),
    (check_paired_difference, per_cent, "points are asked"),
    (check_paired_difference, both_ends, "the interval's lower end"),
    (check_paired_difference, mistaken(mean=lambda d: -statistics.fmean(d)), "The sign"),
    (check_paired_difference, mistaken(mean=lambda d: statistics.fmean(d) / 100), "do not divide by 100"),
    (check_paired_difference, mistaken(mean=statistics.median), "the median"),
    (check_paired_difference, mistaken(lambda d: 1.96 * statistics.stdev(d) / len(d) ** 0.5), "1.96 is for hundreds"),
    (check_paired_difference, mistaken(lambda d: 2 * statistics.stdev(d) / len(d) ** 0.5), "2 is for dozens"),
    (check_paired_difference, mistaken(lambda d: half_of(d, freedom=1)), "The degrees of freedom are n - 1"),
    (
        check_paired_difference,
        mistaken(lambda d: t_quantile(len(d) - 1) * statistics.pstdev(d) / len(d) ** 0.5),
        "divides by n - 1",
    ),
    (check_paired_difference, mistaken(lambda d: t_quantile(len(d) - 1) * statistics.stdev(d)), "√n times smaller"),
    (check_paired_difference, mistaken(lambda d: half_of(d) / len(d) ** 0.5), "You divided by n:"),
    (check_paired_difference, mistaken(lambda d: 2 * half_of(d)), "the whole width"),
    (check_paired_difference, mistaken(lambda d: half_of(d) * statistics.stdev(d)), "the variance"),
    (check_paired_difference, mistaken(lambda d: statistics.stdev(d) / len(d) ** 0.5), "one standard error"),
    (check_paired_difference, lambda runs, m, s: pairs_of(runs, m, s), "expected the pair mean, half"),
    (check_finds_something, outside, "You looked once"),
    (
        check_finds_something,
        lambda d: any(outside(d[:n]) and sum(d[:n]) > 0 for n in range(2, len(d) + 1)),
        "A difference below 0",
    ),
    (check_finds_something, lambda d: every_look(d[:-1]), "The last look"),
    (check_finds_something, lambda d: any(outside(d[:n]) for n in range(3, len(d) + 1)), "at two differences"),
    (check_finds_something, lambda d: any(outside(d[:n], 1.96) for n in range(2, len(d) + 1)), "1.96 is for hundreds"),
    (check_finds_something, lambda d: not every_look(d), "the other way round"),
    (check_finds_something, lambda d: len(d), "expected True or False"),
    (check_seeds_for_margin, lambda s, m: math.ceil((1.96 * s / m) ** 2), "1.96 is too small"),
    (check_seeds_for_margin, lambda s, m: (1.96 * s / m) ** 2, "in turn"),
    (check_seeds_for_margin, first(lambda n, s: t_quantile(n) * s / n**0.5), "The degrees of freedom are n - 1"),
    (check_seeds_for_margin, first(lambda n, s: 2 * t_quantile(n - 1) * s / n**0.5), "the whole width"),
    (check_seeds_for_margin, first(lambda n, s: t_quantile(n - 1) * s / n), "You divided by n:"),
    (check_seeds_for_margin, lambda s, m: doubling(s, m) - 1, "One too few"),
    (check_seeds_for_margin, lambda s, m: doubling(s, m) + 1, "One too many"),
    (check_seeds_for_margin, lambda s, m: math.ceil((s / m) ** 2), "one standard error"),
    (check_my_pilot, [1.0, 2.0], 'a dict with "differences"'),
    (check_my_pilot, {"differences": [1.0], "minutes": 4}, "at least two numbers"),
    (check_my_pilot, {"differences": [1.0, 2.0], "minutes": 0}, "a number above 0"),
    (check_my_pilot, {"differences": [1.0, 1.0], "minutes": 4}, "no spread"),
    (check_coin, lambda a, b: tail(a + b, min(a, b)), "That is one side"),
    (check_coin, lambda a, b: math.comb(a + b, a) / 2 ** (a + b), "on one side: add"),
    (check_coin, lambda a, b: 2 * math.comb(a + b, a) / 2 ** (a + b), "exactly this outcome: add"),
    (check_coin, lambda a, b: 2 * tail(a + b, min(a, b) - 1), "this very outcome counts"),
    (check_coin, lambda a, b: 2 * tail(a + b, min(a, b)), "at most 1"),
    (check_coin, lambda a, b: min(1.0, 2 * tail(a + b, b)), "Take the rarer"),
    (check_coin, lambda a, b: 1 - min(1.0, 2 * tail(a + b, min(a, b))), "less* uneven"),
]
