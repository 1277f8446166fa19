"""Figures of 11_accuracy_comparison."""

import itertools

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREY, ORANGE, VERMILION, stacked


def plot_runs(axes: list[Axes], scores: dict[str, dict[str, list[float]]], labels: dict[str, str]) -> Axes:
    """A panel for each score, a row for each method: a ring for each seed, the mean below as a diamond.

    scores: by name of the score and method, one value for each seed. labels: by method, what stands at its row.
    """
    for ax, (score, by_method) in zip(axes, scores.items(), strict=True):
        for row, (method, values) in enumerate(by_method.items()):
            colour, base = (GREY, "16 or 32 bits") if method.startswith("lora") else (BLUE, "4 bits")
            style = {"color": colour, "markerfacecolor": "none", "markersize": 5, "label": f"a seed, base in {base}"}
            ax.plot(values, stacked(values, row, 0.17), "o", **style)
            ax.plot([sum(values) / len(values)], [row + 0.28], "D", color=VERMILION, markersize=6, label="mean")
        ax.set(ylim=(len(by_method) - 0.5, -0.6), xlabel=score)
        ax.set_yticks(range(len(by_method)), [labels[method] for method in by_method], fontsize=9)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))  # each label once
    axes[0].figure.legend(named.values(), named, frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    return axes[0]


def plot_answers(ax: Axes, dense: list[list[int]], few_bits: list[list[int]], order: list[int]) -> Axes:
    """A mark for each order (x) and seed (y) where not both methods are right.

    dense, few_bits: for each seed a 1 for each right answer, with a 16-bit base and with NF4. order: the orders shown.
    """
    cases = {"lost with NF4": (1, 0), "gained with NF4": (0, 1), "wrong with both": (0, 0)}
    styles = [("v", VERMILION), ("^", BLUE), ("x", GREY)]
    shown = list(itertools.product(range(len(dense)), enumerate(order)))
    for (name, case), (marker, colour) in zip(cases.items(), styles, strict=True):
        places = [(place, seed) for seed, (place, i) in shown if (dense[seed][i], few_bits[seed][i]) == case]
        x, y = zip(*places, strict=True) if places else ([], [])
        ax.plot(x, y, marker, color=colour, markersize=6, linestyle="none", label=name)
    ax.set(xlim=(-1, len(order)), ylim=(len(dense) - 0.5, -0.5), yticks=range(len(dense)), ylabel="seed")
    ax.set_xlabel("orders that at least one of the adapters gets wrong, hardest first")
    ax.grid(axis="y", color="0.92")
    ax.set_axisbelow(True)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=9)
    return ax


def plot_coins(ax: Axes, heads: dict[str, list[int]]) -> Axes:
    """How often a number of heads came up: a histogram for each way to toss, a bar around each sixth number.

    A number between two bars counts half in each: so fair coins, heads and tails alike, give a symmetric picture.
    """
    bins = range(-3, 64, 6)
    for (name, counts), (colour, style) in zip(heads.items(), [(BLUE, "-"), (ORANGE, "--")], strict=True):
        halves = [count + side for count in counts for side in (-0.5, 0.5)]
        share = [1 / len(halves)] * len(halves)
        ax.hist(halves, bins, weights=share, histtype="step", color=colour, linestyle=style, linewidth=2, label=name)
    ax.set(xlabel="heads among 60 coins", ylabel="share of 10,000 tosses", xlim=(-3, 63), xticks=range(0, 61, 6))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(frameon=False)
    return ax
