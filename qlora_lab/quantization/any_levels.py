"""Any levels, any block size, signed scales, outliers kept apart: to compare number formats, not to store them.

`quantize` of `blockwise.py` is what QLoRA uses: 16 levels, packed, fast, equal to bitsandbytes'. Here a code takes a
whole byte, and everything that a format may change is an argument:

    levels          2 to 256 of them, ascending in [-1, 1]
    signed          a block is divided by its signed largest number, which is then at 1: no level is spent on -1
                    (BOF4-S, Blumenberg et al. 2025, arXiv 2505.06653)
    outlier_sigmas  numbers beyond so many standard deviations of the tensor are kept in 16 bits, with their places,
                    and their blocks are divided by what is left
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .blockwise import DTYPES, refuse_non_finite
from .codebooks import NF4, check_codebook, nearest_level
from .scales import SMALLEST_ABSMAX

PLACE_BITS, VALUE_BITS, SCALE_BITS = 32, 16, 32  # of an outlier's index and value; of a block's scale


@dataclass(frozen=True, eq=False)
class LevelTensor:
    """A tensor as codes and scales.

    Attributes:
        codes: uint8, in the original's shape: an index of `levels` for each element.
        scales: float32, Tensor[blocks], negative for a block whose largest number is, if it was quantized so.
        levels: float32, ascending in [-1, 1].
        block_size: elements that share a scale, counted along the flattened tensor.
        dtype: of the original.
        places, values: int64 and bfloat16, Tensor[outliers]: where in the flattened tensor each is, and what.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    levels: torch.Tensor
    block_size: int
    dtype: torch.dtype
    places: torch.Tensor
    values: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The tensor that this stands for, in its original shape and dtype."""
        flat = self.levels[self.codes.flatten().int()]
        flat = flat * self.scales.repeat_interleave(self.block_size)[: len(flat)]
        flat[self.places] = self.values.float()
        return flat.view(self.codes.shape).to(self.dtype)

    @property
    def bits_per_parameter(self) -> float:
        """Bits of codes as if they were packed, of float32 scales and of outliers, per element."""
        code_bits = math.ceil(math.log2(len(self.levels)))
        rest = SCALE_BITS * len(self.scales) + (PLACE_BITS + VALUE_BITS) * len(self.places)
        return code_bits + rest / self.codes.numel() if self.codes.numel() else float("nan")


@torch.no_grad()
def quantize_levels(
    x: torch.Tensor,
    levels: torch.Tensor = NF4,
    block_size: int = 64,
    signed: bool = False,
    outlier_sigmas: float | None = None,
) -> LevelTensor:
    """Quantize to any levels: each element of a block becomes the nearest level, times the block's scale.

    Args:
        x: float32, bfloat16 or float16, any shape.
        levels: float32, Tensor[2 to 256], ascending in [-1, 1].
        block_size: at least 1; the last block may be partial.
        signed: scale by the signed largest number. 1 must be among the levels then.
        outlier_sigmas: None keeps no outliers.

    Raises:
        TypeError: x or levels of another type.
        ValueError: NaN or infinity in x, levels that do not form a codebook, or an impossible block size.

    >>> q = quantize_levels(torch.tensor([0.5, -2.0, 1.0, -1.0]), torch.tensor([-0.5, 0.0, 0.5, 1.0]), signed=True)
    >>> q.scales, q.dequantize()
    (tensor([-2.]), tensor([ 1., -2.,  1., -1.]))
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"x is {getattr(x, 'dtype', type(x).__name__)}: give a float32, bfloat16 or float16 tensor")
    if not 2 <= len(levels) <= 256:
        raise ValueError(f"{len(levels)} levels: 2 to 256 are possible")
    check_codebook(levels, size=len(levels))
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: must be at least 1")
    if signed and levels[-1] != 1:
        raise ValueError(
            f"the highest level is {levels[-1].item():g}: with signed scales every block needs the level 1"
        )
    flat = x.reshape(-1).float()
    refuse_non_finite(x, flat.abs())
    places = torch.empty(0, dtype=torch.int64, device=x.device)
    if outlier_sigmas is not None and len(flat) > 1:
        places = (flat.abs() > outlier_sigmas * flat.std()).nonzero()[:, 0]
    values = flat[places].bfloat16()
    blocks = torch.cat([flat, flat.new_zeros(-len(flat) % block_size)]).view(-1, block_size)
    blocks.view(-1)[places] = 0
    largest = blocks.abs().argmax(1, keepdim=True) if len(blocks) else blocks.new_zeros(0, 1, dtype=torch.int64)
    scales = blocks.gather(1, largest)
    if not signed:
        scales = scales.abs()
    divisors = torch.where(scales.abs() < SMALLEST_ABSMAX, SMALLEST_ABSMAX, scales)
    levels = levels.to(x.device)
    codes = nearest_level((blocks / divisors).clamp(-1, 1), levels).view(-1)[: len(flat)]
    return LevelTensor(codes.to(torch.uint8).view(x.shape), scales[:, 0], levels, block_size, x.dtype, places, values)
