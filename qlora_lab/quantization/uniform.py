"""Integer quantization: equal steps between the levels.

Two ways to lay b-bit integers over an interval:

    absmax (symmetric)   x is near scale * code          code from -q to q, q = 2**(b-1) - 1; scale = absmax / q
    affine               x is near minimum + scale*code  code from 0 to 2**b - 1; scale = (max - min) / (2**b - 1)

Absmax keeps zero exact and needs one number for each group of elements, but one of its 2**b codes stays unused, as
do those on the empty side of a lopsided group. Affine uses every code and reaches both ends exactly, but holds two
numbers for each group. (Integer kernels hold a zero point, -minimum / scale, in place of the minimum: the same thing.)

A group may be the whole tensor, a row, or a block of consecutive elements. Smaller groups follow the data more closely
and cost more: a float32 scale for 64 elements is half a bit per parameter, scale and minimum are one bit.

INT8 and INT4 are these schemes with b = 8 and 4. Sources: LLM.int8() (arXiv 2208.07339, section 2) for the names;
GGUF's Q8_0 is absmax with blocks of 32, its Q4_1 affine with blocks of 32 and float16 constants.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from qlora_lab.facts import bits_per_parameter

from .blockwise import DTYPES, refuse_non_finite


@dataclass(frozen=True, eq=False)
class UniformTensor:
    """A tensor as integers with a scale for each block.

    Attributes:
        codes: int8 (absmax) or uint8 (affine), in the original's shape. One per byte whatever `bits` is, so that a
            lesson can show them; `bits_per_parameter` counts them as if they were packed.
        scale: float32, Tensor[blocks].
        minimum: float32, Tensor[blocks], the value of code 0 in an affine scheme; None in an absmax scheme.
        bits: width of a code, 2 to 8.
        block_size: elements that share a scale, counted along the flattened tensor.
        dtype: of the original.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    bits: int
    block_size: int
    dtype: torch.dtype

    def dequantize(self) -> torch.Tensor:
        """The tensor that the codes stand for, in its original shape and dtype."""
        values = _blocks(self.codes, self.block_size).float() * self.scale[:, None]
        if self.minimum is not None:
            values = values + self.minimum[:, None]
        return values.flatten()[: self.codes.numel()].view(self.codes.shape).to(self.dtype)

    def indices(self) -> torch.Tensor:
        """The level chosen for each element: int32, 0 to `levels` - 1 from the lowest up, in the tensor's shape."""
        return self.codes.int() if self.minimum is not None else self.codes.int() + self.levels // 2

    @property
    def levels(self) -> int:
        """The number of levels: 2**bits, or one fewer in an absmax scheme."""
        return 2**self.bits - (self.minimum is None)

    @property
    def zero_point(self) -> torch.Tensor | None:
        """The code that would stand for 0, not rounded: float32, Tensor[blocks]. None in an absmax scheme."""
        return None if self.minimum is None else -self.minimum / self.scale

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def to(self, device) -> UniformTensor:
        """The same tensor on another device."""
        minimum = None if self.minimum is None else self.minimum.to(device)
        return dataclasses.replace(self, codes=self.codes.to(device), scale=self.scale.to(device), minimum=minimum)

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        parts = [self.codes, self.scale] + ([] if self.minimum is None else [self.minimum])
        return sum(part.nbytes for part in parts)

    @property
    def bits_per_parameter(self) -> float:
        """Bits of a packed code, plus its share of the block's float32 scale and minimum."""
        zero_point_bits = 0 if self.minimum is None else 32
        return bits_per_parameter(self.block_size, double=False, bits=self.bits, zero_point_bits=zero_point_bits)


@torch.no_grad()
def quantize_absmax(x: torch.Tensor, bits: int = 8, block_size: int | str | None = None) -> UniformTensor:
    """Symmetric integer quantization: codes from -q to q with q = 2**(bits - 1) - 1.

    Args:
        x: float32, bfloat16 or float16, any shape.
        bits: 2 to 8.
        block_size: elements that share a scale: any count, "row" for the last dimension, None for the whole tensor.

    Raises:
        TypeError: x is not such a tensor.
        ValueError: NaN or infinity in x, or bits or block size out of range.

    >>> quantize_absmax(torch.tensor([0.5234, -1.2341, 0.8923]), bits=4).codes
    tensor([ 3, -7,  5], dtype=torch.int8)
    """
    block_size = _check(x, bits, block_size)
    largest = 2 ** (bits - 1) - 1
    blocks = _blocks(x, block_size).float()
    scale = blocks.abs().amax(dim=1) / largest
    codes = _divide(blocks, scale).round().clamp(-largest, largest)
    return UniformTensor(_unblock(codes, x).to(torch.int8), scale, None, bits, block_size, x.dtype)


@torch.no_grad()
def quantize_affine(x: torch.Tensor, bits: int = 8, block_size: int | str | None = None) -> UniformTensor:
    """Affine integer quantization: codes from 0 for the smallest to 2**bits - 1 for the largest element of a block.

    Arguments and errors as for `quantize_absmax`.

    >>> q = quantize_affine(torch.tensor([0.5234, -1.2341, 0.8923]), bits=4)
    >>> q.codes, q.dequantize()
    (tensor([12,  0, 15], dtype=torch.uint8), tensor([ 0.4670, -1.2341,  0.8923]))
    """
    block_size = _check(x, bits, block_size)
    largest = 2**bits - 1
    blocks = _blocks(x, block_size).float()
    minimum, maximum = blocks.amin(dim=1), blocks.amax(dim=1)
    scale = (maximum - minimum) / largest
    if not torch.isfinite(scale).all():
        raise ValueError("a block's maximum minus its minimum overflows float32: divide x by 4 and multiply afterwards")
    codes = _divide(blocks - minimum[:, None], scale).round().clamp(0, largest)
    return UniformTensor(_unblock(codes, x).to(torch.uint8), scale, minimum, bits, block_size, x.dtype)


@torch.no_grad()
def quantize_q4_0(x: torch.Tensor) -> UniformTensor:
    """GGUF's Q4_0: blocks of 32, x is near scale * (code - 8). Equal to the library `gguf` bit for bit.

    The element of a block that is farthest from 0 gets code 0, whatever its sign; so a scale may be negative, and code
    15 then stands for the lowest number. All 16 codes are used, and the other side ends at 7/8 of the farthest. Codes
    are chosen by the scale as it was before it was rounded to float16. (Source: ggml-quants.c, quantize_row_q4_0_ref.)

    Args:
        x: float32, bfloat16 or float16, any shape whose last dimension 32 divides.

    Returns:
        codes 0 to 15; float16 numbers as scales, in float32, and -8 * scale as minimum. A file packs the codes and has
        no minimum: 4.5 bits per parameter.

    Raises:
        TypeError: x is not such a tensor.
        ValueError: NaN or infinity in x, or rows that do not consist of blocks of 32.

    >>> q = quantize_q4_0(torch.tensor([0.5, -1.0, 0.9, 0.0] * 8))
    >>> q.codes[:4], q.dequantize()[:4]
    (tensor([12,  0, 15,  8], dtype=torch.uint8), tensor([ 0.5000, -1.0000,  0.8750,  0.0000]))
    """
    _check(x, 4, 32)
    if not x.ndim or x.shape[-1] % 32:
        raise ValueError(f"x has shape {tuple(x.shape)}: Q4_0 needs rows of a multiple of 32 elements")
    blocks = x.reshape(-1, 32).float()
    scale = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)) / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = (blocks * inverse + 8.5).clamp(0, 15).to(torch.uint8)
    scale = scale[:, 0].half().float()
    return UniformTensor(codes.view(x.shape), scale, -8 * scale, 4, 32, x.dtype)


def _check(x: torch.Tensor, bits: int, block_size: int | str | None) -> int:
    """Raise TypeError or ValueError for impossible arguments; return the block size as a number."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        came = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"x is {came}: a float32, bfloat16 or float16 tensor is needed; convert it with x.float()")
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits}: choose 2 to 8")
    if block_size is None:
        block_size = max(x.numel(), 1)
    elif block_size == "row":
        block_size = max(x.shape[-1], 1) if x.ndim else 1
    if isinstance(block_size, str) or block_size < 1:
        raise ValueError(f'block_size={block_size!r}: choose a count from 1, "row", or None for the whole tensor')
    refuse_non_finite(x, x)
    return block_size


def _blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """The flattened tensor as rows of blocks. A partial last block is filled up with copies of its last element, which
    change neither its minimum nor its maximum."""
    flat = x.reshape(-1)
    padding = -len(flat) % block_size
    if padding:
        flat = torch.cat([flat, flat[-1:].expand(padding)])
    return flat.view(-1, block_size)


def _unblock(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return blocks.flatten()[: like.numel()].view(like.shape)


def _divide(blocks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """blocks / scale, but 0 where the scale is 0: all elements are equal there, or too close for float32 to tell."""
    return torch.where(scale[:, None] > 0, blocks / scale[:, None], 0.0)
