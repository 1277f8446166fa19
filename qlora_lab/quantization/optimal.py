"""The best levels for normal numbers in blocks, by integration instead of data: AF4, BOF4 and their relatives.

A block of B normal numbers is divided by its largest absolute value M. What is left of the others has the density

    p(x) ∝ ∫ M^k · M φ(x M) (2Φ(M) - 1)^(B-2) φ(M) dM        on (-1, 1); the largest itself is at 1 or -1

with k = 0. An error of x counts M times in the tensor, so levels that are to be good for the tensor's absolute error
need k = 1, for its squared error k = 2. Lloyd's algorithm then finds the levels: each moves to the median (absolute
error) or the mean (squared error) of what is nearest to it.

    AF4     k = 0, absolute error, -1 and 1 among the levels, and 7 negative ones found apart from 8 positive ones; 0 is
            added at the end (Yoshida 2023, arXiv 2306.06965; so it is in bitsandbytes' table)
    BOF4    k = 1 and absolute error, or k = 2 and squared error, with -1, 0 and 1 (Blumenberg et al. 2025,
            arXiv 2505.06653)
    BOF4-S  the same for blocks divided by their signed largest number: it is always at 1, and -1 is free
"""

from __future__ import annotations

import math

import torch

from .codebooks import thresholds

POINTS = 1 << 14  # of x in (-1, 1)
ROUNDS = 5000  # of Lloyd's algorithm, at most


def af4(block_size: int = 64) -> torch.Tensor:
    """AbnormalFloat's levels for blocks of this size: float32, Tensor[16], ascending."""
    levels = torch.cat([torch.linspace(-1, 0, 8)[:-1], torch.linspace(0, 1, 9)[1:]]).double()
    found = _lloyd(levels, (-1.0, 1.0), *block_density(block_size), squared=False, zero_divides=True)
    return torch.cat([found[:7], found.new_zeros(1), found[7:]]).float()


def bof4(block_size: int = 64, squared: bool = True, signed: bool = False) -> torch.Tensor:
    """BOF4's levels, or BOF4-S's if `signed`: float32, Tensor[16], ascending. squared: which error they minimize."""
    keep = (0.0, 1.0) if signed else (-1.0, 0.0, 1.0)
    return optimal_levels(block_size, squared, weight=2 if squared else 1, keep=keep)


def optimal_levels(
    block_size: int, squared: bool, weight: int, keep: tuple[float, ...], levels: int = 16
) -> torch.Tensor:
    """Levels for normal numbers in blocks that are divided by their largest, by Lloyd's algorithm.

    Args:
        block_size: B, at least 2.
        squared: minimize the squared error; otherwise the absolute one.
        weight: k, the power of the largest number with which an error counts.
        keep: levels that do not move; 0 and 1 must be among them. With -1, one level fewer is below 0 than above.
        levels: how many, at least 4.

    Returns:
        Tensor[levels], float32, ascending, in [-1, 1].

    Raises:
        ValueError: block_size or levels too small, or 0 or 1 missing in `keep`.
    """
    if block_size < 2 or levels < 4:
        raise ValueError(f"block_size={block_size}, levels={levels}: at least 2 and 4 are needed")
    if not {0.0, 1.0} <= set(keep):
        raise ValueError(f"keep={keep}: 0 and 1 must be among the levels that do not move")
    below = levels // 2 - 1
    code = torch.cat([torch.linspace(-1, 0, below + 1)[:-1], torch.linspace(0, 1, levels - below)]).double()
    return _lloyd(code, keep, *block_density(block_size, weight), squared).float()


def _lloyd(
    code: torch.Tensor,
    keep: tuple[float, ...],
    x: torch.Tensor,
    density: torch.Tensor,
    squared: bool,
    zero_divides: bool = False,
) -> torch.Tensor:
    """Move levels to the mean or the median of what is nearest to each, until none moves any more.

    keep: levels that do not move. x, density: as from `block_density`. zero_divides: negative levels have what is
    below 0, positive ones what is above.
    """
    step = x[1] - x[0]
    edges = torch.cat([x - step / 2, x[-1:] + step / 2])  # of the cells around the points
    mass = torch.cat([density.new_zeros(1), density.cumsum(0)]) * step  # up to each edge
    moment = torch.cat([density.new_zeros(1), (density * x).cumsum(0)]) * step
    fixed = torch.isin(code, torch.tensor(keep, dtype=code.dtype))
    for _ in range(ROUNDS):
        bounds = torch.cat([edges[:1], thresholds(code), edges[-1:]])
        if zero_divides:
            bounds[int((code < 0).sum())] = 0
        reached = _at(bounds, edges, mass)
        if squared:
            centre = _at(bounds, edges, moment).diff() / reached.diff()
        else:
            centre = _at((reached[:-1] + reached[1:]) / 2, mass, edges)
        moved = torch.where(fixed, code, centre)
        done = (moved - code).abs().max() < 1e-9
        code = moved
        if done:
            break
    return code


def block_density(block_size: int, weight: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The density of normal numbers over their block's largest, times that largest to a power.

    Args:
        block_size: B. weight: k.

    Returns:
        x, float64, Tensor[POINTS], in (-1, 1), and the density there, whose integral is 1. The largest of each block,
        which is at 1 or -1 exactly, is left out.
    """
    x = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS * 2 - 1
    largest = torch.linspace(1e-3, 8, 400, dtype=torch.float64)  # beyond 8 there is one number in 10^15
    log_inside = torch.log(torch.special.erf(largest / math.sqrt(2)))  # 2Φ(M) - 1
    log_weight = (weight + 1) * largest.log() + (block_size - 2) * log_inside - largest**2 / 2
    density = torch.exp(log_weight - (x[:, None] * largest) ** 2 / 2).sum(1)
    return x, density / (density.sum() * (x[1] - x[0]))


def _at(where: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Linear interpolation of the points (x, y), x ascending."""
    right = torch.searchsorted(x, where).clamp(1, len(x) - 1)
    left = right - 1
    share = ((where - x[left]) / (x[right] - x[left])).clamp(0, 1)
    return y[left] + share * (y[right] - y[left])
