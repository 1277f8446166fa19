"""The frozen linear layers of a model and their adapters, whoever made them: this package, PEFT or bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qlora_lab.adapters.lora import LoraLinear
from qlora_lab.adapters.quantized_linear import frozen_weight
from qlora_lab.quantization import QuantizedTensor
from qlora_lab.training.steps.fast.limits import NoFastStep

DENSE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear layer and its adapter, whoever made them.

    weight: (out, in), dense or in 4 bits. lora_A: (rank, in), lora_B: (out, rank), float32; or None and None.
    """

    weight: torch.Tensor | QuantizedTensor
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    scaling: float

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else len(self.lora_A)


@dataclass(frozen=True)
class SharedInput:
    """Linear layers that read the same input. Their adapters, where they have one, have one rank and one scaling.

    Raises:
        NoFastStep: several ranks or scalings.
    """

    parts: tuple[AdaptedLinear, ...]

    def __post_init__(self):
        if len({(part.rank, part.scaling) for part in self.adapted}) > 1:
            raise NoFastStep("layers that read the same input have adapters of several ranks or scalings")

    @property
    def adapted(self) -> list[AdaptedLinear]:
        return [part for part in self.parts if part.rank]

    @property
    def sizes(self) -> list[int]:
        """Output features of each part."""
        return [part.weight.shape[0] for part in self.parts]


def read_linear(module: nn.Module, name: str) -> AdaptedLinear:
    """What a layer of this package, of PEFT or of bitsandbytes holds. Raises NoFastStep for anything else."""
    lora_A = lora_B = None
    base, scaling, dropout = module, 1.0, 0.0
    if isinstance(module, LoraLinear):
        base, lora_A, lora_B = module.base, module.lora_A, module.lora_B
        scaling, dropout, merged = module.alpha / module.rank, module.dropout, module.merged
    elif hasattr(module, "base_layer"):  # PEFT
        if len(module.active_adapters) != 1 or module.use_dora.get(module.active_adapters[0]):
            raise NoFastStep(f"{name} has several adapters or DoRA")
        base, (key,), merged = module.base_layer, module.active_adapters, module.merged
        lora_A, lora_B, scaling = module.lora_A[key].weight, module.lora_B[key].weight, module.scaling[key]
        dropout = getattr(module.lora_dropout[key], "p", 0.0)
    if lora_A is not None:
        if dropout or merged:
            raise NoFastStep(f"{name} has {'a dropout' if dropout else 'its adapter merged'}")
        if len(lora_A) % 8:
            raise NoFastStep(f"{name} has an adapter of rank {len(lora_A)}: it must be a multiple of 8")
        if lora_A.dtype != torch.float32:
            raise NoFastStep(
                f"{name} has an adapter in {lora_A.dtype}: it must be float32 (what computes is a bf16 copy)"
            )
    if getattr(base, "bias", None) is not None:
        raise NoFastStep(f"{name} has a bias")
    weight = frozen_weight(base)
    dense = isinstance(weight, torch.Tensor) and weight.dtype in DENSE
    if not dense and not isinstance(weight, QuantizedTensor):
        raise NoFastStep(f"{name} is a {type(base).__name__} with a weight that is neither dense nor in 4 bits")
    return AdaptedLinear(weight, lora_A, lora_B, scaling)


def read_layer(layer: nn.Module, name: str) -> tuple[SharedInput, SharedInput, SharedInput, SharedInput]:
    """A LLaMA layer's linears by what they read: q, k and v; o; gate and up; down."""

    def reading(parent: nn.Module, *names: str) -> SharedInput:
        return SharedInput(tuple(read_linear(getattr(parent, n), f"{name}.{n}") for n in names))

    attention, mlp = layer.self_attn, layer.mlp
    return (
        reading(attention, "q_proj", "k_proj", "v_proj"),
        reading(attention, "o_proj"),
        reading(mlp, "gate_proj", "up_proj"),
        reading(mlp, "down_proj"),
    )
