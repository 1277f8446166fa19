"""Figures of 12_ship_it."""

import html

from IPython.display import HTML
from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, ORANGE, draw_guesses
from qlora_lab.classroom.widgets import show_tokens
from qlora_lab.training.chat import TokenizedSample


def show_ends(samples: dict[str, TokenizedSample], tokenizer, count: int = 10) -> HTML:
    """The last tokens of samples, a line each after their names; those that are learned are framed."""
    lines = []
    for name, sample in samples.items():
        pieces = [tokenizer.decode([id]) for id in sample.ids[-count:]]
        tokens = show_tokens(pieces, [label != -100 for label in sample.labels[-count:]])
        lines.append(f"<div>{html.escape(name)}</div>{tokens.data}")
    return HTML("".join(lines))


def plot_merges(ax: Axes, losses: dict[str, float], lines: dict[str, float], guesses: dict) -> Axes:
    """Horizontal bars of validation losses (nats per token), references as vertical lines, guesses as diamonds."""
    names = list(losses)
    drawn = ax.barh(names, list(losses.values()), 0.6, color=[BLUE, ORANGE, GREEN])
    ax.bar_label(drawn, [f"{loss:.3f}" for loss in losses.values()], padding=14, fontsize=9)
    for (name, value), style in zip(lines.items(), [":", "--"], strict=False):
        ax.axvline(value, color="0.3", linestyle=style, linewidth=1, label=f"{name}: {value:.3f}")
    made = {name: guess for name, guess in guesses.items() if isinstance(guess, (int, float))}
    if made:
        draw_guesses(ax, names, made)
    ax.set_xlim(0, 1.2 * max(*losses.values(), *lines.values(), *made.values()))
    ax.set_xlabel("validation loss (nats per token)")
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return ax
