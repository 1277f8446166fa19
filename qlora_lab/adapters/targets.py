"""Find the layers of a model that an adapter or a quantizer is meant for, by name."""

from __future__ import annotations

import difflib
from typing import Any, TypeGuard

import torch
from torch import nn

from qlora_lab.errors import UserError
from qlora_lab.models.parts import beside_the_language, is_inside


class LinearLike(nn.Module):
    """What `is_linear` promises, for type checkers. Nothing inherits from it: attributes decide.

    Attributes:
        weight: Tensor[out_features, in_features], or what stands for it in few bits; of a Conv1D, the transpose.
        bias: Tensor[out_features] or None.
    """

    in_features: int
    out_features: int
    weight: Any
    bias: torch.Tensor | None


def is_linear(module: nn.Module) -> TypeGuard[LinearLike]:
    """Whether a module maps (..., in) to (..., out) with a weight: nn.Linear, LoraLinear, 4-bit layers, GPT-2's Conv1D.

    Those but Conv1D have `in_features` and `out_features`; `widths` has the numbers of each.
    """
    return all(isinstance(width, int) for width in _widths(module)) and hasattr(module, "weight")


def widths(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear-like layer."""
    inputs, outputs = _widths(layer)
    return inputs, outputs


def _widths(module: nn.Module) -> tuple[Any, Any]:
    if is_transposed(module):
        return module.nx, module.nf
    return getattr(module, "in_features", None), getattr(module, "out_features", None)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as (in, out), as GPT-2's Conv1D does, which calls them nx and nf."""
    return not hasattr(module, "in_features") and hasattr(module, "nx") and hasattr(module, "nf")


def find_targets(model: nn.Module, targets: str | list[str] = "all-linear", language_only: bool = False) -> list[str]:
    """Dotted names of the layers that `targets` selects, in the model's order. Arguments and errors: `add_lora`.

    language_only: without those that text never reaches (a vision tower's), unless `targets` has their whole names.
    """
    beside = beside_the_language(model) if language_only else ()
    linears = [name for name, module in model.named_modules() if name and is_linear(module)]
    if not linears:
        others = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
        raise UserError(f"the model has no linear layer that LoRA could adapt: it is made of {', '.join(others)}")
    if targets == "all-linear":
        output_embeddings = getattr(model, "get_output_embeddings", None)
        head = output_embeddings() if output_embeddings else None
        found = [name for name in linears if model.get_submodule(name) is not head]
        return [name for name in found if not is_inside(name, beside)]
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise UserError("targets is empty: name at least one layer, or say 'all-linear'")
    ends = sorted({name.rpartition(".")[2] for name in linears})
    for target in targets:
        if not any(is_named(name, target) for name in linears):
            near = difflib.get_close_matches(target, ends, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(ends)}"
            raise UserError(f"the model has no linear layer named {target!r}: {hint}")
    named = [name for name in linears if any(is_named(name, target) for target in targets)]
    return [name for name in named if name in targets or not is_inside(name, beside)]


def is_named(name: str, target: str) -> bool:
    """Whether a dotted name is the target or ends in it, as in PEFT: `model.layers.0.mlp.up_proj` is an `up_proj`."""
    return name == target or name.endswith("." + target)


def get_linear(model: nn.Module, name: str) -> LinearLike:
    """The linear-like layer with this dotted name. Raises UserError if another kind of module has it."""
    module = model.get_submodule(name)
    if not is_linear(module):
        raise UserError(f"{name} is a {type(module).__name__}: a linear layer is needed")
    return module


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule with this dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
