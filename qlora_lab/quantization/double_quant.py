"""Double quantization: the scales are numbers too.

A block of 64 elements has one float32 scale, its absmax. 32 bits over 64 elements are half a bit a parameter: a ninth
of the memory of a 4-bit model holds no weights at all. QLoRA (arXiv 2305.14314, section 3) quantizes the scales again:

    1. subtract their mean. Scales are positive and lie close together; without the mean they use both signs
    2. cut them into blocks of 256, divide each block by *its* absmax (float32: 32 bits over 64 * 256 elements)
    3. replace each by the nearest of 256 levels: 8 bits over 64 elements

which leaves 8/64 + 32/(64 * 256) = 0.126953 bits a parameter instead of 0.5.

The 256 levels are bitsandbytes' dynamic code (`codebooks.dynamic_map`): neither INT8 nor an IEEE FP8. Pass
`codebook=INT8` to see what equal steps would do. NF4 has no zero points; there is nothing else to quantize.

Where this differs from bitsandbytes 0.50: its CUDA kernel searches the nearest level, and so do we. Its CPU kernel
rounds the scaled number to one of 65,536 grid points, 2/65535 apart, and looks that one's nearest level up. So its
choice may be farther from the number than ours, by at most 2/65535 of the block's absmax. And a block of zeros gets
level 0 there (-0.993, times an absmax of zero) and the level of 0 here: the same value.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from dataclasses import dataclass

import torch

from .codebooks import DYNAMIC8, check_codebook, nearest_level

SMALLEST_ABSMAX = 1e-38  # smaller blocks are divided by this: float32 could not hold the reciprocal of much less
BLOCK_SIZES = tuple(2**exponent for exponent in range(5, 13))  # 32 to 4096, as bitsandbytes has them


def check_block_size(block_size: int) -> None:
    """Refuse a block size that bitsandbytes does not have."""
    if not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size!r}: choose a power of two from 32 to 4096")


@functools.cache
def gpu_kernels():
    """The module of Triton kernels, which serves tensors on CUDA; None, and one warning, where Triton is missing."""
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


@dataclass(frozen=True, eq=False)
class QuantizedAbsmax:
    """Scales held in 8 bits. It stands in `QuantizedTensor.absmax` after `double_quantize`.

    codes: uint8, Tensor[scales]. absmax: float32, one for each `block_size` codes. offset: float32 scalar, the mean of
    the scales. codebook: float32, Tensor[256].
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor
    codebook: torch.Tensor
    block_size: int

    def __post_init__(self):
        check_block_size(self.block_size)
        blocks = -(-self.codes.numel() // self.block_size)
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 1:
            raise ValueError(f"codes are {self.codes.dtype} of shape {tuple(self.codes.shape)}: 1-D uint8 is needed")
        for name, shape in {"absmax": (blocks,), "offset": (), "codebook": (256,)}.items():
            part = getattr(self, name)
            if part.dtype != torch.float32 or part.shape != shape:
                raise ValueError(
                    f"{name} is {part.dtype} of shape {tuple(part.shape)}: for {self.codes.numel()} scales in blocks "
                    f"of {self.block_size}, float32 of shape {shape} is needed"
                )
            if part.device != self.codes.device:
                raise ValueError(
                    f"{name} is on {part.device}, codes are on {self.codes.device}: move all with .to(device)"
                )

    def dequantize(self) -> torch.Tensor:
        """The scales, nearly as they were: float32, Tensor[scales]."""
        scales = self.codebook[self.codes.int()]
        return scales * self.absmax.repeat_interleave(self.block_size)[: len(scales)] + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: codes, scales, the table of 256 levels and the offset."""
        return self.codes.nbytes + self.absmax.nbytes + self.codebook.nbytes + self.offset.nbytes

    def to(self, device) -> QuantizedAbsmax:
        """The same on another device."""
        parts = {name: getattr(self, name).to(device) for name in ("codes", "absmax", "offset", "codebook")}
        return dataclasses.replace(self, **parts)


@torch.no_grad()
def quantize_scales(absmax: torch.Tensor, block_size: int = 256, codebook: torch.Tensor = DYNAMIC8) -> QuantizedAbsmax:
    """Quantize scales to 8 bits.

    Args:
        absmax: float32, Tensor[scales].
        block_size: scales that share a second-level scale: a power of two from 32 to 4096.
        codebook: float32, Tensor[256], ascending in [-1, 1]: DYNAMIC8 or INT8.

    Raises:
        ValueError, TypeError: impossible block size or codebook.
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
    """What `quantize_scales` computes, with PyTorch's operators on every device."""
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
    """Hold the scales of a `QuantizedTensor` in 8 bits; `dequantize` reads the result as it is.

    Args:
        q: a QuantizedTensor whose absmax is float32.
        block_size, codebook: as for `quantize_scales`.

    Raises:
        ValueError: the scales are in 8 bits already.

    >>> from qlora_lab.quantization import quantize
    >>> q = quantize(torch.randn(512, 512))
    >>> q.bits_per_parameter, double_quantize(q).bits_per_parameter
    (4.5, 4.126953125)
    """
    if isinstance(q.absmax, QuantizedAbsmax):
        raise ValueError("the scales are in 8 bits already: double_quantize takes what quantize returns")
    return dataclasses.replace(q, absmax=quantize_scales(q.absmax, block_size, codebook))


def bits_per_parameter(
    block_size: int = 64,
    double: bool = True,
    scale_block_size: int = 256,
    *,
    bits: int = 4,
    scale_bits: int = 32,
    zero_point_bits: int = 0,
) -> float:
    """Bits that a parameter takes in a large tensor: its code and its share of the block's constants.

    Args:
        block_size: elements that share a scale.
        double: the scale is held in 8 bits, with one of `scale_bits` for each `scale_block_size` scales.
        bits: width of a code.
        scale_bits: width of a scale; 32 for float32.
        zero_point_bits: width of a zero point or minimum, which affine schemes hold for each block.

    >>> bits_per_parameter(), bits_per_parameter(double=False)  # NF4 with and without double quantization
    (4.126953125, 4.5)
    >>> bits_per_parameter(32, double=False, scale_bits=16, zero_point_bits=16)  # GGUF's Q4_1
    5.0
    """
    scale = 8 + scale_bits / scale_block_size if double else scale_bits
    return bits + (scale + zero_point_bits) / block_size
