"""The settings of a training run. They are checked when they are made.

That is before a model is loaded, evaluated or trained, and before an output folder is claimed. What depends on the
machine (its device, the number of processes) is checked by `require_possible`, just as early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qlora_lab.errors import UserError
from qlora_lab.facts import MERGE_TARGETS, OPTIMIZERS

SCHEDULES = ("cosine", "constant")
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}  # 🤗 Accelerate's names


@dataclass(frozen=True)
class TrainSettings:
    """How `train_steps` trains, apart from the model, the data and the files.

    Args:
        steps: optimizer steps in all, those before a resume included.
        learning_rate, schedule, warmup_steps: linear warm-up to the peak, then "cosine" down to 0 or "constant".
        max_grad_norm: gradients are scaled down to this norm; None leaves them as they are.
        weight_decay: AdamW's, decoupled: each step also multiplies the parameters by 1 - learning_rate * weight_decay.
        lora_plus: how many times A's learning rate B gets (LoRA+); 1 is plain LoRA.
        optimizer: one of OPTIMIZERS; `make_optimizer` says which states each one keeps, and where.
        compute_dtype: bf16 or fp16 run the forward pass under autocast (fp16 with a scaled loss); fp32 does not.
        gradient_checkpointing: keep only each layer's input and compute the rest again in the backward pass.
        activation_offloading: keep the layers' inputs in the host's memory, not the GPU's; needs checkpointing.
        loss_chunk: at most this many positions have logits at a time; None: all at once. The same loss, less memory.
        update_in_backward: update each parameter as soon as its gradient is computed, and drop the gradient. The
            numbers do not change. It needs one micro-batch per step, one process and `max_grad_norm=None`, since the
            norm of all gradients is known only after the last of them.
        fast: take the steps of `steps/fast/` if they support the model and the GPU; otherwise print the reason and
            take the usual ones. It computes in bf16 or fp16, and the numbers are the same up to their rounding.
            `loss_chunk` has no effect there: the logits are always computed in chunks.
        merge_aware: "nf4" or "q4_0": the forward pass sees each weight as it will be when the adapter is merged and the
            sum is rounded to these 4 bits, see `adapters/merge_aware.py`. It needs our LoRA layers and the plain step.
        dense_base: on a CPU, keep the weights that are in 4 bits dense, too, while training: the same values, not
            dequantized anew for each product; None: where they take at most a quarter of the free memory.
        checkpoint_every: steps from one checkpoint to the next, if checkpoints are written.

    Raises:
        UserError: a setting that is impossible by itself or together with another.
    """

    steps: int
    learning_rate: float = 1.5e-3
    schedule: str = "cosine"
    warmup_steps: int = 3
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    lora_plus: float = 1.0
    optimizer: str = "adamw_torch"
    compute_dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False
    activation_offloading: bool = False
    loss_chunk: int | None = None
    update_in_backward: bool = False
    fast: bool = False
    merge_aware: str | None = None
    dense_base: bool | None = None
    checkpoint_every: int = 10

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps={self.steps}: must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate={self.learning_rate}: must be a positive number")
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule is {self.schedule!r}: choose from {', '.join(SCHEDULES)}")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps={self.warmup_steps}: must be 0 or more")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"max_grad_norm={self.max_grad_norm}: must be positive, or None to leave gradients alone")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay={self.weight_decay}: must be 0 or more")
        if not 0 < self.lora_plus < math.inf:
            raise UserError(f"lora_plus={self.lora_plus}: must be a positive number, 1 for one learning rate")
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"optimizer is {self.optimizer!r}: choose from {', '.join(OPTIMIZERS)}")
        if self.compute_dtype not in PRECISIONS:
            raise UserError(
                f"compute_dtype is {self.compute_dtype}: choose torch.float32, torch.bfloat16 or torch.float16"
            )
        if self.activation_offloading and not self.gradient_checkpointing:
            raise UserError("activation_offloading moves what gradient checkpointing keeps: switch that on too")
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise UserError(f"loss_chunk={self.loss_chunk}: must be at least 1, or None for all positions at once")
        if self.checkpoint_every < 1:
            raise UserError(f"checkpoint_every={self.checkpoint_every}: must be at least 1 step")
        if self.update_in_backward and self.compute_dtype == torch.float16:
            raise UserError("update_in_backward cannot unscale fp16 gradients: use bf16 or fp32 compute")
        if self.update_in_backward and self.max_grad_norm is not None:
            raise UserError("update_in_backward needs max_grad_norm=None: the norm is known only after the last update")

        if self.merge_aware not in (None, *MERGE_TARGETS):
            raise UserError(f"merge_aware is {self.merge_aware!r}: choose from {', '.join(MERGE_TARGETS)}, or None")
        if self.merge_aware and (self.fast or self.update_in_backward):
            other = "fast" if self.fast else "update_in_backward (the presets in-backward and lean)"
            raise UserError(f"merge_aware needs the plain step: leave out {other}")
        if self.merge_aware and self.dense_base:
            raise UserError("merge_aware computes with other weights than dense_base would hold: leave one of them out")

    def require_possible(self, device: torch.device, batch_size: int, accumulation: int, processes: int = 1) -> None:
        """Raise UserError unless this machine can train so. batch_size: rows per forward pass, over all processes."""
        if batch_size % processes:
            raise UserError(f"batch_size={batch_size} cannot be shared evenly by {processes} processes")
        if self.compute_dtype == torch.float16 and device.type == "cpu":
            raise UserError("float16 compute needs a GPU: on a CPU use float32, or bfloat16 where the processor has it")
        if self.dense_base and device.type != "cpu":
            raise UserError(f"dense_base is for models on a CPU, and this one is on {device.type}: leave it out")
        if self.optimizer.startswith("paged") and device.type == "cpu":
            unpaged = "adamw_8bit" if self.optimizer.endswith("8bit") else "adamw_torch"
            raise UserError(f"{self.optimizer} pages GPU memory, and this model is on a CPU: use {unpaged!r}")
        if self.update_in_backward and accumulation > 1:
            raise UserError(f"update_in_backward needs accumulation=1: it updates after each of {accumulation}")
        if self.update_in_backward and processes > 1:
            raise UserError(
                "update_in_backward needs one process: gradients of several are summed after the backward pass"
            )
