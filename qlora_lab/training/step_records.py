"""The record of each training step, and the project's one definition of tokens per second."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lab.errors import UserError

WARM_UP = 2  # steps: the first loads libraries and kernels, the first two fill caches and record graphs


class TrainingDiverged(UserError):
    """A loss or the gradient norm is not finite."""


@dataclass(frozen=True)
class StepRecord:
    """What happened in one optimizer step, counted from 1, in all processes together.

    Attributes:
        loss: mean over the step's target tokens, in nats, before the update.
        gradient_norm: before clipping.
        tokens: all tokens of the step's samples, including prompts but not padding.
        seconds: wall time, without validation and without writing checkpoints.
        validation_loss: mean over the held-out samples' target tokens, in nats, after the update; None if the model was
            not validated after this step.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    validation_loss: float | None = None


def steady(records: Sequence[StepRecord]) -> Sequence[StepRecord]:
    """All records but the first two, or all if there are no others."""
    return records[WARM_UP:] or records


def tokens_per_second(records: Sequence[StepRecord]) -> float | None:
    """The median, over the steady steps, of tokens divided by seconds; None if no step was taken.

    Tokens are those of the samples in all processes, including prompts but not padding; seconds are wall time, from
    receiving a step's samples to having its loss on the host.
    """
    if not records:
        return None
    return statistics.median(record.tokens / record.seconds for record in steady(records))


def seconds_per_step(records: Sequence[StepRecord]) -> float | None:
    """The median of the steady steps' seconds; None if no step was taken."""
    return statistics.median(record.seconds for record in steady(records)) if records else None
