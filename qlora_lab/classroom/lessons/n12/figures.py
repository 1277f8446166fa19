"""Figures of 12_ship_it."""

from IPython.display import HTML
from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, ORANGE, VERMILION
from qlora_lab.classroom.widgets import show_tokens
from qlora_lab.training.chat import TokenizedSample


def show_end(sample: TokenizedSample, tokenizer, count: int = 12) -> HTML:
    """The last tokens of a sample; those that are learned are framed."""
    pieces = [tokenizer.decode([id]) for id in sample.ids[-count:]]
    return show_tokens(pieces, [label != -100 for label in sample.labels[-count:]])


def plot_merges(ax: Axes, losses: dict[str, float], lines: dict[str, float], guesses: dict) -> Axes:
    """Horizontal bars of validation losses (nats per token), references as vertical lines, guesses as diamonds."""
    names = list(losses)
    drawn = ax.barh(names, list(losses.values()), 0.6, color=[BLUE, ORANGE, GREEN])
    ax.bar_label(drawn, [f"{loss:.3f}" for loss in losses.values()], padding=14, fontsize=9)
    for (name, value), style in zip(lines.items(), [":", "--"], strict=False):
        ax.axvline(value, color="0.3", linestyle=style, linewidth=1, label=f"{name}: {value:.3f}")
    made = {name: guess for name, guess in guesses.items() if isinstance(guess, (int, float))}
    if made:
        ax.plot(list(made.values()), list(made), "D", color=VERMILION, markersize=8, label="your guess")
    ax.set_xlim(0, 1.2 * max(*losses.values(), *lines.values(), *made.values()))
    ax.set_xlabel("validation loss (nats per token)")
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return ax


def plot_gaps(ax: Axes, gaps: dict[str, list[float]], in_llama_cpp: dict[str, float]) -> Axes:
    """A row of dots for each case, and two diamonds: log probability of "The" minus that of "L".

    gaps: by case, one number a run. in_llama_cpp: by kind of file.
    """
    ax.axvline(0, color="0.3", linewidth=1)
    for row, values in enumerate(gaps.values()):
        spread = [row + 0.25 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        ax.plot(values, spread, "o", color=BLUE, markersize=5, alpha=0.7)
    row = len(gaps)
    for (kind, gap), colour in zip(in_llama_cpp.items(), [GREY, VERMILION], strict=False):
        ax.plot([gap], [row], "D", color=colour, markersize=8)
        ax.annotate(kind.upper(), (gap, row), (0, 9), textcoords="offset points", ha="center", fontsize=9)
    ax.set(yticks=range(row + 1), yticklabels=[*gaps, "llama.cpp"])
    limit = 1.3 * max(abs(value) for values in [*gaps.values(), list(in_llama_cpp.values())] for value in values)
    ax.set(xlim=(-limit, limit), ylim=(row + 0.5, -0.7), xlabel="log probability of “The” minus that of “L”")
    ax.annotate("French", (-limit, -0.45), (4, 0), textcoords="offset points", fontsize=9, color="0.3")
    ax.annotate("English", (limit, -0.45), (-4, 0), textcoords="offset points", ha="right", fontsize=9, color="0.3")
    return ax
