"""AdamW optimizers by their names in transformers."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def parameter_groups(parameters: Mapping[str, torch.Tensor], lora_plus: float = 1.0) -> list[dict]:
    """The groups of an optimizer: one, or with LoRA+ two that learn at different rates.

    A wide layer learns best if B moves faster than A: with one rate for both, A's share of what the adapter learns
    vanishes as the layer grows. (LoRA+, Hayou et al. 2024, arXiv 2402.12354.)

    Args:
        parameters: an adapter's, by name.
        lora_plus: how many times A's learning rate B gets, and whatever else is not A (DoRA's magnitudes).

    Returns:
        what AdamW takes as parameters; `names` and `scale` are read by the functions below
    """
    if lora_plus == 1:
        return [{"params": list(parameters.values()), "names": list(parameters), "scale": 1.0}]
    slow = {name: parameter for name, parameter in parameters.items() if "lora_A" in name}
    fast = {name: parameter for name, parameter in parameters.items() if name not in slow}
    groups = [(slow, 1.0), (fast, lora_plus)]
    return [{"params": list(group.values()), "names": list(group), "scale": scale} for group, scale in groups if group]


def make_optimizer(name: str, parameters, learning_rate: float, weight_decay: float):
    """Make the AdamW that transformers calls `name`. Paged states are in CUDA managed memory, which needs a GPU.

    parameters: tensors, or what `parameter_groups` makes of them.

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
    """Set the rate of every group, times its `scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("scale", 1.0)


def parameters_by_name(optimizer) -> dict[str, torch.Tensor]:
    """The parameters of an optimizer that was made with `parameter_groups`."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def without_accelerate(optimizer):
    """The optimizer without 🤗 Accelerate's wrapper, if it has one."""
    return getattr(optimizer, "optimizer", optimizer)
