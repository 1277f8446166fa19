"""Figures of 13_fact_check."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREY, VERMILION

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
    if voted:
        ax.plot(*zip(*voted, strict=True), "D", label="your vote", **style)
    ax.set(xlim=(-0.4, 2.4), ylim=(y - 0.7, -0.6), xticks=range(3), xticklabels=["true", "it depends", "false"])
    ax.set_yticks([at for at, *_ in labels], [text for _, text, _ in labels])
    for tick, (*_, is_theme) in zip(ax.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if is_theme else "normal")
    ax.xaxis.tick_top()
    ax.tick_params(axis="both", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
    return ax
