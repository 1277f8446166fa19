"""The choice of the training step: the one that the settings ask for, if the model and the machine support it."""

from __future__ import annotations

import sys

from qlora_lab.training.settings import TrainSettings
from qlora_lab.training.sharding import is_sharded
from qlora_lab.training.steps.contract import Step
from qlora_lab.training.steps.fast.limits import NoFastStep, require_machine
from qlora_lab.training.steps.fast.step import FastStep
from qlora_lab.training.steps.in_backward import InBackwardStep
from qlora_lab.training.steps.plain import PlainStep
from qlora_lab.training.steps.sharded import ShardedStep


def make_step(model, optimizer, accelerator, settings: TrainSettings, accumulation: int, pad_token_id: int) -> Step:
    """Make the step that `settings` ask for. If it cannot be the fast one, print why and make another.

    accumulation: micro-batches per step. pad_token_id: fills up short rows.
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return ShardedStep(model, optimizer, accelerator, settings, pad_token_id)
    if settings.fast:
        try:
            return make_fast_step(model, optimizer, accelerator, settings, accumulation, pad_token_id)
        except NoFastStep as reason:
            print(f"no fast step, the plain one takes over: {reason}", file=sys.stderr)
    kind = InBackwardStep if settings.update_in_backward else PlainStep
    return kind(model, optimizer, accelerator, settings, pad_token_id)


def make_fast_step(
    model,
    optimizer,
    accelerator,
    settings: TrainSettings,
    accumulation: int,
    pad_token_id: int,
    capture: bool = True,
) -> FastStep:
    """Make the fast step, which records its launches in CUDA graphs if `capture`. Raises NoFastStep with the reason."""
    require_machine(next(model.parameters()).device, settings.compute_dtype)
    if settings.update_in_backward:
        raise NoFastStep("it updates all adapters at once, not in the backward pass")
    return FastStep(
        model,
        optimizer,
        accelerator,
        max_grad_norm=settings.max_grad_norm,
        accumulation=accumulation,
        gradient_checkpointing=settings.gradient_checkpointing,
        activation_offloading=settings.activation_offloading,
        pad_token_id=pad_token_id,
        dtype=settings.compute_dtype,
        capture=capture,
    )
