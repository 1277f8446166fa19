"""Keeping fewer activations for the backward pass, or keeping them in the host's memory."""

from __future__ import annotations

import torch
import torch.utils.checkpoint

from qlora_lab.errors import UserError


def checkpoint_activations(model, on: bool = True) -> None:
    """Switch gradient checkpointing on or off; not the reentrant kind, which needs inputs that require gradients.

    Raises:
        UserError: transformers has no checkpointing for this model.
    """
    # transformers 5.23 calls it activation checkpointing; 5.17 knows only the old name
    new = hasattr(model, "activation_checkpointing_enable")
    name = f"{'activation' if new else 'gradient'}_checkpointing_{'enable' if on else 'disable'}"
    try:
        getattr(model, name)(*[{"use_reentrant": False}] * on)
    except ValueError as error:
        raise UserError(f"{error} Use gradient_checkpointing=False") from error


def offloaded_hidden_states(hidden_size: int):
    """A context in which autograd saves hidden states, (batch, sequence, hidden_size), in the host's memory.

    The CPU waits for each copy; `steps.fast.host_memory` avoids that.
    """

    def pack(kept: torch.Tensor):
        if kept.dim() != 3 or kept.shape[-1] != hidden_size:
            return kept, None
        there = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=kept.is_cuda)
        return there.copy_(kept), kept.device

    def unpack(packed) -> torch.Tensor:
        kept, device = packed
        return kept if device is None else kept.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
