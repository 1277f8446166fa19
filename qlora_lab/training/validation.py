"""Validation while a model trains: the loss on held-out samples, the best adapter so far, and when to stop early.

Which step was the best, and how many validations have passed since, follows from the steps' records. A checkpoint holds
those, and the best adapter beside the newest one; so a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from qlora_lab.errors import UserError
from qlora_lab.training.checkpoints import Checkpoint
from qlora_lab.training.sharding import own_part, part_of, whole
from qlora_lab.training.step_records import StepRecord, TrainingDiverged


def validated(records: Sequence[StepRecord]) -> list[StepRecord]:
    """The records of the steps after which the model was validated."""
    return [record for record in records if record.validation_loss is not None]


def best_of(records: Sequence[StepRecord]) -> StepRecord | None:
    """The record with the lowest validation loss, the earliest of several; None if there was no validation."""
    return min(validated(records), key=lambda record: record.validation_loss or 0.0, default=None)


class Validation:
    """What `train_steps` does after every so many steps, and after the last.

    With several processes, all of them call it, and `measure` must give all of them the same number: then they all
    stop at the same step.

    Args:
        measure: takes the model and returns its loss on held-out samples, in nats per token. It may leave the model in
            eval mode.
        every: steps from one validation to the next.
        patience: training stops after this many validations in a row that were not better than the best one before
            them; None: never early.
        keep_best: keep a copy of the best adapter, in the host's memory and in each checkpoint, for `restore_best`.

    Raises:
        UserError: `every` or `patience` below 1.
    """

    def __init__(self, measure: Callable[..., float], every: int, patience: int | None = None, keep_best: bool = False):
        if every < 1 or (patience is not None and patience < 1):
            raise UserError(f"every={every}, patience={patience}: both must be at least 1 (patience may be None)")
        self.measure, self.every, self.patience, self.keep_best = measure, every, patience, keep_best
        self.best: dict[str, torch.Tensor] | None = None  # the best adapter's parameters by name
        self.best_step, self.best_loss = 0, math.inf

    def take_up(self, begun: Checkpoint) -> None:
        """Go on from a checkpoint. Raises UserError if the best adapter is to be kept, and the checkpoint lacks it."""
        best = best_of(begun.records)
        if best is None or best.validation_loss is None:
            return
        if self.keep_best and begun.best is None:
            raise UserError(f"{begun.path} does not hold the best adapter so far: resume without keeping the best")
        self.best_step, self.best_loss = best.step, best.validation_loss
        self.best = begun.best if self.keep_best else None

    def after(self, record: StepRecord, model, trained: dict[str, torch.nn.Parameter], steps: int) -> StepRecord:
        """Validate if it is time, and return the record with the loss.

        Args:
            record: of the step just taken.
            model: in train mode, before and after.
            trained: the model's trained parameters by name.
            steps: of the whole run; the last one is always validated.

        Raises:
            TrainingDiverged: the validation loss is not finite.
        """
        if record.step % self.every and record.step != steps:
            return record
        loss = self.measure(model)
        model.train()
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the validation loss is {loss} after step {record.step}: lower the learning rate")
        if loss < self.best_loss:
            self.best_step, self.best_loss = record.step, loss
            if self.keep_best:
                self.best = {
                    name: whole(p.detach(), p).to("cpu", copy=True).contiguous() for name, p in trained.items()
                }
        return replace(record, validation_loss=loss)

    def over(self, records: Sequence[StepRecord]) -> bool:
        """Whether patience is at its end after these records, all of them since the first step."""
        best = best_of(records)
        if self.patience is None or best is None:
            return False
        return len(validated(records[best.step :])) >= self.patience

    def restore_best(self, model) -> int | None:
        """Give the model its best adapter back. Returns the step after which it was that; None if none was kept."""
        if self.best is None:
            return None
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.best.items():
                part_of(parameters[name]).copy_(own_part(value, parameters[name]))
        return self.best_step
