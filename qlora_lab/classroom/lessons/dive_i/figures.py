"""Figures of dive_i_the_offset."""

import numpy as np
from matplotlib.axes import Axes

from qlora_lab.classroom.plots import BLUE, GREEN, GREY, VERMILION, fix_ticks, is_number


def plot_offset(
    axes: list[Axes],
    levels: list[float],
    offsets: list[float],
    errors: list[float],
    here: tuple[float, float],
    guess: object = ...,
) -> Axes:
    """Left: the levels that an offset gives. Right: by how much the error exceeds the least one, over the offset.

    errors: relative RMS errors, one for each of `offsets`. here: (offset, error) of the levels on the left. guess:
    where the learner expects the least error, a dotted line; none if it is left open. A dashed line marks NF4's offset.
    """
    left, right = axes
    left.plot(levels, np.zeros(len(levels)), "|", color=BLUE, markersize=60, markeredgewidth=2)
    left.set(xlim=(-1.05, 1.05), ylim=(-1, 1), yticks=[], xlabel="level")
    fix_ticks(left.xaxis, [-1, -0.5, 0, 0.5, 1])
    best, least = offsets[int(np.argmin(errors))], min(errors)
    right.plot(offsets, np.array(errors) / least - 1, color=BLUE)
    right.plot(best, 0, "s", color=GREEN, markersize=8, label="least error")
    right.plot(here[0], here[1] / least - 1, "o", color=VERMILION, markersize=9, label="your offset")
    right.axvline(0.9677083, color=GREY, linestyle="--", linewidth=1.2, label="NF4's, 0.9677")
    if is_number(guess):
        right.axvline(guess, color=VERMILION, linestyle=":", linewidth=1.5, label=f"your guess, {guess:g}")
    right.set(xlim=(offsets[0], offsets[-1]), ylim=(-0.02, 0.4))
    fix_ticks(right.xaxis, [0.9, 0.92, 0.94, 0.96, 0.98])
    right.set(xlabel="offset (outermost probability)", ylabel="relative RMS error above the least")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.legend(frameon=False, loc="upper left").set_gid("frame")
    right.set_title(f"error {here[1]:.4f}, least {least:.4f} at {best:.3f}", loc="left", fontsize=11)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    left.spines["left"].set_visible(False)
    return left
