"""Add a LoRA correction to its base's weight, take it back, take the LoRA layers out."""

from __future__ import annotations

import torch
from torch import nn

from qlora_lab.adapters.lora import required_lora
from qlora_lab.adapters.targets import is_transposed, set_module
from qlora_lab.errors import UserError


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add every correction to its base's weight: inference then costs what it cost before LoRA.

    The sum is rounded to the weight's dtype. Each layer keeps the old weight, so that `unmerge` restores it bit for bit
    (a subtraction would not); `unload` drops it.

    Raises:
        UserError: a model without LoRA layers, one that is merged already, a base without a floating-point weight, or
            one whose weight another layer has, too.
    """
    layers = required_lora(model)
    if any(layer.merged for layer in layers.values()):
        raise UserError("the adapter is merged already: merging twice would add it twice; unmerge(model) takes it back")
    for name, layer in layers.items():
        weight = getattr(layer.base, "weight", None)
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise UserError(
                f"{name}: {type(layer.base).__name__} holds no weight that a correction can be added to; "
                "dequantize_linears(model) makes the base dense first"
            )
    if shared := [name for name in layers if f"{name}.weight" in _shared_weights(model)]:
        raise UserError(
            f"{shared[0]} shares its weight with another layer, which would change with it: leave it out of the "
            "targets, or keep the adapter beside the model"
        )
    for layer in layers.values():
        weight = layer.base.weight.data
        delta = layer.delta().T if is_transposed(layer.base) else layer.delta()
        layer.base.weight.data = (weight.float() + delta).to(weight.dtype)
        layer.unmerged_weight = weight
    return model


def _shared_weights(model: nn.Module) -> set[str]:
    """Names of weights that are one tensor with another, or belong to a module that has two names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace(".base.weight", ".weight"))
    return {name for same in names.values() if len(same) > 1 for name in same}


@torch.no_grad()
def unmerge(model: nn.Module) -> nn.Module:
    """Restore the bases' old weights, bit for bit. Raises UserError if nothing is merged."""
    layers = required_lora(model)
    if not all(layer.merged for layer in layers.values()):
        raise UserError("the adapter is not merged: there is nothing to take back")
    for layer in layers.values():
        layer.base.weight.data, layer.unmerged_weight = layer.unmerged_weight, None
    return model


def unload(model: nn.Module) -> nn.Module:
    """Replace each LoRA layer by its base, merged if it was. Raises UserError if there are no LoRA layers."""
    for name, layer in required_lora(model).items():
        set_module(model, name, layer.base)
    return model
