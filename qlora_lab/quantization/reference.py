"""Quantization in slow, readable loops: the oracle that the fast code is tested against.

One element at a time, in plain Python. Python's floats are float64, so each step that the fast code does in float32 is
followed here by `f32`, which rounds to float32. (For one product or quotient of float32 numbers, the result is
exactly that of float32 hardware: float64 has enough bits for the second rounding to do no harm.)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

SMALLEST_ABSMAX = 1e-38


def f32(x: float) -> float:
    """The float32 nearest to x."""
    return struct.unpack("f", struct.pack("f", x))[0]


def nearest_level(x: float, codebook: Sequence[float]) -> int:
    """Index of the level nearest to x: the count of midpoints that x exceeds."""
    return sum(x > f32(f32(low + high) / 2) for low, high in zip(codebook[:-1], codebook[1:], strict=True))


def quantize(values: Sequence[float], codebook: Sequence[float], block_size: int = 64) -> tuple[list[int], list[float]]:
    """4-bit block-wise quantization of float32 values: packed bytes, and the absmax of each block."""
    codes, scales = [], []
    smallest = f32(SMALLEST_ABSMAX)
    for start in range(0, len(values), block_size):
        block = values[start : start + block_size]
        absmax = max(abs(x) for x in block)
        if len(block) == block_size:
            reciprocal = f32(1 / max(absmax, smallest))
            scaled = [f32(x * reciprocal) for x in block]
        else:  # the partial last block: bitsandbytes' CPU code divides, and keeps the larger absmax
            absmax = max(absmax, smallest)
            scaled = [f32(x / absmax) for x in block]
        codes += [nearest_level(x, codebook) for x in scaled]
        scales.append(absmax)
    if len(codes) % 2:
        codes.append(nearest_level(0.0, codebook))
    return [16 * high + low for high, low in zip(codes[::2], codes[1::2], strict=True)], scales


def dequantize(
    packed: Sequence[int], absmax: Sequence[float], codebook: Sequence[float], count: int, block_size: int = 64
) -> list[float]:
    """The `count` float32 values that packed bytes and scales stand for."""
    values = []
    for i in range(count):
        byte = packed[i // 2]
        code = byte // 16 if i % 2 == 0 else byte % 16
        values.append(f32(codebook[code] * absmax[i // block_size]))
    return values


def quantize_scales(
    absmax: Sequence[float], offset: float, codebook: Sequence[float], block_size: int = 256
) -> tuple[list[int], list[float]]:
    """8-bit quantization of scales whose mean is `offset`: a code for each, and a second-level scale for each block."""
    codes, scales = [], []
    for start in range(0, len(absmax), block_size):
        block = [f32(a - offset) for a in absmax[start : start + block_size]]
        scale = max(abs(x) for x in block)
        reciprocal = f32(1 / max(scale, f32(SMALLEST_ABSMAX)))
        codes += [nearest_level(f32(x * reciprocal), codebook) for x in block]
        scales.append(scale)
    return codes, scales


def quantize_absmax(values: Sequence[float], bits: int) -> tuple[list[int], float]:
    """Symmetric integers for one block of float32 values: codes and scale."""
    largest = 2 ** (bits - 1) - 1
    scale = f32(max(abs(x) for x in values) / largest)
    codes = [round(f32(x / scale)) if scale else 0 for x in values]
    return [min(max(code, -largest), largest) for code in codes], scale


def quantize_affine(values: Sequence[float], bits: int) -> tuple[list[int], float, float]:
    """Affine integers for one block of float32 values: codes, scale and minimum."""
    largest = 2**bits - 1
    minimum = min(values)
    scale = f32(f32(max(values) - minimum) / largest)
    codes = [round(f32(f32(x - minimum) / scale)) if scale else 0 for x in values]
    return [min(max(code, 0), largest) for code in codes], scale, minimum
