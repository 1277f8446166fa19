"""Figures of 11_accuracy_comparison."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION


def stacked(values: list[float], row: float, step: float) -> list[float]:
    """A height for each value: that of the row, and a step higher for each equal one before it; half a row at most."""
    step = min(step, 0.5 / max(map(values.count, values), default=1))
    return [row - step * values[:i].count(value) for i, value in enumerate(values)]


def plot_runs(
    axes: list[Axes],
    scores: dict[str, dict[str, list[float]]],
    intervals: dict[str, dict[str, tuple[float, float]]],
    labels: dict[str, str],
) -> Axes:
    """A panel for each score, a row for each method: a ring for each seed, mean and interval below as a bar.

    scores: by name of the score and method, one value for each seed. intervals: mean and half the interval's width.
    labels: by method, what stands at its row.
    """
    axes = list(axes)
    for ax, (score, by_method) in zip(axes, scores.items(), strict=True):
        for row, (method, values) in enumerate(by_method.items()):
            mean, half = intervals[score][method]
            colour, base = (GREY, "16 or 32 bits") if method.startswith("lora") else (BLUE, "4 bits")
            style = {"color": colour, "markerfacecolor": "none", "markersize": 5, "label": f"a seed, base in {base}"}
            ax.plot(values, stacked(values, row, 0.17), "o", **style)
            style = {"color": VERMILION, "markersize": 5, "capsize": 3, "label": "mean and 95 % interval"}
            ax.errorbar([mean], [row + 0.26], xerr=[half], fmt="D", **style)
        ax.set(ylim=(len(by_method) - 0.5, -0.5), xlabel=score)
        ax.set_yticks(range(len(by_method)), [labels[method] for method in by_method], fontsize=9)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))  # each label once
    axes[0].figure.legend(named.values(), named, frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    return axes[0]


def plot_seeds(axes: list[Axes], pairs: dict[str, tuple[list[float], list[float]]], ylabel: str) -> Axes:
    """A panel for each pair of methods: a line for each seed, from its score with the first to that with the second.

    pairs: by "first | second", the scores of both. Lines that rise are dashed.
    """
    for ax, (names, (first, second)) in zip(axes, pairs.items(), strict=True):
        for a, b in zip(first, second, strict=True):
            colour, style = (BLUE, "--") if b > a else (VERMILION, "-") if b < a else (GREY, "-")
            ax.plot([0, 1], [a, b], color=colour, linestyle=style, marker="o", markersize=4, linewidth=1.5)
        ax.set_xlim(-0.25, 1.25)
        ax.set_xticks([0, 1], names.split(" | "))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    return axes[0]


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
    lies outside the limits is drawn as an arrow at the edge. A figure without notes, a static one, has a legend.
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
    for ends, edge, arrow in ((lows, left, "<"), (highs, right, ">")):
        for marker, beyond in (("|", False), (arrow, True)):
            chosen = [(end, row) for end, row in zip(ends, rows, strict=True) if (end == edge) == beyond]
            if chosen:
                ax.plot(*zip(*chosen, strict=True), marker, color=BLUE, markersize=9, markeredgewidth=2)
    ax.plot(means, rows, "D", color=VERMILION, markersize=6, zorder=3, label="mean")
    for row, note in enumerate(notes or ()):
        ax.text(0.99, row, note, transform=ax.get_yaxis_transform(), va="center", ha="right")
    if notes is None:
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=9)
    ax.set(ylim=(len(intervals) - 0.5, -0.7), xlim=limits, xlabel=xlabel)
    ax.set_yticks(range(len(intervals)), list(intervals), fontsize=9)
    ax.tick_params(axis="y", length=0)
    return ax


def plot_answers(ax: Axes, kinds: dict[str, list[tuple[int, int]]], seeds: int) -> Axes:
    """A mark for each order (x) and seed (y) where not both methods are right.

    kinds: by what happened, pairs of the order's place and the seed; at most three.
    """
    styles = [("v", VERMILION), ("^", BLUE), ("x", GREY)]
    for (name, places), (marker, colour) in zip(kinds.items(), styles, strict=False):
        x, y = zip(*places, strict=True) if places else ([], [])
        ax.plot(x, y, marker, color=colour, markersize=6, linestyle="none", label=name)
    last = max(x for places in kinds.values() for x, _ in places)
    ax.set(xlim=(-1, last + 1), ylim=(seeds - 0.5, -0.5), yticks=range(seeds), ylabel="seed")
    ax.set_xlabel("orders that at least one of the adapters gets wrong, hardest first")
    ax.grid(axis="y", color="0.92")
    ax.set_axisbelow(True)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=9)
    return ax


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
