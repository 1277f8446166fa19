"""Other beginnings for A and B than "random and zero": from the singular value decomposition of a weight.

PiSSA   A and B begin as the most important part of W, and what is frozen is the rest. Training moves first what
        matters most. (Meng et al. 2024, arXiv 2404.02948.)
LoftQ   A and B begin as the best correction of the quantization's error, W - Q, so that the 4-bit model starts closer
        to the 16-bit one. (Li et al. 2023, arXiv 2310.08659, algorithm 1.)

Both need the dense weight. PiSSA, and LoftQ with more than one iteration, freeze another base than the checkpoint's:
their adapters fit that base alone. LoftQ with one iteration keeps the usual 4-bit base.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qlora_lab.adapters.dora import DoraLinear
from qlora_lab.adapters.lora import LoraLinear, required_lora
from qlora_lab.adapters.quantized_linear import QuantizedLinear, Quantizer, Weight, dense_weight, is_quantized
from qlora_lab.adapters.targets import is_transposed
from qlora_lab.errors import UserError


@torch.no_grad()
def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of a matrix by B A of this rank, by the singular value decomposition.

    Args:
        weight: Tensor[out, in].

    Returns:
        B, Tensor[out, rank], and A, Tensor[rank, in]: float32, with the singular values' roots in each.
    """
    U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * V[:rank]


@torch.no_grad()
def begin(A: torch.Tensor, B: torch.Tensor, scale: float, target: torch.Tensor) -> None:
    """Set A, Tensor[rank, in], and B, Tensor[out, rank], so that scale * B A comes as close to a matrix as it can."""
    b, a = low_rank(target, len(A))
    A.copy_(a / scale**0.5)
    B.copy_(b / scale**0.5)


@torch.no_grad()
def without(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """W - scale * B A, Tensor[out, in] in W's dtype: what PiSSA leaves to the frozen base."""
    return (weight.float() - scale * (B.float() @ A.float())).to(weight.dtype)


@torch.no_grad()
def initialize_pissa(model: nn.Module, quantizer: Quantizer | None = None) -> nn.Module:
    """Give the LoRA layers of a model with dense weights their beginning, in place.

    Args:
        quantizer: quantizes what is frozen (QPiSSA), as in `quantize_linears`; None leaves it dense.

    Returns:
        the same model. Without a quantizer it computes what it computed before, up to rounding.

    Raises:
        UserError: a model without LoRA layers, or one of them is quantized or merged already.
    """
    for name, layer in required_lora(model).items():
        weight = _dense_weight(name, layer)
        begin(layer.lora_A, layer.lora_B, layer.scale, weight)
        rest = without(weight, layer.lora_A, layer.lora_B, layer.scale)
        if quantizer:
            _quantize_base(layer, quantizer(rest))
        else:
            layer.base.weight.data = rest.T if is_transposed(layer.base) else rest
        _keep_lengths(layer)
    return model


@torch.no_grad()
def initialize_loftq(model: nn.Module, quantizer: Quantizer, iterations: int = 1) -> nn.Module:
    """Quantize the base of each LoRA layer, and give A and B the best correction of what that loses, in place.

    Args:
        model: with dense weights.
        quantizer: as in `quantize_linears`.
        iterations: the base is quantized again without what A and B hold, and they are fitted again, so many times.

    Returns:
        the same model

    Raises:
        UserError: iterations below 1, a model without LoRA layers, or one of them is quantized or merged already.
    """
    if iterations < 1:
        raise UserError(f"iterations={iterations}: LoftQ needs at least 1")
    for name, layer in required_lora(model).items():
        weight = _dense_weight(name, layer)
        nn.init.zeros_(layer.lora_B)
        for _ in range(iterations):
            q = quantizer((weight.float() - LoraLinear.delta(layer)).to(weight.dtype))
            begin(layer.lora_A, layer.lora_B, layer.scale, weight.float() - q.dequantize().float())
        _quantize_base(layer, q)
        _keep_lengths(layer)
    return model


@torch.no_grad()
def fit_to_error(model: nn.Module, weight_of: Callable[[str], torch.Tensor]) -> nn.Module:
    """LoftQ with one iteration for a model that is quantized already: its base stays as it is.

    Args:
        model: with LoRA layers on quantized ones.
        weight_of: from a layer's name to its weight before quantization, Tensor[out, in].

    Returns:
        the same model

    Raises:
        UserError: a model without LoRA layers, or one of them is not quantized.
    """
    for name, layer in required_lora(model).items():
        if not is_quantized(layer.base):
            raise UserError(f"{name} is not quantized: there is no error that LoftQ could correct")
        error = weight_of(name).float() - dense_weight(layer.base).float()
        begin(layer.lora_A, layer.lora_B, layer.scale, error)
        _keep_lengths(layer)
    return model


def _quantize_base(layer: LoraLinear, q: Weight) -> None:
    """Put a layer with this weight in the place of a LoRA layer's dense base."""
    layer.add_module("base", QuantizedLinear(q, layer.base.bias).train(layer.training))


def _keep_lengths(layer: LoraLinear) -> None:
    """Let DoRA's magnitudes begin as the lengths that W + scale * B A has now."""
    if isinstance(layer, DoraLinear):
        layer.lora_magnitude.copy_(layer.lengths())


def _dense_weight(name: str, layer: LoraLinear) -> torch.Tensor:
    """A layer's dense weight, Tensor[out, in]. Raises UserError if it has none, or if the layer is merged."""
    if is_quantized(layer.base) or layer.merged:
        state = "merged" if layer.merged else "quantized"
        raise UserError(f"{name} is {state} already: PiSSA and LoftQ begin with the dense weight")
    weight = layer.base.weight.detach()
    return weight.T if is_transposed(layer.base) else weight
