"""What the training loop asks of a step, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from qlora_lab.training.chat import TokenizedSample

MicroBatches = list[list[list[TokenizedSample]]]  # a step's, as `Batches` gives them: micro-batches of rows of samples


@dataclass(frozen=True)
class StepResult:
    """loss: over all micro-batches and processes, per target token. norm: the gradients', before clipping.

    Both are float32 tensors of one element, which the next step may overwrite.
    updated: the parameters have changed. skipped: they have not, since fp16 gradients overflowed: the scaler now
    multiplies the loss by less, and the next step tries again.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    updated: bool
    skipped: bool = False


class Step(Protocol):
    """One optimizer step: forward, backward, clipping and update of the parameters that require gradients.

    It is made with the model, its optimizer and 🤗 Accelerate's accelerator; what it changes on the model to do its
    work, `close` takes back.
    """

    def run(
        self, micro_batches: MicroBatches, targets: int, learning_rate: float, following: MicroBatches | None = None
    ) -> StepResult:
        """Take the step. Where the loss or a gradient is not finite, nothing is updated if that can still be avoided.

        Args:
            micro_batches: all processes' together; each takes its share of their rows.
            targets: how many tokens they have to learn, in all processes: what the summed loss is divided by.
            following: the next step's micro-batches, or None at the end.
        """
        ...

    def write_state(self) -> None:
        """Have the optimizer's state hold all that a checkpoint needs."""
        ...

    def close(self) -> None: ...
