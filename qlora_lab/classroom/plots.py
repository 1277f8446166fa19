"""Figures of the course: data in, matplotlib Axes out. Nothing is computed here that a lesson speaks about.

Colours are Okabe and Ito's, which the colour-blind can tell apart, and no figure tells anything by colour alone: lines
differ in dashes, bars in hatching or labels.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator, NullLocator
from matplotlib.patches import StepPatch

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"


def new_axes(width: float = 8.0, height: float = 3.6) -> Axes:
    """Axes of a figure in the course's size (inches), legible at a notebook's width."""
    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_loss(ax: Axes, losses: list[float], steps: int, guess: int | None = None, threshold: float = 0.1) -> Axes:
    """Training loss (nats per token, log scale) over optimizer steps, from step 1.

    guess: the step at which the learner expects the loss below `threshold`: a dashed line.
    """
    ax.plot(range(1, len(losses) + 1), losses, color=BLUE, marker="o", markersize=4, label="loss of the step's samples")
    ax.axhline(threshold, color=GREY, linewidth=1, linestyle=":")
    if guess is not None:
        ax.axvline(guess, color=VERMILION, linestyle="--", label=f"your guess: below {threshold:g} at step {guess}")
    ax.set(xlim=(0.5, steps + 0.5), xlabel="optimizer step", ylabel="loss (nats per token)", yscale="log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.legend(frameon=False)
    return ax


def plot_shares(ax: Axes, shares: dict[str, dict[str, float]], xlabel: str) -> Axes:
    """Grouped horizontal bars of shares between 0 and 1; the outer keys are the groups, the inner ones the bars."""
    bars = list(next(iter(shares.values())))
    styles = [(BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (GREY, "xx")]
    height = 0.8 / len(bars)
    for i, (bar, (colour, hatch)) in enumerate(zip(bars, styles, strict=False)):
        at = [group + (i - (len(bars) - 1) / 2) * height for group in range(len(shares))]
        values = [group[bar] for group in shares.values()]
        drawn = ax.barh(at, values, height * 0.92, color=colour, hatch=hatch, edgecolor="white", label=bar)
        ax.bar_label(drawn, [f"{value:.0%}" for value in values], padding=3, fontsize=9)
    ax.set(yticks=range(len(shares)), yticklabels=list(shares), xlim=(0, 1.1), xlabel=xlabel)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.invert_yaxis()
    if len(bars) > 1:
        ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(bars))
    return ax


def plot_times(ax: Axes, milliseconds: dict[str, float], guess: dict[str, float] | None = None) -> Axes:
    """Horizontal bars of times on a log scale, and the learner's guesses as diamonds."""
    names = list(milliseconds)
    drawn = ax.barh(names, list(milliseconds.values()), 0.6, color=BLUE)
    ax.bar_label(drawn, [f"{value:.3g} ms" for value in milliseconds.values()], padding=4)
    if guess:
        ax.plot([guess[n] for n in guess], list(guess), "D", color=VERMILION, markersize=9, label="your guess")
        ax.legend(frameon=False)
    everything = [*milliseconds.values(), *(guess or {}).values()]
    ax.set(xscale="log", xlabel="time (ms, log scale)", xlim=(min(everything) / 3, max(everything) * 6))
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.invert_yaxis()
    return ax


def plot_weights(ax: Axes, gigabytes: dict[str, float], memory: dict[str, float]) -> Axes:
    """Horizontal bars of a model's weights (GB, 10^9 bytes) by format, and lines for the memory there is."""
    drawn = ax.barh(list(gigabytes), list(gigabytes.values()), 0.6, color=BLUE)
    ax.bar_label(drawn, [f"{value:.3g} GB" for value in gigabytes.values()], padding=4)
    for (name, size), style in zip(memory.items(), ["--", ":"], strict=False):
        ax.axvline(size, color=VERMILION, linestyle=style, label=f"{name}: {size:.1f} GB")
    ax.set(xlabel="weights (GB, 10$^9$ bytes)", xlim=(0, 1.25 * max([*gigabytes.values(), *memory.values()])))
    ax.invert_yaxis()
    ax.legend(frameon=False, loc="lower right")
    return ax


def plot_codebooks(ax: Axes, codebooks: dict[str, list[float]]) -> Axes:
    """Number lines from -1 to 1, one below the other, with a tick for each level and a ring around an exact zero."""
    for row, (_name, levels) in enumerate(codebooks.items()):
        ax.plot([-1, 1], [row, row], color=GREY, linewidth=0.8)
        ax.plot(levels, [row] * len(levels), "|", color=BLUE, markersize=18, markeredgewidth=2)
        if 0 in list(levels):
            ax.plot(0, row, "o", color=VERMILION, markersize=11, markerfacecolor="none", markeredgewidth=1.6)
    names = [f"{name}  ({len(set(map(float, levels)))})" for name, levels in codebooks.items()]
    ax.set(yticks=range(len(names)), yticklabels=names, xlim=(-1.06, 1.06), ylim=(len(names) - 0.4, -0.6))
    ax.set(xlabel="level (share of the block's absmax); ring: an exact zero; in brackets: different levels")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax


def plot_histogram(ax: Axes, shares: dict[str, np.ndarray], edges: np.ndarray, levels: list[float] = ()) -> Axes:
    """Outlined histograms (share of the values in each bin), and a codebook's levels as marks along the axis."""
    for (name, heights), (colour, style) in zip(
        shares.items(), [(BLUE, "-"), (ORANGE, "--"), (GREEN, ":")], strict=False
    ):
        ax.stairs(heights, edges, color=colour, linestyle=style, linewidth=1.8, label=name)
    if len(levels):
        ax.plot(levels, np.zeros(len(levels)), "|", color=VERMILION, markersize=22, markeredgewidth=1.8, label="NF4")
    ax.set(xlabel="value (share of the block's absmax)", ylabel="share of the values", ylim=(0, None))
    ax.yaxis.set_major_locator(MultipleLocator(0.01))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(frameon=False)
    return ax


def plot_level_usage(ax: Axes, usage: list[float], guess: dict[str, float] | None = None) -> Axes:
    """Bars of how often each level is chosen (shares), against equal shares and the learner's guesses (in per cent)."""
    ax.bar(range(len(usage)), usage, 0.8, color=BLUE)
    ax.axhline(1 / len(usage), color=GREY, linestyle=":", label=f"equal shares: {1 / len(usage):.2%}")
    guess = guess or {}
    for name, percent in guess.items():
        ax.axhline(percent / 100, color=VERMILION, linestyle="--", linewidth=1)
        side = "bottom" if percent == max(guess.values()) and name == list(guess)[-1] else "top"
        text = f"your guess, {name}: {percent:g} %"
        ax.annotate(
            text, (len(usage) - 0.4, percent / 100), ha="right", va=side, color=VERMILION, backgroundcolor="white"
        )
    ax.set(xticks=range(len(usage)), xlabel="level, from -1 (0) to 1 (15)", ylabel="share of the elements")
    ax.set(xlim=(-0.6, len(usage) - 0.4), ylim=(0, max(0.16, 1.1 * max(usage))))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(frameon=False, loc="upper left")
    return ax


def plot_offset(axes: list[Axes], levels: list[float], offsets: list[float], errors: list[float], here: tuple) -> Axes:
    """Left: the levels that an offset gives. Right: error over the offset, as a multiple of the least one.

    errors: one for each of `offsets`. here: (offset, error) of the levels on the left. A line marks NF4's offset.
    """
    left, right = axes
    left.plot(levels, np.zeros(len(levels)), "|", color=BLUE, markersize=60, markeredgewidth=2)
    left.set(xlim=(-1.05, 1.05), ylim=(-1, 1), yticks=[], xticks=[-1, -0.5, 0, 0.5, 1], xlabel="level")
    best, least = offsets[int(np.argmin(errors))], min(errors)
    right.plot(offsets, np.array(errors) / least - 1, color=BLUE)
    right.plot(best, 0, "s", color=GREEN, markersize=8, label=f"least error, at {best:.3f}")
    right.plot(here[0], here[1] / least - 1, "o", color=VERMILION, markersize=9, label=f"your offset, {here[0]:.4f}")
    right.axvline(0.9677083, color=GREY, linestyle="--", linewidth=1.2, label="NF4's, 0.9677")
    right.set(xlim=(offsets[0], offsets[-1]), ylim=(-0.02, 0.4), xticks=[0.9, 0.92, 0.94, 0.96, 0.98])
    right.set(xlabel="offset (outermost probability)", ylabel="relative RMS error above the least")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.legend(frameon=False, loc="upper left")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    left.spines["left"].set_visible(False)
    return left


FORMAT_STYLES = {  # colour, dash, marker: the same format looks the same in every figure
    "NF4": (BLUE, "-", "o"),
    "INT4": (ORANGE, "--", "s"),
    "INT4 affine": (VERMILION, "-.", "D"),
    "FP4": (GREEN, ":", "^"),
    "best 16": (GREY, (0, (1, 1)), "v"),
}


def plot_errors_by_block(errors: dict[str, dict[str, list[float]]], sizes: list[int], bits: dict[str, str]) -> Axes:
    """Small panels, one a distribution: relative RMS error over block size, a line a format.

    errors: by distribution, then format, one number for each block size. bits: what to write beside a format's name.
    """
    figure, axes = plt.subplots(2, 3, figsize=(9.5, 6), sharex=True, sharey=True, layout="constrained")
    panels = list(axes.flat)
    for ax, (distribution, by_format) in zip(panels, errors.items(), strict=False):
        for name, values in by_format.items():
            colour, dash, marker = FORMAT_STYLES[name]
            ax.plot(
                sizes, values, color=colour, linestyle=dash, marker=marker, markersize=5, label=f"{name}{bits[name]}"
            )
        ax.set(title=distribution, xscale="log", xticks=[32, 128, 512, 2048], xticklabels=["32", "128", "512", "2048"])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9")
        ax.tick_params(labelbottom=True)
    for ax in panels[len(errors) :]:
        ax.axis("off")
    panels[len(errors)].legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="center", fontsize=10)
    figure.supxlabel("block size (elements that share a scale)", fontsize=10)
    figure.supylabel("relative RMS error", fontsize=10)
    return panels[0]


def plot_error_over_bits(ax: Axes, points: dict[str, tuple[list[float], list[float], list[int]]]) -> Axes:
    """Error over what it costs. points: by format, bits a parameter, relative RMS errors and block sizes."""
    for name, (bits, errors, sizes) in points.items():
        colour, dash, marker = FORMAT_STYLES[name]
        ax.plot(bits, errors, color=colour, linestyle=dash, marker=marker, markersize=6, label=name)
        for x, y, size in zip(bits, errors, sizes, strict=True):
            place = (-4, -13) if name == "NF4" else (5, 4)
            ax.annotate(f"{size}", (x, y), xytext=place, textcoords="offset points", fontsize=8, color=colour)
    ax.set(xlabel="bits per parameter, float32 constants included", ylabel="relative RMS error")
    ax.legend(frameon=False, title="numbers: block size")
    return ax


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
    points: list[tuple[float, float, str]] = (),
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
        StepPatch(np.log10(np.maximum(shares, 1e-5)), edges, baseline=-5, fill=True, linewidth=0, color=BLUE, alpha=0.6)
    )
    thin = {"markersize": 22, "markeredgewidth": min(1, 60 / len(levels)), "color": VERMILION}
    ax.plot(levels, [-5.8] * len(levels), "|", **thin)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlim=(-1.05, 1.05), ylim=(-6.5, 0.3), ylabel="share of the values in a bin")
    ax.set_xticks([-1, 0, 1], ["lowest\nlevel", "middle", "highest\nlevel"])
    ax.set_yticks([-4, -2, 0], ["0.01 %", "1 %", "100 %"])
    ax.set_title(title, fontsize=10, loc="left")
    return ax


def plot_error_sizes(ax: Axes, shares, log_edges, relative_rms: float, title: str = "") -> Axes:
    """Histogram of |error| over the RMS of the tensor (log scales), with the relative RMS error as a line.

    The first bin holds all smaller errors too. log_edges: log10 of the bins' edges.
    """
    ax.add_artist(
        StepPatch(
            np.log10(np.maximum(shares, 1e-5)), log_edges, baseline=-5, fill=True, linewidth=0, color=ORANGE, alpha=0.7
        )
    )
    ax.spines[["top", "right"]].set_visible(False)
    at = np.log10(relative_rms)
    ax.plot([at, at], [-5, 0.8], color=VERMILION, linestyle="--", linewidth=1.5)
    side = {"ha": "right", "x": at - 0.06} if at > -1.5 else {"ha": "left", "x": at + 0.06}
    ax.text(y=0.4, s="relative RMS", fontsize=9, color=VERMILION, **side)
    ax.set(xlim=(-4, 1.5), ylim=(-5, 0.8), ylabel="share of the values in a bin")
    ax.set(xlabel="size of the error / RMS of the tensor")
    ax.set_xticks(range(-4, 2), ["<0.0001", "", "0.01", "0.1", "1", "10"])
    ax.set_yticks([-4, -2, 0], ["0.01 %", "1 %", "100 %"])
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


BAR_STYLES = [  # Okabe and Ito's, with a hatch each
    (BLUE, ""),
    (ORANGE, "//"),
    (GREEN, ".."),
    (VERMILION, "\\\\"),
    ("#56B4E9", "xx"),
    ("#CC79A7", "--"),
    (GREY, ""),
]


def plot_groups(
    ax: Axes, values: dict[str, dict[str, float]], xlabel: str, texts: dict[str, dict[str, str]] | None = None
) -> Axes:
    """Grouped horizontal bars; the outer keys are the groups, the inner ones the bars.

    texts: what to write behind the bars instead of their values with one decimal.
    """
    bars = list(next(iter(values.values())))
    height = 0.8 / len(bars)
    for i, (bar, (colour, hatch)) in enumerate(zip(bars, BAR_STYLES, strict=False)):
        at = [group + (i - (len(bars) - 1) / 2) * height for group in range(len(values))]
        drawn = ax.barh(
            at, [group[bar] for group in values.values()], height * 0.9, color=colour, hatch=hatch, edgecolor="white"
        )
        drawn.set_label(bar)
        labels = [texts[name][bar] if texts else f"{group[bar]:.1f}" for name, group in values.items()]
        ax.bar_label(drawn, labels, padding=3, fontsize=9)
    ax.set(yticks=range(len(values)), yticklabels=list(values), xlabel=xlabel)
    ax.set_xlim(0, 1.2 * max(max(group.values()) for group in values.values()))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(bars))
    return ax


def plot_predictions(axes: list[Axes], points: dict[str, tuple[list[float], list[float]]], bands: list[float]) -> Axes:
    """Left: predicted over measured (log scales). Right: the prediction's error in per cent over measured.

    points: by group, measured and predicted values (GB). bands: errors in per cent, a shaded band and then dashed lines.
    """
    left, right = axes
    everything = [value for pair in points.values() for values in pair for value in values]
    limits = (0.7 * min(everything), 1.4 * max(everything))
    left.plot(limits, limits, color=GREY, linewidth=1)
    left.annotate("equal", (limits[0] * 1.5, limits[0] * 1.7), rotation=45, color=GREY, fontsize=9)
    right.axhline(0, color=GREY, linewidth=1)
    right.axhspan(-bands[0], bands[0], color=GREY, alpha=0.15, linewidth=0)
    for band in bands[1:]:
        for side in (-band, band):
            right.axhline(side, color=GREY, linestyle="--", linewidth=1)
    for (name, (measured, predicted)), (colour, marker) in zip(
        points.items(), [(BLUE, "o"), (VERMILION, "D"), (GREEN, "^")], strict=False
    ):
        style = {"color": colour, "marker": marker, "linestyle": "", "markerfacecolor": "none", "markersize": 6}
        left.plot(measured, predicted, label=name, **style)
        right.plot(measured, [100 * (p / m - 1) for m, p in zip(measured, predicted, strict=True)], **style)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if limits[0] <= tick <= limits[1]]
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": limits})
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_locator(NullLocator())
    limit = 1.3 * max(bands)
    right.set(ylim=(-limit, limit), xlabel="measured peak (GB, 10$^9$ bytes)", ylabel="error of the prediction (%)")
    left.set(xlabel="measured peak (GB, 10$^9$ bytes)", ylabel="predicted peak (GB, 10$^9$ bytes)")
    left.legend(frameon=False, loc="upper left", fontsize=9)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return left


def plot_cards(ax: Axes, outcomes: dict[tuple[str, str], dict[int, bool]], cards: list[int]) -> Axes:
    """Which model trains on which card: a row for each (model, preset), a column for each card (GB).

    outcomes: by row, the cards that were tried and whether training ran. A dot marks the smallest card on which it did,
    a line the larger ones, a cross a card on which it ran out of memory.
    """
    y, ticks = 0.0, {}
    for (model, preset), tried in outcomes.items():
        if ticks and model not in [row[0] for row in ticks]:
            y += 0.6
            ax.axhline(y - 0.8, color="0.85", linewidth=0.8)
        ticks[model, preset] = y
        works = [cards.index(card) for card, ran in tried.items() if ran]
        fails = [cards.index(card) for card, ran in tried.items() if not ran]
        if works:
            ax.plot([min(works), len(cards) - 0.6], [y, y], color=BLUE, linewidth=3, solid_capstyle="butt")
            ax.plot(min(works), y, "o", color=BLUE, markersize=9)
        ax.plot(fails, [y] * len(fails), "X", color=VERMILION, markersize=9)
        y += 1
    ax.plot([], [], "-o", color=BLUE, linewidth=3, markersize=9, label="trains, and on larger cards")
    ax.plot([], [], "X", color=VERMILION, markersize=9, label="out of memory")
    ax.set(xticks=range(len(cards)), xticklabels=cards, xlim=(-0.5, len(cards) - 0.5), xlabel="card (GB, 10$^9$ bytes)")
    ax.set(yticks=list(ticks.values()), yticklabels=[f"{model}  {preset}" for model, preset in ticks])
    ax.set_ylim(y - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return ax


def plot_parts(
    ax: Axes, rows: dict[str, dict[str, float]], xlabel: str, limit: float, ends: dict[str, str] | None = None
) -> Axes:
    """Horizontal bars of up to seven parts, laid end to end; what lies beyond `limit` is cut off. ends: as `plot_stacked`."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    left = [0.0] * len(rows)
    for part, (colour, hatch) in zip(parts, BAR_STYLES, strict=False):
        sizes = [row.get(part, 0.0) for row in rows.values()]
        ax.barh(range(len(rows)), sizes, 0.6, left, color=colour, hatch=hatch, edgecolor="white", label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for y, (name, end) in enumerate(zip(rows, left, strict=True)):
        ax.annotate(f" {(ends or {}).get(name, '')}", (min(end, limit), y), va="center", fontsize=9)
    ax.set(xlabel=xlabel, xlim=(0, 1.12 * limit), yticks=range(len(rows)), yticklabels=list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1), ncols=4, fontsize=9)
    return ax
