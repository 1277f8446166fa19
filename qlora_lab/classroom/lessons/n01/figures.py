"""Figures of 01_first_run."""

from matplotlib.axes import Axes

from qlora_lab.classroom.plots import plot_shares


def plot_right(ax: Axes, whole: dict[str, float], fields: dict[str, dict[str, float]]) -> Axes:
    """Pairs of horizontal bars, one for each split: the share of whole orders that are right, and of each field.

    whole: by split. fields: by split, the shares of the fields.
    """
    groups = {"whole order": whole}
    groups |= {field: {split: fields[split][field] for split in fields} for field in next(iter(fields.values()))}
    plot_shares(ax, groups, "exactly right")
    ax.axhline(0.5, color="0.3", linewidth=0.8)
    return ax
