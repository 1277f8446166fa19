"""Merge-aware training: the forward pass sees the weight as it will be after the merge, rounded again to 4 bits.

An adapter that is merged into its 4-bit base and rounded again loses most of what it learned: its changes are smaller
than a step between two levels. Here it learns under that rounding:

    forward     y = x Wᵀ       W = round(base + scale * B A), anew in each forward pass
    backward    dL/dx = dL/dy W, and A and B get the gradients of plain LoRA:
                dL/dB = scale * dL/dyᵀ (x Aᵀ)        dL/dA = scale * (dL/dy B)ᵀ x

The gradients of A and B pass through the rounding as if it were not there, since its own derivative is 0 nearly
everywhere: the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432).

    merge_aware(model, "q4_0")          LoRA layers see it so, inside a `with`
    merge_requantized(model, "q4_0")    the merge itself: frozen layers in 4 bits, for good
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from qlora_lab.adapters.lora import LoraLinear, lora_layers, required_lora
from qlora_lab.adapters.quantized_linear import QuantizedLinear, frozen_weight, nf4_double
from qlora_lab.adapters.targets import set_module
from qlora_lab.errors import UserError
from qlora_lab.facts import MERGE_TARGETS
from qlora_lab.quantization import QuantizedTensor, UniformTensor, quantize_q4_0


def requantized(layer: LoraLinear, target: str) -> QuantizedTensor | UniformTensor:
    """The merged weight in 4 bits: Tensor[out, in], in the dtype of the base's weight.

    Args:
        target: "nf4": QLoRA's own, as `load_model` makes it from a merged checkpoint in the base's dtype. "q4_0":
            llama.cpp's, as `qlora_lab.export --weights q4_0` makes it from the merged weight in float32.
    """
    base = frozen_weight(layer.base)
    dense = base if isinstance(base, torch.Tensor) else base.dequantize()
    merged = layer.delta().detach().add_(dense)  # float32, as `merge` adds them
    if target == "nf4":
        return nf4_double(merged.to(dense.dtype))
    return dataclasses.replace(quantize_q4_0(merged), dtype=dense.dtype)


class _StraightThrough(torch.autograd.Function):
    """x Wᵀ + b for a W in 4 bits that was made of A and B, which get their gradients as if it had not been rounded."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, scale, q, bias):
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.q, ctx.scale = q, scale  # 4 bits: nothing dense is kept
        return nn.functional.linear(x, q.dequantize().to(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        x, lora_A, lora_B = ctx.saved_tensors
        dx = gradient @ ctx.q.dequantize().to(gradient.dtype) if ctx.needs_input_grad[0] else None
        x, dy = x.flatten(0, -2).to(lora_A.dtype), gradient.flatten(0, -2).to(lora_A.dtype)
        return dx, ctx.scale * (dy @ lora_B).T @ x, ctx.scale * dy.T @ (x @ lora_A.T), None, None, None


class MergeAwareLinear(LoraLinear):
    """A LoRA layer, with the same A and B and base, that computes with its merged and requantized weight.

    In x's dtype, or in autocast's where that is on.
    """

    def __init__(self, layer: LoraLinear, target: str):
        nn.Module.__init__(self)
        self.base, self.alpha, self.dropout = layer.base, layer.alpha, layer.dropout
        self.rank_stabilized = layer.rank_stabilized
        self.lora_A, self.lora_B, self.unmerged_weight = layer.lora_A, layer.lora_B, None
        self.target = target
        self.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = getattr(self.base, "bias", None)
        bias = None if bias is None else bias.to(x.dtype)
        return _StraightThrough.apply(x, self.lora_A, self.lora_B, self.scale, requantized(self, self.target), bias)


@contextlib.contextmanager
def merge_aware(model: nn.Module, target: str) -> Iterator[nn.Module]:
    """Inside the `with`, the model's LoRA layers compute as after a merge into 4 bits. Parameters and names stay.

    Args:
        target: "nf4" or "q4_0", as in `requantized`.

    Raises:
        UserError: another target; a model without our LoRA layers, or with layers that are merged, have dropout, or
            whose rows do not consist of Q4_0's blocks.
    """
    layers = _mergeable(model, target)
    for name, layer in layers.items():
        set_module(model, name, MergeAwareLinear(layer, target))
    try:
        yield model
    finally:
        for name, layer in layers.items():
            set_module(model, name, layer.train(model.training))


@torch.no_grad()
def merge_requantized(model: nn.Module, target: str) -> nn.Module:
    """Merge the adapter and round the sum to 4 bits: each LoRA layer becomes a QuantizedLinear, in place.

    Arguments and errors as for `merge_aware`. Returns the same model.
    """
    for name, layer in _mergeable(model, target).items():
        bias = getattr(layer.base, "bias", None)
        set_module(model, name, QuantizedLinear(requantized(layer, target), bias).train(layer.training))
    return model


def _mergeable(model: nn.Module, target: str) -> dict[str, LoraLinear]:
    if target not in MERGE_TARGETS:
        raise UserError(f"merge_aware is {target!r}: choose from {', '.join(MERGE_TARGETS)}")
    if not lora_layers(model) and hasattr(model, "peft_config"):
        raise UserError("merge_aware works with our LoRA layers, and this adapter is PEFT's: use add_lora(model)")
    layers = required_lora(model)
    for name, layer in layers.items():
        if type(layer) is not LoraLinear:
            raise UserError(f"{name} is a {type(layer).__name__}: merge_aware knows LoRA and rsLoRA")
        if layer.merged:
            raise UserError("the adapter is merged already: unmerge(model) takes it back")
        if layer.dropout:
            raise UserError(f"{name} has dropout={layer.dropout}, and a merged weight has none: set it to 0")
        if target == "q4_0" and layer.in_features % 32:
            raise UserError(f"{name} has rows of {layer.in_features} numbers, and Q4_0's blocks have 32: choose nf4")
    return layers
