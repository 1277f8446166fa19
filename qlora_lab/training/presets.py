"""Recipes by name, from the paper's to the one that needs the least memory.

    preset = PRESETS["lean"]
    model, steps = preset.adapt(base, rank=64), train_steps(model, batches, steps=100, **preset.settings(device))

Each saves memory at a different cost, which `what` names. tests/memory and data/records hold measurements of the memory
that each one needs, and of how well models learn with it: equally well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.models.embeddings import embeddings_to_cpu


@dataclass(frozen=True)
class Preset:
    """How to train, apart from the model, the data and the learning rate.

    what: one line for the learner. adapter_dtype: with "float32" bf16 computation needs autocast, with "bfloat16" not.
    The other fields: see `TrainSettings` and `embeddings_to_cpu`.
    """

    what: str
    adapter_dtype: str = "float32"
    optimizer: str = "paged_adamw_32bit"
    gradient_checkpointing: bool = True
    loss_chunk: int | None = None
    update_in_backward: bool = False
    embeddings_on_cpu: bool = False

    def adapt(self, model, **adapter):
        """Add adapters to a model loaded in bf16 or 4 bits; `adapter` and the result are those of `add_adapter`."""
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        if self.embeddings_on_cpu and not tied:  # tied embeddings are the output head too: they stay
            embeddings_to_cpu(model)
        return add_adapter(model, dtype=getattr(torch, self.adapter_dtype), **adapter)

    def settings(self, compute_dtype: torch.dtype = torch.bfloat16) -> dict:
        """Arguments for `train_steps` and `train`.

        Args:
            compute_dtype: used if the adapters are fp32. bf16 adapters on a bf16 base need no cast, so no autocast.
        """
        settings = {
            "optimizer": self.optimizer,
            "compute_dtype": compute_dtype if self.adapter_dtype == "float32" else torch.float32,
            "gradient_checkpointing": self.gradient_checkpointing,
            "loss_chunk": self.loss_chunk,
            "update_in_backward": self.update_in_backward,
        }
        return {**settings, "max_grad_norm": None} if self.update_in_backward else settings


PRESETS = {
    "standard": Preset("PEFT's way: fp32 adapters under bf16 autocast, paged AdamW, checkpointing"),
    "in-backward": Preset(
        "standard, but each adapter is updated as soon as its gradient is there: no clipping, no accumulation",
        update_in_backward=True,
    ),
    "bf16-adapters": Preset("adapters and their gradients in bf16: half their memory", adapter_dtype="bfloat16"),
    "lean": Preset(
        "bf16 adapters, updates in the backward pass, logits 128 at a time, input embeddings on the CPU",
        adapter_dtype="bfloat16",
        loss_chunk=128,
        update_in_backward=True,
        embeddings_on_cpu=True,
    ),
}
