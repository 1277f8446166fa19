"""What the folded cells and one-line helpers of dive_i_the_offset do."""

import dataclasses
from collections.abc import Sequence

import torch

from qlora_lab.quantization import NF4, normal_float, quantize_affine, quantize_levels, relative_rms


def error_of(levels: torch.Tensor, x: torch.Tensor, block_size: int) -> float:
    """Relative RMS error of x with any levels, in blocks of any size, float32 scales."""
    return relative_rms(x, quantize_levels(x, levels, block_size).dequantize())


def least_offset(x: torch.Tensor, block_size: int, offsets: Sequence[float]) -> tuple[float, float]:
    """The one of `offsets` whose levels have the least error on x, and by what share NF4's error is above that."""
    errors = {offset: error_of(normal_float(4, offset), x, block_size) for offset in offsets}
    best = min(errors, key=lambda offset: errors[offset])
    return best, error_of(NF4, x, block_size) / errors[best] - 1


def q4_1(x: torch.Tensor, block_size: int = 32) -> torch.Tensor:
    """What GGUF's Q4_1 leaves of x: affine, 4 bits, scale and minimum in float16."""
    q = quantize_affine(x, 4, block_size)
    assert q.minimum is not None
    return dataclasses.replace(q, scale=q.scale.half().float(), minimum=q.minimum.half().float()).dequantize()


def nf4_half(x: torch.Tensor, block_size: int = 32) -> torch.Tensor:
    """What NF4 leaves of x if its scales are float16."""
    q = quantize_levels(x, NF4, block_size)
    return dataclasses.replace(q, scales=q.scales.half().float()).dequantize()
