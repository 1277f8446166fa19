"""Figures of 04_nf4."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import StepPatch
from matplotlib.ticker import MultipleLocator, NullLocator

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks, numbers_in


def plot_histogram(ax: Axes, shares: dict[str, np.ndarray], edges: np.ndarray, levels: Sequence[float] = ()) -> Axes:
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


def plot_level_usage(ax: Axes, usage: list[float], guess: Mapping[str, object] | None = None) -> Axes:
    """Bars of how often each level is chosen (shares), against equal shares and the learner's guesses (in per cent).

    guess: by what is guessed; guesses that are left open are not drawn.
    """
    heights = np.ravel([[share, 0] for share in usage])[:-1]  # bars and gaps in one outline: a fifth of `bar`'s time
    edges = np.ravel([[level - 0.4, level + 0.4] for level in range(len(usage))])
    ax.add_artist(StepPatch(heights, edges, fill=True, linewidth=0, color=BLUE))
    ax.axhline(1 / len(usage), color=GREY, linestyle=":", label=f"equal shares: {1 / len(usage):.2%}")
    named: dict[float, list[str]] = {}  # a guess made twice has one label
    for name, percent in numbers_in(guess).items():
        named.setdefault(percent, []).append(name)
    for percent, names in named.items():
        label = f"your guess, {' and '.join(names)}: {percent:g} %"
        ax.axhline(percent / 100, color=VERMILION, linestyle="--", linewidth=1, label=label)
    fix_ticks(ax.xaxis, range(len(usage)))
    ax.set(xlabel="level, from -1 (0) to 1 (15)", ylabel="share of the elements")
    ax.set(xlim=(-0.6, len(usage) - 0.4), ylim=(0, max(0.16, 1.1 * max(usage))))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(loc="upper left", edgecolor="none", framealpha=1)  # a guess may lie behind it
    return ax


FORMAT_STYLES = {  # colour, dash, marker: the same format looks the same in every figure
    "NF4": (BLUE, "-", "o"),
    "INT4": (ORANGE, "--", "s"),
    "INT4 affine": (VERMILION, "-.", "D"),
    "FP4": (GREEN, ":", "^"),
}


def plot_errors_by_block(errors: dict[str, dict[str, list[float]]], sizes: list[int], bits: dict[str, str]) -> Axes:
    """Small panels, one per distribution: relative RMS error over block size, a line for each format.

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
    figure.supylabel("relative error", fontsize=10)
    return panels[0]


def plot_error_over_bits(ax: Axes, points: dict[str, tuple[list[float], list[float], list[int]]]) -> Axes:
    """Error over what it costs. points: by format, bits per parameter, relative RMS errors and block sizes."""
    for name, (bits, errors, sizes) in points.items():
        colour, dash, marker = FORMAT_STYLES[name]
        ax.plot(bits, errors, color=colour, linestyle=dash, marker=marker, markersize=6, label=name)
        for x, y, size in zip(bits, errors, sizes, strict=True):
            below = name in ("NF4", "INT4") or (name == "INT4 affine" and size == max(sizes))
            place: dict[str, Any] = {"xytext": (-5, -5), "ha": "right", "va": "top"} if below else {"xytext": (5, 4)}
            place["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3}
            ax.annotate(f"{size}", (x, y), textcoords="offset points", fontsize=9, color=colour, **place)
    ax.set(xlabel="bits per parameter, float32 constants included", ylabel="relative error")
    ax.set_xlim(min(min(bits) for bits, *_ in points.values()) - 0.3)
    ax.legend(frameon=False, title="numbers: block size")
    return ax
