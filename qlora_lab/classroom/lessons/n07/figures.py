"""Figures of 07_qlora_from_scratch."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, GREEN, VERMILION, draw_guesses, numbers_in


def plot_stairs(axes: list[Axes], step: float, weight: float, others: float) -> Axes:
    """Left: a rounded weight over the weight. Right: an output over its input, for the weight once it is rounded.

    step: between two rounded weights. weight: the one that is marked. others: what the layer's other input adds.
    """
    left, right = axes
    rounded = round(weight / step) * step
    for level in np.arange(-4, 5) * step:
        left.plot([level - step / 2, level + step / 2], [level, level], color=BLUE, linewidth=2)
    left.plot(weight, rounded, "o", color=VERMILION)
    left.annotate("slope 0", (weight, rounded), (4, -16), textcoords="offset points", color=VERMILION)
    left.set(xlabel="weight", ylabel="rounded weight", title="How does it change with the weight?")
    inputs = np.array([0.0, 4.0])
    right.plot(inputs, rounded * inputs + others, color=BLUE, linewidth=2)
    right.plot(2, rounded * 2 + others, "o", color=VERMILION)
    below = {"xytext": (6, -16), "textcoords": "offset points", "color": VERMILION}
    right.annotate(f"slope {rounded:.2f}", (2, rounded * 2 + others), **below)
    right.set(xlabel="input", ylabel="output", title="And with the input?")
    for ax in axes:
        ax.title.set_fontsize(11)
        ax.spines[["top", "right"]].set_visible(False)
    return left


def plot_megabytes(
    ax: Axes, megabytes: dict[str, float], xlabel: str, guess: Mapping[str, object] | None = None
) -> Axes:
    """Horizontal bars of sizes (MB, 10^6 bytes), and the learner's guesses as diamonds, if there are any."""
    names = list(megabytes)
    drawn = ax.barh(names, list(megabytes.values()), 0.6, color=BLUE)
    ax.bar_label(drawn, [f"{value:.1f} MB" for value in megabytes.values()], padding=8)
    guesses = numbers_in(guess)
    if guesses:
        draw_guesses(ax, names, guesses)
        ax.legend(frameon=False, loc="lower right")
    ax.set(xlabel=xlabel, xlim=(0, 1.3 * max([*megabytes.values(), *guesses.values()])))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return ax


def plot_together(
    axes: list[Axes], losses: dict[str, list[float]], apart: dict[str, list[float]], guess: Mapping[str, object]
) -> Axes:
    """Above, two losses over optimizer steps, one a line and one rings; below, how far runs are from the first.

    losses: by name, that of "ours" and others. apart: by name, relative differences from ours; those of the first are
    rings above, too. guess: the largest difference that the learner expects of each, a dashed line; none if left open.
    """
    upper, lower = axes
    count = len(losses["ours"])
    steps = range(1, count + 1)
    theirs = next(iter(apart))
    upper.plot(steps, losses["ours"], color=BLUE, linewidth=2, label="ours")
    upper.plot(steps, losses[theirs], "o", color=VERMILION, markerfacecolor="none", markersize=8, label=theirs)
    upper.set(ylabel="loss (nats per token,\nlog scale)", yscale="log")
    upper.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    floor, guesses = 1e-9, numbers_in(guess)
    for (name, values), (colour, marker) in zip(apart.items(), [(VERMILION, "o"), (GREEN, "^")], strict=True):
        heights = [max(value, floor) for value in values]
        lower.plot(steps, heights, marker, color=colour, markersize=4, label=name, clip_on=False)
        if guesses.get(name, 0) > 0:
            lower.axhline(guesses[name], color=colour, linestyle="--", label=f"your guess: {guesses[name]:g}")
    lower.set(yscale="log", ylim=(0.3 * floor, 10), xlabel="optimizer step", ylabel="relative\ndifference")
    lower.set_yticks([1e-9, 1e-6, 1e-3, 1], ["≤ 10$^{-9}$", "10$^{-6}$", "10$^{-3}$", "1"])
    for ax in axes:
        ax.yaxis.set_minor_locator(NullLocator())
        ax.legend(loc="upper right", fontsize=9, ncols=2, edgecolor="none", framealpha=1)  # a guess may lie behind
        ax.set(xlim=(0.5, count + 0.5), xticks=[1, *range(5, count + 1, 5)])
        ax.spines[["top", "right"]].set_visible(False)
    return upper
