"""Figures of dive_j_how_few_bits."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.patches import StepPatch
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, draw_guesses, numbers_in

STYLES = [(BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, ":", "^"), (ORANGE, "-.", "D")]


def plot_bases(
    axes: list[Axes],
    bases: dict[str, tuple[float, float, float]],
    dense: float,
    guess: Mapping[str, object] | None = None,
) -> Axes:
    """A row for each base: left its weights' error, right its loss; bits per parameter stand beside its name.

    bases: by name, bits per parameter, relative RMS error of the weights, loss (nats per token). dense: the loss before
    quantization, a dashed line. guess: for some of them, the loss that the learner expects, a diamond.
    """
    left, right = axes
    names = [f"{name}\n{bits:.4g} bits" for name, (bits, _, _) in bases.items()]
    for ax, column, colour, hatch, decimals in [(left, 1, ORANGE, "//", 3), (right, 2, BLUE, "", 2)]:
        values = [row[column] for row in bases.values()]
        drawn = ax.barh(names, values, 0.65, color=colour, hatch=hatch, edgecolor="white")
        ax.bar_label(drawn, [f"{value:.{decimals}f}" for value in values], padding=3, fontsize=9)
        ax.set_xlim(0, 1.25 * max(values))
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    right.axvline(dense, color=VERMILION, linestyle="--", label=f"not quantized: {dense:.2f}")
    guesses = numbers_in(guess)
    if guesses:
        draw_guesses(right, list(bases), guesses)
        right.set_xlim(0, max(right.get_xlim()[1], 1.05 * max(guesses.values())))
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9, ncols=2)
    left.set_xlabel("relative RMS error of the weights")
    right.set(xlabel="loss on prose (nats per token)", yticklabels=[])
    left.tick_params(axis="y", labelsize=9)
    left.invert_yaxis()
    right.invert_yaxis()
    return left


def plot_repairs(ax: Axes, losses: dict[str, list[float]], guess: Mapping[str, object] | None = None) -> Axes:
    """Training losses (log scale) over optimizer steps, one line per base, named at its end.

    guess: for some of them, the loss that the learner expects in the last step, a diamond around the line's marker;
    no mark where it is left open.
    """
    guesses = numbers_in(guess)
    last = max(len(values) for values in losses.values())
    heights, lowest = {}, 0.0  # of the names: at least a line of text apart
    for name, values in sorted(losses.items(), key=lambda item: item[1][-1]):
        heights[name] = lowest = max(values[-1], 1.35 * lowest)
    for (name, values), (colour, style, marker) in zip(losses.items(), STYLES, strict=False):
        steps = range(1, len(values) + 1)
        ax.plot(steps, values, color=colour, linestyle=style, marker=marker, markersize=4)
        ax.text(len(values) + 0.25, heights[name], name, va="center", color=colour, fontsize=9)
        if name in guesses:
            ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2, "clip_on": False}
            ax.plot(last, guesses[name], "D", color=colour, **ring)
            ax.plot(last, guesses[name], marker, color=colour, markersize=4, clip_on=False)  # shows whose it is
    if guesses:
        ring = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 2}
        ax.plot([], [], "D", color=GREY, label="your guesses", **ring)
        ax.legend(frameon=False, loc="lower left")
    ax.set(xlabel="optimizer step", ylabel="loss (nats per token, log scale)", yscale="log", xlim=(0.7, 1.22 * last))
    ax.set_xticks(range(1, last + 1))
    ax.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20], ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20"])
    ax.yaxis.set_minor_locator(NullLocator())
    return ax


def plot_layer(
    axes: list[Axes],
    original: tuple[list, list],
    restored: tuple[list, list],
    dots: dict[str, list[tuple]],
    chosen: tuple[float, float],
) -> Axes:
    """Left: histogram of a layer's weights (grey) and of what is left of them. Right: output error over bits.

    The caller sets the limits.

    original, restored: height of each bin and the bins' edges. dots: by scheme, (bits per parameter, error) of each
    setting. chosen: the pair to be ringed.
    """
    left, right = axes
    # added as artists: `stairs` also computes the limits, which takes longer than all the rest
    left.add_artist(StepPatch(*original, color=GREY, alpha=0.4, fill=True, linewidth=0, baseline=0, label="original"))
    left.add_artist(StepPatch(*restored, edgecolor=BLUE, fill=False, linewidth=1, baseline=0, label="quantized"))
    left.legend(frameon=False, loc="upper left").set_gid("frame")
    left.set(xlabel="weight", ylabel="share of the weights (log scale)", yscale="log")
    for (name, points), (colour, _, marker) in zip(dots.items(), STYLES, strict=False):
        x, y = zip(*points, strict=True)
        right.plot(x, y, marker, color=colour, markersize=3.5, label=name)
    ring = {"markersize": 15, "markerfacecolor": "none", "markeredgecolor": "black", "markeredgewidth": 2}
    right.plot(*chosen, "o", linestyle="none", label="your choice", **ring)
    right.set(xlabel="bits per parameter", ylabel="relative error of the output (log scale)", yscale="log")
    right.legend(frameon=False, loc="upper right", labelspacing=0.8).set_gid("frame")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return left
