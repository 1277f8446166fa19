"""Figures of 07_qlora_from_scratch."""

from matplotlib.axes import Axes
from matplotlib.patches import StepPatch
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION

STYLES = [(BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, ":", "^"), (ORANGE, "-.", "D")]


def plot_megabytes(ax: Axes, megabytes: dict[str, float], xlabel: str, guess: dict[str, float] | None = None) -> Axes:
    """Horizontal bars of sizes (MB, 10^6 bytes), and the learner's guesses as diamonds."""
    names = list(megabytes)
    drawn = ax.barh(names, list(megabytes.values()), 0.6, color=BLUE)
    ax.bar_label(drawn, [f"{value:.1f} MB" for value in megabytes.values()], padding=8)
    if guess:
        style = {"color": VERMILION, "markersize": 9, "label": "your guess", "clip_on": False, "zorder": 3}
        ax.plot([guess[name] for name in guess], list(guess), "D", **style)
        ax.legend(frameon=False, loc="lower right")
    ax.set(xlabel=xlabel, xlim=(0, 1.3 * max([*megabytes.values(), *(guess or {}).values()])))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return ax


def plot_together(axes: list[Axes], losses: dict[str, list[float]], differences: list[float], guess: float) -> Axes:
    """Two losses over optimizer steps, one drawn as a line and one as rings; below, their relative difference.

    guess: the largest difference that the learner expects, a dashed line.
    """
    upper, lower = axes
    steps = range(1, len(differences) + 1)
    (line, values), (rings, others) = losses.items()
    upper.plot(steps, values, color=BLUE, linewidth=2, label=line)
    upper.plot(steps, others, "o", color=VERMILION, markerfacecolor="none", markersize=8, label=rings)
    upper.set(ylabel="loss (nats per token,\nlog scale)", yscale="log")
    upper.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    upper.yaxis.set_minor_locator(NullLocator())
    upper.legend(frameon=False)
    floor = 1e-9
    lower.plot(steps, [max(value, floor) for value in differences], "o", color=BLUE, markersize=4)
    for level, style, name in [(1e-4, ":", "asserted below"), (guess, "--", "your guess")]:
        colour = VERMILION if style == "--" else GREY
        lower.axhline(level, color=colour, linestyle=style, label=f"{name}: {level:g}")
    lower.set(yscale="log", ylim=(0.3 * floor, 10), xlabel="optimizer step", ylabel="relative\ndifference")
    lower.set_yticks([1e-9, 1e-6, 1e-3, 1], ["≤ 10$^{-9}$", "10$^{-6}$", "10$^{-3}$", "1"])
    lower.yaxis.set_minor_locator(NullLocator())
    lower.legend(frameon=False, ncols=2, loc="upper right", fontsize=9)
    for ax in axes:
        ax.set(xlim=(0.5, len(differences) + 0.5), xticks=[1, *range(5, len(differences) + 1, 5)])
        ax.spines[["top", "right"]].set_visible(False)
    return upper


def plot_bases(axes: list[Axes], bases: dict[str, tuple[float, float, float]], dense: float, label: str) -> Axes:
    """A row for each base: left its weights' error, right its loss; bits per parameter stand beside its name.

    bases: by name, bits per parameter, relative RMS error of the weights, loss. dense: the loss before quantization, a
    dashed line. label: of the right axis.
    """
    left, right = axes
    names = [f"{name}\n{bits:.4g} bits" for name, (bits, _, _) in bases.items()]
    for ax, column, colour, hatch in [(left, 1, ORANGE, "//"), (right, 2, BLUE, "")]:
        values = [row[column] for row in bases.values()]
        drawn = ax.barh(names, values, 0.65, color=colour, hatch=hatch, edgecolor="white")
        ax.bar_label(drawn, [f"{value:.2f}" for value in values], padding=3, fontsize=9)
        ax.set_xlim(0, 1.22 * max(values))
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    right.axvline(dense, color=VERMILION, linestyle="--", label=f"not quantized: {dense:.2f}")
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)
    left.set_xlabel("relative RMS error of the weights")
    right.set(xlabel=label, yticklabels=[])
    left.tick_params(axis="y", labelsize=9)
    left.invert_yaxis()
    right.invert_yaxis()
    return left


def plot_repairs(ax: Axes, losses: dict[str, list[float]], guess: dict[str, float] | None = None) -> Axes:
    """Training losses (log scale) over optimizer steps, one line per base, named at its end.

    guess: for some of them, the loss that the learner expects in the last step, a diamond around the line's marker.
    """
    last = max(len(values) for values in losses.values())
    heights, lowest = {}, 0.0  # of the names: at least a line of text apart
    for name, values in sorted(losses.items(), key=lambda item: item[1][-1]):
        heights[name] = lowest = max(values[-1], 1.35 * lowest)
    for (name, values), (colour, style, marker) in zip(losses.items(), STYLES, strict=False):
        steps = range(1, len(values) + 1)
        ax.plot(steps, values, color=colour, linestyle=style, marker=marker, markersize=4)
        ax.text(len(values) + 0.25, heights[name], name, va="center", color=colour, fontsize=9)
        if guess and name in guess:
            ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2, "clip_on": False}
            ax.plot(last, guess[name], "D", color=colour, **ring)
            ax.plot(
                last, guess[name], marker, color=colour, markersize=4, clip_on=False
            )  # the line's own marker shows whose it is
    ax.plot([], [], "D", color=GREY, markersize=9, markerfacecolor="none", markeredgewidth=2, label="your guesses")
    ax.set(xlabel="optimizer step", ylabel="loss (nats per token, log scale)", yscale="log", xlim=(0.7, 1.22 * last))
    ax.set_xticks(range(1, last + 1))
    ax.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20], ["0.1", "0.2", "0.5", "1", "2", "5", "10", "20"])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.legend(frameon=False, loc="lower left")
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
    left.add_artist(StepPatch(*original, color=GREY, alpha=0.4, fill=True, linewidth=0, baseline=0))
    left.add_artist(StepPatch(*restored, edgecolor=BLUE, fill=False, linewidth=1, baseline=0))
    left.set(xlabel="weight", ylabel="share of the weights (log scale)", yscale="log")
    for (name, points), (colour, _, marker) in zip(dots.items(), STYLES, strict=False):
        x, y = zip(*points, strict=True)
        right.plot(x, y, marker, color=colour, markersize=3.5, label=name)
    right.plot(*chosen, "o", markersize=15, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2)
    right.set(xlabel="bits per parameter", ylabel="relative error of the output (log scale)", yscale="log")
    right.legend(frameon=False, loc="upper right").set_gid("frame")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return left
