"""Confidence intervals (Student's t) for the difference between two ways of training, from several seeds."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

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


def paired_p_value(differences: Sequence[float]) -> float:
    """How often chance alone would make a mean at least this far from zero, if the true one were zero (Student's t).

    Raises:
        ValueError: fewer than two differences.
    """
    mean, _ = paired_interval(differences)
    spread = statistics.stdev(differences)
    if not spread:
        return 0.0 if mean else 1.0
    angles, shares = _t_shares(len(differences) - 1)
    angle = math.atan(abs(mean) * len(differences) ** 0.5 / spread / (len(differences) - 1) ** 0.5)
    return 1 - float(shares[torch.searchsorted(angles, angle).clamp(max=len(shares) - 1)])


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are (Holm 1979), in the same order.

    Calling those below 0.05 differences is wrong about any of them in at most 5 % of such experiments.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def seeds_needed(differences: Sequence[float], level: float = 0.95, power: float = 0.8) -> float:
    """How many seeds would tell two methods apart, if the differences go on as they are.

    So many that the interval at this level excludes zero in a share `power` of experiments: (z + z')² times the
    variance over the squared mean. Infinite if the mean is zero.

    Raises:
        ValueError: fewer than two differences.
    """
    mean, _ = paired_interval(differences)
    normal = statistics.NormalDist()
    together = normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)
    return math.inf if not mean else max(2.0, together**2 * statistics.variance(differences) / mean**2)


@functools.cache
def _t_shares(freedom: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles from 0 to pi / 2, and the share of Student's t distribution that lies within each; see `t_quantile`."""
    edges = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    shares = (((edges[1:] + edges[:-1]) / 2).cos() ** (freedom - 1)).cumsum(0)
    return edges, torch.cat([shares.new_zeros(1), shares / shares[-1]])


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
    edges, shares = _t_shares(freedom)
    end = int(torch.searchsorted(shares, level))
    part = (level - shares[end - 1]) / (shares[end] - shares[end - 1])
    return freedom**0.5 * math.tan(edges[end - 1] + part * (edges[end] - edges[end - 1]))
