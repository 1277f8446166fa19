"""Machinery of dive_j_how_few_bits: one layer in any number of bits, and whole models that are judged on a text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import linear

from qlora_lab.adapters.quantized_linear import Quantizer
from qlora_lab.finetuning import QuantizedLinear, add_lora, quantize_linears
from qlora_lab.quantization import quantize_absmax, quantize_affine, relative_rms

SCHEMES = {"absmax": quantize_absmax, "affine": quantize_affine}
BITS = [2, 3, 4, 5, 6, 8]
BLOCK_SIZES = [32, 64, 128, 256, 576, "tensor"]
EDGES = torch.linspace(-0.6, 0.6, 242)
Choice = dict[str, tuple[int, int]]


# --- One layer --------------------------------------------------------------------------------------------------------


def flowing_into(module: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """The inputs that a module gets during `run()`: Tensor[tokens, in]."""
    caught: list[torch.Tensor] = []
    with torch.no_grad(), module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])):
        run()
    return caught[0].flatten(0, 1)


@dataclass(frozen=True)
class Study:
    """What each setting (scheme, block size, bits) does to a layer.

    original: shares of its weights between neighbouring EDGES. left: by setting, the same after rounding.
    costs: by setting, bits per parameter and the relative RMS error of the layer's output.
    """

    original: list[float]
    left: dict[tuple, list[float]]
    costs: dict[tuple, tuple[float, float]]

    def dots(self) -> dict[str, list[tuple[float, float]]]:
        """By scheme, the costs of all its settings."""
        return {scheme: [cost for setting, cost in self.costs.items() if setting[0] == scheme] for scheme in SCHEMES}


def study(weight: torch.Tensor, inputs: torch.Tensor) -> Study:
    """Quantize `weight`, (out, in), in each of the settings, and multiply `inputs`, (tokens, in), by it."""
    left, costs = {}, {}
    expected = linear(inputs, weight)
    for scheme, quantizer in SCHEMES.items():
        for size in BLOCK_SIZES:
            for bits in BITS:
                q = quantizer(weight, bits, None if size == "tensor" else size)
                rounded = q.dequantize()
                costs[scheme, size, bits] = q.bits_per_parameter, relative_rms(expected, linear(inputs, rounded))
                left[scheme, size, bits] = shares(rounded)
    return Study(shares(weight), left, costs)


def shares(weight: torch.Tensor) -> list[float]:
    """The share of a tensor's numbers that lies between neighbouring EDGES."""
    return (torch.histogram(weight, EDGES).hist / weight.numel()).tolist()


def repaired_output(damage: torch.Tensor, inputs: dict[str, torch.Tensor], rank: int) -> dict[str, float]:
    """What share of the squared error of a layer's output a low rank takes back, for each of some texts.

    damage: what rounding took from the weight, Tensor[out, in]. inputs: by name, what flows into the layer,
    Tensor[tokens, in]; the correction, of shape (out, in) and this rank, is the best one for the first of them.
    """
    first = next(iter(inputs.values()))
    directions = torch.linalg.svd(damage @ first.T, full_matrices=False).U[:, :rank]
    left = damage - directions @ (directions.T @ damage)
    return {
        name: 1 - (left @ x.T).square().sum().item() / (damage @ x.T).square().sum().item()
        for name, x in inputs.items()
    }


# --- Whole models -----------------------------------------------------------------------------------------------------


def quantized(dense, quantizer: Quantizer):
    """A copy of a dense model with all its linear layers quantized; `dense` is left as it is."""
    return quantize_linears(copy.deepcopy(dense), quantizer=quantizer)


def cost(dense, base) -> tuple[float, float]:
    """Of `base`, a quantized copy of `dense`: bits per parameter, and the relative RMS error of the weights."""
    bits = error = size = count = 0.0
    for name, module in base.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = dense.get_submodule(name).weight.detach()
            bits += module.weight.bits_per_parameter * weight.numel()
            count += weight.numel()
            error += (module.weight.dequantize() - weight).square().sum().item()
            size += weight.square().sum().item()
    return bits / count, (error / size) ** 0.5


def with_lora(base):
    """Put LoRA layers of rank 16 into a model, in place: with the same random A for each model of the same shapes."""
    torch.manual_seed(0)
    return add_lora(base, rank=16, alpha=32)


def spend(dense, choice: Choice):
    """A copy of a dense model with affine layers. choice: by the last part of a layer's name, bits and block size."""
    base = copy.deepcopy(dense)
    for name, (bits, size) in choice.items():
        quantize_linears(base, targets=[name], quantizer=partial(quantize_affine, bits=bits, block_size=size))
    return base
