"""Figures of 02_memory_wall."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, is_number, numbers_in

MEMORY_STYLES = {  # colour, hatch: the same part of a training step's memory looks the same in every figure
    "weights": (BLUE, ""),
    "fp32 copy": ("#56B4E9", "xx"),
    "adapters": (GREEN, ".."),
    "gradients": (ORANGE, "//"),
    "optimizer states": (VERMILION, "\\\\"),
    "activations": ("#CC79A7", ""),
    "logits and loss": ("#F0E442", "--"),
    "helpers": ("#999999", ""),
    "CUDA context": ("#333333", ""),
}


def plot_memory(
    ax: Axes,
    rows: dict[str, dict[str, float]],
    cards: Sequence[float] = (),
    guess: Mapping[str, object] | None = None,
    ends: dict[str, str] | None = None,
    limit: float | None = None,
    legend: bool = True,
) -> Axes:
    """Horizontal bars of a training step's memory (GB, 10^9 bytes), parts laid end to end.

    rows: by bar, the size of each part; parts are keys of MEMORY_STYLES, and each has one entry in the legend.
    cards: sizes (GB) to mark by a line. guess: the learner's value for some bars, a diamond each if not open.
    ends: a text after a bar, instead of its sum. limit: where the axis ends.
    """
    at = {name: number for number, name in enumerate(rows)}
    left = dict.fromkeys(rows, 0.0)
    for part, (colour, hatch) in MEMORY_STYLES.items():
        label = part  # patches, not barh: that takes three times as long, and a slider draws this
        for name in (name for name in rows if part in rows[name]):
            corner, size = (left[name], at[name] - 0.28), rows[name][part]
            look = {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5, "label": label}
            ax.add_patch(Rectangle(corner, size, 0.56, **look))
            left[name] += size
            label = "_"
    guesses = numbers_in(guess)
    limit = limit or 1.18 * max([*left.values(), *guesses.values()])
    labelled = 2 * limit
    for card in sorted((card for card in cards if card <= limit), reverse=True):
        ax.axvline(card, color="#333333", linestyle="--", linewidth=1, zorder=0)
        if labelled - card > 0.06 * limit:  # else the labels would meet
            ax.annotate(f"{card:g} GB", (card, 1), (0, 2), xycoords=("data", "axes fraction"), **_CARD_TEXT)
            labelled = card
    for name, size in left.items():
        shift, side = ((5, 0), "left") if size < 0.9 * limit else ((0, 24), "right")
        text = (ends or {}).get(name, f"{size:.1f} GB")
        place = {"textcoords": "offset points", "va": "center", "ha": side, "bbox": _ON_WHITE}
        ax.annotate(text, (min(size, limit), at[name]), shift, **place)
    if guesses:
        below = [at[name] + 0.4 for name in guesses]  # its bar: a good guess would hide the label at the bar's end
        ax.plot(list(guesses.values()), below, "D", color="black", markersize=7, zorder=5)
        place = {"textcoords": "offset points", "va": "center", "fontsize": 9}
        ax.annotate("your guess", (next(iter(guesses.values())), below[0]), (8, 0), **place)
    ax.set(yticks=list(at.values()), yticklabels=list(at), ylim=(len(at) - 0.5, -0.6), xlim=(0, limit))
    ax.set_xlabel("memory (GB, 10$^9$ bytes)")
    ax.tick_params(axis="y", length=0)
    if legend:
        entries = len(ax.get_legend_handles_labels()[1])
        columns = entries if entries < 6 else (entries + 1) // 2
        legend_style = {"frameon": False, "fontsize": 9, "ncols": columns}
        below = ScaledTranslation(0, -38 / 72, ax.figure.dpi_scale_trans)  # the axis, in inches
        place = {"loc": "upper center", "bbox_to_anchor": (0.45, 0), "bbox_transform": ax.transAxes + below}
        ax.legend(**place, **legend_style).set_gid("frame")
    return ax


_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_CARD_TEXT = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8, "color": "#333333"}


def plot_methods(
    rows: dict[str, dict[str, float]],
    cards: Sequence[float],
    guess: Mapping[str, object] | None = None,
    enlarged: float = 20,
) -> None:
    """Two panels of `plot_memory`: all bars, and below all but the first on an axis that ends at `enlarged` GB.

    guess: the learner's values for some of the lower bars.
    """
    _, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.8), height_ratios=[3, 2], layout="constrained")
    first, *others = rows
    plot_memory(top, rows, cards, legend=False)
    limit = 1.18 * max([enlarged / 1.18, *numbers_in(guess).values()])
    plot_memory(bottom, {name: rows[name] for name in others}, cards, guess, limit=limit, legend=False)
    for ax in (top, bottom):
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = top.get_legend_handles_labels()
    top.figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    bottom.set_xlabel(f"the bars without {first}, enlarged (GB, 10$^9$ bytes)")


def plot_growth(
    ax: Axes,
    curves: dict[str, list[float]],
    tokens: list[int],
    cards: Sequence[float] = (),
    guess: object = None,
) -> Axes:
    """Memory (GB, 10^9 bytes) over the tokens of a step, with and without checkpointing, and cards as dashed lines.

    curves: by "with" and "without". guess: the learner's GB at the most tokens; no mark if it is open.
    """
    styles = [(BLUE, "-", "o"), (VERMILION, "-.", "s"), (GREEN, ":", "^")]
    for (name, values), (colour, dash, marker) in zip(curves.items(), styles, strict=False):
        ax.plot(tokens, values, color=colour, linestyle=dash, marker=marker, markersize=5)
        beside = f"{name}\ncheckpointing"
        ax.annotate(beside, (tokens[-1], values[-1]), (8, 0), textcoords="offset points", va="center", color=colour)
    top = 1.1 * max([*(max(values) for values in curves.values()), guess if is_number(guess) else 0])
    for card in cards:
        if card <= top:
            ax.axhline(card, color=GREY, linestyle="--", linewidth=1, zorder=0)
            place = {"textcoords": "offset points", "fontsize": 8, "color": "#333333", "ha": "right"}
            ax.annotate(f"{card:g} GB card", (1.32 * tokens[-1], card), (0, 2), **place)
    if is_number(guess):
        ax.plot(tokens[-1], guess, "D", color="black", markersize=8, zorder=5)
        place = {"textcoords": "offset points", "va": "center", "fontsize": 9, "bbox": _ON_WHITE}
        ax.annotate("your guess", (tokens[-1], guess), (9, 0), **place)
    ax.set(xlim=(0, 1.32 * tokens[-1]), ylim=(0, top), xticks=tokens, xlabel="tokens in a step (batch size × length)")
    ax.set_ylabel("memory (GB, 10$^9$ bytes)")
    ax.set_xticks(tokens, [f"{count:,}" for count in tokens], fontsize=9)
    return ax
