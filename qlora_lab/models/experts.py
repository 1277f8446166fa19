"""The experts of a mixture, held in 4 bits and dequantized one at a time.

transformers keeps the MLPs of all experts of a layer in two parameters of three dimensions: `gate_up_proj`, Tensor
[experts, 2 * intermediate, hidden], and `down_proj`, Tensor[experts, hidden, intermediate]. They are no `nn.Linear`, so
its 4-bit loading leaves them in 16 bits: of Mixtral 8x7B, 97 % of the parameters.

    replace_experts(model)       an empty `FourBitExperts` in the place of each module with such parameters
    quantize_experts(model)      the same, filled with what the module holds, expert by expert
    FourBitExperts.dequantize    the way back: the original module with the rounded weights

Each expert is quantized by itself, as QLoRA quantizes a linear layer: blocks of 64, scales in 8 bits. The forward pass
takes the experts one after the other. Of each it dequantizes what it needs, multiplies, and frees it; the backward pass
dequantizes it again. So there is never more than one dense matrix, and experts that no token is sent to cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from qlora_lab.facts import BLOCK, SCALE_BLOCK, four_bit_bytes
from qlora_lab.quantization import (
    DYNAMIC8,
    FP4,
    NF4,
    QuantizedAbsmax,
    QuantizedTensor,
    double_quantize,
    quantize,
)

CODEBOOKS = {"nf4": NF4, "fp4": FP4}
GATED, UNGATED = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")

# A low-rank correction of one fused parameter: A of each expert, Tensor[rank, in]; B of each, Tensor[out, rank]; and
# the factor by which B A is scaled.
Correction = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], float]


class _FrozenMatmul(torch.autograd.Function):
    """x W, or x Wᵀ, for a frozen quantized W, which is dequantized in each pass and kept in neither."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, q: QuantizedTensor, is_transposed: bool):
        ctx.q, ctx.is_transposed = q, is_transposed
        weight = q.dequantize().to(x.dtype)
        return x @ (weight if is_transposed else weight.T)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        weight = ctx.q.dequantize().to(gradient.dtype)
        return gradient @ (weight.T if ctx.is_transposed else weight), None, None


class FourBitExperts(nn.Module):
    """All experts of a layer, with their large parameters in 4 bits.

    It has the attributes, biases and activation of the module that it stands for, and is called like it. A fused
    parameter keeps its name and holds the codes: uint8, Tensor[experts, 1, bytes]. Its scales are buffers beside it.

    Args:
        experts: a module for which `is_fused_experts` holds; it may be on the meta device. Its weights are not taken
            over: `fill` or `parts_of` does that.
        quantization: "nf4" or "fp4".
        double_quant: hold the scales in 8 bits, too.
        dtype: of the dequantized weights; None: that of the module's.

    Attributes:
        source_cls: the class that it stands for.
        fused: names of the fused parameters, the one that reads the hidden states first.
        shapes: the shape of each before it was quantized: (experts, out, in), or (experts, in, out) if `is_transposed`.
    """

    source_cls: Any
    num_experts: int
    is_transposed: bool
    has_bias: bool
    has_gate: bool

    def __init__(
        self,
        experts: nn.Module,
        quantization: str = "nf4",
        double_quant: bool = True,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _copy_attributes(experts, self)
        self.source_cls = type(experts)
        self.fused = GATED if self.has_gate else UNGATED
        self.quantization, self.double_quant = quantization, double_quant
        self.dtype: torch.dtype = dtype or experts.get_parameter("down_proj").dtype
        self.shapes = {name: tuple(experts.get_parameter(name).shape) for name in self.fused}
        for name, parameter in experts.named_parameters(recurse=False):  # in the module's order: PEFT nests by it
            if name in self.fused:  # until it is filled, as with bitsandbytes' Params4bit: dense, on the meta device
                dense = torch.empty(parameter.shape, dtype=self.dtype, device="meta")
                self.register_parameter(name, nn.Parameter(dense, requires_grad=False))
                for part, values in self._empty_scales(name, torch.device("meta")).items():
                    self.register_buffer(part, values)
            else:
                self.register_parameter(name, nn.Parameter(parameter.detach(), requires_grad=False))

    def matrix(self, name: str) -> tuple[int, int]:
        """(in, out) of one expert's matrix."""
        _, rows, columns = self.shapes[name]
        return (rows, columns) if self.is_transposed else (columns, rows)

    # ------------------------------------------------------------------------------------------------- quantizing

    def _empty_scales(self, name: str, device: torch.device) -> dict[str, torch.Tensor]:
        count, blocks = self.num_experts, -(-math.prod(self.shapes[name][1:]) // BLOCK)
        codebook = CODEBOOKS[self.quantization]

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        parts = {f"{name}_codebook": codebook.to(device)}
        if not self.double_quant:
            return parts | {f"{name}_absmax": empty(torch.float32, count, blocks)}
        return parts | {
            f"{name}_absmax": empty(torch.uint8, count, blocks),
            f"{name}_absmax_absmax": empty(torch.float32, count, -(-blocks // SCALE_BLOCK)),
            f"{name}_absmax_offset": empty(torch.float32, count),
            f"{name}_absmax_codebook": DYNAMIC8.to(device),
        }

    def parts_of(self, name: str, weights: Iterable[torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        """Quantize a fused parameter, one expert at a time.

        Args:
            weights: each expert's matrix, as the fused parameter has it: a tensor of three dimensions, or an iterable
                that makes one matrix after the other.

        Returns:
            codes and scales on the device, by their names in this module
        """
        matrices = iter(weights)
        parts = self._empty_scales(name, device)
        size = -(-math.prod(self.shapes[name][1:]) // 2)
        codes = parts[name] = torch.empty(self.num_experts, 1, size, dtype=torch.uint8, device=device)
        for number in range(self.num_experts):
            q = self._quantize(next(matrices).to(device))
            codes[number, 0] = q.codes
            if isinstance(q.absmax, QuantizedAbsmax):
                parts[f"{name}_absmax"][number] = q.absmax.codes
                parts[f"{name}_absmax_absmax"][number] = q.absmax.absmax
                parts[f"{name}_absmax_offset"][number] = q.absmax.offset
            else:
                parts[f"{name}_absmax"][number] = q.absmax
        return parts

    def _quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        q = quantize(weight.to(self.dtype), CODEBOOKS[self.quantization], BLOCK)
        return double_quantize(q, SCALE_BLOCK) if self.double_quant else q

    def rounded(self, weights: Iterable[torch.Tensor]) -> torch.Tensor:
        """A fused parameter as it is after it was quantized and dequantized. weights: as in `parts_of`."""
        return torch.stack([self._quantize(weight).dequantize() for weight in weights])

    def fill(self, name: str, weights: Iterable[torch.Tensor], device: torch.device) -> None:
        """Hold a fused parameter from now on. Arguments as in `parts_of`."""
        for part, values in self.parts_of(name, weights, device).items():
            if part == name:
                setattr(self, name, nn.Parameter(values, requires_grad=False))
            else:
                setattr(self, part, values)

    def bytes_of(self, name: str) -> int:
        """Bytes of a fused parameter once it is filled: codes, scales and tables."""
        return sum(four_bit_bytes(math.prod(self.shapes[name][1:]), self.double_quant, self.num_experts))

    def expert(self, name: str, number: int) -> QuantizedTensor:
        """One expert's matrix: a view of the codes and scales."""
        parts: dict[str, torch.Tensor] = self._buffers  # pyright: ignore[reportAssignmentType]  # none is None
        absmax: Any = parts[f"{name}_absmax"][number]
        if self.double_quant:
            second, offset = parts[f"{name}_absmax_absmax"][number], parts[f"{name}_absmax_offset"][number]
            absmax = QuantizedAbsmax(absmax, second, offset, parts[f"{name}_absmax_codebook"], SCALE_BLOCK)
        codes, shape = self.get_parameter(name).data[number, 0], torch.Size(self.shapes[name][1:])
        return QuantizedTensor(codes, absmax, parts[f"{name}_codebook"], shape, self.dtype, BLOCK)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A module of the original class with the rounded weights, frozen. dtype: None for that before quantizing."""
        dense: Any = self.source_cls.__new__(self.source_cls)
        nn.Module.__init__(dense)
        _copy_attributes(self, dense)
        dense._is_expert_parallel = False
        for name, parameter in self.named_parameters(recurse=False):
            values = parameter.detach()
            if name in self.fused:
                values = torch.stack([self.expert(name, number).dequantize() for number in range(self.num_experts)])
            values = values.to(dtype or values.dtype)
            dense.register_parameter(name, nn.Parameter(values, requires_grad=False))
        return dense.train(self.training)

    # -------------------------------------------------------------------------------------------------- computing

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        corrections: Mapping[str, Sequence[Correction]] | None = None,
    ) -> torch.Tensor:
        """What the chosen experts make of each token, weighted and added up.

        Args:
            hidden_states: Tensor[tokens, hidden].
            top_k_index: int64, Tensor[tokens, k]: the experts that a token is sent to.
            top_k_weights: Tensor[tokens, k]: the weight of each.
            corrections: trained additions to the fused parameters, by name.

        Returns:
            Tensor[tokens, hidden] in the dtype of hidden_states
        """
        x, kind = hidden_states, hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        chosen, k = top_k_index.flatten(), top_k_index.shape[-1]
        order = chosen.argsort(stable=True)  # pairs of a token and an expert, each expert's side by side
        counts = chosen.bincount(minlength=self.num_experts).tolist()
        made = []
        for number, rows in enumerate(x[order // k].split(counts)):
            if number >= self.num_experts:  # transformers' mark for "no expert"
                made.append(torch.zeros_like(rows))
            elif len(rows):
                made.append(self._one(number, rows, corrections or {}))
        weighted = torch.cat(made) * top_k_weights.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted[back].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _one(self, number: int, x: torch.Tensor, corrections: Mapping[str, Sequence[Correction]]) -> torch.Tensor:
        """One expert's MLP: Tensor[rows, hidden] to the same."""
        first, last = self.fused
        y = self._multiply(first, number, x, corrections)
        y = self.source_cls._apply_gate(self, y) if self.has_gate else self.get_submodule("act_fn")(y)
        return self._multiply(last, number, y, corrections)

    def _multiply(
        self, name: str, number: int, x: torch.Tensor, corrections: Mapping[str, Sequence[Correction]]
    ) -> torch.Tensor:
        y = _FrozenMatmul.apply(x, self.expert(name, number), self.is_transposed)
        if self.has_bias:
            y = y + self.get_parameter(f"{name}_bias")[number]
        for all_A, all_B, scale in corrections.get(name, ()):
            A, B = all_A[number], all_B[number]
            y = y + scale * nn.functional.linear(nn.functional.linear(x.to(A.dtype), A), B).to(y.dtype)
        return y

    # ----------------------------------------------------------------------------------------------------- moving

    def _apply(self, fn, recurse: bool = True):
        """`model.to(...)` calls this. Scales and tables move to the new device, and keep their dtypes."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, values in kept.items():
            moved = self._buffers[name]
            if values is not None and moved is not None and moved.dtype != values.dtype:
                self._buffers[name] = values.to(moved.device)
        return self

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{name}={shape}" for name, shape in self.shapes.items())
        return f"{self.source_cls.__name__}, {shapes}, {self.quantization}, double_quant={self.double_quant}"


def _copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Give a module another one's settings and submodules. What begins with an underscore is nn.Module's own."""
    settings = {name: value for name, value in vars(source).items() if not name.startswith("_")}
    for name in ("source_cls", "fused", "quantization", "double_quant", "dtype", "shapes"):
        settings.pop(name, None)
    vars(target).update(settings)
    for name, child in source.named_children():
        target.add_module(name, child)


# ----------------------------------------------------------------------------------------------------------- in models


def is_fused_experts(module: nn.Module) -> TypeGuard[Any]:
    """Whether a module computes as those do that transformers decorates with `use_experts_implementation`.

    It holds its experts' weights in parameters of three dimensions, and says how with `has_gate`, `is_transposed` and
    so on. A norm after each expert is not known here.
    """
    if not all(hasattr(module, name) for name in ("num_experts", "is_transposed", "has_gate", "has_bias")):
        return False
    names = GATED if module.has_gate else UNGATED
    fused = [module._parameters.get(name) for name in names]
    return all(
        parameter is not None and parameter.ndim == 3 and parameter.is_floating_point() for parameter in fused
    ) and not (getattr(module, "has_post_expert_norm", False) or isinstance(module, FourBitExperts))


def replace_experts(
    model: nn.Module, quantization: str = "nf4", double_quant: bool = True, dtype: torch.dtype | None = None
) -> dict[str, FourBitExperts]:
    """Put an empty `FourBitExperts` in the place of each module of fused experts. Returns them by dotted name."""
    found = [name for name, module in model.named_modules() if is_fused_experts(module)]
    made = {name: FourBitExperts(model.get_submodule(name), quantization, double_quant, dtype) for name in found}
    for name, module in made.items():
        model.set_submodule(name, module.train(model.training))
    return made


def quantize_experts(model: nn.Module, quantization: str = "nf4", double_quant: bool = True) -> nn.Module:
    """Quantize the fused experts of a dense model, in place, where they are. Returns the model."""
    dense = {name: module for name, module in model.named_modules() if is_fused_experts(module)}
    for name, module in replace_experts(model, quantization, double_quant).items():
        for parameter in module.fused:
            weights = dense[name].get_parameter(parameter).detach()
            module.fill(parameter, weights, weights.device)
    return model


def four_bit_experts(model: nn.Module) -> dict[str, FourBitExperts]:
    """The modules of experts in 4 bits, by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FourBitExperts)}


def split_targets(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of adapted modules, and names of fused parameters among them, which PEFT calls `target_parameters`.

    A target is a parameter's name if the model has fused experts with it, and no module of that name.
    """
    modules = [name for name, _ in model.named_modules()]
    parameters = fused_parameters(model)
    of_experts = [
        target
        for target in targets
        if any(f".{name}".endswith(f".{target}") for name in parameters)
        and not any(f".{name}".endswith(f".{target}") for name in modules)
    ]
    return [target for target in targets if target not in of_experts], of_experts


def fused_parameters(model: nn.Module) -> list[str]:
    """Dotted names of the fused parameters of all experts, dense or in 4 bits."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, FourBitExperts) or is_fused_experts(module):
            found += [f"{name}.{fused}" for fused in (GATED if module.has_gate else UNGATED)]
    return found
