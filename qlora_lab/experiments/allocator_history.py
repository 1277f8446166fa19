"""The history of torch's allocator on a GPU: what was alive when the most was."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping, Sequence


def live_at_peak(trace: Sequence[Mapping]) -> tuple[int, collections.Counter]:
    """Replay an allocator's history up to its peak: what was alive then, by the line of Python that asked for it.

    Args:
        trace: `torch.cuda.memory._snapshot()["device_traces"][i]`: entries with `action`, `addr`, `size`, and
            `frames`, the innermost first.

    Returns:
        the peak in bytes; for each (place, block size) the number of blocks. Places are "file:line function", three
        of them at most, or "C++" where autograd's own code asked.
    """
    alive: dict[int, Mapping] = {}
    total = peak = 0
    at_peak = 0  # length of the history that leads to the peak
    for index, entry in enumerate(trace):
        total += _apply(entry, alive)
        if total > peak:
            peak, at_peak = total, index + 1
    alive.clear()
    for entry in trace[:at_peak]:
        _apply(entry, alive)
    return peak, collections.Counter((_place(entry.get("frames", [])), entry["size"]) for entry in alive.values())


def _apply(entry: Mapping, alive: dict[int, Mapping]) -> int:
    """Take one entry of the history; return by how much the allocated memory grew."""
    if entry["action"] == "alloc":
        alive[entry["addr"]] = entry
        return entry["size"]
    if entry["action"] == "free_requested":
        gone = alive.pop(entry["addr"], None)
        return -gone["size"] if gone else 0
    return 0


def _place(frames: Sequence[Mapping]) -> str:
    python = [frame for frame in frames if frame["filename"].endswith(".py")]
    telling = [frame for frame in python if not any(part in frame["filename"] for part in _PLUMBING)] or python
    names = ["/".join(pathlib.PurePath(frame["filename"]).parts[-2:]) for frame in telling[:3]]
    places = [f"{name}:{frame['line']} {frame['name']}" for name, frame in zip(names, telling, strict=False)]
    return " < ".join(places) or "C++"


_PLUMBING = ("torch/nn/modules/", "torch/_ops.py", "torch/_library", "torch/_compile", "torch/utils/_contextlib")
