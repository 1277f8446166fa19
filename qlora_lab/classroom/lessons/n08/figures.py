"""The figure of 08_your_data."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, ORANGE, VERMILION, fix_ticks, numbers_in


def plot_amounts(ax: Axes, exact: dict[str, dict[int, list[float]]], guess: Mapping[str, object] | None = None) -> Axes:
    """Share exactly right over the number of examples, a point a seed and a line through the means.

    exact: by split and number of examples, a share a seed. guess: by number of examples, the learner's for
    "test".
    """
    amounts = sorted(next(iter(exact.values())))
    for (split, shares), colour, style in zip(exact.items(), (BLUE, ORANGE), ("-o", "--s"), strict=True):
        means = [sum(shares[n]) / len(shares[n]) for n in amounts]
        ax.plot(amounts, means, style[:-1], color=colour, linewidth=1.5)
        points = [(n, share) for n in amounts for share in shares[n]]
        ax.plot(*zip(*points, strict=True), style[-1], color=colour, markersize=6, alpha=0.6, label=f"{split} orders")
    numbers = {int(n): share for n, share in numbers_in(guess).items()}
    if numbers:
        ax.plot(list(numbers), list(numbers.values()), "D", color=VERMILION, markersize=8, label="your guess (test)")
    ax.set(xscale="log", ylim=(0, 1.08), xlabel="examples trained on (log scale)", ylabel="exactly right")
    fix_ticks(ax.xaxis, amounts, [f"{n:,}" for n in amounts])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(frameon=False, loc="center right", title="mark: a seed; line: mean")
    return ax
