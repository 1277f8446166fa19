"""What the record of `methods` says: each method beside QLoRA, seed by seed, and how sure that is."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qlora_lab.evaluation.intervals import paired_interval, seeds_needed
from qlora_lab.experiments.record import Record

SCORES = ("test", "shifted", "validation", "prose")


@dataclass(frozen=True)
class Difference:
    """A method minus another on one task and score, over the seeds that both have.

    Args:
        each: one per seed; percentage points of exact answers, or nats per token.
        half, corrected: half the width of the 95 % interval, alone and where `compared` of them are to hold together
            (Bonferroni).
    """

    method: str
    task: str
    score: str
    each: tuple[float, ...]
    half: float
    corrected: float
    compared: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each)

    @property
    def verdict(self) -> str:
        """ "better", "worse" or, with zero in the corrected interval, "not told apart". Of losses, less is better."""
        if abs(self.mean) <= self.corrected:
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
    return [
        Difference(
            method,
            task,
            score,
            each,
            paired_interval(each)[1],
            paired_interval(each, 1 - 0.05 / len(pairs))[1],
            len(pairs),
        )
        for method, each in pairs.items()
    ]


def losses_by_rate(record: Record, method: str, task: str) -> dict[float, list[float]]:
    """Losses on the validation samples that choose the learning rate, in the order of the seeds."""
    found = {}
    for row in sorted(record.rows("rates", method=method, task=task), key=lambda row: (row["rate"], row["seed"])):
        found.setdefault(row["rate"], []).append(row["validation"])
    return found


def chosen_otherwise(losses: Mapping[float, Sequence[float]], seeds: int = 2) -> float:
    """Of all choices of so many seeds, the share that would take another learning rate than all seeds together.

    Args:
        losses: by learning rate, one loss for each seed, the seeds in the same order at each rate.
    """

    def lowest(some: Sequence[int]) -> float:
        return min(losses, key=lambda rate: sum(losses[rate][seed] for seed in some))

    everyone = range(len(next(iter(losses.values()))))
    rate = lowest(everyone)
    return statistics.fmean(lowest(some) != rate for some in itertools.combinations(everyone, seeds))


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


def best_of_grid(record: Record) -> dict[str, dict[str, dict[int, list[float]]]]:
    """What the grid found: "samples" or "batch size" -> who -> how many -> validation losses, one for each seed.

    Each is at the rate with the lowest mean over the seeds.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = {"samples": {}, "batch size": {}}
    rows: dict[tuple[str, str, int, float], list[float]] = {}
    for row in sorted(record.rows("grid"), key=lambda row: row["seed"]):
        varied = "batch size" if ", batch " in row["point"] else "samples"
        count = row["batch_size" if varied == "batch size" else "samples"]
        rows.setdefault((varied, row["who"], count, row["rate"]), []).append(row["validation"])
    for (varied, who, count, _), losses in rows.items():
        best = found[varied].setdefault(who, {}).get(count)
        if best is None or statistics.fmean(losses) < statistics.fmean(best):
            found[varied][who][count] = losses
    return found
