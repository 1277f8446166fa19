"""Reads a model's frozen linear layers and their adapters, whether of this package, of PEFT or of bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qlora_lab.adapters.lora import LoraLinear
from qlora_lab.adapters.quantized_linear import frozen_weight
from qlora_lab.quantization import QuantizedTensor, UniformTensor
from qlora_lab.training.steps.fast.limits import NoFastStep

DENSE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: A, (rank, in), and B, (out, rank), float32; scaling: what B A is multiplied by."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.A)


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear layer's weight, (out, in), dense or in 4 bits, and its adapter, if it has one."""

    weight: torch.Tensor | QuantizedTensor
    adapter: Adapter | None


@dataclass(frozen=True)
class SharedInput:
    """Linear layers that share their input. Those that have an adapter have the same rank and scaling.

    Raises:
        NoFastStep: the adapters' ranks or scalings differ.
    """

    parts: tuple[AdaptedLinear, ...]

    def __post_init__(self):
        if len({(adapter.rank, adapter.scaling) for adapter in self.adapters}) > 1:
            raise NoFastStep("layers that read the same input have adapters of several ranks or scalings")

    @property
    def adapters(self) -> list[Adapter]:
        return [part.adapter for part in self.parts if part.adapter]

    @property
    def sizes(self) -> list[int]:
        """Output features of each part."""
        return [part.weight.shape[0] for part in self.parts]


def read_linear(module, name: str) -> AdaptedLinear:
    """Read a linear layer of this package, of PEFT or of bitsandbytes. Raises NoFastStep for anything else."""
    base, adapter = module, None
    dropout, merged = 0.0, False
    if isinstance(module, LoraLinear):
        if type(module) is not LoraLinear:
            raise NoFastStep(f"{name} has {type(module).__name__}, not plain LoRA")
        base, adapter = module.base, Adapter(module.lora_A, module.lora_B, module.scale)
        dropout, merged = module.dropout, module.merged
    elif hasattr(module, "base_layer"):  # PEFT
        if len(module.active_adapters) != 1 or module.use_dora.get(module.active_adapters[0]):
            raise NoFastStep(f"{name} has several adapters or DoRA")
        base, (key,) = module.base_layer, module.active_adapters
        adapter = Adapter(module.lora_A[key].weight, module.lora_B[key].weight, module.scaling[key])
        dropout, merged = getattr(module.lora_dropout[key], "p", 0.0), module.merged
    if adapter:
        if dropout or merged:
            raise NoFastStep(f"{name} has {'a dropout' if dropout else 'its adapter merged'}")
        if adapter.rank % 8:
            raise NoFastStep(f"{name} has an adapter of rank {adapter.rank}: it must be a multiple of 8")
        if adapter.A.dtype != torch.float32:
            raise NoFastStep(
                f"{name} has an adapter in {adapter.A.dtype}: it must be float32 (a bf16 copy of it does the computing)"
            )
    if getattr(base, "bias", None) is not None:
        raise NoFastStep(f"{name} has a bias")
    weight = frozen_weight(base)
    if isinstance(weight, UniformTensor) or (isinstance(weight, torch.Tensor) and weight.dtype not in DENSE):
        raise NoFastStep(f"{name} is a {type(base).__name__} with a weight that is neither dense nor in 4 bits")
    return AdaptedLinear(weight, adapter)


def read_layer(layer, name: str) -> tuple[SharedInput, SharedInput, SharedInput, SharedInput]:
    """A LLaMA layer's linear layers, grouped by their input: q, k and v; o; gate and up; down."""

    def reading(parent, *names: str) -> SharedInput:
        return SharedInput(tuple(read_linear(getattr(parent, n), f"{name}.{n}") for n in names))

    attention, mlp = layer.self_attn, layer.mlp
    return (
        reading(attention, "q_proj", "k_proj", "v_proj"),
        reading(attention, "o_proj"),
        reading(mlp, "gate_proj", "up_proj"),
        reading(mlp, "down_proj"),
    )
