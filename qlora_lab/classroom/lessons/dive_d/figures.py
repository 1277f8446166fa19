"""Figures of dive_d_training_tricks."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, is_number, numbers_in


def plot_knobs(
    axes: list[Axes],
    groups: list[list[str]],
    panels: dict[str, tuple[dict[str, list[float]], list[float], tuple[float, float], list[float]]],
    guesses: Mapping[str, object],
) -> Axes:
    """Rings: a row for each knob, a panel for each measure, a ring for each run, the runs of a row one below the other.

    groups: the rows, by kind. panels: by axis label, the values of each knob; values that should be equal, for the grey
    band; the axis's limits (logarithmic if one is ten times the other), and its ticks. What lies beyond the upper limit
    is written as a text. guesses: what the learner expects, by knob, in the last panel; those left open are not drawn.
    """
    rows, y = {}, 0.0
    for group in groups:
        for knob in group:
            rows[knob] = y
            y += 1
        y += 0.5
    for ax, (label, (values, equal, (low, high), ticks)) in zip(axes, panels.items(), strict=True):
        ax.axvspan(min(equal), max(equal), color=GREY, alpha=0.3, linewidth=0, label="equal settings")
        for group in groups[:-1]:
            ax.axhline(rows[group[-1]] + 0.75, color="0.85", linewidth=0.8)
        inside = [
            (value, rows[knob] + 0.18 * (i - (len(runs) - 1) / 2))
            for knob, runs in values.items()
            for i, value in enumerate(runs)
            if value <= high
        ]
        ax.plot(*zip(*inside, strict=True), "o", color=BLUE, markersize=4.5, markerfacecolor="none", label="a run")
        for knob, runs in values.items():
            if max(runs) > high:
                text = f"{min(runs):.3g} … {max(runs):.3g} →"
                ax.text(0.98, rows[knob], text, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=8)
        ax.set(xlim=(low, high), xlabel=label)
        if high >= 10 * low:
            ax.set(xscale="log", xlabel=f"{label}\nlog scale")
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(y - 1.0, -0.6)
        ax.set_yticks(list(rows.values()), list(rows) if ax is axes[0] else [])
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    if drawn := numbers_in(guesses):
        at = [rows[knob] for knob in drawn]
        axes[-1].plot(list(drawn.values()), at, "D", color=VERMILION, markersize=5, zorder=0, label="your guess")
    handles, labels = axes[-1].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    return axes[0]


def plot_pairs(
    axes: list[Axes],
    groups: list[str],
    panels: dict[str, dict[str, list[float]]],
    limits: list[float],
    guesses: list[object],
) -> Axes:
    """Grouped horizontal bars, two per group; the second is labelled with its difference from the first (%).

    panels: by axis label, for both bars a value for each group. guesses: by panel, the learner's per cent, a diamond in
    each group; one that is left open is not drawn.
    """
    for ax, (label, (first, second)), limit, guess in zip(
        axes, ((label, bars.items()) for label, bars in panels.items()), limits, guesses, strict=True
    ):
        for (name, sizes), offset, colour, hatch in [(first, -0.19, ORANGE, "//"), (second, 0.19, BLUE, "")]:
            at = [i + offset for i in range(len(groups))]
            ax.barh(at, sizes, 0.34, color=colour, hatch=hatch, edgecolor="white", label=name)
        for i, (before, after) in enumerate(zip(first[1], second[1], strict=True)):
            ax.text(before + 0.02 * limit, i - 0.19, f"{before:#.3g}", va="center", fontsize=9)
            guessed = before * (1 + guess / 100) if is_number(guess) else 0.0
            text = f"{after:#.3g}: {100 * (after / before - 1):+.0f} %".replace("-", "−")
            ax.text(max(after, guessed) + 0.03 * limit, i + 0.19, text, va="center", fontsize=9)
            if is_number(guess):
                mark = "your guess" if i == 0 else None
                ax.plot(guessed, i + 0.19, "D", color=VERMILION, markersize=6, label=mark)
        ax.set(xlabel=label, xlim=(0, limit), yticks=range(len(groups)), yticklabels=groups if ax is axes[0] else [])
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    return axes[0]


def plot_splits(
    ax: Axes,
    sizes: list[int],
    lines: dict[str, list[float]],
    measured: dict[str, list[tuple[int, float]]],
    card: float,
    limits: tuple[float, float] = (4, 400),
) -> Axes:
    """Memory on the card (GB, 10^9 bytes) over the samples in a forward pass, a line for each way; filled if it fits.

    measured: by way, points that were recorded. card: GB that may be used.
    """
    place = {size: x for x, size in enumerate(sizes)}
    ax.axhspan(card, limits[1], color=GREY, alpha=0.2, linewidth=0, label="does not fit")
    ax.axhline(card, color=GREY, linewidth=1)
    for (name, values), colour, style, marker in zip(lines.items(), (ORANGE, BLUE), ("--", "-"), "so", strict=True):
        ax.plot(
            range(len(sizes)),
            values,
            style,
            color=colour,
            marker=marker,
            markerfacecolor="white",
            markersize=7,
            label=name,
        )
        fitting = [(place[size], value) for size, value in zip(sizes, values, strict=True) if value <= card]
        if fitting:
            ax.plot(*zip(*fitting, strict=True), marker, color=colour, markersize=7)
    recorded = [(place[size], value) for points in measured.values() for size, value in points]
    x, heights = zip(*recorded, strict=True) if recorded else ((), ())
    ax.plot(x, heights, "_", color="black", markersize=16, markeredgewidth=2, label="measured")
    ax.set(yscale="log", xlim=(-0.4, len(sizes) - 0.6), ylim=limits)
    ax.set_xticks(range(len(sizes)), [f"{size} × {16 // size}" for size in sizes])
    ticks = [tick for tick in (5, 10, 20, 50, 100, 200, 400) if limits[0] <= tick <= limits[1]]
    ax.set_yticks(ticks, [f"{tick}" for tick in ticks])
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="samples in a forward pass × passes a step", ylabel="on the card (GB, 10$^9$ bytes)")
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=9).set_gid("frame")
    return ax


def plot_tradeoff(
    ax: Axes,
    points: dict[str, list[tuple[float, float]]],
    start: float,
    labels: dict[str, tuple[int, int]],
    guess: tuple[object, object],
) -> Axes:
    """What was trained for (nats per token, log scale) against everything else, a mark for each seed of a knob.

    start: the other loss before any training. labels: offsets (points) of the knobs that are named. guess: the
    learner's point; not drawn if a part of it is left open.
    """
    markers = "osD^vP*X<>"
    ax.axhline(start, color=GREY, linestyle=":", linewidth=1)
    ax.text(0.0042, start, "untrained", color=GREY, fontsize=9, ha="right", va="bottom")
    in_sight = sorted(points.items(), key=lambda item: -min(item[1])[0])  # left to right: neighbours differ in colour
    for i, (knob, seeds) in enumerate(in_sight):
        colour = GREY if knob not in labels else (BLUE, ORANGE, GREEN)[i % 3]
        marker = "." if knob not in labels else markers[i % len(markers)]
        ax.plot(*zip(*seeds, strict=True), marker, color=colour, markersize=6, markerfacecolor="none", linestyle="")
        if knob in labels:
            x, y = (sum(values) / len(seeds) for values in zip(*seeds, strict=True))
            ax.annotate(knob, (x, y), labels[knob], textcoords="offset points", color=colour, fontsize=9, ha="center")
    orders, english = guess
    if is_number(orders) and is_number(english):
        ax.plot(orders, english, "D", color=VERMILION, markersize=8)
        place = {"textcoords": "offset points", "color": VERMILION, "fontsize": 9, "ha": "center"}
        ax.annotate("your guess", (orders, english), (0, -17), **place)
    ax.set(xscale="log", xlim=(0.25, 0.004), ylim=(3.55, 4.15))
    ax.set_xticks([0.2, 0.1, 0.05, 0.02, 0.01, 0.005], ["0.2", "0.1", "0.05", "0.02", "0.01", "0.005"])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="held-out orders (nats per token); better to the right →", ylabel="plain English\n(nats per token)")
    return ax


def plot_moves(ax: Axes, moves: dict[str, list[float]], guesses: Mapping[int, object]) -> Axes:
    """How far AdamW moves a number (in learning rates) over the steps, a line for each case; from step 1.

    guesses: by step, what the learner expects; those left open are not drawn.
    """
    for (name, values), colour, style in zip(moves.items(), (BLUE, GREEN), ("-", "--"), strict=True):
        ax.plot(range(1, len(values) + 1), values, style, color=colour, linewidth=2, label=name)
    drawn = [(step, guess) for step, guess in guesses.items() if is_number(guess)]
    if drawn:
        ax.plot(*zip(*drawn, strict=True), "D", color=VERMILION, markersize=8, label="your guess")
    ax.set(xlabel="step", ylabel="move (learning rates)", xlim=(0, len(next(iter(moves.values())))), ylim=(0, None))
    ax.legend(frameon=False, loc="center right")
    return ax
