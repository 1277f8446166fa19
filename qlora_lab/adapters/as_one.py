"""A frozen layer and PEFT's adapter beside it, computed as one operation: less work around the products, on a CPU.

    y = x Wᵀ + b + scale * (x Aᵀ) Bᵀ
    dL/dx = dL/dy W + dz A      dL/dA = dzᵀ x      dL/dB = scale * dL/dyᵀ z      z = x Aᵀ, dz = scale * dL/dy B

PEFT writes this as a dozen operations, each of which reads and writes whole activations: a copy of x in fp32 (PEFT asks
whether a GPU's autocast is on), a copy of the base's output, the correction times `scale`, the sum. Here the second
product is added to the first in place. The numbers are those of PEFT up to the rounding of `scale * ...`.

W is dequantized as bitsandbytes does it, either anew for each product or once for all (`hold`): the same values.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from qlora_lab.adapters.quantized_linear import dense_weight, is_quantized

SHARE_OF_MEMORY = 0.25  # of what is available, that dense weights may take without being asked for


class AdaptedProduct(torch.autograd.Function):
    """y for x of shape (rows, in); `weight` gives W, (out, in), in x's dtype. A and B may be wider: they are cast.

    Of more dimensions it would have to return a view, and what a Function returned as a view cannot be changed in place
    (Gemma 3n does that).
    """

    @staticmethod
    def forward(ctx, x, weight: Callable[[], torch.Tensor], bias, lora_A, lora_B, scale: float):
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        z = x @ A.T
        y = nn.functional.linear(x, weight(), bias).addmm_(z, B.T, alpha=scale)
        ctx.save_for_backward(x, z, A, B)
        ctx.weight, ctx.scale, ctx.adapter_dtypes = weight, scale, (lora_A.dtype, lora_B.dtype)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, z, A, B = ctx.saved_tensors
        dz = (dy @ B).mul_(ctx.scale)
        dA, dB = (dz.T @ x).to(ctx.adapter_dtypes[0]), (dy.T @ z).mul_(ctx.scale).to(ctx.adapter_dtypes[1])
        dx = (dy @ ctx.weight()).addmm_(dz, A) if ctx.needs_input_grad[0] else None
        return dx, None, None, dA, dB, None


@contextlib.contextmanager
def as_one(model: nn.Module, hold: bool | None = None) -> Iterator[None]:
    """Compute a model's 4-bit layers, and PEFT's plain LoRA layers around any, as one operation each, inside a `with`.

    What this does not describe (DoRA, dropout, several adapters or none, other dtypes than the base's) is computed by
    PEFT and bitsandbytes, as before. Nothing happens to a model that is not on a CPU.

    Args:
        hold: keep the 4-bit layers' weights dense, too, until the `with` ends; None: if `room_for_dense` says so.
    """
    if hold is None:
        hold = room_for_dense(model)
    with contextlib.ExitStack() as undo:
        for layer, base in _layers(model):
            weight = functools.partial(_weight, base)
            if hold and is_quantized(base):
                weight = functools.partial(torch.Tensor.detach, weight())
            elif layer is base:
                continue
            undo.callback(_set_forward, layer, vars(layer).get("forward"))
            forward = functools.partial(_frozen if layer is base else _adapted, layer, layer.forward, base, weight)
            _set_forward(layer, forward)
        yield


def room_for_dense(model: nn.Module) -> bool:
    """Whether the weights that a model on a CPU has in 4 bits take at most a quarter of the free memory when dense."""
    import psutil

    return 0 < dense_bytes(model) <= SHARE_OF_MEMORY * psutil.virtual_memory().available


def dense_bytes(model: nn.Module) -> int:
    """Bytes of the dense weights that `as_one` would hold of this model: 0 if it is not on a CPU, or has no 4 bits."""
    bases = [base for _, base in _layers(model) if is_quantized(base)]
    return sum(base.weight.quant_state.shape.numel() * _dtype(base).itemsize for base in bases)


def _layers(model: nn.Module) -> list[tuple[Any, Any]]:
    """PEFT's LoRA layers, each with the 4-bit or dense layer in it; and 4-bit layers without one, each with itself."""
    if next(model.parameters()).device.type != "cpu":
        return []
    # whoever has such layers has imported these; they take seconds
    Linear4bit = getattr(sys.modules.get("bitsandbytes.nn.modules"), "Linear4bit", ())
    LoraLayer = getattr(sys.modules.get("peft.tuners.lora"), "LoraLayer", ())
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    pairs = [(layer, layer.get_base_layer()) for layer in adapted]
    inside = {id(module) for layer in adapted for module in layer.modules()}
    pairs += [(m, m) for m in model.modules() if isinstance(m, Linear4bit) and id(m) not in inside]
    return [(layer, base) for layer, base in pairs if type(base) in (Linear4bit, nn.Linear)]


def _dtype(base: Any) -> torch.dtype:
    """That of a layer's products."""
    if is_quantized(base):
        return getattr(base, "compute_dtype", None) or base.weight.quant_state.dtype
    return base.weight.dtype


def _weight(base: Any) -> torch.Tensor:
    return dense_weight(base).to(_dtype(base)) if is_quantized(base) else base.weight


def _set_forward(layer: Any, forward: Callable | None) -> None:
    """Put a function in the place of this layer's own `forward`; None: its class's."""
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


def _frozen(layer, otherwise: Callable, base, weight: Callable, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """The forward pass of a 4-bit layer without an adapter, whose weight is held."""
    if x.dtype != _dtype(base) or args or kwargs:
        return otherwise(x, *args, **kwargs)
    return nn.functional.linear(x, weight(), _bias(base, x))


def _adapted(layer, otherwise: Callable, base, weight: Callable, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """The forward pass of PEFT's layer, if it is plain LoRA."""
    adapter = _only_adapter(layer)
    if adapter is None or args or kwargs or x.dtype != _dtype(base) or x.dim() < 2 or x.numel() == 0:
        return otherwise(x, *args, **kwargs)
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    autocast = torch.is_autocast_enabled("cpu")
    dtypes = {torch.get_autocast_dtype("cpu")} if autocast else {A.dtype, B.dtype}
    if dtypes != {x.dtype}:
        return otherwise(x, *args, **kwargs)
    y = AdaptedProduct.apply(x.flatten(0, -2), weight, _bias(base, x), A, B, layer.scaling[adapter])
    return y.unflatten(0, x.shape[:-1])


def _bias(base: Any, x: torch.Tensor) -> torch.Tensor | None:
    return None if base.bias is None else base.bias.to(x.dtype)


def _only_adapter(layer) -> str | None:
    """The name of the one adapter that is on, if it is LoRA without dropout, bias or a variant."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    plain = name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias[name]
    return name if plain and isinstance(layer.lora_dropout[name], nn.Identity) else None
