"""Figures of dive_b_why_low_rank."""

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator
from torch import Tensor

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, draw_matrix, fix_ticks, is_number

RANK_TICKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 576]


def rank_axis(ax: Axes, ranks: list[int], label: str = "rank") -> None:
    """A logarithmic x axis with a tick at every power of two, and at 576."""
    ticks = [tick for tick in RANK_TICKS if ranks[0] <= tick <= ranks[-1]]
    ax.set(xscale="log", xlim=(0.9 * ranks[0], 1.1 * ranks[-1]), xlabel=label)
    ax.set_xticks(ticks, [f"{tick}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def plot_parts(whole: Tensor, parts: dict[str, Tensor]) -> Axes:
    """A matrix M and, by name, the matrices that it is the sum of: numbers in coloured squares."""
    _, axes = plt.subplots(2, 2, figsize=(6.6, 6.4), layout="constrained")
    for ax, (name, matrix) in zip(axes.flat, ({"M": whole} | parts).items(), strict=True):
        draw_matrix(ax, matrix, 4, decimals=1, title=name)
    return axes[0, 0]


def plot_rebuilt(matrix: Tensor, rank: int) -> Axes:
    """A matrix, what its `rank` largest directions add up to, and its singular values as bars, the kept ones blue."""
    u, s, v = torch.linalg.svd(matrix)
    rebuilt, singular_values = (u[:, :rank] * s[:rank]) @ v[:rank], s.tolist()
    _, (left, middle, right) = plt.subplots(1, 3, figsize=(9.4, 3.1), width_ratios=[1, 1, 0.8], layout="constrained")
    draw_matrix(left, matrix, 4, decimals=None, title="M")
    draw_matrix(middle, rebuilt, 4, decimals=None, title=f"its {rank} largest direction{'s' if rank > 1 else ''}")
    at = range(1, len(singular_values) + 1)
    right.bar(at, singular_values, color=[BLUE if i <= rank else "#D0D0D0" for i in at])
    fix_ticks(right.xaxis, at)
    right.set(xlabel="direction (blue: kept)", ylabel="singular value", ylim=(0, 1.1 * max(singular_values)))
    right.spines[["top", "right"]].set_visible(False)
    return middle


def plot_energy(ax: Axes, shares: dict[str, list[float]], guess: tuple[int, object]) -> Axes:
    """Share of a matrix's squared norm that its r largest singular values hold, over r: a line for each matrix.

    guess: a rank, and the share in per cent that the learner expects there; no mark if it is left open.
    """
    styles = [(BLUE, "-"), (GREEN, "--"), (ORANGE, "-."), (GREY, ":")]
    for (name, values), (colour, style) in zip(shares.items(), styles, strict=False):
        ranks = range(1, len(values) + 1)
        ax.plot(ranks, values, color=colour, linestyle=style, linewidth=1.8, label=name)
    rank_axis(ax, [1, max(map(len, shares.values()))], "rank r (log scale)")
    rank, percent = guess
    ax.axvline(rank, color=GREY, linewidth=0.8, label=f"rank {rank}")
    if is_number(percent):
        ax.plot(rank, percent / 100, "D", color=VERMILION, markersize=9, label="your guess")
    ax.set(ylim=(0, 1.03), ylabel="share of the squared norm")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=9)
    return ax


def plot_truncation(
    ranks: list[int], kept: list[float], losses: dict[str, list[float]], ends: tuple[float, float], here: int
) -> Axes:
    """Left: share of the update's squared norm below and above a rank. Right: the loss with either part alone.

    ranks: where it was measured, powers of two. kept: share (0 to 1) of the largest `rank` directions. losses: by
    name, a loss for each rank. ends: the loss before and after training. here: index of the rank to mark.
    """
    _, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.6), width_ratios=[1, 2], layout="constrained")
    styles = [(BLUE, "o", "-"), (ORANGE, "s", "--")]
    for at, (share, (colour, _, _)) in enumerate(zip((kept[here], 1 - kept[here]), styles, strict=True)):
        left.bar(at, share, 0.7, color=colour)
        left.text(at, share + 0.02, f"{share:.0%}", ha="center")
    fix_ticks(left.xaxis, [0, 1], ["kept", "thrown away"])
    fix_ticks(left.yaxis, [0, 0.5, 1])
    left.set(ylabel="share of the squared norm", xlim=(-0.6, 1.6), ylim=(0, 1.1))
    left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for (name, values), (colour, marker, style) in zip(losses.items(), styles, strict=False):
        right.plot(values, color=colour, linestyle=style, marker=marker, markersize=5, label=name)
        right.plot(here, values[here], marker, color=colour, markersize=12)
    for end, style, label in zip(ends, (":", "-."), ("before training", "after training"), strict=True):
        right.hlines(end, 0, len(ranks) - 1, color=GREY, linewidth=1, linestyle=style, label=label)
    right.legend(frameon=False, loc="center right", fontsize=9).set_gid("frame")
    fix_ticks(right.xaxis, range(len(ranks)), ranks)
    right.set(xlim=(-0.2, len(ranks) - 0.8), xlabel="rank (log scale)")
    right.set(ylabel="loss on unseen orders (nats per token)", ylim=(0, 1.15 * max(ends)))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return right


def plot_by_rank(ax: Axes, ranks: list[int], lines: dict[str, list[float]], ylabel: str, guess: object = ...) -> Axes:
    """A quantity (log scale) over the rank (log scale), a line for each rule.

    guess: a rank, drawn as a dotted line unless it is left open.
    """
    styles = [(BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, ":", "^")]
    for (name, values), (colour, style, marker) in zip(lines.items(), styles, strict=False):
        ax.plot(ranks, values, color=colour, linestyle=style, marker=marker, markersize=6, label=name)
    rank_axis(ax, ranks, "rank (log scale)")
    if is_number(guess):
        ax.axvline(guess, color=GREY, linestyle=":", label="your guess")
    ax.set(ylabel=ylabel, yscale="log")
    ax.legend(frameon=False, fontsize=9)
    return ax
