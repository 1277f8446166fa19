"""Figures of 05_double_quantization."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION


def plot_stacked(
    ax: Axes,
    rows: dict[str, dict[str, float]],
    xlabel: str,
    ends: dict[str, str] | None = None,
    guess: dict[str, float] | None = None,
    legend: bool = True,
) -> Axes:
    """Horizontal bars of parts laid end to end; the outer keys are the bars, the inner ones the parts.

    ends: a text after a bar. guess: the learner's value for some of the bars, a diamond each.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    styles = [(BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (GREY, "xx")]
    left = dict.fromkeys(rows, 0.0)
    for part, (colour, hatch) in zip(parts, styles, strict=False):
        sizes = [row.get(part, 0) for row in rows.values()]
        ax.barh(list(rows), sizes, 0.6, list(left.values()), color=colour, hatch=hatch, edgecolor="white", label=part)
        left = {row: left[row] + size for row, size in zip(rows, sizes, strict=True)}
    for row, text in (ends or {}).items():
        ax.annotate(text, (left[row], row), (5, 0), textcoords="offset points", va="center", fontsize=9)
    if guess:
        ax.plot(list(guess.values()), list(guess), "D", color=VERMILION, markersize=9, label="your guess")
    ax.set(xlabel=xlabel, xlim=(0, 1.25 * max([*left.values(), *(guess or {}).values()])))
    ax.invert_yaxis()
    if legend and (len(parts) > 1 or guess):
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    return ax


def plot_scale_histograms(ax: Axes, histograms: dict[str, tuple], xlabel: str) -> Axes:
    """Outlines of histograms. histograms: by name, the height of each bin and the bins' edges, one more."""
    for (name, (heights, edges)), (colour, style) in zip(
        histograms.items(), [(BLUE, "-"), (VERMILION, "--"), (GREEN, ":")], strict=False
    ):
        ax.stairs(heights, edges, color=colour, linestyle=style, linewidth=1.8, label=name)
    ax.set(xlabel=xlabel, ylabel="density", ylim=(0, None))
    ax.legend(frameon=False)
    return ax


def plot_code_levels(ax: Axes, codes: dict[str, list[float]], xlabel: str) -> Axes:
    """Every level of some codes as a stroke; one row per code."""
    ax.eventplot(
        list(codes.values()),
        lineoffsets=range(len(codes)),
        linelengths=0.7,
        linewidths=0.7,
        colors=[BLUE, VERMILION, GREEN][: len(codes)],
    )
    ax.set(yticks=range(len(codes)), yticklabels=list(codes), ylim=(len(codes) - 0.5, -0.5), xlabel=xlabel)
    return ax


def plot_step_sizes(ax: Axes, steps: dict[str, tuple], histogram: tuple, xlabel: str) -> Axes:
    """Distances between neighbouring levels (log scale), over a grey histogram of the numbers to be quantized.

    steps: by code, the distances and the levels, one more. histogram: the height of each bin and the bins' edges.
    """
    behind = ax.twinx()
    behind.stairs(*histogram, color=GREY, alpha=0.3, fill=True)
    behind.set(yticks=[], ylim=(0, 1.15 * max(histogram[0])))
    behind.spines[:].set_visible(False)
    for (name, (sizes, edges)), (colour, style) in zip(steps.items(), [(BLUE, "-"), (VERMILION, "--")], strict=False):
        ax.stairs(sizes, edges, baseline=None, color=colour, linestyle=style, linewidth=1.8, label=name)
    ax.set(xlabel=xlabel, ylabel="step to the next level (log scale)", yscale="log", xlim=(-1, 1), ylim=(2e-4, 4e-2))
    ax.set_zorder(behind.get_zorder() + 1)
    ax.patch.set_visible(False)
    ax.legend(frameon=False, loc="lower left")
    return ax


def plot_block_costs(
    ax: Axes, curves: dict[str, list[tuple]], point: tuple[float, float] | None = None, sparse: bool = False
) -> Axes:
    """Relative RMS error over bits per parameter, a dot for each block size.

    curves: by name, (bits per parameter, error, block size) of each dot: the cheapest curve is labelled.
    point: bits and error to be ringed. sparse: no block sizes, names in place of the legend: quicker to draw.
    """
    styles = [(VERMILION, "--", "s"), (BLUE, "-", "o"), (GREEN, ":", "^")]
    for (name, dots), (colour, style, marker) in zip(curves.items(), styles, strict=False):
        bits, errors, _ = zip(*dots, strict=True)
        ax.plot(bits, errors, color=colour, linestyle=style, marker=marker, markersize=5, label=name)
        if sparse:
            below = {"xytext": (8, -20), "textcoords": "offset points", "ha": "right"}
            ax.annotate(name, (bits[0], errors[0]), color=colour, fontsize=9, **below)
    for bit, error, size in [] if sparse else min(curves.values(), key=lambda dots: dots[0][0]):
        ax.annotate(f"{size}", (bit, error), (-5, -6), textcoords="offset points", ha="right", va="center", fontsize=9)
    if point:
        ax.plot(*point, "o", markersize=15, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2)
    ax.set(xlabel="bits per parameter", ylabel="relative RMS error", xlim=(3.9, None))
    ax.margins(y=0.1)  # room for the lowest block size
    if not sparse:
        ax.legend(frameon=False, loc="upper right")
    return ax


def plot_restored(axes: list[Axes], scales: list[float], errors: dict[str, list[float]]) -> list[Axes]:
    """A panel for each of several restorations: the error of every scale over the scale."""
    for ax, (name, values) in zip(axes, errors.items(), strict=True):
        ax.axhline(0, color=VERMILION, linestyle="--", linewidth=1)
        ax.plot(scales, values, ".", color=BLUE, markersize=2)
        ax.set(title=name, xlabel="scale")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("restored minus scale")
    return axes
