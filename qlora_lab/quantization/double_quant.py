"""Double quantization: the scales are numbers too.

A block of 64 elements has one float32 scale, its absmax. 32 bits over 64 elements are half a bit per parameter: a
ninth of a 4-bit model's memory holds no weights at all. QLoRA (arXiv 2305.14314, section 3) quantizes the scales again:

    1. subtract their mean. Scales are positive and lie close together; centred, they use both signs
    2. cut them into blocks of 256, divide each block by *its* absmax (float32: 32 bits over 64 * 256 elements)
    3. replace each by the nearest of 256 levels: 8 bits over 64 elements

which leaves 8/64 + 32/(64 * 256) = 0.126953 bits per parameter instead of 0.5.

The 256 levels are bitsandbytes' dynamic code (`codebooks.dynamic_map`): neither INT8 nor an IEEE FP8. Pass
`codebook=INT8` to see what equal steps would do. NF4 has no zero points; there is nothing else to quantize.

Differences from bitsandbytes 0.50: its CUDA kernel searches for the nearest level, as this module does. Its CPU kernel
rounds the scaled number to one of 65,536 grid points, 2/65535 apart, and looks up the level nearest to that point. So
its choice may be farther from the number than ours, by at most 2/65535 of the block's absmax. For a block of zeros it
stores code 0 (level -0.993, times an absmax of zero), and we store the code of level 0: the value is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings

import torch

from .codebooks import DYNAMIC8, check_codebook, nearest_level
from .scales import SMALLEST_ABSMAX, QuantizedAbsmax, check_block_size


@functools.cache
def gpu_kernels():
    """The module of Triton kernels, for tensors on CUDA; None, with one warning, if Triton is missing."""
    try:
        from . import kernels
    except ImportError as error:
        warnings.warn(
            f"the 4-bit kernels need Triton ({error}): PyTorch's operators take over, several times slower. "
            "On Linux, `pip install triton`",
            stacklevel=3,
        )
        return None
    return kernels


@torch.no_grad()
def quantize_scales(absmax: torch.Tensor, block_size: int = 256, codebook: torch.Tensor = DYNAMIC8) -> QuantizedAbsmax:
    """Quantize scales to 8 bits.

    Args:
        absmax: float32, Tensor[scales].
        block_size: scales that share a second-level scale: a power of two from 32 to 4096.
        codebook: float32, Tensor[256], ascending in [-1, 1]: DYNAMIC8 or INT8.

    Returns:
        A QuantizedAbsmax on the device of `absmax`, with the mean of the scales as its offset.

    Raises:
        TypeError: codebook is not a float32 tensor.
        ValueError: an unsupported block size, or levels that do not form a codebook.
    """
    if not absmax.is_cuda or not (gpu := gpu_kernels()):
        return quantize_scales_plain(absmax, block_size, codebook)
    check_block_size(block_size)
    check_codebook(codebook, size=256)
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    codebook = codebook.to(absmax.device, non_blocking=True)
    codes, scale = gpu.quantize_scales(absmax, offset, codebook, block_size)
    return QuantizedAbsmax(codes, scale, offset, codebook, block_size)


@torch.no_grad()
def quantize_scales_plain(
    absmax: torch.Tensor, block_size: int = 256, codebook: torch.Tensor = DYNAMIC8
) -> QuantizedAbsmax:
    """The readable version of `quantize_scales`: PyTorch's operators on every device."""
    check_block_size(block_size)
    check_codebook(codebook, size=256)
    offset = absmax.mean() if len(absmax) else absmax.new_zeros(())
    centred = absmax - offset
    padding = -len(centred) % block_size
    blocks = torch.nn.functional.pad(centred, (0, padding)).view(-1, block_size)
    scale = blocks.abs().amax(1)
    codebook = codebook.to(absmax.device)
    codes = nearest_level(blocks * (1 / scale.clamp(min=SMALLEST_ABSMAX))[:, None], codebook)
    return QuantizedAbsmax(codes.to(torch.uint8).flatten()[: len(absmax)], scale, offset, codebook, block_size)


def double_quantize(q, block_size: int = 256, codebook: torch.Tensor = DYNAMIC8):
    """Quantize the scales of a `QuantizedTensor` to 8 bits; `dequantize` takes the result as well.

    Args:
        q: a QuantizedTensor whose absmax is float32.
        block_size, codebook: as for `quantize_scales`.

    Returns:
        A QuantizedTensor that shares q's codes.

    Raises:
        ValueError: the scales are in 8 bits already. Further errors as for `quantize_scales`.

    >>> from qlora_lab.quantization import quantize
    >>> q = quantize(torch.randn(512, 512))
    >>> q.bits_per_parameter, double_quantize(q).bits_per_parameter
    (4.5, 4.126953125)
    """
    if isinstance(q.absmax, QuantizedAbsmax):
        raise ValueError("the scales are in 8 bits already: double_quantize takes what quantize returns")
    return dataclasses.replace(q, absmax=quantize_scales(q.absmax, block_size, codebook))
