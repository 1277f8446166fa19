"""Figures of dive_f_why_is_it_slow."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks, numbers_in


def plot_roofline(ax: Axes, rate: float, bandwidth: float, kernels: dict[str, float], guess: float | None) -> Axes:
    """The operations a second that a GPU can reach, over the operations for each byte moved, both logarithmic.

    rate: operations a second at most. bandwidth: bytes a second. kernels: by name, operations for each byte: dots on
    the roof. guess: operations for each byte at which the learner expects the corner, if there is a guess.
    """
    corner, ends = rate / bandwidth, (0.1, 1e4)

    def reach(x: float) -> float:
        return min(rate, bandwidth * x) / 1e12

    ax.plot([ends[0], corner], [reach(ends[0]), reach(corner)], color=VERMILION, label="reading and writing limit")
    ax.plot([corner, ends[1]], [reach(corner)] * 2, "--", color=BLUE, label="computing limits")
    for name, x in kernels.items():
        ax.plot(x, reach(x), "o", color="black", markersize=6)
        sloped = x < corner
        place = (9, -4) if sloped else (-6, -17)
        ax.annotate(name, (x, reach(x)), place, textcoords="offset points", fontsize=9)
    if guess:
        ax.axvline(guess, color=GREY, linestyle=":", label="your guess")
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=(0.15, 2500))
    ax.set(xlabel="operations for each byte read or written", ylabel="10$^{12}$ operations a second")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    ax.legend(frameon=False, loc="upper left", ncols=3, fontsize=9)
    return ax


def plot_timeline(axes: list[Axes], rows: dict[str, list[tuple[float, float, str]]], limit: float) -> Axes:
    """Kernels as blocks over time (microseconds): a panel for each way, a lane for each kind of kernel.

    rows: by title, the kernels' start, end and lane, in the order that they ran. Lanes stand in a fixed order.
    """
    lanes = {"matrix products": BLUE, "dequantize": ORANGE, "attention": GREEN, "everything else": GREY}
    for ax, (title, kernels) in zip(axes, rows.items(), strict=True):
        for y, (lane, colour) in enumerate(lanes.items()):
            blocks = [(start, end - start) for start, end, kind in kernels if kind == lane and start < limit]
            ax.broken_barh(blocks, (y - 0.4, 0.8), color=colour, linewidth=0)
        ax.set_yticks(range(len(lanes)), list(lanes))
        ax.set(xlim=(0, limit), ylim=(len(lanes) - 0.4, -0.6))
        ax.set_title(title, fontsize=10, loc="left")
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("time (µs)")
    return axes[0]


def plot_kinds(ax: Axes, rows: dict[str, dict[str, float]], limit: float) -> Axes:
    """Stacked horizontal bars: milliseconds of a step by kind of kernel, and what is left: the GPU waits."""
    styles = {
        "matrix products": (BLUE, ""),
        "dequantize": (ORANGE, "//"),
        "attention, AdamW": (GREEN, ".."),
        "elementwise, copies": (VERMILION, "xx"),
        "waiting": ("white", ""),
    }
    for y, parts in enumerate(rows.values()):
        left = 0.0
        for kind, (colour, hatch) in styles.items():
            edge = GREY if kind == "waiting" else "white"
            label = kind if y == 0 else None
            ax.barh(y, parts[kind], 0.65, left, color=colour, hatch=hatch, edgecolor=edge, linewidth=0.8, label=label)
            left += parts[kind]
        ax.text(left + 0.01 * limit, y, f"{left:,.0f}", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlim=(0, limit), xlabel="a step (ms)")
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.42, 1), ncols=5, fontsize=9, columnspacing=1.2)
    return ax


def plot_ladder(
    axes: list[Axes], panels: dict[str, dict[str, float]], floors: list[float], guess: Mapping[str, object]
) -> Axes:
    """Horizontal bars of milliseconds a step, a panel for each setting. floors: dotted lines.

    guess: the learner's, for the first panel, by name; what is open is not drawn.
    """
    for ax, (title, times), floor in zip(axes, panels.items(), floors, strict=True):
        rows = {name: y for y, name in enumerate(times)}
        guesses = numbers_in(guess) if ax is axes[0] else {}
        widest = 1.2 * max([*times.values(), *guesses.values()])
        ax.barh(list(rows.values()), list(times.values()), 0.5, color=BLUE)
        for name, time in times.items():
            ax.text(time + 0.02 * widest, rows[name], f"{time:.0f}", va="center", fontsize=9)
        label = "the floor: arithmetic alone"
        ax.axvline(floor, color="black", linestyle=":", linewidth=1.2, label=label)
        if guesses:
            at = [rows[name] + 0.38 for name in guesses]  # below its bar
            ax.plot(list(guesses.values()), at, "D", color=VERMILION, markersize=6, label="your guess")
        ax.set_yticks(list(rows.values()), list(rows) if ax is axes[0] else [])
        ax.set(xlim=(0, widest), xlabel="a step (ms)")
        ax.set_title(title, fontsize=10)
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=2, fontsize=9)
    return axes[0]


def plot_arriving(ax: Axes, sizes: list[float], shares: dict[str, list[float]], marks: dict[str, float]) -> Axes:
    """Lines: share of a correction that is left after rounding, over its size. marks: sizes to point at."""
    for (name, values), colour, style in zip(shares.items(), (BLUE, VERMILION), ("-o", "--s"), strict=True):
        ax.plot(sizes, values, style, color=colour, markersize=5, label=name)
    for text, size in marks.items():
        ax.plot([size, size], [-0.05, 1.1], color=GREY, linestyle=":", linewidth=1.2)
        ax.text(size / 1.1, 0.6, text, color="0.35", fontsize=9, va="center", ha="right")
    ax.set(xscale="log", ylim=(-0.05, 1.3), xlabel="size of the correction, as a share of the output's")
    ax.set_ylabel("share of the correction that arrives")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.legend(frameon=False, loc="upper left", ncols=2, fontsize=9)
    return ax


TOKENS, TIMES = (256, 512, 1024, 2048, 4096, 8192, 16384), (20, 50, 100, 200, 500, 1000, 2000)


def plot_bounds(
    ax: Axes,
    tokens: list[int],
    launching: list[float],
    busy: list[float],
    here: tuple[int, float],
    measured: list[tuple[int, float]],
) -> Axes:
    """Milliseconds a step over tokens a step, both logarithmic: launching, the GPU's work, and the longer of both.

    here: the tokens that were picked, and the milliseconds predicted. measured: recorded points.
    """
    longer = [max(pair) for pair in zip(launching, busy, strict=True)]
    ax.plot(tokens, longer, color="0.85", linewidth=9, solid_capstyle="round", label="predicted: the longer of both")
    ax.plot(tokens, launching, "--", color=VERMILION, label="the CPU launches")
    ax.plot(tokens, busy, "-", color=BLUE, label="the GPU computes")
    ax.plot(*zip(*measured, strict=True), "k_", markersize=18, markeredgewidth=2.5, label="measured")
    ax.plot(*here, "D", color=GREEN, markersize=11, markerfacecolor="none", markeredgewidth=2, label="here")
    ax.annotate(f"{here[1]:,.0f} ms", here, (0, -16), textcoords="offset points", ha="center", fontsize=9, color=GREEN)
    ax.set(xscale="log", yscale="log", xlim=(220, 19_000), ylim=(15, 4000))
    ax.set(xlabel="tokens a step", ylabel="a step (ms)")
    fix_ticks(ax.xaxis, TOKENS, [f"{n:,}" for n in TOKENS])
    fix_ticks(ax.yaxis, TIMES, [f"{n:,}" for n in TIMES])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_locator(NullLocator())
    ax.legend(frameon=False, loc="upper left", ncols=3, fontsize=9).set_gid("frame")
    return ax
