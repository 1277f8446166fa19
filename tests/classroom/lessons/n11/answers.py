"""Answers to the exercises of 11_accuracy_comparison: right ones, found by another way, and likely mistakes."""

import json
import math
import statistics
from pathlib import Path

import numpy

import qlora_lab
from qlora_lab.classroom.checks import check_claims, check_my_share, check_paired_difference
from qlora_lab.evaluation.intervals import t_quantile
from qlora_lab.experiments.accuracy import METHODS


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


def ends(runs, method, score):
    d = pairs_of(runs, method, score)
    return statistics.fmean(d) - half_of(d), statistics.fmean(d) + half_of(d)


def with_t(right, asked):
    """By the formula: n - 1 twice, for t and for the spread."""
    share = right / asked
    return 100 * t_quantile(asked - 1) * math.sqrt(share * (1 - share) / (asked - 1))


def with_z(right, asked):
    """The formula of textbooks, which is close enough with hundreds of answers."""
    return 196 * math.sqrt(right * (asked - right) / asked**3)


MINE = {"asked": 40, "right": 31, "groups": 12}


# The claims, judged from the record itself: the interval of what the claim says is above 0.
RUNS = json.loads(
    (Path(qlora_lab.__file__).parents[1] / "data/records/accuracy-nvidia-h100-80gb-hbm3.json").read_text("utf-8")
)["runs"]
ORDERS = Path(qlora_lab.__file__).parents[1] / "data/orders/test.jsonl"
CITY = [json.loads(json.loads(line)["response"])["city"] for line in ORDERS.read_text("utf-8").splitlines()]
SCORES = {
    "test": lambda run: 100 * run["exact"]["test"].count("1") / 200,
    "validation": lambda run: run["after"]["validation"],
    "prose": lambda run: run["after"]["prose"],
}


def less(method, base, score, sign=1, plus=0.0):
    a, b = (by_seed(RUNS, m, SCORES[score]) for m in (method, base))
    return [sign * (a[seed] - b[seed]) + plus for seed in a]


def by_city():
    bits = {(run["method"], run["seed"]): run["exact"]["test"] for run in RUNS}
    lost = dict.fromkeys(CITY, 0.0)
    for seed in range(8):
        for city, a, b in zip(CITY, bits["lora-bf16", seed], bits["nf4", seed], strict=True):
            lost[city] += int(a) - int(b)
    return list(lost.values())


def judged(above_0):
    mean, half = statistics.fmean(above_0), half_of(above_0)
    return "shown" if mean > half else "refuted" if mean < -half else "open"


assert set(METHODS) == {run["method"] for run in RUNS}
JUDGED = {
    "A": judged(less("nf4", "lora-bf16", "test", sign=-1)),
    "B": judged(less("nf4", "lora-bf16", "test", plus=2)),
    "C": judged(less("int4", "lora-bf16", "test", plus=3)),
    "D": judged(by_city()),
    "E": judged(less("nf4-double", "nf4", "test", sign=-1)),
    "F": judged(less("nf4", "fp4", "prose")),
}

RIGHT = [
    (check_paired_difference, (with_numpy,)),
    (check_paired_difference, (by_hand,)),
    (check_claims, (JUDGED,)),
    (check_my_share, (with_t, MINE)),
    (check_my_share, (with_z, MINE)),
    (check_my_share, (with_t, {"asked": 12, "right": 12, "groups": 12})),
]

WRONG = [
    (check_paired_difference, by_place, "pair by `seed`"),
    (check_paired_difference, unpaired, "as strangers"),
    (check_paired_difference, own_mean, "subtract lora-bf16's"),
    (
        check_paired_difference,
        lambda runs, m, s: all_seeds(runs, m, s) if any(r["seed"] == 9 for r in runs) else with_numpy(runs, m, s),
        "A seed without a partner",
    ),
    (check_paired_difference, per_cent, "points are asked"),
    (check_paired_difference, ends, "the interval's lower end"),
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
    (check_claims, JUDGED | {"A": "open"}, "lies below 0"),
    (check_claims, JUDGED | {"B": "refuted"}, "a loss of 1 point"),
    (check_claims, JUDGED | {"B": "shown"}, "a loss of 3 points"),
    (check_claims, JUDGED | {"C": "open"}, "where is -3?"),
    (check_claims, JUDGED | {"D": "shown"}, "holds the 200 orders fixed"),
    (check_claims, JUDGED | {"E": "refuted"}, "not the same as not there"),
    (check_claims, JUDGED | {"E": "shown"}, "Compare nf4-double with nf4"),
    (check_claims, JUDGED | {"F": "shown"}, "lower is better"),
    (check_claims, {"A": "shown"}, "a diagnosis for A, B"),
    (check_my_share, (lambda right, asked: with_t(right, asked) / 100, MINE), "multiply by 100"),
    (check_my_share, (lambda right, asked: 2 * with_t(right, asked), MINE), "the whole width"),
    (check_my_share, (lambda right, asked: 100 * math.sqrt(right * (asked - right)) / asked, MINE), "spread of single"),
    (check_my_share, (lambda right, asked: with_t(right, asked) * math.sqrt(asked), MINE), "spread of single"),
    (check_my_share, (lambda right, asked: with_t(right, asked) / 1.96, MINE), "one standard error"),
    (check_my_share, (lambda right, asked: with_t(right, asked) / math.sqrt(asked), MINE), "You divided by n:"),
    (check_my_share, (lambda right, asked: 100 * right / asked, MINE), "the share itself"),
    (check_my_share, (with_t, {"asked": 40, "right": 31}), "three whole numbers"),
    (check_my_share, (with_t, MINE | {"right": 41}), "a number from 0 to 40"),
    (check_my_share, (with_t, MINE | {"groups": 1}), "expected at least 2"),
]
