"""DoRA: LoRA turns the rows of a weight, and a vector of its own says how long they are.

    V = W + scale * B A
    y = x W'ᵀ        W' = m ∘ V / |V|        |V|: the length of each row        m: (out,), trained

m starts as the lengths of W's rows, so an adapted model first computes what it computed before. In LoRA, a small change
of direction comes with one of length; full fine-tuning changes them more freely, and DoRA lets them change apart. |V|
follows A and B, but gets no gradient. (Liu et al. 2024, arXiv 2402.09353, section 4; the last is its equation 11.)

The price: out more numbers for each layer, and W, which a 4-bit layer dequantizes once more in each forward pass.
"""

from __future__ import annotations

import torch
from torch import nn

from qlora_lab.adapters.lora import LoraLinear
from qlora_lab.adapters.quantized_linear import dense_weight, is_quantized
from qlora_lab.adapters.targets import is_transposed


class DoraLinear(LoraLinear):
    """A frozen linear layer with DoRA: `add_lora(model, kind=DoraLinear)`. Arguments and errors: `LoraLinear`."""

    def __init__(self, base: nn.Module, *args, **named):
        super().__init__(base, *args, **named)
        lengths = torch.linalg.vector_norm(self._dense(), dim=1)
        self.lora_magnitude = nn.Parameter(lengths.to(self.lora_A.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        y = self.base(x)
        if self.merged:
            return y
        z = nn.functional.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        if self.dropout and self.training:
            straight = nn.functional.linear(z, self._dense().to(z.dtype))
        else:
            bias = self.base.bias
            straight = y if bias is None else y - bias.to(y.dtype)
        stretch = self.lora_magnitude / self.lengths().to(self.lora_magnitude.dtype)  # (out,), near 1
        return y + ((stretch - 1) * straight + stretch * self.correction(z)).to(y.dtype)

    @torch.no_grad()
    def lengths(self) -> torch.Tensor:
        """|V|, the length of each row of W + scale * B A: float32, Tensor[out_features].

        |w + b A|² = |w|² + 2 b·(A w) + b (A Aᵀ) bᵀ for a row w of W and its row b of scale * B: B A is never formed.
        """
        W, A, b = self._dense(), self.lora_A.float(), self.scale * self.lora_B.float()
        square = W.square().sum(1) + 2 * (b * (W @ A.T)).sum(1) + ((b @ (A @ A.T)) * b).sum(1)
        return square.clamp(min=0).sqrt()

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """W' - W: float32, Tensor[out_features, in_features]."""
        W = self._dense()
        return (self.lora_magnitude.float() / self.lengths())[:, None] * (W + super().delta()) - W

    def _dense(self) -> torch.Tensor:
        """W in float32, Tensor[out_features, in_features]: not the merged one."""
        if is_quantized(self.base):
            return dense_weight(self.base).float()
        weight = self.base.weight if self.unmerged_weight is None else self.unmerged_weight
        return (weight.T if is_transposed(self.base) else weight).detach().float()
