"""Figures of 13_fact_check."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREY, ORANGE, VERMILION

ANSWERS = ("true", "depends", "false")


def plot_ballot(ax: Axes, themes: dict[str, list[tuple[str, str | None, str]]]) -> Axes:
    """What the learner voted and what the evidence says, claim by claim.

    themes: by theme, (claim, vote, verdict). A verdict is "true", "depends" or "false"; a vote that is none of them is
    not drawn.
    """
    rows, labels, y = [], [], 0.0
    for theme, claims in themes.items():
        labels.append((y, theme, True))
        for claim, vote, verdict in claims:
            y += 1
            labels.append((y, claim, False))
            rows.append((y, vote, verdict))
        y += 1.25
    for at, vote, verdict in rows:
        ax.axhline(at, color="0.9", linewidth=0.8, zorder=0)
        if vote in ANSWERS and vote != verdict:
            ax.plot([ANSWERS.index(vote), ANSWERS.index(verdict)], [at, at], color=GREY, linewidth=1, linestyle=":")
    heights = [at for at, *_ in rows]
    found = [ANSWERS.index(verdict) for *_, verdict in rows]
    ax.plot(found, heights, "o", color=BLUE, markersize=12, label="what the evidence says")
    voted = [(ANSWERS.index(vote), at) for at, vote, _ in rows if vote in ANSWERS]
    style = {"color": VERMILION, "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.8}
    ax.plot(*zip(*voted, strict=True) if voted else ((), ()), "D", label="your vote", **style)
    ax.set(xlim=(-0.4, 2.4), ylim=(y - 0.7, -0.6), xticks=range(3), xticklabels=["true", "it depends", "false"])
    ax.set_yticks([at for at, *_ in labels], [text for _, text, _ in labels])
    for tick, (*_, is_theme) in zip(ax.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if is_theme else "normal")
    ax.xaxis.tick_top()
    ax.tick_params(axis="both", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
    return ax


def plot_changes(
    ax: Axes, rows: dict[str, dict[str, float]], claimed: dict[str, tuple[float, float]], xlabel: str
) -> Axes:
    """Horizontal bars of changes in per cent, and what was claimed: a band, or a line where both ends are the same.

    rows: by setting, the change of each series. claimed: by series, the lower and the upper end.
    """
    styles = dict(zip(claimed, [(BLUE, "", "--"), (ORANGE, "//", "-.")], strict=False))
    height = 0.8 / len(claimed)
    for i, (series, (colour, hatch, _)) in enumerate(styles.items()):
        at = [row + (i - (len(claimed) - 1) / 2) * height for row in range(len(rows))]
        values = [row[series] for row in rows.values()]
        drawn = ax.barh(at, values, 0.9 * height, color=colour, hatch=hatch, edgecolor="white", label=series)
        texts = ax.bar_label(drawn, [f"{value:+.0f} %".replace("-", "−") for value in values], padding=3, fontsize=9)
        for text in texts:  # a claim's line must not cross it
            text.set(zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    for series, (low, high) in claimed.items():
        colour, _, dash = styles[series]
        if low == high:
            ax.axvline(low, color=colour, linestyle=dash, label=f"claimed: {low:+g} %".replace("-", "−"))
        else:
            label = f"claimed: {low:+g} to {high:+g} %".replace("-", "−")
            ax.axvspan(low, high, color=VERMILION, alpha=0.2, linewidth=0, zorder=0, label=label)
    ax.axvline(0, color="black", linewidth=0.8)
    values = [0, *(value for row in rows.values() for value in row.values())]
    margin = 0.14 * (max(values) - min(values))
    ax.set_xlim(min(values) - margin * (min(values) < 0), max(values) + margin * (max(values) > 0))
    ax.set(xlabel=xlabel, yticks=range(len(rows)), yticklabels=list(rows))
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    handles, texts = ax.get_legend_handles_labels()
    order = sorted(range(len(texts)), key=lambda i: texts[i].startswith("claimed"))  # what was measured comes first
    where = {"loc": "lower center", "bbox_to_anchor": (0.4, 1), "ncols": 4}
    ax.legend([handles[i] for i in order], [texts[i] for i in order], frameon=False, fontsize=9, **where)
    return ax
