"""Figures of 07_qlora_from_scratch."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, VERMILION, is_number, numbers_in


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
        style = {"color": VERMILION, "markersize": 9, "label": "your guess", "clip_on": False, "zorder": 3}
        ax.plot(list(guesses.values()), list(guesses), "D", **style)
        ax.legend(frameon=False, loc="lower right")
    ax.set(xlabel=xlabel, xlim=(0, 1.3 * max([*megabytes.values(), *guesses.values()])))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return ax


def plot_together(axes: list[Axes], losses: dict[str, list[float]], differences: list[float], guess: object) -> Axes:
    """Two losses over optimizer steps, one drawn as a line and one as rings; below, their relative difference.

    guess: the largest difference that the learner expects, a dashed line; none if it is left open.
    """
    upper, lower = axes
    steps = range(1, len(differences) + 1)
    (line, values), (rings, others) = losses.items()
    upper.plot(steps, values, color=BLUE, linewidth=2, label=line)
    upper.plot(steps, others, "o", color=VERMILION, markerfacecolor="none", markersize=8, label=rings)
    upper.set(ylabel="loss (nats per token,\nlog scale)", yscale="log")
    upper.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    upper.yaxis.set_minor_locator(NullLocator())
    upper.legend(frameon=False)
    floor = 1e-9
    lower.plot(steps, [max(value, floor) for value in differences], "o", color=BLUE, markersize=4)
    if is_number(guess) and guess > 0:
        lower.axhline(guess, color=VERMILION, linestyle="--", label=f"your guess: {guess:g}")
        lower.legend(frameon=False, loc="upper right", fontsize=9)
    lower.set(yscale="log", ylim=(0.3 * floor, 10), xlabel="optimizer step", ylabel="relative\ndifference")
    lower.set_yticks([1e-9, 1e-6, 1e-3, 1], ["≤ 10$^{-9}$", "10$^{-6}$", "10$^{-3}$", "1"])
    lower.yaxis.set_minor_locator(NullLocator())
    for ax in axes:
        ax.set(xlim=(0.5, len(differences) + 0.5), xticks=[1, *range(5, len(differences) + 1, 5)])
        ax.spines[["top", "right"]].set_visible(False)
    return upper
