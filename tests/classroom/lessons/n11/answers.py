"""Answers to the exercises of 11_accuracy_comparison: right ones, found by another way, and likely mistakes."""

import json
import math
import statistics
from pathlib import Path

import numpy

import qlora_lab
from qlora_lab.classroom.checks import check_claims, check_my_comparison
from qlora_lab.evaluation.intervals import paired_interval, t_quantile
from qlora_lab.experiments.accuracy import METHODS


def by_seed(runs, method, score):
    return {run["seed"]: score(run) for run in runs if run["method"] == method}


def half_of(d):
    return t_quantile(len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))


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


def by_city(method):
    """The change of each city's orders, off the mean, in points: for an interval of `method` less lora-bf16."""
    bits = {(run["method"], run["seed"]): numpy.array(list(map(int, run["exact"]["test"]))) for run in RUNS}
    changes = 100 * sum(bits[method, seed] - bits["lora-bf16", seed] for seed in range(8)) / 8
    cities = sorted(set(CITY))
    off = [(changes - changes.mean())[numpy.array(CITY) == city].sum() for city in cities]
    return [float(changes.mean() + x * len(cities) / 200) for x in off]


def judged(above_0):
    mean, half = statistics.fmean(above_0), half_of(above_0)
    return "shown" if mean > half else "refuted" if mean < -half else "open"


assert set(METHODS) == {run["method"] for run in RUNS}
JUDGED = {
    "A": judged(less("int4", "nf4", "test")),
    "B": judged(less("int4", "lora-bf16", "test", plus=3)),
    "C": judged([-change for change in by_city("fp4")]),
    "D": judged(less("nf4-double", "nf4", "test", sign=-1)),
    "E": judged(less("nf4", "fp4", "prose", sign=-1)),
    "F": judged(less("fp4", "lora-bf16", "prose", sign=-1, plus=0.1)),
}


def with_numpy(first, second, groups):
    """The ratio estimator for clusters, written out."""
    each, names = 100.0 * (numpy.array(second) - numpy.array(first)), list(dict.fromkeys(groups))
    off = numpy.array([(each - each.mean())[[g == name for g in groups]].sum() for name in names])
    count = len(names)
    error = count / len(each) * math.sqrt((off**2).sum() / (count - 1) / count)
    return float(each.mean()), t_quantile(count - 1) * error


def changed(mean=lambda mean: mean, half=lambda half: half):
    """A right answer, spoilt afterwards."""

    def answer(*lists):
        found = with_numpy(*lists)
        return mean(found[0]), half(found[1])

    return answer


def single(first, second, groups):
    return paired_interval([100 * (b - a) for a, b in zip(first, second, strict=True)])


def of_groups(count):
    """Means of groups (count=len) or sums (count=lambda x: 1), each group once."""

    def answer(first, second, groups):
        each = {name: [] for name in groups}
        for a, b, name in zip(first, second, groups, strict=True):
            each[name].append(100 * (b - a))
        return paired_interval([sum(x) / count(x) for x in each.values()])

    return answer


MINE = {"first": [0, 1, 0, 1, 0, 0], "second": [1, 1, 1, 0, 1, 1], "groups": list("aabbcd")}

RIGHT = [
    (check_claims, (JUDGED,)),
    (check_my_comparison, (with_numpy, MINE)),
    (check_my_comparison, (with_numpy, MINE | {"second": [1, 1, 1, 1, 1, 1]})),
    (check_my_comparison, (with_numpy, MINE | {"second": MINE["first"]})),
]

WRONG = [
    (check_claims, JUDGED | {"A": "shown"}, "Compare int4 with nf4"),
    (check_claims, JUDGED | {"A": "refuted"}, "Compare int4 with nf4"),
    (check_claims, JUDGED | {"B": "open"}, "where is -3?"),
    (check_claims, JUDGED | {"C": "open"}, "by_group"),
    (check_claims, JUDGED | {"C": "refuted"}, "is a loss"),
    (check_claims, JUDGED | {"D": "refuted"}, "not the same as not there"),
    (check_claims, JUDGED | {"D": "shown"}, "Compare nf4-double with nf4"),
    (check_claims, JUDGED | {"E": "refuted"}, "lower is better"),
    (check_claims, JUDGED | {"E": "open"}, "compare nf4 with fp4"),
    (check_claims, JUDGED | {"F": "open"}, "on which side of 0.1"),
    (check_claims, JUDGED | {"F": "false"}, "expected one of 'shown'"),
    (check_claims, {"A": "shown"}, "a diagnosis for A, B"),
    (check_my_comparison, (single, MINE), "a coin of its own"),
    (check_my_comparison, (changed(mean=lambda mean: -mean), MINE), "second less first"),
    (check_my_comparison, (changed(mean=lambda mean: mean / 100), MINE), "multiply by 100"),
    (check_my_comparison, (changed(half=lambda half: half / 100), MINE), "multiply by 100"),
    (check_my_comparison, (changed(half=lambda half: 2 * half), MINE), "the whole width"),
    (check_my_comparison, (of_groups(len), MINE), "as much as a large one"),
    (check_my_comparison, (of_groups(lambda each: 1), MINE), "sums of groups"),
    (check_my_comparison, (lambda *lists: 3, MINE), "expected the pair"),
    (check_my_comparison, (with_numpy, {"first": [0, 1]}), "three lists"),
    (check_my_comparison, (with_numpy, MINE | {"groups": ["a", "b"]}), "one entry a sample"),
    (check_my_comparison, (with_numpy, MINE | {"first": [0, 1, 0, 1, 0, 9]}), "neither 1, right, nor 0"),
    (check_my_comparison, (with_numpy, MINE | {"groups": ["a"] * 6}), "at least 2"),
]
