"""Figures of dive_e_beyond_qlora."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks
from qlora_lab.experiments.methods_compared import Difference

LOSSES = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)  # ticks
STYLES = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (VERMILION, "D", ":"), (GREY, "v", "-"))


def plot_forest(axes: Sequence[Axes], panels: Mapping[str, Sequence[Difference]], unit: str) -> Sequence[Axes]:
    """A row for each method, a panel for each task: the mean difference from QLoRA with two intervals.

    The thick line is the 95 % interval alone, the thin one is corrected for how many are compared. The dot is
    filled, and the row in colour, where the thin line leaves zero out.
    """
    names = list(dict.fromkeys(d.method for found in panels.values() for d in found))
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        for d in found:
            row = names.index(d.method)
            apart = d.verdict != "not told apart"
            colour = {"better": BLUE, "worse": VERMILION}.get(d.verdict, GREY)
            ax.plot([d.mean - d.corrected, d.mean + d.corrected], [row, row], color=colour, linewidth=1)
            ax.plot([d.mean - d.half, d.mean + d.half], [row, row], color=colour, linewidth=3.5, solid_capstyle="butt")
            ax.plot(d.mean, row, "o", color=colour, markerfacecolor=colour if apart else "white", markersize=7)
        ax.axvline(0, color="0.3", linewidth=1)
        ax.set(title=title, xlabel=unit, ylim=(len(names) - 0.5, -0.5))
        fix_ticks(ax.yaxis, range(len(names)), names)
        ax.xaxis.set_major_locator(MaxNLocator(5))  # no more: losses have long labels
        ax.grid(axis="y", color="0.9", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    compared = max(d.compared for found in panels.values() for d in found)
    handles = [
        Line2D([], [], color=GREY, linewidth=3.5, label="95 % interval"),
        Line2D([], [], color=GREY, linewidth=1, label=f"corrected for {compared} methods"),
        Line2D([], [], color=BLUE, marker="o", markersize=7, label="surely better"),
        Line2D([], [], color=VERMILION, marker="o", markersize=7, label="surely worse"),
    ]
    axes[0].figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return axes


def plot_rates(axes: Sequence[Axes], panels: Mapping[str, Mapping[str, Mapping[float, float]]]) -> Sequence[Axes]:
    """A curve for each method, a panel for each task: mean validation loss at each learning rate."""
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        for (name, curve), (colour, marker, dashes) in zip(curves.items(), STYLES, strict=False):
            rates = list(curve)
            ax.plot(rates, list(curve.values()), color=colour, marker=marker, linestyle=dashes, label=name)
        rates = sorted({rate for curve in curves.values() for rate in curve})
        ax.set(xscale="log", yscale="log", title=title, xlabel="learning rate (log scale)")
        fix_ticks(ax.xaxis, rates, [f"{rate:g}" for rate in rates])
        losses = [loss for loss in LOSSES if ax.get_ylim()[0] < loss < ax.get_ylim()[1]]
        fix_ticks(ax.yaxis, losses, [f"{loss:g}" for loss in losses])
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_formatter(lambda value, _: "")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation loss (nats per token, log scale)")
    axes[-1].legend(frameon=False, fontsize=9)
    return axes
