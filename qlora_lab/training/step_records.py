"""What a training writes down after each step, and how fast it was: the project's one definition of tokens a second."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP = 2  # steps: libraries and kernels load in the first, caches and graphs are made in the first two


@dataclass(frozen=True)
class StepRecord:
    """What happened in one optimizer step.

    loss: mean over the step's target tokens, before the update. seconds: wall time, without writing checkpoints.
    tokens: all tokens that the step's samples have, prompts included, padding not.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float


def steady(records: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """All but the first two, or all of them where there are no more."""
    return records[WARM_UP:] or records


def tokens_per_second(records: Sequence[StepRecord]) -> float | None:
    """The median over the steady steps of their tokens by their seconds; None if no step was taken.

    Tokens are all that the samples have, prompts included and padding not; seconds are wall time, from a step's samples
    to its loss on the host, over all processes together.
    """
    if not records:
        return None
    return statistics.median(record.tokens / record.seconds for record in steady(records))


def seconds_per_step(records: Sequence[StepRecord]) -> float | None:
    """The median over the steady steps; None if no step was taken."""
    return statistics.median(record.seconds for record in steady(records)) if records else None
