"""How sure a difference between two ways of training is, from several seeds: confidence intervals of Student's t."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import torch


def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of paired differences, and half the width of its confidence interval (Student's t).

    Args:
        differences: one for each seed: a score of one method less that of the other, at the same seed.
        level: the share of such intervals that hold the true mean, if the differences are independent and roughly
            normal.

    Raises:
        ValueError: fewer than two differences, which say nothing about their spread.
    """
    count = len(differences)
    if count < 2:
        raise ValueError(f"{count} difference(s): at least 2 are needed to see how far they spread")
    return statistics.fmean(differences), t_quantile(count - 1, level) * statistics.stdev(differences) / count**0.5


@functools.cache
def t_quantile(freedom: int, level: float = 0.95) -> float:
    """How many standard errors to each side hold a share `level` of Student's t distribution.

    freedom: degrees of freedom, for n differences n - 1. Substitute t = sqrt(freedom) tan(a): the density of the angle
    a is cos(a) to the power freedom - 1, up to a constant. Its integral is taken in 100,000 steps.
    """
    if freedom < 1 or not 0 < level < 1:
        raise ValueError(f"freedom={freedom}, level={level}: expected at least 1, and a share between 0 and 1")
    edges = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    shares = (((edges[1:] + edges[:-1]) / 2).cos() ** (freedom - 1)).cumsum(0)
    shares = torch.cat([shares.new_zeros(1), shares / shares[-1]])
    end = int(torch.searchsorted(shares, level))
    part = (level - shares[end - 1]) / (shares[end] - shares[end - 1])
    return freedom**0.5 * math.tan(edges[end - 1] + part * (edges[end] - edges[end - 1]))
