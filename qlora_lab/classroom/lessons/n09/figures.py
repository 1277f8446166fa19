"""Figures of 09_your_gpu."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, ORANGE, VERMILION

LARGEST = 65_504  # of float16


def plot_lives(ax: Axes, first: dict[int, float], second: dict[int, float], guess: int | None = None) -> Axes:
    """Loss by step of a session that was killed and of the one that went on; the guessed step as a dashed line."""
    ax.plot(list(first), list(first.values()), "-o", color=BLUE, markersize=9, linewidth=1.5, label="first session")
    ax.plot(
        list(second), list(second.values()), "--s", color=ORANGE, markersize=5, linewidth=1.5, label="second session"
    )
    ax.axvline(max(first) + 0.5, color="0.5", linewidth=1)
    ax.annotate("killed", (max(first) + 0.5, 1), (4, -10), xycoords=("data", "axes fraction"),
                textcoords="offset points", fontsize=9, color="0.3", bbox={"color": "white", "pad": 1})  # fmt: skip
    if isinstance(guess, int):
        ax.axvline(guess, color=VERMILION, linestyle="--", linewidth=1, label="your guess")
    ax.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    ax.legend(edgecolor="none", framealpha=1)  # a guess may lie behind it
    return ax


def plot_peaks(ax: Axes, peaks: list[float]) -> Axes:
    """The largest absolute number after each layer, on a log scale, under the largest that fp16 has."""
    ax.plot(range(len(peaks)), peaks, "-o", color=BLUE, markersize=4, linewidth=1.5)
    ax.axhline(LARGEST, color="0.3", linestyle=":", linewidth=1.5)
    ax.annotate(f"largest fp16 number: {LARGEST:,}", (0, LARGEST), (0, 4), textcoords="offset points", fontsize=9)
    ax.set(yscale="log", ylim=(10, 400_000), xlabel="layer", ylabel="largest |number|")
    return ax
