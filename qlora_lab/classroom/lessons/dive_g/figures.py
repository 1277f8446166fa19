"""Figures of dive_g_more_than_one_card."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks, is_number

CARDS = (16, 24, 48, 80)  # GB
TOPS = (10, 30, 60, 100, 200)  # GB, of the axis: a few, so that most moves of a slider leave the frame as it is
GROUPS = {  # what is drawn as one piece of a bar: its parts by `estimate`'s names, colour, hatch
    "weights, 4 and 16 bits": (("base weights", "embeddings and head", "norms", "biases"), BLUE, ""),
    "scales (not shared)": (("quantization constants",), "#56B4E9", "xx"),
    "gathered layer": (("gathered",), ORANGE, "//"),
    "adapters, and what training them takes": (
        ("adapters", "gradients", "optimizer states", "update", "bf16 copies"),
        GREEN,
        "..",
    ),
    "activations and the rest": ((), GREY, ""),
}
DOTS = {"sharded": ("measured", VERMILION), "rehearsed": ("rehearsed on one card", "white")}  # label, filling


def plot_cards_needed(
    ax: Axes, predicted: dict[int, dict[str, int]], peaks: dict[str, dict[int, float]], guess: int | None = None
) -> Axes:
    """A stacked bar for each number of cards: bytes on each of them, by group.

    predicted: by number of cards, `estimate`'s parts in bytes. peaks: GB by number of cards, a dot each, of "sharded"
    and "rehearsed" runs. guess: a number of cards.
    """
    bottoms = dict.fromkeys(predicted, 0.0)
    named = {part for parts, *_ in GROUPS.values() for part in parts}
    for name, (parts, colour, hatch) in GROUPS.items():
        sizes = [
            sum(size for part, size in all_parts.items() if (part in parts if parts else part not in named)) / 1e9
            for all_parts in predicted.values()
        ]
        spans = [(x, low, low + size) for x, (low, size) in enumerate(zip(bottoms.values(), sizes, strict=True))]
        corners = [[(x - 0.35, a), (x + 0.35, a), (x + 0.35, b), (x - 0.35, b)] for x, a, b in spans]
        ax.add_collection(PolyCollection(corners, facecolor=colour, hatch=hatch, edgecolor="white", label=name))
        bottoms = {n: bottoms[n] + size for n, size in zip(predicted, sizes, strict=True)}
    at = list(predicted)
    for way, (label, fill) in DOTS.items():
        dots = {n: peak for n, peak in peaks[way].items() if way == "sharded" or n not in peaks["sharded"]}
        places = [at.index(n) for n in dots]
        ax.plot(places, list(dots.values()), "o", color=VERMILION, markerfacecolor=fill, label=label)
    top = next(top for top in TOPS if top > 1.15 * max(bottoms.values()))
    for card in (card for card in CARDS if card < top):
        ax.axhline(card, color="0.6", linestyle="--", linewidth=1)
        ax.annotate(f"{card} GB", (len(at) - 0.02, card), va="bottom", ha="right", color="0.4", fontsize=9)
    if isinstance(guess, int) and guess in predicted:
        ax.annotate("your guess", (at.index(guess), bottoms[guess]), (0, 14), textcoords="offset points", ha="center",
                    arrowprops={"arrowstyle": "->", "color": "0.3"}, fontsize=9)  # fmt: skip
    ax.set(xlabel="cards", ylabel="on each card (GB, 10$^9$ bytes)", xlim=(-0.5, len(at)), ylim=(0, top))
    fix_ticks(ax.xaxis, range(len(at)), at)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3).set_gid("frame")
    return ax


def plot_ways(axes: Sequence[Axes], speed: dict[str, float], memory: dict[str, float], guesses: dict) -> Sequence[Axes]:
    """Two panels of horizontal bars: tokens a second, with twice the first as a dashed line, and GB on a card.

    guesses: of tokens a second, by a bar's name, drawn as ticks; what is no number is not drawn.
    """
    names, twice = list(speed), 2 * next(iter(speed.values()))
    panels = ((speed, "{:,.0f}", "tokens a second, all cards together"), (memory, "{:.1f}", "GB on the fuller card"))
    for ax, (values, form, label) in zip(axes, panels, strict=True):
        ax.barh(names, list(values.values()), 0.6, color=[GREY, BLUE, ORANGE, GREEN])
        widest = 1.25 * max(values.values())
        for row, value in enumerate(values.values()):
            struck = values is speed and value < twice < 1.25 * value  # the line would strike the number out
            ax.text((twice if struck else value) + 0.01 * widest, row, form.format(value), va="center", fontsize=9)
        ax.set_xlim(0, widest)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        ax.set_xlabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].axvline(twice, color="0.4", linestyle="--", linewidth=1)
    axes[0].annotate("twice one card", (twice, -0.4), (-4, 0), textcoords="offset points", ha="right", fontsize=9)
    for row, name in enumerate(names):
        if is_number(guess := guesses.get(name)):
            axes[0].plot([guess, guess], [row - 0.4, row + 0.4], color=VERMILION, linewidth=2)
    axes[0].invert_yaxis()
    return axes


SECONDS = (0.01, 0.1, 1, 10, 100, 1000)


def plot_plan(ax: Axes, computing: float, wires: dict[str, float], guesses: dict) -> Axes:
    """Horizontal bars on a logarithmic axis: seconds that a step computes, and that its bytes take, by way.

    guesses: seconds by way, drawn as diamonds; what is no number above zero is not drawn.
    """
    names = ["computing", *(f"wires: {way}" for way in wires)]
    values = [computing, *wires.values()]
    colours = [GREY, *(VERMILION if value > computing else BLUE for value in wires.values())]
    ax.barh(range(len(names)), values, 0.6, left=1e-4, color=colours)
    for row, value in enumerate(values):
        size = f"{value:,.{2 if value < 10 else 0}f} s"
        end = computing if value < computing < 3 * value else value  # the line would strike the number out
        ax.text(1.15 * end, row, size + " (longer)" * (value > computing), va="center", fontsize=9)
    ax.axvline(computing, color="0.4", linestyle="--", linewidth=1)
    for row, way in enumerate(wires, 1):
        if is_number(guess := guesses.get(way)) and guess > 0:
            ax.plot(guess, row + 0.38, "D", color="black", markersize=6)
    ax.set(xscale="log", xlim=(0.01, 5000), xlabel="seconds a step (log scale); dashed: as long as computing")
    fix_ticks(ax.xaxis, SECONDS, [f"{second:g}" for second in SECONDS])
    fix_ticks(ax.yaxis, range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
