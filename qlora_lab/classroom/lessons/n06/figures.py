"""Figures of 06_lora."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from qlora_lab.classroom.plots import BLUE, GREEN, ORANGE, VERMILION, draw_matrix, fix_ticks


def plot_sum(weight: Tensor, column: Tensor, row: Tensor) -> Axes:
    """Above: column × row = update. Below: weight + update. Tables of whole numbers in coloured squares."""
    update = column[:, None] * row
    above = [(column[:, None], "column", ""), (row[None, :], "row", "×"), (update, "update", "=")]
    below = [(weight, "W, frozen", ""), (update, "update", "+"), (weight + update, "what the layer does now", "=")]
    _, axes = plt.subplots(2, 3, figsize=(7.4, 5), layout="constrained")
    for ax, (matrix, title, sign) in zip(axes.flat, above + below, strict=True):
        draw_matrix(ax, matrix, 6, title=title)
        ax.set_ylabel(sign, rotation=0, fontsize=16, va="center", labelpad=12)
    return axes[-1, -1]


def plot_found(wanted: Tensor, found: Tensor) -> Axes:
    """Two matrices side by side: the update that was missing, and the one that was learned."""
    _, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    draw_matrix(axes[0], wanted, 6, decimals=1, title="the update that was missing")
    return draw_matrix(axes[1], found, 6, decimals=1, title="alpha / r · B A, after training")


def plot_chances(ax: Axes, chances: dict[str, float]) -> Axes:
    """Horizontal bars: the probability (0 to 1) of one word after each text."""
    at = list(range(len(chances)))
    drawn = ax.barh(at, list(chances.values()), 0.65, color=BLUE)
    ax.bar_label(drawn, [f"{chance:.0%}" for chance in chances.values()], padding=3, fontsize=9)
    fix_ticks(ax.yaxis, at, [f"{text} …" for text in chances])
    fix_ticks(ax.xaxis, [0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    ax.set(xlim=(0, 1.1), ylim=(len(at) - 0.5, -0.5), xlabel="probability of Rome as the next word")
    return ax


def plot_runs(ax: Axes, runs: dict[str, list[float]], ylabel: str) -> Axes:
    """Losses (log scale) over optimizer steps, from step 1; the first run wide and pale, the others on top."""
    styles = [("#9FC5DF", "-", 6), (VERMILION, "--", 1.8), (GREEN, ":", 2.2), (ORANGE, "-.", 1.8)]
    for (name, losses), (colour, style, width) in zip(runs.items(), styles, strict=False):
        ax.plot(range(1, len(losses) + 1), losses, color=colour, linestyle=style, linewidth=width, label=name)
    ax.set(xlabel="optimizer step", ylabel=ylabel, yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1,)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.legend(frameon=False, fontsize=9)
    return ax
