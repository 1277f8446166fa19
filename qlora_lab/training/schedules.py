"""The learning rate over a run."""

from __future__ import annotations

import math


def rate(step: int, steps: int, warmup_steps: int, schedule: str) -> float:
    """The share of the peak learning rate, from 0 to 1, at a step counted from 1: linear warm-up, then the schedule.

    schedule: "cosine" falls, and is small but not zero at the last step; "constant" stays at 1.
    """
    warmup_steps = min(warmup_steps, steps - 1)
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup_steps) / (steps - warmup_steps)))
