"""Figures of 10_memory_comparison."""

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION

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


def plot_parts(
    ax: Axes,
    rows: dict[str, dict[str, float]],
    xlabel: str,
    limit: float,
    ends: dict[str, str] | None = None,
) -> Axes:
    """Horizontal bars of up to seven parts, laid end to end; what lies beyond `limit` is cut off.

    ends: a text after a bar.
    """
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
    columns = 4 if len(parts) <= 4 else 3
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.45, 1), ncols=columns, fontsize=9)
    return ax
