"""Figures of dive_h_merging."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks, numbers_in


def plot_snapped(
    axes: list[Axes],
    base: list[float],
    wanted: list[float],
    stored: list[float],
    levels: list[float],
    survival: dict[float, float],
    factor: float,
) -> Axes:
    """Left: a block's weights: the base, what is wanted, what 16 levels store. Right: what survives of a correction.

    survival: share of the correction that is still there, by how many times as large it is. factor: the one shown left.
    """
    left, right = axes
    x = range(len(wanted))
    left.hlines(levels, -1, len(wanted), color="0.85", linewidth=0.8, zorder=0)
    left.vlines(x, wanted, stored, color=GREY, linewidth=1)
    left.plot(x, base, "_", color="black", markersize=11, label="base")
    left.plot(x, wanted, "o", color=ORANGE, markersize=5, markerfacecolor="none", label="wanted")
    left.plot(x, stored, "s", color=BLUE, markersize=3.5, label="stored in 4 bits")
    left.set(xlim=(-1, len(wanted)), xlabel="weight of one block", ylabel="value / largest of the base's block")
    left.set_ylim(-1.25, 1.25)
    fix_ticks(left.yaxis, [-1, 0, 1])
    left.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=9).set_gid("frame")
    right.axhline(1, color=GREY, linestyle=":", linewidth=1)
    right.plot(list(survival), list(survival.values()), color=BLUE, marker=".")
    right.plot([factor], [survival[factor]], "D", color=VERMILION, markersize=8)
    right.annotate(
        f"× {factor:g}: {survival[factor]:.0%}", (0.97, 0.06), xycoords="axes fraction", color=VERMILION, ha="right"
    )
    right.set(xscale="log", ylim=(0, 1.15), xlabel="correction,\ntimes the trained one", ylabel="share that survives")
    ticks = [1, 3, 10, 30]
    fix_ticks(right.xaxis, ticks, [f"× {tick}" for tick in ticks])
    right.minorticks_off()
    fix_ticks(right.yaxis, [0, 0.5, 1], ["0 %", "50 %", "100 %"])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return left


def plot_left(ax: Axes, left: dict[str, tuple[float, float]], guesses: dict) -> Axes:
    """An arrow for each merge: as high as what is left of the adapter, as long to the right as the rest.

    left: by merge, both as multiples of the adapter. guesses: heights by merge, drawn as diamonds if they are numbers.
    """
    ax.axhline(1, color=GREY, linestyle=":", linewidth=1)
    for (name, (kept, rest)), colour in zip(left.items(), (BLUE, ORANGE, GREEN, GREY), strict=True):
        ax.annotate("", (rest, kept), (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2})
        up = 2 if kept > 0.5 else -2  # beside the tip, and away from the other arrows
        at = "bottom" if up > 0 else "top"
        ax.annotate(name, (rest, kept), (6, up), textcoords="offset points", color=colour, va=at)
    if made := numbers_in(guesses):
        ax.plot([left[name][1] for name in made], list(made.values()), "D", color=VERMILION, label="your guess")
        ax.legend(frameon=False, loc="upper center")
    furthest = max(rest for _, rest in left.values())
    tallest = max(1.0, *(kept for kept, _ in left.values()), *made.values())
    ax.set(xlim=(-0.02 * furthest, 1.2 * furthest), ylim=(-0.2, 1.3 * tallest))
    ax.set(xlabel="everything else that changed (1 = as large as the adapter)", ylabel="adapter that is left")
    return ax


def plot_preflight(ax: Axes, shares: dict[str, tuple[float, float, str]], guess: dict) -> Axes:
    """Stacked horizontal bars: what of a model's 16-bit bytes is still there after loading in 4 bits (per cent).

    shares: by model, the 4-bit weights' part and the part left in 16 bits, both of the 16-bit size, and a text.
    guess: by model, the learner's guess of the whole; what is no number is not drawn.
    """
    names = list(shares)
    four = [part for part, _, _ in shares.values()]
    left = [rest for _, rest, _ in shares.values()]
    ax.barh(names, four, 0.6, color=BLUE, edgecolor="white", label="in 4 bits")
    ax.barh(names, left, 0.6, four, color=ORANGE, hatch="//", edgecolor="white", label="left in 16 bits")
    for y, (part, rest, text) in enumerate(shares.values()):
        ax.text(part + rest + 1, y, text, va="center", fontsize=9)
    if made := numbers_in(guess):
        ax.plot(list(made.values()), [names.index(name) for name in made], "D", color=VERMILION, label="your guess")
    ax.set(xlim=(0, 135), xlabel="bytes after loading (% of the model in 16 bits)", xticks=range(0, 101, 25))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.42, 1), ncols=3, fontsize=9)
    return ax


def plot_plans(ax: Axes, adapters: list[int], gigabytes: dict[str, list[float]], cards: dict[str, float]) -> Axes:
    """Lines: memory (GB, 10^9 bytes) over the number of adapters served, one line per plan; cards as grey lines."""
    for (name, sizes), (colour, style) in zip(
        gigabytes.items(), [(ORANGE, "--"), (GREEN, "-."), (BLUE, "-")], strict=True
    ):
        ax.plot(adapters, sizes, color=colour, linestyle=style, linewidth=2, label=name)
    for name, size in cards.items():
        ax.axhline(size, color=GREY, linestyle=":", linewidth=1)
        ax.text(1.01, size, name, transform=ax.get_yaxis_transform(), va="center", color=GREY, fontsize=9)
    ax.set(xlabel="adapters served", ylabel="weights (GB, 10$^9$ bytes)", xscale="log", yscale="log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.legend(frameon=False, loc="upper left", fontsize=9)
    return ax
