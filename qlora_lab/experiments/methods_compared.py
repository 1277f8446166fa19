"""What the record of `methods` says: each method beside QLoRA, seed by seed, and how sure that is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lab.evaluation.intervals import holm, paired_interval, paired_p_value, seeds_needed
from qlora_lab.experiments.record import Record

SCORES = ("test", "shifted", "validation", "prose")


@dataclass(frozen=True)
class Difference:
    """A method minus another on one task and score, over the seeds that both have.

    Args:
        each: one per seed; percentage points of exact answers, or nats per token.
        half, corrected: half the width of the 95 % interval, alone and where `compared` of them are to hold together
            (Bonferroni).
        p: of a difference of zero, adjusted by Holm for as many.
    """

    method: str
    task: str
    score: str
    each: tuple[float, ...]
    half: float
    corrected: float
    p: float
    compared: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each)

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "not told apart" at 5 % after the correction. Of losses, less is better."""
        if self.p >= 0.05:
            return "not told apart"
        return "better" if (self.mean > 0) == (self.score in ("test", "shifted")) else "worse"


def values(record: Record, method: str, task: str, score: str, merged: bool = False) -> dict[int, float]:
    """By seed: percent of exact answers (`test`, `shifted`), or nats per token. A run that diverged has none."""
    found = {}
    for run in record.rows("runs", method=method, task=task):
        judged = run["merged"] if merged else run
        if score in judged["exact"]:
            bits = judged["exact"][score]
            found[run["seed"]] = 100 * bits.count("1") / len(bits)
        elif (loss := judged["after"][score]) is not None:
            found[run["seed"]] = loss
    return found


def methods_of(record: Record, task: str) -> list[str]:
    """Those with runs, in the order of the record."""
    return list(dict.fromkeys(run["method"] for run in record.rows("runs", task=task)))


def differences(record: Record, task: str, score: str, base: str = "QLoRA") -> list[Difference]:
    """Every method beside `base`, in the order of the record."""
    ours = values(record, base, task, score)
    pairs = {}
    for method in methods_of(record, task):
        theirs = values(record, method, task, score)
        shared = sorted(ours.keys() & theirs.keys())
        if method != base and len(shared) > 1:
            pairs[method] = tuple(theirs[seed] - ours[seed] for seed in shared)
    count = len(pairs)
    adjusted = holm([paired_p_value(each) for each in pairs.values()])
    return [
        Difference(
            method,
            task,
            score,
            each,
            paired_interval(each)[1],
            paired_interval(each, 1 - 0.05 / count)[1],
            p,
            count,
        )
        for (method, each), p in zip(pairs.items(), adjusted, strict=True)
    ]


def closest(record: Record, task: str, score: str, methods: Sequence[str]) -> tuple[str, str, tuple[float, ...], float]:
    """The two methods whose means are the closest but not equal, their differences, and how many seeds would do.

    See `seeds_needed` for what that means.
    """
    found = {method: values(record, method, task, score) for method in methods}
    best = None
    for i, first in enumerate(methods):
        for second in methods[i + 1 :]:
            shared = sorted(found[first].keys() & found[second].keys())
            each = tuple(found[first][seed] - found[second][seed] for seed in shared)
            mean = abs(statistics.fmean(each))
            if mean > 1e-9 and (best is None or mean < abs(statistics.fmean(best[2]))):
                best = first, second, each
    if best is None:
        raise ValueError(f"no two of {', '.join(methods)} differ in {score}")
    return (*best, seeds_needed(best[2]))
