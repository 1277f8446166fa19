"""Figures of dive_l_small_cards."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION, fix_ticks


def plot_cards(ax: Axes, outcomes: dict[tuple[str, str], dict[int, str]], cards: list[int]) -> Axes:
    """Which model trains on which card: a row for each (model, preset), a column for each card (GB).

    outcomes: by row and card, "fits" (a dot), "pages" (a ring) or "fails" (a cross); nothing where it was not tried.
    """
    marks = {
        "fits": ("o", BLUE, BLUE, "trains, with states and 0.5 GB of context"),
        "pages": ("o", BLUE, "white", "trains, but states would move out"),
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


def plot_waterfall(
    ax: Axes, parts: dict[str, float], totals: dict[str, float | None], xlabel: str, limit: float
) -> Axes:
    """Parts as bars that begin where the one above ends, and below them bars of totals.

    totals: None says "not recorded". What lies beyond `limit` is cut off: an arrow at its number.
    """
    sizes = list(parts.values())
    left = [sum(sizes[:i]) for i in range(len(sizes))] + [0.0] * len(totals)
    widths = sizes + [size or 0.0 for size in totals.values()]
    colours = [ORANGE] * len(parts) + [BLUE, GREEN][: len(totals)]
    ends = [start + width for start, width in zip(left, widths, strict=True)]
    left, shown = ([min(edge, limit) for edge in edges] for edges in (left, ends))
    ax.barh(
        range(len(widths)), [end - start for start, end in zip(left, shown, strict=True)], 0.75, left, color=colours
    )
    texts = [f"{size:.2f}" for size in sizes]
    texts += ["not recorded" if size is None else f"{size:.2f}" for size in totals.values()]
    for y, (end, text) in enumerate(zip(ends, texts, strict=True)):
        ax.text(min(end, limit) + 0.01 * limit, y, text + " →" * (end > limit), va="center", fontsize=9)
    ax.axhline(len(parts) - 0.5, color=GREY, linewidth=0.8)
    fix_ticks(ax.yaxis, range(len(widths)), [*parts, *totals])
    ax.set(xlabel=xlabel, xlim=(0, 1.15 * limit))
    ax.set_ylim(len(widths) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    return ax
