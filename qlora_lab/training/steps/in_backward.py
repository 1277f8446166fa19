"""The step that updates each parameter during the backward pass."""

from __future__ import annotations

import math

import torch

from qlora_lab.training.optimizers import set_learning_rate, without_accelerate
from qlora_lab.training.settings import TrainSettings
from qlora_lab.training.steps.contract import MicroBatches, StepResult
from qlora_lab.training.steps.plain import PlainStep


class InBackwardStep(PlainStep):
    """Updates each parameter as soon as the backward pass has computed its gradient, and then drops the gradient.

    The gradients are therefore never in memory all at once. That requires one micro-batch per step, one process and no
    clipping; `TrainSettings` refuses anything else.
    """

    def __init__(self, model, optimizer, accelerator, settings: TrainSettings, pad_token_id: int):
        super().__init__(model, optimizer, accelerator, settings, pad_token_id)
        self._inner = without_accelerate(optimizer)
        self._group_of = {p: group for group in self._inner.param_groups for p in group["params"]}
        self._norms: list[torch.Tensor] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in self.parameters]

    def run(
        self, micro_batches: MicroBatches, targets: int, learning_rate: float, following: MicroBatches | None = None
    ) -> StepResult:
        self.optimizer.zero_grad()
        set_learning_rate(self.optimizer, learning_rate)
        [rows] = micro_batches
        with self.attention(micro_batches):
            share = self.loss_share(rows, targets)
            loss = share.detach()
            if not math.isfinite(loss):
                return StepResult(loss, torch.full((), math.nan), updated=False)
            self.accelerator.backward(share)
        norms, self._norms = self._norms, []
        return StepResult(loss, torch.linalg.vector_norm(torch.stack(norms)), updated=True)

    def _update(self, parameter: torch.Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        groups = self._inner.param_groups
        self._inner.param_groups = [{**self._group_of[parameter], "params": [parameter]}]
        try:
            self._inner.step()
        finally:
            self._inner.param_groups = groups
        parameter.grad = None

    def close(self) -> None:
        super().close()
        for hook in self._hooks:
            hook.remove()
