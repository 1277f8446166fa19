"""The scales of blocks: the allowed block sizes, the smallest scale, and scales that are held in 8 bits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

SMALLEST_ABSMAX = 1e-38  # blocks with a smaller one are divided by this: float32 holds no reciprocal of much less
BLOCK_SIZES = tuple(2**exponent for exponent in range(5, 13))  # 32 to 4096, as in bitsandbytes


def check_block_size(block_size: int) -> None:
    """Raise ValueError for a block size that bitsandbytes does not have."""
    if not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size!r}: choose a power of two from 32 to 4096")


@dataclass(frozen=True, eq=False)
class QuantizedAbsmax:
    """Scales held in 8 bits: the `absmax` of a `QuantizedTensor` after `double_quantize`.

    Attributes:
        codes: uint8, Tensor[scales]: indices into the codebook.
        absmax: float32, Tensor[blocks]: a second-level scale for each `block_size` codes.
        offset: float32 scalar, the mean of the scales.
        codebook: float32, Tensor[256], ascending in [-1, 1].
        block_size: scales that share a second-level scale.

    Raises:
        ValueError: an unsupported block size, or parts that disagree in shape, dtype or device.
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
        """The scales that the codes stand for: float32, Tensor[scales]."""
        scales = self.codebook[self.codes.int()]
        return scales * self.absmax.repeat_interleave(self.block_size)[: len(scales)] + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of everything held: codes, scales, the table of 256 levels and the offset."""
        return self.codes.nbytes + self.absmax.nbytes + self.codebook.nbytes + self.offset.nbytes

    def to(self, device) -> QuantizedAbsmax:
        """The same scales on another device."""
        parts = {name: getattr(self, name).to(device) for name in ("codes", "absmax", "offset", "codebook")}
        return dataclasses.replace(self, **parts)
