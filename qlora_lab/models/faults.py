"""Faults of other libraries, and how we avoid them. For each, a test fails once it is fixed (tests/test_drift.py).

use_differentiable_kernels   bitsandbytes 0.50.2, AVX512-BF16: a 4-bit layer that was evaluated gives wrong gradients
require_right_scales         bitsandbytes 0.50.2, AVX512: wrong scales where blocks do not divide a row
"""

from __future__ import annotations

import copy

import torch

from qlora_lab.errors import UserError


def use_differentiable_kernels(model) -> None:
    """Keep bitsandbytes' 4-bit layers on the kernels that training needs, on every CPU.

    On a CPU with AVX512-BF16, `Linear4bit` repacks its weight in place when it is first called in eval mode with an
    input that needs no gradient, rounds the scales to bf16, and calls a kernel without a backward pass from then on
    (bitsandbytes 0.50.2, `nn/modules.py` and `autograd/_functions.py`). A model that was evaluated before training
    would be trained wrongly: no gradient passes through its frozen layers, and torch says so in a warning only.
    Measured on the bundled model: the loss of a batch is 0.3 % off, its gradient nearly orthogonal to the true one
    (cosine 0.11).
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def require_right_scales(model) -> None:
    """Raise UserError if bitsandbytes reads the wrong scales for one of the model's 4-bit weights.

    A weight is quantized in blocks over the flattened tensor. On a CPU with AVX512, `dequantize_4bit` of
    bitsandbytes 0.50.2 assumes that a row of n elements holds n // block_size whole blocks: it looks up the scale of
    element (i, k) at i * (n // block_size) + k // block_size. Where n is a multiple of 16 that
    the block size does not divide (other widths take another path), nearly every row but the first silently gets other
    blocks' scales: Gaussian weights with 80 inputs have a relative RMS error of 0.27 instead of 0.092. Read as a single
    row, the same weight gets the right ones.
    """
    from bitsandbytes.functional import dequantize_4bit

    weights = {}  # by width, one weight each
    for module in model.modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize and module.weight.device.type == "cpu":
            weights[state.shape[-1]] = module.weight
    for width, weight in sorted(weights.items()):
        flat = copy.copy(weight.quant_state)
        flat.shape = torch.Size([1, weight.quant_state.shape.numel()])
        if not torch.equal(
            dequantize_4bit(weight.data, weight.quant_state).flatten(), dequantize_4bit(weight.data, flat).flatten()
        ):
            raise UserError(
                f"on this CPU bitsandbytes reads the wrong scales of weights with {width} inputs, which blocks of "
                f"{flat.blocksize} do not divide: load the model without quantization (--method lora) or use a GPU"
            )
