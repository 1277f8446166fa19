"""LoRA: train a small correction beside each frozen linear layer.

    y = base(x) + alpha / rank * (x Aᵀ) Bᵀ        x: (..., in)   A: (rank, in)   B: (out, rank)   y: (..., out)

A starts random and B at zero, so an adapted model first computes exactly what it computed before. Only A and B are
trained: rank * (in + out) numbers instead of in * out. (Hu et al. 2021, arXiv 2106.09685, section 4.1.)

With `rank_stabilized`, the scale is alpha / sqrt(rank). B's first step then changes the output equally at all ranks if
it is plain gradient descent's. With Adam, alpha / rank does that, and alpha / sqrt(rank) lets a high rank take larger
steps: at one rank it is a larger alpha. (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732; dive E has the sums.)

    add_lora(model)               freeze the model, put a LoraLinear around its linear layers, in place
    merge, unmerge                add the correction to the base's weight; take it back, exactly
    unload                        put the base layers back in the LoraLinears' place
    save_lora, load_lora          PEFT's files: `PeftModel.from_pretrained` reads ours, `load_lora` reads PEFT's

The base may be any module with `in_features`, `out_features` and `weight` (or GPT-2's Conv1D, which has other names for
them): nothing here depends on what the weight is.
QLoRA is LoRA on a base that happens to be 4-bit. Only `merge` needs a floating-point weight.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from qlora_lab.adapters.targets import LinearLike, find_targets, get_linear, is_linear, set_module, widths
from qlora_lab.errors import UserError


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank correction.

    Args:
        base: a module that maps (..., in_features) to (..., out_features).
        rank: r, the inner dimension of the correction.
        alpha: the correction is scaled by alpha / rank, or by alpha / sqrt(rank) if `rank_stabilized`.
        dropout: share of the correction's input that is set to zero while training.
        dtype: of A and B, and so of their gradients and the optimizer's states.
        generator: for A's random numbers, on the base's device; None: torch's own.

    Raises:
        UserError: a rank below 1, or a base that is not linear-like.
    """

    base: LinearLike

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        rank_stabilized: bool = False,
    ):
        super().__init__()
        if not is_linear(base):
            raise UserError(
                f"{type(base).__name__} is not linear-like: LoRA needs its in_features, out_features and weight"
            )
        if rank < 1:
            raise UserError(f"rank={rank}: must be at least 1")
        self.base, self.alpha, self.dropout, self.rank_stabilized = base, alpha, dropout, rank_stabilized
        device = base.weight.device
        inputs, outputs = widths(base)
        self.lora_A = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=device))
        # as nn.Linear does: within ±1/sqrt(in_features)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.unmerged_weight: torch.Tensor | None = None  # the base's weight before it was merged

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def in_features(self) -> int:
        return widths(self.base)[0]

    @property
    def out_features(self) -> int:
        return widths(self.base)[1]

    @property
    def weight(self):
        """The base's weight: frozen, and without the correction unless that is merged."""
        return self.base.weight

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        y = self.base(x)
        if self.merged:
            return y
        z = nn.functional.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        return y + self.correction(z).to(y.dtype)

    def correction(self, x: torch.Tensor) -> torch.Tensor:
        """scale * (x Aᵀ) Bᵀ: (..., in) -> (..., rank) -> (..., out)."""
        return nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B) * self.scale

    def delta(self) -> torch.Tensor:
        """What the correction adds to the weight: float32, Tensor[out_features, in_features]."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    def extra_repr(self) -> str:
        scale = f"scale={self.scale:.3g}, " if self.rank_stabilized else ""
        return f"rank={self.rank}, alpha={self.alpha}, {scale}dropout={self.dropout}, merged={self.merged}"


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32,
    targets: str | list[str] = "all-linear",
    dropout: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rank_stabilized: bool = False,
    kind: type[LoraLinear] = LoraLinear,
) -> nn.Module:
    """Freeze a model and put a LoraLinear around its linear layers, in place.

    Args:
        rank, alpha, dropout, dtype, rank_stabilized: as in `LoraLinear`.
        kind: LoraLinear, or DoraLinear for DoRA.
        targets: "all-linear" (all but the output head), or names of modules, or the ends of dotted ones:
            ["q_proj", "layers.0.mlp.down_proj"]. Of a model that also sees or hears, the part that reads text.
        seed: for A's random numbers. torch's own generators are not touched.

    Returns:
        the same model

    Raises:
        UserError: a target that the model does not have (near matches are named), no linear layer at all, or a model
            that has adapters already.
    """
    if lora_layers(model):
        raise UserError("this model has LoRA layers already: unload(model) takes them out first")
    names = find_targets(model, targets, language_only=True)
    model.requires_grad_(False)
    devices = {get_linear(model, name).weight.device for name in names}
    draw = {device: torch.Generator(device).manual_seed(seed) for device in devices if device.type != "meta"}
    for name in names:
        base = get_linear(model, name)
        layer = kind(base, rank, alpha, dropout, dtype, draw.get(base.weight.device), rank_stabilized)
        set_module(model, name, layer.train(model.training))
    return model


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The model's LoRA layers by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def lora_parameters(model: nn.Module) -> int:
    """The number of trained numbers in them: rank * (in_features + out_features) a layer; DoRA has a few more."""
    return sum(p.numel() for layer in lora_layers(model).values() for p in layer.parameters(recurse=False))


def required_lora(model: nn.Module) -> dict[str, LoraLinear]:
    """The model's LoRA layers by dotted name. Raises UserError if there are none."""
    layers = lora_layers(model)
    if not layers:
        raise UserError("the model has no LoRA layers: add_lora(model) or load_lora(model, folder) adds them")
    return layers
