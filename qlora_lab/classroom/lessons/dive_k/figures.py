"""Figures of dive_k_to_the_last_bit."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREY, VERMILION


def plot_table(ax: Axes, levels: list[float], grid: list[float], number: float) -> Axes:
    """A number between two levels, and the grid points of a table: each points to its nearest level.

    levels: the two, ascending. grid: the points, ascending. number: what is looked up.
    """
    low, high = levels
    for level, name in zip(levels, ("lower level", "upper level"), strict=True):
        ax.axvline(level, color=BLUE, linewidth=2)
        ax.text(level, 1.5, name, color=BLUE, ha="center", bbox={"color": "white"})
    ax.axvline((low + high) / 2, color=GREY, linestyle=":")
    ax.text((low + high) / 2, 1.5, "middle", color=GREY, ha="center", bbox={"color": "white"})
    nearest = min(grid, key=lambda point: abs(point - number))
    for point in grid:
        target = low if point <= (low + high) / 2 else high
        ax.plot(point, 0, "|", color=VERMILION if point == nearest else GREY, markersize=14)
        style = {"arrowstyle": "->", "color": VERMILION if point == nearest else GREY}
        ax.annotate("", (target, 0.35), (point, 0.1), arrowprops=style)
    ax.plot(number, 0, "o", color=VERMILION)
    ax.annotate("the number", (number, 0), (-8, -18), textcoords="offset points", color=VERMILION, ha="right")
    ax.set(ylim=(-0.9, 1.9), yticks=[], xlabel="number that is looked up (grid steps)")
    ax.spines["left"].set_visible(False)
    return ax


def plot_misses(ax: Axes, farther: list[float]) -> Axes:
    """A histogram: how much farther from its number than the nearest level a chosen one is."""
    millionths = [1e6 * distance for distance in farther]
    ax.hist(millionths, bins=list(range(41)), color=BLUE, edgecolor="white")
    ax.set(xlabel="farther than the nearest level (millionths)", ylabel="scales", xlim=(0, 40))
    return ax
