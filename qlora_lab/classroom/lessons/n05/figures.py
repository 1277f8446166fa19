"""Figures of 05_double_quantization."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, draw_guesses, is_number, numbers_in


def draw_stacked(
    ax: Axes,
    rows: dict[str, dict[str, float]],
    xlabel: str,
    ends: dict[str, str] | None = None,
    guess: dict[str, object] | None = None,
    legend: bool = True,
) -> Axes:
    """Horizontal bars of parts laid end to end; the outer keys are the bars, the inner ones the parts.

    ends: a text after a bar. guess: the learner's value for some of the bars, a diamond each; none if it is left open.
    """
    guesses = numbers_in(guess)
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    styles = [(BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (GREY, "xx")]
    left = dict.fromkeys(rows, 0.0)
    for part, (colour, hatch) in zip(parts, styles, strict=False):
        sizes = [row.get(part, 0) for row in rows.values()]
        ax.barh(list(rows), sizes, 0.6, list(left.values()), color=colour, hatch=hatch, edgecolor="white", label=part)
        left = {row: left[row] + size for row, size in zip(rows, sizes, strict=True)}
    for row, text in (ends or {}).items():
        ax.annotate(text, (left[row], row), (5, 0), textcoords="offset points", va="center", fontsize=9)
    if guesses:
        draw_guesses(ax, list(rows), guesses)
    ax.set(xlabel=xlabel, xlim=(0, 1.25 * max([*left.values(), *guesses.values()])))
    ax.invert_yaxis()
    if legend and (len(parts) > 1 or guesses):
        ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    return ax


def plot_bytes(ax: Axes, scales: float, guess: object = None) -> Axes:
    """Bars of codes and scales, in per cent of the bytes: measured, and guessed if the guess is a number.

    scales: the share of the scales, 0 to 100.
    """
    shares = {"measured": scales} | ({"your guess": guess} if is_number(guess) else {})
    rows = {name: {"codes": 100 - share, "scales": share} for name, share in shares.items()}
    draw_stacked(ax, rows, "share of the bytes (%)", {name: f"{share:.1f} %" for name, share in shares.items()})
    ax.set_xlim(0, 112)
    return ax


def plot_savings(ax: Axes, gigabytes: dict[str, float], guess: dict[str, object] | None = None) -> Axes:
    """Horizontal bars of GB (10^9 bytes) saved, by model. guess: the learner's for some of them."""
    rows = {model: {"saved": size} for model, size in gigabytes.items()}
    ends = {model: f"{size:.2f} GB" for model, size in gigabytes.items()}
    return draw_stacked(ax, rows, "saved by double quantization (GB, 10$^9$ bytes)", ends, guess)


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


def draw_block_costs(ax: Axes, curves: dict[str, list[tuple]], point: tuple[float, float]) -> Axes:
    """Relative error over bits per parameter, a dot for each block size.

    curves: by name, (bits per parameter, error, block size) of each dot. point: bits and error to be ringed.
    """
    styles = [(VERMILION, "--", "s"), (BLUE, "-", "o")]
    for (name, dots), (colour, style, marker) in zip(curves.items(), styles, strict=True):
        bits, errors, _ = zip(*dots, strict=True)
        ax.plot(bits, errors, color=colour, linestyle=style, marker=marker, markersize=5)
        below = {"xytext": (8, -20), "textcoords": "offset points", "ha": "right"}
        ax.annotate(name, (bits[0], errors[0]), color=colour, fontsize=9, **below)
    ax.plot(*point, "o", markersize=15, markerfacecolor="none", markeredgecolor="black", markeredgewidth=2)
    ax.set(xlabel="bits per parameter", ylabel="relative error")
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
