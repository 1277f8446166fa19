"""MXFP4 and NVFP4: 4-bit floating-point numbers with scales that hardware multiplies by for nothing.

Both store E2M1 numbers, 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, in small blocks of a row; their scales differ:

    MXFP4   blocks of 32, a power of two each (8 bits, E8M0): 4.25 bits per parameter. The power is chosen so that the
            block's largest number lands in [4, 8), and what is beyond 6 is cut off. (OCP Microscaling Formats 1.0,
            sections 5.3.3 and 6.3)
    NVFP4   blocks of 16, an FP8 number each (E4M3), over one float32 scale for the tensor: 4.5 bits per parameter. The
            scales bring a block's largest number to 6 and the largest block's scale to 448, E4M3's largest number.
            (NVIDIA's Transformer Engine and cuDNN call it block scaling with E4M3.)

NF4's codebook follows the bell curve; these follow what a multiplier in silicon can do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .blockwise import DTYPES, refuse_non_finite

E2M1_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # by their 3-bit patterns
LARGEST_E2M1, LARGEST_E4M3 = 6.0, 448.0
MX_BLOCK, NV_BLOCK = 32, 16
E8M0_BIAS = 127


@dataclass(frozen=True, eq=False)
class MicroscaledTensor:
    """A tensor of E2M1 numbers with a scale for each block.

    Attributes:
        codes: uint8, in the original's shape: the 4-bit pattern of each element, sign first.
        scales: Tensor[blocks]: uint8, the exponent plus 127 (MXFP4), or float8_e4m3fn (NVFP4).
        tensor_scale: float32, a scalar: 1 for MXFP4.
        block_size: 32 or 16, along the rows.
        dtype: of the original.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    block_size: int
    dtype: torch.dtype

    def dequantize(self) -> torch.Tensor:
        """The tensor that this stands for, in its original shape and dtype."""
        values = decode_e2m1(self.codes).view(-1, self.block_size)
        return (values * self.block_scales()[:, None]).view(self.codes.shape).to(self.dtype)

    def block_scales(self) -> torch.Tensor:
        """What each block is multiplied by: float32, Tensor[blocks]."""
        if self.scales.dtype == torch.uint8:
            return torch.ldexp(torch.ones_like(self.scales, dtype=torch.float32), self.scales.int() - E8M0_BIAS)
        return self.scales.float() * self.tensor_scale

    @property
    def bits_per_parameter(self) -> float:
        """Bits of codes, as if they were packed, and of the blocks' scales, per element."""
        return 4 + 8 / self.block_size


@torch.no_grad()
def quantize_mxfp4(x: torch.Tensor) -> MicroscaledTensor:
    """Encode as MXFP4. Ties go to the even pattern, as IEEE 754 rounds.

    Args:
        x: float32, bfloat16 or float16, any shape whose last dimension 32 divides.

    Raises:
        TypeError: x is not such a tensor.
        ValueError: NaN or infinity in x, or rows that do not consist of blocks of 32.

    >>> quantize_mxfp4(torch.tensor([0.3, -1.0, 7.0, 0.0] * 8)).dequantize()[:4]
    tensor([ 0.5000, -1.0000,  6.0000,  0.0000])
    """
    blocks = _blocks(x, MX_BLOCK)
    _, exponent = torch.frexp(blocks.abs().amax(1))  # in [0.5, 1) times 2**exponent
    scales = (exponent - 1 - 2 + E8M0_BIAS).clamp(0, 254).to(torch.uint8)  # 2: the exponent of 4, E2M1's largest
    scales = torch.where(blocks.abs().amax(1) == 0, 0, scales).to(torch.uint8)
    inverse = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), E8M0_BIAS - scales.int())
    codes = encode_e2m1(blocks * inverse[:, None])
    return MicroscaledTensor(codes.view(x.shape), scales, torch.ones((), device=x.device), MX_BLOCK, x.dtype)


@torch.no_grad()
def quantize_nvfp4(x: torch.Tensor) -> MicroscaledTensor:
    """Encode as NVFP4. Ties go to the even pattern; a block is scaled by its scale as E4M3 has it.

    Args:
        x: float32, bfloat16 or float16, any shape whose last dimension 16 divides.

    Raises:
        TypeError: x is not such a tensor.
        ValueError: NaN or infinity in x, or rows that do not consist of blocks of 16.

    >>> quantize_nvfp4(torch.tensor([0.3, -1.0, 7.0, 0.0] * 4)).dequantize()[:4]
    tensor([ 0.5833, -1.1667,  7.0000,  0.0000])
    """
    blocks = _blocks(x, NV_BLOCK)
    largest = blocks.abs().amax(1)
    tensor_scale = (largest.max() if len(largest) else largest.sum()) / (LARGEST_E2M1 * LARGEST_E4M3)
    tensor_scale = torch.where(tensor_scale == 0, 1.0, tensor_scale)
    scales = (largest / LARGEST_E2M1 / tensor_scale).clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn)
    whole = scales.float() * tensor_scale
    codes = encode_e2m1(torch.where(whole[:, None] == 0, 0.0, blocks / whole[:, None]))
    return MicroscaledTensor(codes.view(x.shape), scales, tensor_scale, NV_BLOCK, x.dtype)


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 number's pattern, sign first: uint8. Ties go to the even pattern, what is beyond 6 becomes 6."""
    edges = ((E2M1_MAGNITUDES[:-1] + E2M1_MAGNITUDES[1:]) / 2).to(x.device)
    size = x.abs()
    below, above = torch.bucketize(size, edges), torch.bucketize(size, edges, right=True)  # they differ on a tie
    pattern = torch.where(below % 2 == 0, below, above)
    return (pattern + 8 * torch.signbit(x)).to(torch.uint8)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The numbers that 4-bit patterns stand for: float32."""
    values = torch.cat([E2M1_MAGNITUDES, -E2M1_MAGNITUDES]).to(codes.device)
    return values[codes.int()]


def _blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """x as float32, Tensor[blocks, block_size]. Raises TypeError or ValueError for what cannot be encoded."""
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"x is {getattr(x, 'dtype', type(x).__name__)}: give a float32, bfloat16 or float16 tensor")
    if not x.ndim or x.shape[-1] % block_size:
        raise ValueError(f"x has shape {tuple(x.shape)}: its rows must consist of blocks of {block_size}")
    refuse_non_finite(x, x.abs().reshape(-1))
    return x.reshape(-1, block_size).float()
