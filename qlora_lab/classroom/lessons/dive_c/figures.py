"""Figures of dive_c_small_differences."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, is_number


def plot_experiments(ax: Axes, intervals: list[tuple[float, float]], truth: float, limit: float) -> Axes:
    """A vertical bar for each experiment's interval, from (mean, half): those that miss the truth are red and dashed.

    limit: the axis ends so far from the truth, on both sides.
    """
    for kind, colour, style in (("holds the truth", BLUE, "-"), ("misses it", VERMILION, "--")):
        chosen = [i for i, (mean, half) in enumerate(intervals) if (abs(mean - truth) > half) == (colour == VERMILION)]
        lows, highs = ([intervals[i][0] + sign * intervals[i][1] for i in chosen] for sign in (-1, 1))
        ax.vlines(chosen, lows, highs, color=colour, linestyle=style, linewidth=2, label=kind)
        ax.plot(chosen, [intervals[i][0] for i in chosen], ".", color=colour, markersize=4)
    ax.axhline(truth, color="black", linewidth=1)
    ax.set(xlabel="experiment", ylabel="mean and interval", ylim=(truth - limit, truth + limit))
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=9)
    return ax


def plot_looks(ax: Axes, shares: list[float], guess: object = None) -> Axes:
    """Share of experiments with a false alarm so far, over the number of seeds, from 2 on; the guess as a line."""
    seeds = range(2, 2 + len(shares))
    ax.plot(seeds, shares, "-o", color=VERMILION, markersize=5, label="a look after every seed")
    ax.axhline(0.05, color=BLUE, linestyle="--", label="one look, at a number fixed beforehand")
    if is_number(guess):
        ax.axhline(guess / 100, color=GREY, linestyle=":", label="your guess")
    ax.set(xlabel="seeds", ylabel="share with a false alarm", ylim=(0, 1.25 * max(shares)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(edgecolor="none", framealpha=1)  # a guess may lie behind it
    return ax


def plot_seeds(axes: list[Axes], pairs: dict[str, tuple[list[float], list[float]]], ylabel: str) -> Axes:
    """A panel for each pair of methods: a line for each seed, from its score with the first to that with the second.

    pairs: by "first | second", the scores of both. Lines that rise are dashed.
    """
    styles: dict[str, tuple[str, Any]] = {"rises": (BLUE, "--"), "stays": (GREY, "-"), "falls": (VERMILION, "-")}
    for ax, (names, (first, second)) in zip(axes, pairs.items(), strict=True):
        for a, b in zip(first, second, strict=True):
            colour, style = styles["rises" if b > a else "falls" if b < a else "stays"]
            ax.plot([0, 1], [a, b], color=colour, linestyle=style, marker="o", markersize=4, linewidth=1.5)
        ax.set_xlim(-0.25, 1.25)
        ax.set_xticks([0, 1], names.split(" | "))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    handles = [Line2D([], [], color=colour, linestyle=style, label=name) for name, (colour, style) in styles.items()]
    axes[0].figure.legend(handles=handles, frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    return axes[0]


def plot_repairs(axes: list[Axes], gaps: dict[str, dict[str, tuple[float, float]]]) -> Axes:
    """A panel for each text, a row for each base: its distance to 16 bits before training (ring) and after (dot)."""
    for ax, (text, by_base) in zip(axes, gaps.items(), strict=True):
        ax.axvline(0, color="black", linewidth=1)
        for row, (before, after) in enumerate(by_base.values()):
            arrow = {"arrowstyle": "-|>", "color": GREEN if after < before else VERMILION, "linewidth": 2}
            ax.annotate("", (after, row), (before, row), arrowprops=arrow)
            style = {"markerfacecolor": "white", "markersize": 8, "markeredgewidth": 2, "linestyle": "none"}
            ax.plot([before], [row], "o", color=ORANGE, label="before training" if row == 0 else None, **style)
            ax.plot([after], [row], "o", color=BLUE, label="after" if row == 0 else None, linestyle="none")
            for value, other in ((before, after), (after, before)):  # away from one another, and from the line at 0
                right = 0.05 < value < other
                shift = (8 if right else 3 if value < 0.05 else -8, 7)
                side = "right" if right else "left"
                number = f"{value:.{3 if value < 0.1 else 2}f}"
                ax.annotate(number, (value, row), shift, textcoords="offset points", ha=side, va="bottom", fontsize=9)
        ax.set(ylim=(len(by_base) - 0.6, -0.6), xlim=(-0.06, 0.55), xlabel=f"nats above the bf16 base, {text}")
        ax.set_yticks(range(len(by_base)), list(by_base), fontsize=9)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=9)
    axes[1].set_yticklabels([])
    return axes[0]
