"""Machinery of dive_k_to_the_last_bit: first passes, scales of two models, gradients, an examination of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from qlora_lab.finetuning import QuantizedLinear
from qlora_lab.quantization import DYNAMIC8, nearest_level, relative_rms
from qlora_lab.training.loss import token_loss_sum


@torch.no_grad()
def first_pass(model, batch) -> tuple[torch.Tensor, float]:
    """Logits, Tensor[rows, tokens, vocabulary], and the mean loss of the targets, in nats per token."""
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    targets = batch["labels"][:, 1:].flatten()  # position i predicts token i + 1
    return logits, nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).item()


def quantized_layers(model: nn.Module) -> Iterator[QuantizedLinear]:
    """Our 4-bit layers in a model, in its order."""
    return (module for module in model.modules() if isinstance(module, QuantizedLinear))


@dataclass(frozen=True)
class Scales:
    """The scales of all linear layers, one after another: Tensor[scales] each.

    scales: float32, before they were quantized. numbers: what a level in [-1, 1] is searched for: the scale minus the
    layer's mean, over the largest such number among 256. ours, theirs: the 8-bit codes that were found, uint8.
    ours_restored, theirs_restored: the scales that are made of them, float32.
    """

    scales: torch.Tensor
    numbers: torch.Tensor
    ours: torch.Tensor
    theirs: torch.Tensor
    ours_restored: torch.Tensor
    theirs_restored: torch.Tensor


def side_by_side(plain: nn.Module, ours: nn.Module, theirs: nn.Module) -> Scales:
    """The scales of three models with our layers: plain, double-quantized by us, and with the bytes of bitsandbytes."""
    rows = []
    for one, mine, other in zip(*map(quantized_layers, (plain, ours, theirs)), strict=True):
        scales, a, b = one.weight.absmax, mine.weight.absmax, other.weight.absmax
        factor = (1 / a.absmax).repeat_interleave(a.block_size)[: len(scales)]
        rows.append((scales, (scales - a.offset) * factor, a.codes, b.codes, a.dequantize(), b.dequantize()))
    return Scales(*(torch.cat([part.flatten() for part in parts]) for parts in zip(*rows, strict=True)))


def table_codes(numbers: torch.Tensor) -> torch.Tensor:
    """Codes of DYNAMIC8 as a table of 65,536 points gives them. numbers: in [-1, 1]; the result is int32, as long."""
    points = ((numbers + 1) / 2 * 65535 + 0.5).floor() * 2 / 65535 - 1  # a half goes up
    return nearest_level(points, DYNAMIC8)


def equal_parts(ours: nn.Module, theirs: nn.Module) -> dict[str, bool]:
    """By part of a double-quantized weight: whether it is the same in all layers of two models."""
    parts = {
        "4-bit codes": lambda weight: weight.codes,
        "8-bit levels": lambda weight: weight.absmax.codebook,
        "mean of the scales": lambda weight: weight.absmax.offset,
        "scales of the scales": lambda weight: weight.absmax.absmax,
        "8-bit codes of the scales": lambda weight: weight.absmax.codes,
    }
    pairs = list(zip(quantized_layers(ours), quantized_layers(theirs), strict=True))
    return {name: all(torch.equal(part(a.weight), part(b.weight)) for a, b in pairs) for name, part in parts.items()}


def adapter_gradients(model, batch) -> list[torch.Tensor]:
    """The gradients of all trained matrices after one backward pass; none is left in the model."""
    model.train()
    token_loss_sum(model, batch).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None]
    for p in trained:
        p.grad = None
    return gradients


def examine(layer: Callable, q, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    """Print how a layer differs from the dense one with the same rounded weight, and what it keeps.

    Args:
        layer: the apply of an autograd.Function: x, Tensor[1, tokens, in] -> x Wᵀ, Tensor[1, tokens, out]
        q: W, a QuantizedTensor of shape (out, in)
        tokens, dtype: of the random input
    """
    a = torch.randn(1, tokens, q.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    b = a.detach().clone().requires_grad_()
    y, expected = layer(a), nn.functional.linear(b, q.dequantize().to(dtype))
    kept = sum(saved.nbytes for saved in getattr(y.grad_fn, "saved_tensors", ()))
    y.backward(torch.ones_like(y))
    expected.backward(torch.ones_like(y))
    assert a.grad is not None and b.grad is not None
    errors = relative_rms(expected.float(), y.float()), relative_rms(b.grad.float(), a.grad.float())
    print(
        f"{tokens} tokens: error of the output {errors[0]:.4f}, of the gradient {errors[1]:.4f}; keeps {kept:,} bytes"
    )
