"""Figures of 03_number_formats."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import StepPatch

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks


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


def plot_codes(
    ax: Axes, levels: list[float], values: list[float], codes: list[int], guess: list[int] | None = None
) -> Axes:
    """Values on a number line, the levels that integer codes stand for, and the level that each value gets.

    levels: the value of code 0, 1, ... guess: the codes that the learner expects.
    """
    ax.vlines(levels, 0, 0.5, color=GREY, linewidth=1)
    for code, level in enumerate(levels):
        ax.text(level, -0.12, str(code), ha="center", va="top", fontsize=9, color="black" if code in codes else GREY)
    ax.text(levels[0], -0.62, "code", va="top", fontsize=9, color=GREY, ha="center")
    ax.hlines(0, levels[0], levels[-1], color=GREY, linewidth=1)
    ax.plot(values, [1.0] * len(values), "o", color=BLUE, label="value")
    for value, code in zip(values, codes, strict=True):
        ax.annotate("", (levels[code], 0.5), (value, 0.93), arrowprops={"arrowstyle": "->", "color": BLUE})
        ax.text(value, 1.16, f"{value:g}", ha="center", fontsize=9)
    if guess is not None:
        known = [int(code) for code in guess if 0 <= code < len(levels)]
        ax.plot([levels[code] for code in known], [0.25] * len(known), "D", color=VERMILION, label="your guess")
    ax.set(xlabel="value", ylim=(-1.0, 1.6), yticks=[])
    ax.spines["left"].set_visible(False)
    ax.legend(frameon=False, loc="upper center", ncols=2)
    return ax


def plot_snr(ax: Axes, decibels: dict[str, dict[int, float]], guess: tuple[int, float, str] | None = None) -> Axes:
    """Signal-to-noise ratio (dB) over bits, a line for each scheme.

    guess: bits, decibels and a text: what the learner expected, a diamond.
    """
    styles = [(BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (GREY, "v", ":")]
    for (name, line), (colour, marker, dash) in zip(decibels.items(), styles, strict=False):
        ax.plot(list(line), list(line.values()), color=colour, marker=marker, linestyle=dash, label=name)
    if guess is not None:
        ax.plot(*guess[:2], "D", color=VERMILION, markersize=8, label=guess[2])
    bits = sorted({b for line in decibels.values() for b in line})
    ax.set(xticks=bits, xlabel="bits per parameter", ylabel="signal-to-noise ratio (dB)")
    ax.grid(axis="y", linewidth=0.5, alpha=0.5)
    ax.legend(frameon=False, loc="lower right")
    return ax


def plot_error_over_bits(
    ax: Axes,
    curves: dict[str, list[tuple[float, float, str]]],
    points: Sequence[tuple[float, float, str]] = (),
    below=False,
) -> Axes:
    """Relative RMS error (log scale) over bits per parameter; every point of the first curve has a direct label.

    curves: name -> points (bits per parameter, error, label), connected. points: single ones, labelled too.
    below: put the first curve's labels below its points instead of above.
    """
    styles = [(BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-.")]
    for number, ((name, curve), (colour, marker, dash)) in enumerate(zip(curves.items(), styles, strict=False)):
        x, y, labels = zip(*curve, strict=True)
        ax.plot(x, y, color=colour, marker=marker, linestyle=dash, markersize=5, label=name)
        for at, label in zip(zip(x, y, strict=True), labels, strict=True):
            if number == 0 and label:
                shift = (0, -13) if below and label.isdigit() else (5, 3)
                ax.annotate(label, at, shift, textcoords="offset points", fontsize=8, color=colour)
    for bits, error, label in points:
        ax.plot(bits, error, "*", color=VERMILION, markersize=11)
        ax.annotate(label, (bits, error), (0, -17), textcoords="offset points", ha="center", fontsize=8)
    ax.set(yscale="log", xlabel="bits per parameter", ylabel="relative RMS error")
    ax.set(yticks=[0.03, 0.1, 0.3, 1, 3], yticklabels=["0.03", "0.1", "0.3", "1", "3"])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="upper right")
    return ax


def plot_scaled_values(ax: Axes, shares, edges, levels, title: str = "") -> Axes:
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
    fix_ticks(ax.xaxis, [-1, 0, 1], ["lowest\nlevel", "middle", "highest\nlevel"])
    fix_ticks(ax.yaxis, [-4, -2, 0], ["0.01 %", "1 %", "100 %"])
    ax.set_title(title, fontsize=10, loc="left")
    return ax


def plot_error_sizes(ax: Axes, shares, log_edges, relative_rms: float, title: str = "") -> Axes:
    """Histogram of |error| over the RMS of the tensor (log scales), with the relative RMS error as a line.

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
    ax.text(y=0.4, s="relative RMS", fontsize=9, color=VERMILION, **side)
    ax.set(xlim=(-4, 1.5), ylim=(-5, 0.8), ylabel="share of the values in a bin")
    ax.set(xlabel="size of the error / RMS of the tensor")
    fix_ticks(ax.xaxis, range(-4, 2), ["<0.0001", "", "0.01", "0.1", "1", "10"])
    fix_ticks(ax.yaxis, [-4, -2, 0], ["0.01 %", "1 %", "100 %"])
    ax.set_title(title, fontsize=10, loc="left")
    return ax


def plot_weight_histogram(ax: Axes, shares, edges, gaussian, largest: float) -> Axes:
    """Histogram (log scale) of weights in units of their standard deviation, beside a Gaussian's shares.

    largest: the weight farthest from 0, in the same units, pointed at.
    """
    ax.stairs(shares, edges, fill=True, color=BLUE, alpha=0.6, baseline=1e-9, label="embedding weights")
    ax.stairs(gaussian, edges, color=VERMILION, linestyle="--", linewidth=1.5, baseline=None, label="a Gaussian")
    arrow = {"arrowstyle": "->", "color": "black"}
    ax.annotate(f"farthest: {largest:.1f}", (largest, 3e-7), (largest, 3e-5), ha="center", arrowprops=arrow)
    ax.set(yscale="log", ylim=(1e-7, 1), xlim=(-16, 16), xlabel="weight / standard deviation")
    ax.set(ylabel="share of the values in a bin")
    ax.legend(frameon=False, loc="upper left")
    return ax
