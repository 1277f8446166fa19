"""Figures of dive_a_better_codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks, is_number

LINES = {  # colour, dash, marker of what comes in many block sizes
    "NF4": (BLUE, "-", "o"),
    "AF4": (ORANGE, "--", "s"),
    "BOF4-S (squared)": (GREEN, "-", "^"),
    "BOF4-S (absolute)": (GREEN, ":", "<"),
    "INT4": (GREY, ":", "v"),
    "E2M1": (VERMILION, "-.", "D"),
}
POINTS = {"Q4_0": ("P", GREY), "Q4_1": ("X", GREY), "MXFP4": ("*", VERMILION), "NVFP4": ("p", VERMILION)}


KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plot_levels(ax: Axes, tables: dict[str, Sequence[float]]) -> Axes:
    """Number lines from -1 to 1, one below the other, with a tick for each level."""
    for row, levels in enumerate(tables.values()):
        ax.plot([-1, 1], [row, row], color=GREY, linewidth=0.8)
        ax.plot(levels, [row] * len(levels), "|", color=BLUE, markersize=18, markeredgewidth=2)
    ax.set(yticks=range(len(tables)), yticklabels=list(tables), xlim=(-1.06, 1.06), ylim=(len(tables) - 0.4, -0.6))
    ax.set(xlabel="level (share of the number that its block is divided by)")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax


def percent(row: dict, measure: str) -> float:
    """A row's error in per cent: the root of the relative squared error, or the relative absolute error."""
    return 100 * (row["mse"] ** 0.5 if measure == "squared" else row["mae"])


def plot_errors(ax: Axes, rows: list[dict], measure: str) -> Axes:
    """Errors of formats over bits per parameter. rows: of one kind of data; lines have scales in 8 bits."""
    for name, (colour, dash, marker) in LINES.items():
        own = [row for row in rows if row["format"] == name and row["scales"] == "8 bits"]
        bits, errors = [row["bits"] for row in own], [percent(row, measure) for row in own]
        ax.plot(bits, errors, color=colour, linestyle=dash, marker=marker, markersize=5, label=name)
    for name, (marker, colour) in POINTS.items():
        (row,) = (row for row in rows if row["format"] == name)
        hollow = {"markersize": 10, "markerfacecolor": "none", "markeredgewidth": 2}  # what lies below it can be seen
        ax.plot(row["bits"], percent(row, measure), marker, color=colour, label=name, **hollow)
    ax.set(xlim=(3.98, 5.05), ylim=(6, 18), xlabel="bits per parameter, scales included")
    ax.set_ylabel(f"{measure} error (%)")
    fix_ticks(ax.xaxis, [4, 4.25, 4.5, 4.75, 5])
    fix_ticks(ax.yaxis, range(6, 19, 2))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1)).set_gid("frame")
    return ax


def plot_rises(ax: Axes, rises: dict[str, dict[str, float]], guess: object = ...) -> Axes:
    """Horizontal bars: by how much the loss rises in each format, for two kinds of text. guess: of the first's bar."""
    styles, names = ((BLUE, ""), (ORANGE, "//")), list(rises)
    for i, (kind, (colour, hatch)) in enumerate(zip(next(iter(rises.values())), styles, strict=True)):
        at, values = [row + (i - 0.5) * 0.4 for row in range(len(names))], [rises[name][kind] for name in names]
        drawn = ax.barh(at, values, 0.36, color=colour, hatch=hatch, edgecolor="white", label=kind)
        ax.bar_label(drawn, [f"{value:+.2f}" for value in values], padding=3, fontsize=9)
    if is_number(guess):
        ax.plot(guess, -0.2, "D", color=VERMILION, markersize=8, label="your guess")
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel="rise of the loss (nats per token)")
    ax.margins(x=0.12)
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="center right")
    return ax


def plot_sensitivity(ax: Axes, values: dict[str, float], label: str) -> Axes:
    """A field for each linear layer, kinds by decoder layers, coloured by value; rings: the largest five.

    values: by dotted name, such as model.layers.3.mlp.up_proj; nats per token.
    """
    places = {name: (KINDS.index(name.rpartition(".")[2]), int(name.split(".")[2])) for name in values}
    table = np.zeros((len(KINDS), 1 + max(layer for _, layer in places.values())))
    for name, place in places.items():
        table[place] = values[name]
    most = float(np.abs(table).max())
    picture = ax.imshow(table, aspect="auto", cmap="PuOr", vmin=-most, vmax=most)
    for name in sorted(values, key=values.__getitem__)[-5:]:
        row, column = places[name]
        ax.plot(column, row, "o", color=GREEN, markersize=13, markerfacecolor="none", markeredgewidth=2)
    ax.set(yticks=range(len(KINDS)), yticklabels=KINDS, xlabel="decoder layer")
    ax.figure.colorbar(picture, ax=ax, label=f"{label}\n(nats per token)", fraction=0.04)
    ax.set_title("rings: the five largest rises", loc="right", fontsize=9)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


WAYS: dict[str, tuple[str, str, str]] = {  # of spending bits: colour, dash, marker
    "NF4, smaller blocks everywhere": (BLUE, "-", "o"),
    "NF5 everywhere": (GREY, "", "s"),
    "best layers in 16 bits": (GREEN, "-", "^"),
    "best layers in 8 bits": (ORANGE, "-", "D"),
    "some layers in 16 bits, at random": (VERMILION, ":", "v"),
}


def plot_plans(axes: Sequence[Axes], panels: dict[str, dict[str, list[tuple[float, float]]]]) -> Sequence[Axes]:
    """Loss above that in 16 bits over bits per parameter, a line for each way to spend them.

    panels: by title, then by name in WAYS, bits and losses.
    """
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, points in curves.items():
            colour, dash, marker = WAYS[name]
            where: Any = zip(*sorted(points), strict=True)
            bits, losses = where
            ax.plot(bits, losses, color=colour, linestyle=dash, marker=marker, markersize=6, label=name)
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("bits per parameter of the linear layers")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss above 16 bits (nats per token)")
    axes[-1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return axes
