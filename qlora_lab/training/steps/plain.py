"""The step for every model: autograd's forward and backward pass for each micro-batch, then one update."""

from __future__ import annotations

import contextlib
import math

import torch

from qlora_lab.adapters.as_one import as_one
from qlora_lab.adapters.merge_aware import merge_aware
from qlora_lab.models.rows import attention_of_rows
from qlora_lab.models.trying import can_share_beginnings
from qlora_lab.training.activations import checkpoint_activations, offloaded_hidden_states
from qlora_lab.training.batches import collate, collate_sharing
from qlora_lab.training.loss import token_loss_sum
from qlora_lab.training.optimizers import set_learning_rate
from qlora_lab.training.processes import sum_over_processes
from qlora_lab.training.settings import TrainSettings
from qlora_lab.training.sharding import is_sharded
from qlora_lab.training.steps.contract import MicroBatches, StepResult


class PlainStep:
    """A `Step` for any causal language model of transformers."""

    def __init__(self, model, optimizer, accelerator, settings: TrainSettings, pad_token_id: int):
        self.model, self.optimizer, self.accelerator = model, optimizer, accelerator
        self.settings, self.pad_token_id = settings, pad_token_id
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if settings.gradient_checkpointing:
            checkpoint_activations(model)
        self._changed = contextlib.ExitStack()
        if settings.merge_aware:
            self._changed.enter_context(merge_aware(model, settings.merge_aware))
        on_cpu = accelerator.device.type == "cpu" and not any(is_sharded(p) for p in model.parameters())
        if on_cpu and not settings.merge_aware:
            self._changed.enter_context(as_one(model, settings.dense_base))
        self._can_share = on_cpu and can_share_beginnings(model)

    def run(
        self, micro_batches: MicroBatches, targets: int, learning_rate: float, following: MicroBatches | None = None
    ) -> StepResult:
        self.optimizer.zero_grad()
        set_learning_rate(self.optimizer, learning_rate)
        loss = self.backward(micro_batches, targets)
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters:  # no sample of this process may have reached it
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        sum_over_processes(self.accelerator, [loss, *(p.grad for p in self.parameters)])
        largest = self.settings.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, math.inf if largest is None else largest)
        finite = math.isfinite(loss) and math.isfinite(norm)
        skipped = bool(self.accelerator.scaler) and math.isfinite(loss) and not finite
        if finite or skipped:  # the scaler does the skipping
            self.optimizer.step()
        return StepResult(loss, norm, updated=finite, skipped=skipped)

    def backward(self, micro_batches: MicroBatches, targets: int) -> torch.Tensor:
        """Forward and backward pass of this process's rows. Returns their part of the step's loss, a scalar."""
        loss = torch.zeros((), device=self.accelerator.device)
        with self.attention(micro_batches):
            for rows in micro_batches:
                share = self.loss_share(rows, targets)
                loss += share.detach()
                self.accelerator.backward(share)
        return loss

    def attention(self, micro_batches: MicroBatches):
        """A context for the step's passes, in which rows with a common beginning share it, if they can."""
        alone = all(len(row) == 1 for rows in micro_batches for row in rows)  # not packed
        self._sharing = self._can_share and alone
        return attention_of_rows(self.model) if self._sharing else contextlib.nullcontext()

    def loss_share(self, rows: list[list], targets: int) -> torch.Tensor:
        """The forward pass of this process's rows of a micro-batch. Returns their part of the step's loss, a scalar."""
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        batch = (collate_sharing if self._sharing else collate)(mine, self.pad_token_id)
        with self.accelerator.autocast(), self._offloaded():
            return token_loss_sum(self.model, batch, self.settings.loss_chunk) / targets

    def _offloaded(self):
        if self.settings.activation_offloading:
            return offloaded_hidden_states(self.model.config.hidden_size)
        return contextlib.nullcontext()

    def write_state(self) -> None:
        """Nothing to do: the optimizer's state is complete after each step."""

    def close(self) -> None:
        self.optimizer.zero_grad()
        self._changed.close()
        if self.settings.gradient_checkpointing:
            checkpoint_activations(self.model, on=False)
