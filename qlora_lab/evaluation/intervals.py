"""Confidence intervals (Student's t) for the difference between two ways of training, from several seeds."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Hashable, Sequence

import torch


def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of paired differences, and half the width of its confidence interval (Student's t).

    Args:
        differences: one per seed: one method's score minus the other's at the same seed.
        level: the share of such intervals that contain the true mean, if the differences are independent and roughly
            normal.

    Raises:
        ValueError: fewer than two differences, which say nothing about their spread.
    """
    count = len(differences)
    if count < 2:
        raise ValueError(f"{count} difference(s): at least 2 are needed to see how far they spread")
    return statistics.fmean(differences), t_quantile(count - 1, level) * statistics.stdev(differences) / count**0.5


def by_group(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """One number for each group, to give to `paired_interval` where the values of a group rise and fall together.

    A group's number is the mean of all values, and how far the group's own values, added up, are off it, in shares of
    an average group. So the numbers have the mean of all values, and a larger group counts for more. (Their spread is
    that of the ratio estimator for clusters of unequal size: Cochran, Sampling Techniques, 3rd edition, chapter 9A.)

    Args:
        values: such as the change of each answer, in points.
        groups: for each value, what it falls together with: a city, a customer, a day.

    Returns:
        The groups' numbers, in the order in which the groups come up first.

    Raises:
        ValueError: no values, or not one group for each.
    """
    if not values or len(values) != len(groups):
        raise ValueError(f"{len(values)} values and {len(groups)} groups: expected one group for each value")
    mean = statistics.fmean(values)
    off: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        off[group] = off.get(group, 0.0) + value - mean
    return [mean + len(off) / len(values) * each for each in off.values()]


def seeds_needed(differences: Sequence[float], level: float = 0.95, power: float = 0.8) -> float:
    """How many seeds would tell two methods apart, if the differences go on as they are.

    The smallest number, at least 2, at which Student's interval at this level excludes zero in a share `power` of
    experiments. Infinite if the mean is zero.

    Raises:
        ValueError: fewer than two differences.
    """
    mean, _ = paired_interval(differences)
    spread = statistics.stdev(differences)
    if not mean or not spread:
        return 2 if mean else math.inf
    effect, normal = abs(mean) / spread, statistics.NormalDist()
    together = normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)
    seeds = max(2, math.floor((together / effect) ** 2))  # with a normal distribution; Student's asks for a few more
    while share_excluding_zero(effect, seeds, level) < power:
        seeds += 1
    return seeds


def share_excluding_zero(effect: float, seeds: int, level: float = 0.95) -> float:
    """The power of the paired t test: how often Student's interval excludes zero.

    Given the ratio r of measured to true spread, what is left is normal; r is integrated over its chi distribution.

    Args:
        effect: the true mean difference, in standard deviations of the differences.
        seeds: at least 2.
    """
    freedom = seeds - 1
    r = torch.linspace(0, 1 + 8 / (2 * freedom) ** 0.5, 20_001, dtype=torch.float64)[1:]
    weights = (freedom * (r.log() - r**2 / 2) - r.log()).softmax(0)
    edge, shift = t_quantile(freedom, level) * r, effect * seeds**0.5
    return float(weights @ (torch.special.ndtr(shift - edge) + torch.special.ndtr(-shift - edge)))


@functools.cache
def t_quantile(freedom: int, level: float = 0.95) -> float:
    """How many standard errors on each side of the mean enclose a share `level` of Student's t distribution.

    With t = sqrt(freedom) tan(a), the density of the angle a is proportional to cos(a) ** (freedom - 1), which is
    integrated in 100,000 steps.

    Args:
        freedom: degrees of freedom, n - 1 for n differences.

    Raises:
        ValueError: fewer than one degree of freedom, or a level that is not between 0 and 1.
    """
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(f"freedom={freedom}, level={level}: expected at least 1, and a share between 0 and 1")
    edges = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    shares = (((edges[1:] + edges[:-1]) / 2).cos() ** (freedom - 1)).cumsum(0)
    shares = torch.cat([shares.new_zeros(1), shares / shares[-1]])
    end = int(torch.searchsorted(shares, level))
    part = (level - shares[end - 1]) / (shares[end] - shares[end - 1])
    return freedom**0.5 * math.tan(edges[end - 1] + part * (edges[end] - edges[end - 1]))
