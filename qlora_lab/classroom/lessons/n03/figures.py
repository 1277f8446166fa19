"""Figures of 03_number_formats."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import StepPatch

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks, is_number


def plot_float_bits(ax: Axes, bits: dict[str, tuple[str, str, str, str]]) -> Axes:
    """Bits of one number in several floating-point formats, a row each, boxes coloured and labelled by what they mean.

    bits: format -> sign, exponent and mantissa as strings of 0 and 1, and the value that they stand for.
    """
    for row, (*parts, value) in enumerate(bits.values()):
        at = 0
        for part, colour, name in zip(parts, (ORANGE, BLUE, GREEN), ("sign", "exponent", "mantissa"), strict=True):
            boxes = [(at + i + 0.04, 0.92) for i in range(len(part))]
            ax.broken_barh(boxes, (row - 0.25, 0.5), facecolor=f"{colour}44", edgecolor=colour, linewidth=0.8)
            label = name if len(part) == 1 else f"{name}: {len(part)}"
            ax.text(at + len(part) / 2, row - 0.3, label, ha="center", va="bottom", fontsize=8)
            for i, bit in enumerate(part):
                ax.text(at + i + 0.5, row, bit, ha="center", va="center", fontsize=9, family="monospace")
            at += len(part)
        ax.text(at + 0.6, row, value, va="center", fontsize=9)
    ax.set(yticks=range(len(bits)), yticklabels=list(bits), xlim=(0, 38.5), ylim=(len(bits) - 0.6, -0.65), xticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(left=False)
    return ax


def plot_codes(ax: Axes, scale: float, values: list[float], codes: list[int], guess: object = None) -> Axes:
    """Values on a number line, the marks of an absmax ruler from code -7 to 7, and the mark that each value gets.

    scale: the distance between two marks. guess: a list of the codes that the learner expects; what is not a code is
    left out.
    """
    marks = range(-7, 8)
    ax.vlines([scale * code for code in marks], 0, 0.5, color=GREY, linewidth=1)
    ax.hlines(0, -7 * scale, 7 * scale, color=GREY, linewidth=1)
    for code in marks:
        colour = "black" if code in codes else GREY
        ax.text(scale * code, -0.12, f"{code}".replace("-", "−"), ha="center", va="top", fontsize=9, color=colour)
    ax.text(-7.6 * scale, -0.12, "code", va="top", ha="right", fontsize=9, color=GREY)
    ax.plot(values, [1.0] * len(values), "o", color=BLUE, label="number")
    for value, code in zip(values, codes, strict=True):
        ax.annotate("", (scale * code, 0.5), (value, 0.93), arrowprops={"arrowstyle": "->", "color": BLUE})
        ax.text(value, 1.16, f"{value:.2f}".replace("-", "−"), ha="center", fontsize=9)
    known = [code for code in guess if code in marks] if isinstance(guess, list | tuple) else []
    if known:
        ax.plot([scale * code for code in known], [0.25] * len(known), "D", color=VERMILION, label="your guess")
    ax.set(xlabel="number", xlim=(-9 * scale, 9 * scale), ylim=(-0.7, 1.7), yticks=[])
    ax.spines["left"].set_visible(False)
    ax.legend(frameon=False, loc="upper right")
    return ax


def plot_error_by_bits(ax: Axes, error: dict[int, float], guess: object = None) -> Axes:
    """Relative error (log scale) over the bits of a code. guess: times the error of 8 bits, a diamond at 4 bits."""
    ax.plot(list(error), list(error.values()), "-o", color=BLUE)
    for bits, value in error.items():
        ax.annotate(f"{value:.3f}", (bits, value), (5, 5), textcoords="offset points", fontsize=9)
    if is_number(guess) and guess > 0:
        ax.plot(
            4, error[8] * guess, "D", color=VERMILION, markersize=8, label=f"your guess: {guess:g} × that of 8 bits"
        )
        ax.legend(frameon=False, loc="upper right")
    ax.set(
        yscale="log", xlabel="bits of a code", ylabel="relative error (log scale)", xlim=(1.8, 8.7), ylim=(0.007, 1.8)
    )
    fix_ticks(ax.yaxis, [0.01, 0.03, 0.1, 0.3, 1], ["0.01", "0.03", "0.1", "0.3", "1"])
    ax.minorticks_off()
    return ax


def plot_blocks(
    ax: Axes, curves: dict[str, list[tuple[float, float, str]]], stars: dict[str, list[tuple[float, float, str]]]
) -> Axes:
    """Relative error (log scale) over bits per parameter: 4-bit codes in ever smaller blocks, and longer codes.

    curves: for each tensor its points (bits per parameter, error, label), connected, for ever smaller blocks. stars:
    for the same tensors, longer codes with one scale.
    """
    places = {"va": "bottom", "xytext": (3, 5)}, {"va": "top", "xytext": (-3, -6), "ha": "right"}
    for name, colour, marker, dash, place in zip(curves, (VERMILION, BLUE), "so", ("--", "-"), places, strict=True):
        x, y, labels = zip(*curves[name], strict=True)
        ax.plot(x, y, color=colour, marker=marker, linestyle=dash, markersize=5, label=": ".join((name, "blocks")))
        longer_x, longer_y, longer = zip(*stars[name], strict=True)
        ax.plot(longer_x, longer_y, "*", color=colour, markersize=12, label=": ".join((name, "one scale")))
        for bits, error, label in zip(x, y, labels, strict=True):
            starred = place["va"] == "top" and bits in longer_x  # a star stands below: its label beside, not upon it
            at = {"va": "center", "xytext": (-9, -5), "ha": "right"} if starred else place
            ax.annotate(label, (bits, error), textcoords="offset points", fontsize=8, color=colour, **at)
        for point in zip(longer_x, longer_y, longer, strict=True):
            ax.annotate(point[2], point[:2], (0, -16), textcoords="offset points", ha="center", fontsize=8)
    ax.set(yscale="log", xlabel="bits per parameter", ylabel="relative error (log scale)")
    ax.set(xlim=(3.7, 6.3), ylim=(0.025, 2))
    fix_ticks(ax.yaxis, [0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1, 0.5))
    return ax


def draw_scaled_values(ax: Axes, shares, edges, levels, title: str = "") -> Axes:
    """Histogram (share of the values in each bin, log scale) of scaled values, and the levels as ticks below it.

    Made for sliders: log10 on linear axes and a bare StepPatch cost half as much time as log axes and `ax.stairs`.
    """
    ax.add_artist(
        StepPatch(
            np.log10(np.maximum(np.asarray(shares), 1e-5)),
            edges,
            baseline=-5,
            fill=True,
            linewidth=0,
            color=BLUE,
            alpha=0.6,
        )
    )
    thin = {"markersize": 22, "markeredgewidth": min(1, 60 / len(levels)), "color": VERMILION}
    ax.plot(levels, [-5.8] * len(levels), "|", **thin)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlim=(-1.05, 1.05), ylim=(-6.5, 0.3), ylabel="share of the values in a bin")
    fix_ticks(ax.xaxis, [-1, 0, 1], ["lowest\nmark", "middle", "highest\nmark"])
    fix_ticks(ax.yaxis, [-4, -2, 0], ["0.01 %", "1 %", "100 %"])
    ax.set_title(title, fontsize=10, loc="left")
    return ax


def draw_error_sizes(ax: Axes, shares, log_edges, relative_rms: float, title: str = "") -> Axes:
    """Histogram of |error| over the RMS of the tensor (log scales), with the relative error as a line.

    The first bin holds all smaller errors too. log_edges: log10 of the bins' edges.
    """
    ax.add_artist(
        StepPatch(
            np.log10(np.maximum(np.asarray(shares), 1e-5)),
            log_edges,
            baseline=-5,
            fill=True,
            linewidth=0,
            color=ORANGE,
            alpha=0.7,
        )
    )
    ax.spines[["top", "right"]].set_visible(False)
    at = np.log10(relative_rms)
    ax.plot([at, at], [-5, 0.8], color=VERMILION, linestyle="--", linewidth=1.5)
    side = {"ha": "right", "x": at - 0.06} if at > -1.5 else {"ha": "left", "x": at + 0.06}
    ax.text(y=0.4, s="relative error", fontsize=9, color=VERMILION, **side)
    ax.set(xlim=(-4, 1.5), ylim=(-5, 0.8), ylabel="share of the values in a bin")
    ax.set_xlabel("size of the error / typical size of the numbers", fontsize=9)  # else it is cut off at the right
    fix_ticks(ax.xaxis, range(-4, 2), ["<0.0001", "", "0.01", "0.1", "1", "10"])
    fix_ticks(ax.yaxis, [-4, -2, 0], ["0.01 %", "1 %", "100 %"])
    ax.set_title(title, fontsize=10, loc="left")
    return ax


def plot_weight_histogram(ax: Axes, shares, edges, gaussian, farthest: float) -> Axes:
    """Histogram (log scale) of weights in units of their standard deviation, beside a Gaussian's shares.

    farthest: the weight farthest from 0, in the same units, pointed at.
    """
    ax.stairs(shares, edges, fill=True, color=BLUE, alpha=0.6, baseline=1e-10, label="weights")
    ax.stairs(gaussian, edges, color=VERMILION, linestyle="--", linewidth=1.5, baseline=None, label="a Gaussian")
    arrow = {"arrowstyle": "->", "color": "black"}
    ax.annotate(
        f"farthest: {farthest:.0f}".replace("-", "−"),
        (farthest, 2e-8),
        (farthest - 2, 3e-6),
        ha="left",
        arrowprops=arrow,
    )
    far = max(20.0, 1.12 * abs(farthest))
    ax.set(yscale="log", ylim=(3e-9, 1), xlim=(-far, far), xlabel="weight / standard deviation of its matrix")
    ax.set(ylabel="share of the weights in a bin")
    ax.legend(frameon=False, loc="upper right")
    return ax
