"""A linear layer that holds its weight in 4 bits and dequantizes it whenever it is needed.

    forward     y = x Wᵀ           W = dequantize(q), made, used and freed
    backward    dL/dx = dL/dy W    W made again: nothing dense, and not even x, is kept in between

The weight is frozen, so there is no dL/dW. All that QLoRA needs of its base is to let gradients *through*, to the
adapters of earlier layers (Dettmers et al. 2023, arXiv 2305.14314, section 3). bitsandbytes' `Linear4bit` does the same
in its `MatMul4Bit`.

    quantize_linears(model)      replace the linear layers of a model, in place
    from_bitsandbytes(model)     take over the 4-bit layers of a bitsandbytes model, byte for byte
    dequantize_linears(model)    dense layers with the rounded weights, in place of ours or bitsandbytes'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn

from qlora_lab.adapters.targets import LinearLike, find_targets, get_linear, is_transposed, set_module
from qlora_lab.errors import UserError
from qlora_lab.models.experts import four_bit_experts
from qlora_lab.quantization import (
    FP4,
    FP4_BIT_PATTERNS,
    NF4,
    QuantizedAbsmax,
    QuantizedTensor,
    UniformTensor,
    double_quantize,
    pack,
    quantize,
    unpack,
)

Weight = QuantizedTensor | UniformTensor  # what stands for a matrix, in few bits
Quantizer = Callable[[torch.Tensor], Weight]


class _FrozenMatmul(torch.autograd.Function):
    """x Wᵀ + b for a frozen quantized W and a frozen b."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, q: Weight, bias: torch.Tensor | None):
        ctx.q = q  # (out, in) in 4 bits: the dense weight is not kept
        return nn.functional.linear(x, q.dequantize().to(x.dtype), bias)  # (..., in) -> (..., out)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ ctx.q.dequantize().to(gradient.dtype), None, None  # (..., out) @ (out, in)


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with a quantized W.

    Computes in x's dtype, or in autocast's where that is on.

    `load_state_dict` treats it like an nn.Linear: a weight that does not fit is reported and changes nothing, one that
    fits is copied to the layer's device.

    Args:
        weight: what stands for W, of shape (out_features, in_features): a QuantizedTensor, with double quantization or
            without, or a UniformTensor.
        bias: Tensor[out_features] or None; frozen.

    Raises:
        UserError: a weight that is not a matrix, or a bias of another length.
    """

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None):
        super().__init__()
        if len(weight.shape) != 2:
            raise UserError(
                f"the weight has shape {tuple(weight.shape)}: a linear layer's is (out_features, in_features)"
            )
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise UserError(
                f"the bias has shape {tuple(bias.shape)}: a weight of {self.out_features} rows needs as many"
            )
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.dim() < 3:
            return _FrozenMatmul.apply(x, self.weight, bias)
        # with a bias, more dimensions would be a view of two, and a Function's view cannot be changed in place
        return _FrozenMatmul.apply(x.flatten(0, -2), self.weight, bias).unflatten(0, x.shape[:-1])

    def _apply(self, fn, recurse: bool = True):
        """`model.to(...)` calls this. The weight moves to the new device; codes and scales keep their dtypes."""
        self.weight = self.weight.to(fn(self.weight.codes).device)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not isinstance(self.weight, QuantizedTensor):
            raise UserError(f"a {type(self.weight).__name__} cannot be saved or loaded: only 4-bit QuantizedTensor can")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}weight.{name}": part for name, part in self.weight.state_dict().items()})

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Like nn.Linear's: reports what is missing, unexpected or of another shape. No weight is loaded in part."""
        start = f"{prefix}weight."
        given = {name.removeprefix(start): part for name, part in state_dict.items() if name.startswith(start)}
        rest = {name: part for name, part in state_dict.items() if not name.startswith(start)}
        own = [name.removeprefix(start) for name in self.state_dict(prefix=prefix) if name.startswith(start)]
        missing = [name for name in own if name not in given]
        missing_keys += [start + name for name in missing]
        unexpected_keys += [start + name for name in given if name not in own]
        if not missing:
            self._load_weight({name: given[name] for name in own}, prefix, local_metadata, error_msgs)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _load_weight(self, state: dict[str, torch.Tensor], prefix: str, local_metadata: dict, error_msgs: list[str]):
        assign = local_metadata.get("assign_to_params_buffers", False)  # load_state_dict(assign=True)
        try:
            weight = QuantizedTensor.from_state_dict(
                state if assign else {name: part.clone() for name, part in state.items()}
            )
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}.")
            return
        if weight.shape != self.weight.shape:
            error_msgs.append(
                f"size mismatch for {prefix}weight: copying a param with shape {weight.shape} from checkpoint, the "
                f"shape in current model is {self.weight.shape}."
            )
            return
        self.weight = weight if assign else weight.to(self.weight.device)

    def extra_repr(self) -> str:
        bits = self.weight.bits_per_parameter
        return f"in_features={self.in_features}, out_features={self.out_features}, bits_per_parameter={bits:.3f}"


def nf4_double(weight: torch.Tensor) -> QuantizedTensor:
    """QLoRA's choice: NF4 in blocks of 64, their scales in 8 bits. 4.127 bits per parameter."""
    return double_quantize(quantize(weight))


def quantize_linears(
    model: nn.Module,
    targets: str | list[str] = "all-linear",
    quantizer: Quantizer = nf4_double,
) -> nn.Module:
    """Replace linear layers by quantized ones, in place and one at a time.

    Args:
        targets: "all-linear" (all but the output head), or names of modules, as in `add_lora`.
        quantizer: weight -> quantized weight. `quantize` does without double quantization;
            `lambda weight: quantize(weight, FP4)` or `lambda weight: quantize_affine(weight, 3, 64)` use other numbers.

    Returns:
        the same model, frozen: quantized weights cannot be trained, adapters can

    Raises:
        UserError: targets that the model does not have, layers that are not a dense nn.Linear, or an output head that
            is tied to the input embeddings: quantizing it would untie them.
    """
    names = find_targets(model, targets)
    input_embeddings = getattr(model, "get_input_embeddings", None)
    embeddings = input_embeddings().weight if input_embeddings else None
    for name in names:
        layer = get_linear(model, name)
        if not (isinstance(layer, nn.Linear) or is_transposed(layer)) or not layer.weight.is_floating_point():
            raise UserError(f"{name} is a {type(layer).__name__}: only dense nn.Linear layers can be quantized")
        if layer.weight is embeddings:
            raise UserError(f"{name} is tied to the input embeddings: leave it out of targets")
    model.requires_grad_(False)
    for name in names:
        layer = get_linear(model, name)
        weight = layer.weight.detach()
        weight = weight.T.contiguous() if is_transposed(layer) else weight
        _put(model, name, QuantizedLinear(quantizer(weight), layer.bias), layer, source=type(layer))
    return model


def _put(model: nn.Module, name: str, module: nn.Module, old: nn.Module, source: type) -> None:
    """Put a layer in the place of an old one. source: the class that both stand for, nn.Linear or Conv1D."""
    module.source_cls = source  # pyright: ignore[reportArgumentType]  # transformers' name for it, on Linear4bit
    set_module(model, name, module.train(old.training))


def from_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace bitsandbytes' 4-bit layers by ours, in place, with the same codes and scales.

    Quantizing the same weights again gives the same bytes except in double quantization, where one scale in several
    hundred differs: bitsandbytes' 8-bit search misses its nearest code. A comparison of training runs, step by step,
    must start from equal bytes. transformers no longer treats the result as a bitsandbytes model.

    Returns:
        the same model

    Raises:
        UserError: the model has no such layer.
    """
    names = [name for name, module in model.named_modules() if _is_linear4bit(module)]
    if not names:
        raise UserError("the model has no 4-bit layer of bitsandbytes: load_model(quantization='nf4') makes one")
    for name in names:
        layer = get_linear(model, name)
        _put(model, name, QuantizedLinear(_quantized_tensor(layer.weight), layer.bias), layer, source=_source(layer))
    _unmark(model)
    return model


def _quantized_tensor(weight) -> QuantizedTensor:
    """Our QuantizedTensor with the bytes of bitsandbytes' Params4bit."""
    q = _quantized_view(weight)
    if weight.quant_state.quant_type == "nf4":
        return q
    index = FP4_BIT_PATTERNS.argsort().to(torch.uint8).to(q.device)  # bit pattern -> index of its level
    return dataclasses.replace(q, codes=pack(index[unpack(q.codes).int()]), codebook=FP4.to(q.device))


def _quantized_view(weight) -> QuantizedTensor:
    """A QuantizedTensor that shares the memory of a Params4bit. FP4's levels are in the order of its bit patterns."""
    state, codes = weight.quant_state, weight.data.view(torch.uint8).flatten()
    absmax = state.absmax
    if state.nested:
        second = state.state2
        absmax = QuantizedAbsmax(absmax, second.absmax, state.offset, second.code.float(), second.blocksize)
    codebook = {"nf4": NF4, "fp4": FP4[FP4_BIT_PATTERNS.argsort()]}[state.quant_type].to(codes.device)
    return QuantizedTensor(codes, absmax, codebook, state.shape, state.dtype, state.blocksize)


def frozen_weight(module: nn.Module) -> torch.Tensor | Weight:
    """A linear layer's weight, not copied and not to be changed. bitsandbytes' 4-bit one comes as a QuantizedTensor."""
    if _is_linear4bit(module):
        return _quantized_view(module.weight)
    weight: Any = module.weight
    return weight.T if is_transposed(module) else weight


def dequantize_linears(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace quantized layers, ours and bitsandbytes' 4-bit ones, by dense ones with the rounded weights, in place.

    The experts of a mixture likewise.

    Adapters were trained on these rounded weights: merge them into this model, not into the 16-bit original. The result
    is an ordinary dense model, and `save_pretrained` writes an ordinary checkpoint. LoRA layers, ours or PEFT's, stay.

    Args:
        dtype: of the dense weights; None: that of the weights before they were quantized.

    Returns:
        the same model, frozen

    Raises:
        UserError: no layer is quantized.
    """
    quantized = {name: module for name, module in model.named_modules() if is_quantized(module)}
    experts = four_bit_experts(model)
    if not quantized and not experts:
        raise UserError("the model has no quantized linear layer: there is nothing to dequantize")
    for name, module in experts.items():
        set_module(model, name, module.dequantize(dtype))
    for name, module in quantized.items():
        weight = dense_weight(module)
        weight = weight.to(dtype or weight.dtype)
        dense = _dense(module, weight)
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias.detach().to(weight.dtype), requires_grad=False)
        set_module(model, name, dense.train(module.training))
    _unmark(model)
    return model


def _dense(module: LinearLike, weight: torch.Tensor) -> Any:
    """A frozen layer of the class that a quantized one stands for, with this weight of shape (out, in)."""
    source = _source(module)
    with torch.device("meta"):
        if source is nn.Linear:
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
        else:
            dense = source(module.out_features, module.in_features)  # Conv1D(nf, nx)
            weight = weight.T.contiguous()
    dense.weight = nn.Parameter(weight, requires_grad=False)
    return dense


def _source(module: nn.Module) -> Any:
    """The class of the layer that was quantized: nn.Linear, or transformers' Conv1D with its weight of (in, out)."""
    source = getattr(module, "source_cls", nn.Linear)
    return nn.Linear if issubclass(source, nn.Linear) else source


def _unmark(model: nn.Module) -> None:
    """Remove the attributes that mark a model as having bitsandbytes' 4-bit layers, once it has none.

    transformers would write them to config.json and refuse `.half()`; PEFT's layers would merge in 4 bits.
    """
    of_model = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")
    of_config = ("quantization_config", "_is_quantized")
    for module in model.modules():
        for owner, marks in ((module, of_model), (getattr(module, "config", None), of_config)):
            for mark in marks:
                getattr(owner, "__dict__", {}).pop(mark, None)
        if type(module).__module__ == "peft.tuners.lora.bnb":
            from peft.tuners.lora import Linear

            layer: Any = module
            conv1d = is_transposed(layer.get_base_layer())
            layer.__class__, layer.is_target_conv_1d_layer = Linear, conv1d  # the one attribute that only it has
            layer.fan_in_fan_out = conv1d
        elif type(module).__module__ == "qlora_lab.models.experts_lora":
            from peft.tuners.lora.layer import ParamWrapper

            module.__class__ = ParamWrapper


def is_quantized(module: nn.Module) -> TypeGuard[LinearLike]:
    """Whether a module is a QuantizedLinear or bitsandbytes' Linear4bit."""
    return isinstance(module, QuantizedLinear) or _is_linear4bit(module)


def _is_linear4bit(module: nn.Module) -> TypeGuard[LinearLike]:
    """Whether the module's own weight, not that of a layer which it wraps, carries bitsandbytes' `quant_state`."""
    return hasattr(module._parameters.get("weight"), "quant_state")


def dense_weight(module: nn.Module) -> torch.Tensor:
    """A quantized layer's weight, dequantized: Tensor[out_features, in_features], in its dtype before quantization."""
    if isinstance(module, QuantizedLinear):
        return module.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = module.weight
    return dequantize_4bit(weight.data, weight.quant_state)


@torch.no_grad()
def replace_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Put another weight, Tensor[out_features, in_features], into a frozen linear layer, dense or bitsandbytes'.

    A 4-bit layer quantizes it as it did its own.
    """
    old: Any = module.weight
    if not _is_linear4bit(module):
        old.data = (weight.T.contiguous() if is_transposed(module) else weight).to(old)
        return
    kept = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    dense = type(old)(weight, requires_grad=False, module=module, **kept)
    module.weight = dense.to(old.device)  # this is where bitsandbytes quantizes
