"""What folded cells of dive_c_small_differences compute: made-up experiments, and the recorded trainings."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from qlora_lab.evaluation.intervals import t_quantile
from qlora_lab.places import RECORDS

if TYPE_CHECKING:
    import torch


def read_record() -> dict:
    """What `python -m qlora_lab.experiments accuracy` wrote on a GPU: six methods, eight seeds each."""
    path = RECORDS / "accuracy-nvidia-h100-80gb-hbm3.json"
    return json.loads(path.read_text(encoding="utf-8"))


def made_up(trials: int, count: int, seed: int = 0) -> torch.Tensor:
    """(trials, count) float64 numbers of a normal distribution with mean 0 and spread 1: nothing is going on."""
    import torch

    return torch.randn(trials, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share_held(count: int, factor: float, trials: int = 20_000) -> float:
    """The share of intervals, mean ± factor x standard error of `count` numbers, that hold the true mean."""
    x = made_up(trials, count)
    return (x.mean(1).abs() <= factor * x.std(1) / count**0.5).double().mean().item()


def false_alarms(most: int, trials: int = 20_000) -> list[float]:
    """For 2, 3, ... `most` looks: the share of experiments in which any interval so far has excluded the truth."""
    x, found, shares = made_up(trials, most), None, []
    for count in range(2, most + 1):
        part = x[:, :count]
        out = part.mean(1).abs() > t_quantile(count - 1) * part.std(1) / count**0.5
        found = out if found is None else found | out
        shares.append(found.double().mean().item())
    return shares


def shorter_of_two(count: int = 8, trials: int = 20_000) -> dict[str, float]:
    """How often two equal methods "differ" by the paired interval, by the unpaired one, and by the more pleasing."""
    a, b = made_up(trials, count, 1), made_up(trials, count, 2)
    gap = (a - b).mean(1).abs()
    paired = gap > t_quantile(count - 1) * (a - b).std(1) / count**0.5
    apart = gap > t_quantile(2 * count - 2) * ((a.var(1) + b.var(1)) / count).sqrt()
    ways = {"paired": paired, "not paired": apart, "either": paired | apart}
    return {name: found.double().mean().item() for name, found in ways.items()}


def unpaired_interval(mine: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Difference of two means of n runs each, and half its 95 % interval (Student's, 2n - 2 degrees of freedom)."""
    count = len(mine)
    error = math.sqrt((statistics.variance(mine) + statistics.variance(base)) / count)
    return statistics.fmean(mine) - statistics.fmean(base), t_quantile(2 * count - 2) * error


def redraw(values: Sequence[float], groups: Sequence[Hashable], times: int = 4000) -> tuple[float, float]:
    """Draw as many groups as there are, with repetition, and take the mean of all their values; 95 % of the means lie
    between the two that are returned.
    """
    pieces: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        pieces.setdefault(group, []).append(value)
    draw, names, means = random.Random(0), sorted(pieces, key=str), []
    for _ in range(times):
        drawn = [value for name in draw.choices(names, k=len(names)) for value in pieces[name]]
        means.append(statistics.fmean(drawn))
    means.sort()
    return means[round(0.025 * times)], means[round(0.975 * times) - 1]


def fair_coins(lost: int, gained: int) -> float:
    """How probable it is that lost + gained fair coins fall at least as unevenly, to either side (McNemar, exact)."""
    count = lost + gained
    tail = sum(math.comb(count, k) for k in range(min(lost, gained) + 1)) / 2**count
    return min(1.0, 2 * tail)


def seeds_within(spread: float, margin: float) -> int:
    """The smallest number of seeds, at least 2, at which half the 95 % interval is `margin` or less."""
    count = 2
    while t_quantile(count - 1) * spread / count**0.5 > margin:
        count += 1
    return count
