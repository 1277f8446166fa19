"""AdamW, by transformers' names."""

from __future__ import annotations

import torch


def make_optimizer(name: str, parameters, learning_rate: float, weight_decay: float):
    """AdamW by transformers' name for it. Paged states lie in managed memory, which only a GPU has.

    adamw_torch         fp32 states
    adamw_8bit          states in 8 bits, block-wise (for parameters of 4,096 elements and more)
    paged_adamw_32bit   fp32 states that the driver may move to the host (100,000 elements and more)
    paged_adamw_8bit    both
    """
    if name == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    from bitsandbytes.optim.adamw import AdamW8bit, AdamW32bit

    kinds = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": AdamW8bit, "paged_adamw_32bit": AdamW32bit}
    return kinds[name](parameters, lr=learning_rate, weight_decay=weight_decay, is_paged=name.startswith("paged"))


def set_learning_rate(optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def without_accelerate(optimizer):
    """The optimizer that 🤗 Accelerate has wrapped, or the same one."""
    return getattr(optimizer, "optimizer", optimizer)
