"""Figures of 14_more_than_one_card."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION

CARDS = (16, 24, 48, 80)  # GB
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


def told(guess) -> str:
    """What the learner guessed, or that nothing was guessed."""
    return "you made no guess" if guess is ... else f"your guess: {guess}"


def plot_cards_needed(
    ax: Axes, predicted: dict[int, dict[str, int]], measured: dict[int, float], guess: int | None = None
) -> Axes:
    """A stacked bar for each number of cards: bytes on each of them, by group.

    predicted: by number of cards, `estimate`'s parts in bytes. measured: GB, a dot each. guess: a number of cards.
    """
    bottoms = dict.fromkeys(predicted, 0.0)
    named = {part for parts, *_ in GROUPS.values() for part in parts}
    for name, (parts, colour, hatch) in GROUPS.items():
        sizes = [
            sum(size for part, size in all_parts.items() if (part in parts if parts else part not in named)) / 1e9
            for all_parts in predicted.values()
        ]
        ax.bar(
            range(len(predicted)),
            sizes,
            0.7,
            list(bottoms.values()),
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=name,
        )
        bottoms = {n: bottoms[n] + size for n, size in zip(predicted, sizes, strict=True)}
    at = list(predicted)
    if measured:
        ax.plot([at.index(n) for n in measured], list(measured.values()), "o", color=VERMILION, label="measured")
    highest = max(bottoms.values())
    for card in (card for card in CARDS if card < 1.25 * highest):
        ax.axhline(card, color="0.6", linestyle="--", linewidth=1)
        ax.annotate(f"{card} GB", (len(at) - 0.45, card), va="bottom", ha="right", color="0.4", fontsize=9)
    if isinstance(guess, int) and guess in predicted:
        ax.annotate("your guess", (at.index(guess), bottoms[guess]), (0, 14), textcoords="offset points", ha="center",
                    arrowprops={"arrowstyle": "->", "color": "0.3"}, fontsize=9)  # fmt: skip
    ax.set(xticks=range(len(at)), xticklabels=at, xlabel="cards", ylabel="on each card (GB, 10$^9$ bytes)")
    ax.set_ylim(0, 1.25 * highest)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9)
    return ax


def plot_step_times(ax: Axes, tokens_per_second: dict[str, float], guesses: dict) -> Axes:
    """Horizontal bars of tokens a second, with twice the first as a dashed line and guesses as ticks.

    guesses: by the last word of a bar's name; what is no number is not drawn.
    """
    names = list(tokens_per_second)
    drawn = ax.barh(names, list(tokens_per_second.values()), 0.6, color=[GREY, BLUE, ORANGE])
    ax.bar_label(drawn, [f"{value:,.0f}" for value in tokens_per_second.values()], padding=4, fontsize=9)
    twice = 2 * tokens_per_second[names[0]]
    ax.axvline(twice, color="0.4", linestyle="--", linewidth=1)
    ax.annotate(
        "twice one card", (twice, -0.45), (-4, 0), textcoords="offset points", ha="right", fontsize=9, color="0.4"
    )
    for row, name in enumerate(names):
        guess = guesses.get(name.split()[-1])
        if isinstance(guess, (int, float)):
            ax.plot([guess, guess], [row - 0.35, row + 0.35], color=VERMILION, linewidth=2)
    ax.set_xlim(0, 1.15 * twice)
    ax.set_xlabel("tokens a second, all cards together")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    return ax
