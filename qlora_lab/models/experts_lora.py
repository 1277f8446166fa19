"""PEFT's adapters on the experts of a mixture, where those are in 4 bits.

PEFT adapts a fused parameter with a `ParamWrapper`, which adds B A of *all* experts to the dense parameter before the
layer computes. A parameter in 4 bits has no dense form to add to, and making one would cost more memory than the model.
The layer here has the same A and B, by the same names in the same files, and hands them to `FourBitExperts`, which
multiplies each token by its own experts' A and B.

    A: Tensor[experts * rank, in]     expert after expert
    B: Tensor[out, rank * experts]    rank after rank, as PEFT has it
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer

from qlora_lab.errors import UserError
from qlora_lab.models.experts import Correction, FourBitExperts


class ParamWrapper(layer.ParamWrapper):  # PEFT nests wrappers of this name only
    """LoRA on one fused parameter of a `FourBitExperts`. Several of them are nested, as PEFT's own are."""

    num_experts: int

    def _get_in_out_features(self, module):
        self.num_experts, first, second = self._experts().shapes[self.parameter_name]
        self._param_ndim = 3
        return first, second  # PEFT's `update_layer` swaps them unless the module is transposed

    def _experts(self) -> FourBitExperts:
        base: Any = self.get_base_layer()
        return base

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `FourBitExperts.forward`, with what this adapter adds."""
        self._check_forward_args(x, *args, **kwargs)
        corrections = dict(kwargs.pop("corrections", None) or {})
        if not self.disable_adapters:
            own = [self._correction(name, x) for name in self.active_adapters if name in self.lora_A]
            corrections[self.parameter_name] = [*corrections.get(self.parameter_name, ()), *own]
        return self.base_layer(x, *args, corrections=corrections, **kwargs)

    def _correction(self, adapter: str, x: torch.Tensor) -> Correction:
        layers: Any = (self.lora_A[adapter], self.lora_B[adapter])
        A, B = (layer.weight for layer in layers)
        if torch.is_autocast_enabled(x.device.type):  # all at once, not expert by expert
            dtype = torch.get_autocast_dtype(x.device.type)
            A, B = A.to(dtype), B.to(dtype)
        all_A = A.view(self.num_experts, -1, A.shape[1])
        all_B = B.view(len(B), -1, self.num_experts).permute(2, 0, 1).contiguous()
        return all_A.unbind(), all_B.unbind(), self.scaling[adapter]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise UserError: 4-bit weights cannot be added to."""
        raise UserError(
            "experts in 4 bits cannot take an adapter in: dequantize_linears(model) makes them dense, then PEFT merges"
        )


def register(config) -> None:
    """Have PEFT use this `ParamWrapper` where the model has experts in 4 bits. config: a LoraConfig."""
    config._register_custom_module({FourBitExperts: ParamWrapper})
