"""AdamW optimizers by their names in transformers."""

from __future__ import annotations

import torch


def make_optimizer(name: str, parameters, learning_rate: float, weight_decay: float):
    """Make the AdamW that transformers calls `name`. Paged states are in CUDA managed memory, which needs a GPU.

    adamw_torch         fp32 states
    adamw_8bit          8-bit states, quantized in blocks (of parameters with at least 4,096 elements)
    paged_adamw_32bit   fp32 states that the driver may move to the host (of at least 100,000 elements)
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
    """The optimizer without 🤗 Accelerate's wrapper, if it has one."""
    return getattr(optimizer, "optimizer", optimizer)
