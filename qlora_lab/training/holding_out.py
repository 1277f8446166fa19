"""Which samples of a data set without splits are held out: some to judge a model on, others to validate it.

A fifth is held out to judge answers, and a tenth to validate, where that is asked for: 70 : 20 : 10, the usual shares.
Neither is more than `most`, which is what limits the time that judging takes.

Why a fifth? Of n answers, a share p is right. Its standard error is the root of p (1 - p) / n, at most 0.5 / root(n),
so the 95 % interval reaches at most 0.98 / root(n) up and down. Of 60 samples, a tenth would be 6 answers, 40 points
up and down, which says next to nothing; a fifth is 12, and 28 points. What it costs: errors fall with the number of
samples trained on, but rarely faster than 1 / root(samples), so with a fifth less they are at most 12 % larger. From
250 samples on, 50 are held out (`train_qlora`'s default for `most`), which is 14 points; half of that would take four
times as many. Of 100,000 samples, 400 cost nothing but time, and give 5 points.

To validate, half as many do: a mean over all their tokens varies less than a share of right answers, and it is compared
with itself, since each validation sees the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qlora_lab.errors import UserError

LEAST = 10  # of fewer samples, none is held out
RULE = "a fifth to judge, a tenth to validate"


@dataclass(frozen=True)
class HeldOut:
    """The numbers of samples, counted from 0: to judge on, to validate on, and the rest, to train on."""

    judged: list[int] = field(default_factory=list)
    validating: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)


def wanted(samples: int, most: int) -> tuple[int, int]:
    """How many of so many samples are held out to judge and to validate, at most.

    >>> wanted(9, 50), wanted(20, 50), wanted(60, 50), wanted(60, 8), wanted(100_000, 50)
    ((0, 0), (4, 2), (12, 6), (8, 6), (50, 50))
    """
    if samples < LEAST:
        return 0, 0
    return min(most, samples // 5), min(most, samples // 10)


def interval(judged: int) -> float:
    """Half the width of the widest 95 % interval of a share of so many answers.

    >>> f"{interval(12):.0%}"
    '28%'
    """
    return min(1.0, 0.98 / judged**0.5)


def hold_out(
    samples: int, most: int, seed: int, validates: bool = False, values: Sequence[int] | None = None
) -> HeldOut:
    """Draw them at random.

    Args:
        samples: how many there are.
        most: to judge, and to validate, at most so many.
        seed: chooses them.
        validates: whether some are also held out to validate. Those to judge are the same in both cases.
        values: of each sample, a number that stands for what it is about. All samples with the same number then go to
            the same side. The numbers are drawn, one after the other, and one is passed over if it has more samples
            than are still wanted; so there may be a few less than `wanted` says.

    Raises:
        UserError: every one of the `values` has more samples than are wanted.
    """
    import numpy

    to_judge, to_validate = wanted(samples, most)
    to_validate = to_validate if validates else 0
    draw = numpy.random.default_rng(seed)
    if values is None:
        order = draw.permutation(samples).tolist()
        end = to_judge + to_validate
        return HeldOut(order[:to_judge], order[to_judge:end], order[end:])
    numbers, which, sizes = numpy.unique(numpy.asarray(values), return_inverse=True, return_counts=True)
    sides = numpy.full(len(numbers), 2)
    still = [to_judge, to_validate]
    for number in draw.permutation(len(numbers)):
        size = int(sizes[number])
        side = next((side for side in (0, 1) if size <= still[side]), None)
        if side is not None:
            sides[number] = side
            still[side] -= size
    judged, validating, trained = (numpy.flatnonzero(sides[which] == side).tolist() for side in (0, 1, 2))
    if to_judge and not judged or to_validate and not validating:
        lacking = to_validate if judged else to_judge
        raise UserError(
            f"the column to split by has {len(numbers)} different values among {samples:,} samples, and each stands in "
            f"more of them than the {lacking:,} that can still be held out: split by another column"
        )
    return HeldOut(judged, validating, trained)
