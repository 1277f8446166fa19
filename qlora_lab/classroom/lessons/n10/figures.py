"""Figures of 10_memory_comparison."""

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks

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

    texts: what to write after the bars instead of their values with one decimal.
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

    points: by group, measured and predicted values (GB). bands: errors in per cent, first a shaded band, then
    dashed lines.
    """
    left, right = axes
    everything = [value for pair in points.values() for values in pair for value in values]
    limits = (0.7 * min(everything), 1.4 * max(everything))
    left.plot(limits, limits, color=GREY, linewidth=1)
    left.annotate("equal", (limits[1] / 1.3, limits[1] / 2), ha="center", color=GREY, fontsize=9)
    right.axhline(0, color=GREY, linewidth=1)
    right.axhspan(-bands[0], bands[0], color=GREY, alpha=0.15, linewidth=0)
    for band in bands[1:]:
        for side in (-band, band):
            right.axhline(side, color=GREY, linestyle="--", linewidth=1)
    for band in bands:
        style = {"color": "0.4", "fontsize": 9, "ha": "right", "va": "top", "textcoords": "offset points"}
        right.annotate(f"±{band:g} %", (limits[1], band), (-4, -3), **style)
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


def plot_cards(ax: Axes, outcomes: dict[tuple[str, str], dict[int, str]], cards: list[int]) -> Axes:
    """Which model trains on which card: a row for each (model, preset), a column for each card (GB).

    outcomes: by row and card, "fits" (a dot), "pages" (a ring) or "fails" (a cross); nothing where it was not tried.
    """
    marks = {
        "fits": ("o", BLUE, BLUE, "trains, optimizer states included"),
        "pages": ("o", BLUE, "white", "trains, but the states would have to move out"),
        "fails": ("X", VERMILION, VERMILION, "out of memory"),
    }
    rows, y = {}, 0.0
    for model, preset in outcomes:
        if rows and model not in [row[0] for row in rows]:
            y += 0.5
            ax.axhline(y - 0.75, color="0.85", linewidth=0.8)
        rows[model, preset] = y
        y += 1
    for how, (marker, colour, face, label) in marks.items():
        at = [(cards.index(card), rows[row]) for row, by in outcomes.items() for card, got in by.items() if got == how]
        x, heights = zip(*at, strict=True) if at else ((), ())
        style = {"color": colour, "markerfacecolor": face, "markersize": 9, "markeredgewidth": 1.6}
        ax.plot(x, heights, marker, label=label, **style)
    ax.set(xticks=range(len(cards)), xticklabels=cards, xlim=(-0.5, len(cards) - 0.5), xlabel="card (GB, 10$^9$ bytes)")
    ax.set(yticks=list(rows.values()), yticklabels=[f"{model}  {preset}" for model, preset in rows])
    ax.set_ylim(y - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, fontsize=9, columnspacing=1.2)
    return ax


def plot_parts(
    ax: Axes,
    rows: dict[str, dict[str, float]],
    xlabel: str,
    limit: float,
    ends: dict[str, str] | None = None,
    guess: float | None = None,
) -> Axes:
    """Horizontal bars of up to seven parts, laid end to end; what lies beyond `limit` is cut off.

    ends: a text after a bar. guess: what the learner expects, a dashed line.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    left = [0.0] * len(rows)
    for part, (colour, hatch) in zip(parts, BAR_STYLES, strict=False):
        sizes = [row.get(part, 0.0) for row in rows.values()]
        ax.barh(range(len(rows)), sizes, 0.6, left, color=colour, hatch=hatch, edgecolor="white", label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for y, (name, end) in enumerate(zip(rows, left, strict=True)):
        ax.annotate(f" {(ends or {}).get(name, '')}", (min(end, limit), y), va="center", fontsize=9)
    if guess is not None:
        ax.axvline(guess, color=VERMILION, linestyle="--", label=f"your guess: {guess}")
    ax.set(xlabel=xlabel, xlim=(0, 1.12 * limit), yticks=range(len(rows)), yticklabels=list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    columns = 4 if len(parts) <= 4 else 3
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1), ncols=columns, fontsize=9)
    return ax


def plot_waterfall(
    ax: Axes, parts: dict[str, float], totals: dict[str, float | None], xlabel: str, limit: float
) -> Axes:
    """Parts as bars that begin where the one above ends, and below them bars of totals.

    totals: None says "not recorded". What lies beyond `limit` is cut off.
    """
    sizes = list(parts.values())
    left = [sum(sizes[:i]) for i in range(len(sizes))] + [0.0] * len(totals)
    widths = sizes + [size or 0.0 for size in totals.values()]
    colours = [ORANGE] * len(parts) + [BLUE, GREEN][: len(totals)]
    ax.barh(range(len(widths)), widths, 0.75, left, color=colours)
    texts = [f"{size:.2f}" for size in sizes]
    texts += ["not recorded" if size is None else f"{size:.2f}" for size in totals.values()]
    for y, (start, width, text) in enumerate(zip(left, widths, texts, strict=True)):
        ax.text(min(start + width, limit) + 0.01 * limit, y, text, va="center", fontsize=9)
    ax.axhline(len(parts) - 0.5, color=GREY, linewidth=0.8)
    fix_ticks(ax.yaxis, range(len(widths)), [*parts, *totals])
    ax.set(xlabel=xlabel, xlim=(0, 1.15 * limit))
    ax.set_ylim(len(widths) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    return ax
