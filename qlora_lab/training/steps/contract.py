"""The interface between the training loop and its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from qlora_lab.training.chat import TokenizedSample

MicroBatches = list[list[list[TokenizedSample]]]  # of one step, as `Batches` yields them: lists of rows of samples


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step.

    loss: the mean per target token (nats) over all micro-batches and processes. norm: the gradients', before clipping.
    Both are float32 tensors of one element, which the next step may overwrite.
    updated: the parameters have changed.
    skipped: they have not, because fp16 gradients overflowed; the scaler has lowered its factor for the next step.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    updated: bool
    skipped: bool = False


class Step(Protocol):
    """One optimizer step: forward, backward, clipping and update of the parameters that require gradients.

    It is made with the model, its optimizer and 🤗 Accelerate's accelerator. `close` undoes what it has changed in the
    model to do its work.
    """

    def run(
        self, micro_batches: MicroBatches, targets: int, learning_rate: float, following: MicroBatches | None = None
    ) -> StepResult:
        """Take the step. If the loss or a gradient is not finite, nothing is updated where that can still be avoided.

        Args:
            micro_batches: those of all processes; each process takes its share of the rows.
            targets: the number of target tokens in all processes, by which the summed loss is divided.
            learning_rate: for this step.
            following: the next step's micro-batches; None for the last step.
        """
        ...

    def write_state(self) -> None:
        """Complete the optimizer's state with all that a checkpoint needs."""
        ...

    def close(self) -> None:
        """Leave the model as it was, apart from its trained parameters."""
        ...
