"""Two 4-bit codes in a byte.

Memory is addressed in bytes, so 4-bit codes travel in pairs. Element 0 sits in the *high* half (nibble) of byte 0,
element 1 in its low half, element 2 in the high half of byte 1, and so on: the order of bitsandbytes, in which the hex
digits of the bytes read like the codes.

    codes   10  0  13         hex a 0 d
    bytes   0xa0  0xd0        an odd count leaves the last low nibble to padding
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """Pack 4-bit codes, two per byte, high nibble first.

    Args:
        codes: integers from 0 to 15, any shape; read in row-major order. Larger ones are not detected, and would
            corrupt their neighbours.
        padding: the code that fills the last low nibble when the count is odd.

    Returns:
        Tensor[(count + 1) // 2], uint8.

    >>> pack(torch.tensor([10, 0, 13])).tolist() == [0xA0, 0xD0]
    True
    """
    codes = codes.reshape(-1).to(torch.uint8)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_tensor([padding])])
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """The 4-bit codes in a tensor of bytes: the inverse of `pack`.

    Args:
        packed: uint8, any shape.
        count: how many codes there are; the default is two per byte.

    Returns:
        Tensor[count], uint8.

    Raises:
        TypeError: packed is not uint8.
        ValueError: so many codes do not take so many bytes.
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed is {packed.dtype}: packed codes are torch.uint8")
    count = 2 * packed.numel() if count is None else count
    if (count + 1) // 2 != packed.numel():
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes: {count} take {(count + 1) // 2} bytes")
    packed = packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 0x0F], dim=1).reshape(-1)[:count]
