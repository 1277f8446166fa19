"""The step for a model of which each process holds a part (see `models/sharded.py`)."""

from __future__ import annotations

import math

import torch

from qlora_lab.training.optimizers import parameters_by_name, set_learning_rate
from qlora_lab.training.processes import sum_over_processes
from qlora_lab.training.settings import TrainSettings
from qlora_lab.training.steps.contract import MicroBatches, StepResult
from qlora_lab.training.steps.plain import PlainStep


class ShardedStep(PlainStep):
    """The plain step, but for the gradients: FSDP2 has summed them over the processes, and leaves each its rows.

    Args:
        optimizer: its parameters are this process's parts of the model's trained parameters, by the same names.
    """

    def __init__(self, model, optimizer, accelerator, settings: TrainSettings, pad_token_id: int):
        super().__init__(model, optimizer, accelerator, settings, pad_token_id)
        parts = parameters_by_name(optimizer)
        self.parts = [parts[name] for name, parameter in model.named_parameters() if parameter.requires_grad]

    def run(
        self, micro_batches: MicroBatches, targets: int, learning_rate: float, following: MicroBatches | None = None
    ) -> StepResult:
        set_learning_rate(self.optimizer, learning_rate)
        loss = self.backward(micro_batches, targets)
        gradients = [
            torch.zeros_like(part) if parameter.grad is None else parameter.grad.to_local()  # no sample reached it
            for parameter, part in zip(self.parameters, self.parts, strict=True)
        ]
        square = torch.nn.utils.get_total_norm(gradients).square()
        sum_over_processes(self.accelerator, [loss, square])
        norm = square.sqrt()
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            for part, gradient in zip(self.parts, gradients, strict=True):
                part.grad = gradient
            if self.settings.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parts, self.settings.max_grad_norm, norm)
            self.optimizer.step()
        self._forget_gradients()
        return StepResult(loss, norm, updated=finite)

    def close(self) -> None:
        super().close()
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for parameter in (*self.parameters, *self.parts):
            parameter.grad = None
