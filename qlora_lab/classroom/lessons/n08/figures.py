"""Figures of 08_your_data."""

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from qlora_lab.classroom.plots import BLUE, GREY, ORANGE, VERMILION, fix_ticks


def plot_amounts(ax: Axes, exact: dict[str, dict[int, list[float]]], guess: dict[int, float] | None = None) -> Axes:
    """Share exactly right over the number of examples, a point a seed and a line through the means.

    exact: by split and number of examples, a share a seed. guess: by number of examples, the learner's for
    "test".
    """
    amounts = sorted(next(iter(exact.values())))
    for (split, shares), colour, style in zip(exact.items(), (BLUE, ORANGE), ("-o", "--s"), strict=True):
        means = [sum(shares[n]) / len(shares[n]) for n in amounts]
        ax.plot(amounts, means, style[:-1], color=colour, linewidth=1.5)
        points = [(n, share) for n in amounts for share in shares[n]]
        ax.plot(*zip(*points, strict=True), style[-1], color=colour, markersize=6, alpha=0.6, label=f"{split} orders")
    numbers = {n: y for n, y in (guess or {}).items() if isinstance(y, int | float)}
    if numbers:
        ax.plot(list(numbers), list(numbers.values()), "D", color=VERMILION, markersize=8, label="your guess (test)")
    ax.set(xscale="log", ylim=(0, 1.08), xlabel="examples trained on (log scale)", ylabel="exactly right")
    fix_ticks(ax.xaxis, amounts, [f"{n:,}" for n in amounts])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.legend(frameon=False, loc="center right")
    return ax


def plot_curves(ax: Axes, curves: dict[str, list[tuple[int, float]]], training: list[float]) -> Axes:
    """Loss (nats per token, log scale) over steps: of one run on its training samples, of several on held-out ones."""
    ax.plot(range(1, len(training) + 1), training, color=GREY, linewidth=1, label="training loss, 50 orders")
    for (name, points), colour, style in zip(curves.items(), (VERMILION, BLUE), ("-s", "--o"), strict=True):
        ax.plot(*zip(*points, strict=True), style, color=colour, markersize=5, label=f"validation loss, {name} orders")
    ax.set(yscale="log", xlabel="optimizer step", ylabel="loss (nats per token)")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.legend(frameon=False, loc="upper right")
    return ax


def plot_forgetting(ax: Axes, losses: dict[str, list[float]], base: float, guess: float | None = None) -> Axes:
    """Loss on plain English after training, a point a seed, and lines for the base's and for the learner's guess."""
    for row, (name, values) in enumerate(losses.items()):
        colour, marker = (BLUE, "o") if "replay" in name else (VERMILION, "s")
        ax.plot(values, [row] * len(values), marker, color=colour, markersize=7, alpha=0.7)
    ax.axvline(base, color="black", linestyle=":", linewidth=1.2)
    ax.text(base, -0.75, "  the base", fontsize=9)
    if isinstance(guess, int | float):
        ax.axvline(guess, color=GREY, linestyle="--", linewidth=1.2)
        ax.text(guess, len(losses) - 0.35, "your guess", ha="center", va="top", fontsize=9, color="0.35")
    ax.set(yticks=range(len(losses)), yticklabels=list(losses), ylim=(len(losses) - 0.2, -1.0))
    ax.set_xlabel("loss on plain English (nats per token)")
    ax.tick_params(axis="y", length=0)
    return ax


def plot_promises(ax: Axes, answers: dict[str, list[str]]) -> Axes:
    """Share exactly right: a row a kind of tickets, a small point an adapter, and a bar for all of them together.

    answers: by kind, a text an adapter, with one character for each answer: "1" if it was right.
    """
    for row, (kind, texts) in enumerate(answers.items()):
        colour, marker = (VERMILION, "s") if kind.startswith("held out") else (BLUE, "o")
        shares = [bits.count("1") / len(bits) for bits in texts]
        ax.plot(shares, [row] * len(shares), marker, color=colour, markersize=6, alpha=0.5)
        mean = sum(bits.count("1") for bits in texts) / sum(map(len, texts))
        ax.plot([mean, mean], [row - 0.35, row + 0.35], color=colour, linewidth=3)
    ax.set(yticks=range(len(answers)), yticklabels=list(answers), ylim=(len(answers) - 0.4, -0.6), xlim=(0, 1.02))
    ax.set_xlabel("exactly right (a bar: all answers together)")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    ax.tick_params(axis="y", length=0)
    return ax
