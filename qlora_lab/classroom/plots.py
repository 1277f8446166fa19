"""Figures of the course: data in, matplotlib Axes out. Nothing is computed here that a lesson speaks about.

Colours are Okabe and Ito's, which the colour-blind can tell apart, and no figure relies on colour alone: lines
differ in dashes, bars in hatching or labels.

Here is what several notebooks draw; what only one of them draws is in its folder (lessons/n04/figures.py).
"""

import math
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator
from numpy.typing import ArrayLike

from qlora_lab.classroom.languages import figures

figures.speak()  # as its docstring says, nothing happens in a kernel that speaks English
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"


def new_axes(width: float = 8.0, height: float = 3.6) -> Axes:
    """Axes of a figure in the course's size (inches), legible at a notebook's width."""
    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def fix_ticks(axis: Axis, at: Iterable[float], labels: Iterable[object] | None = None) -> None:
    """Like `axis.set_ticks`, but ticks are made when drawn: never in a slider's figure, whose frame is kept."""
    axis.set_major_locator(FixedLocator(list(at)))
    if labels is not None:
        axis.set_major_formatter(FixedFormatter([str(label) for label in labels]))


def plot_loss(ax: Axes, losses: list[float], steps: int, guess: object = None, threshold: float = 0.1) -> Axes:
    """Training loss (nats per token, log scale) over optimizer steps, from step 1.

    guess: the step at which the learner expects the loss below `threshold`: a dashed line; none if it is left open.
    """
    ax.plot(range(1, len(losses) + 1), losses, color=BLUE, marker="o", markersize=4, label="loss of the step's samples")
    ax.axhline(threshold, color=GREY, linewidth=1, linestyle=":")
    if is_number(guess):
        ax.axvline(guess, color=VERMILION, linestyle="--", label=f"your guess: below {threshold:g} at step {guess}")
    ax.set(xlim=(0.5, steps + 0.5), xlabel="optimizer step", ylabel="loss (nats per token)", yscale="log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.legend(frameon=False)
    return ax


def plot_shares(ax: Axes, shares: dict[str, dict[str, float]], xlabel: str) -> Axes:
    """Grouped horizontal bars of shares between 0 and 1; the outer keys are the groups, the inner ones the bars."""
    bars = list(next(iter(shares.values())))
    styles = [(BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (GREY, "xx")]
    height = 0.8 / len(bars)
    for i, (bar, (colour, hatch)) in enumerate(zip(bars, styles, strict=False)):
        at = [group + (i - (len(bars) - 1) / 2) * height for group in range(len(shares))]
        values = [group[bar] for group in shares.values()]
        drawn = ax.barh(at, values, height * 0.92, color=colour, hatch=hatch, edgecolor="white", label=bar)
        ax.bar_label(drawn, [f"{value:.0%}" for value in values], padding=3, fontsize=9)
    ax.set(yticks=range(len(shares)), yticklabels=list(shares), xlim=(0, 1.1), xlabel=xlabel)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.invert_yaxis()
    if len(bars) > 1:
        ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(bars))
    return ax


def draw_matrix(ax: Axes, matrix: ArrayLike, limit: float, *, decimals: int | None = 0, title: str = "") -> Axes:
    """A small matrix as a table: each number in a square, blue below zero and orange above, full at ±limit.

    decimals: None leaves the numbers out, which a slider's figure draws twice as fast.
    """
    colours = LinearSegmentedColormap.from_list("blue to orange", [BLUE, "white", ORANGE])
    values = np.asarray(matrix, dtype=float)
    ax.imshow(values, cmap=colours, vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(values) if decimals is not None else ():
        number = round(value, decimals) + 0.0  # not "-0"
        ax.text(j, i, f"{number:.{decimals}f}".replace("-", "−"), ha="center", va="center", fontsize=9)
    ax.set_title(title, fontsize=10)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return ax


def told(guess: object) -> str:
    """What the learner guessed, or that nothing was guessed. A guess that is left open is `...`."""
    nothing = all(value is ... for value in guess.values()) if isinstance(guess, dict) else guess is ...
    return "you made no guess" if nothing else f"your guess: {guess}"


def is_number(guess: object) -> TypeGuard[int | float]:
    """Whether a guess can be drawn."""
    return isinstance(guess, int | float) and not isinstance(guess, bool)


def numbers_in(guesses: Mapping[str, object] | None) -> dict[str, float]:
    """The guesses that can be drawn, by name."""
    return {name: guess for name, guess in (guesses or {}).items() if is_number(guess)}


def draw_guesses(ax: Axes, bars: list[str], guesses: Mapping[str, float]) -> None:
    """Guesses as diamonds at the lower edges of their bars (0.6 high): a good one would hide the label at its end."""
    at = [bars.index(bar) + 0.36 for bar in guesses]
    marks = ax.plot(list(guesses.values()), at, "D", color=VERMILION, markersize=7, label="your guess", clip_on=False)
    marks[0].set_zorder(3)


def plot_times(ax: Axes, milliseconds: dict[str, float], guess: Mapping[str, object] | None = None) -> Axes:
    """Horizontal bars of times on a log scale, and the learner's guesses as diamonds."""
    names = list(milliseconds)
    drawn = ax.barh(names, list(milliseconds.values()), 0.6, color=BLUE)
    ax.bar_label(drawn, [f"{value:.3g} ms" for value in milliseconds.values()], padding=4)
    guesses = numbers_in(guess)
    if guesses:
        draw_guesses(ax, names, guesses)
        ax.legend(frameon=False)
    everything = [*milliseconds.values(), *guesses.values()]
    ax.set(xscale="log", xlabel="time (ms, log scale)", xlim=(min(everything) / 3, max(everything) * 6))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.invert_yaxis()
    return ax


def plot_weights(ax: Axes, gigabytes: dict[str, float], memory: dict[str, float]) -> Axes:
    """Horizontal bars of a model's weights (GB, 10^9 bytes) by format, and lines for the memory there is."""
    drawn = ax.barh(list(gigabytes), list(gigabytes.values()), 0.6, color=BLUE)
    ax.bar_label(drawn, [f"{value:.3g} GB" for value in gigabytes.values()], padding=4)
    for (name, size), style in zip(memory.items(), ["--", ":"], strict=False):
        ax.axvline(size, color=VERMILION, linestyle=style, label=f"{name}: {size:.1f} GB")
    widest = 1.25 * max([*gigabytes.values(), *memory.values()])
    limit = 2 ** math.ceil(math.log2(widest))  # in powers of two: bars grow on a scale that stays
    ax.set(xlabel="weights (GB, 10$^9$ bytes)", xlim=(0, limit))
    ax.invert_yaxis()
    ax.legend(frameon=False, loc="lower right")
    return ax


def stacked(values: list[float], row: float, step: float) -> list[float]:
    """A height for each value: that of the row, and a step higher for each equal one before it; half a row at most."""
    step = min(step, 0.5 / max(map(values.count, values), default=1))
    return [row - step * values[:i].count(value) for i, value in enumerate(values)]


def plot_intervals(
    ax: Axes,
    intervals: dict[str, tuple[float, float]],
    points: dict[str, list[float]],
    xlabel: str,
    limits: tuple[float, float],
    band: tuple[float, float] | None = None,
    notes: list[str] | None = None,
) -> Axes:
    """A row for each method: its differences as rings, their mean and interval as a bar; 0 is a line.

    band: the range of differences that do not matter, grey. notes: for each row, a few words at the right end. What
    lies outside the limits is drawn as an arrow at the edge.
    """
    if band:
        ax.axvspan(*band, color="0.93", zorder=0, label=f"{band[0]:g} to {band[1]:+g}".replace("-", "−"))
    ax.axvline(0, color="black", linewidth=1)
    left, right = limits
    rows = [row + 0.2 for row in range(len(intervals))]
    lows, means, highs = (
        [min(max(mean + sign * half, left), right) for mean, half in intervals.values()] for sign in (-1, 0, 1)
    )
    rings, heights = [], []
    for row, method in enumerate(intervals):
        inside = [min(max(value, left), right) for value in points[method]]
        rings, heights = rings + inside, heights + stacked(inside, row - 0.1, 0.14)
    if rings:
        ax.plot(rings, heights, "o", color=GREY, markerfacecolor="none", markersize=5, label="a difference")
    ax.hlines(rows, lows, highs, color=BLUE, linewidth=2.5, label="95 % interval")
    for ends, edge, arrow in ((lows, left, CARETLEFT), (highs, right, CARETRIGHT)):  # whose tips are the points
        for marker, beyond in (("|", False), (arrow, True)):
            chosen = [(end, row) for end, row in zip(ends, rows, strict=True) if (end == edge) == beyond]
            if chosen:
                marks = ax.plot(*zip(*chosen, strict=True), marker=marker, color=BLUE, markersize=9, markeredgewidth=2)
                marks[0].set_linestyle("none")
    ax.plot(means, rows, "D", color=VERMILION, markersize=6, zorder=3, label="mean")
    for row, note in enumerate(notes or ()):
        ax.text(0.99, row, note, transform=ax.get_yaxis_transform(), va="center", ha="right")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=9).set_gid("frame")
    ax.set(ylim=(len(intervals) - 0.5, -0.7), xlim=limits, xlabel=xlabel)
    ax.set_yticks(range(len(intervals)), list(intervals), fontsize=9)
    ax.tick_params(axis="y", length=0)
    return ax


def plot_codebooks(ax: Axes, codebooks: Mapping[str, list[float]]) -> Axes:
    """Number lines from -1 to 1, one below the other, with a tick for each level and a ring around an exact zero."""
    for row, levels in enumerate(codebooks.values()):
        ax.plot([-1, 1], [row, row], color=GREY, linewidth=0.8)
        ax.plot(levels, [row] * len(levels), "|", color=BLUE, markersize=18, markeredgewidth=2)
        if 0 in levels:
            ax.plot(0, row, "o", color=VERMILION, markersize=11, markerfacecolor="none", markeredgewidth=1.6)
    names = [f"{name}  ({len(set(map(float, levels)))})" for name, levels in codebooks.items()]
    ax.set(yticks=range(len(names)), yticklabels=names, xlim=(-1.06, 1.06), ylim=(len(names) - 0.4, -0.6))
    ax.set(xlabel="level (share of the block's absmax); ring: an exact zero; in brackets: different levels")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax
