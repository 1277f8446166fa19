"""How much was lost, and what the rest costs.

An error alone says little: 8 bits beat 4. So `error_report` adds bits per parameter. And a mean hides the distribution:
`level_usage` shows how often each level is chosen, `entropy` how many bits that choice carries. A 4-bit code whose
levels were all used equally often would carry 4 bits; NF4 on Gaussian blocks of 64 carries 3.88.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ErrorReport:
    """Error and cost of one quantization.

    relative_rms: root mean square of the error over that of the original. max_error: largest absolute error, in the
    original's units. snr_db: the same as relative_rms in decibels. bits_per_parameter: codes and constants.
    """

    relative_rms: float
    max_error: float
    snr_db: float
    bits_per_parameter: float


def error_report(x: torch.Tensor, quantized) -> ErrorReport:
    """Compare a tensor with its quantized version, a QuantizedTensor or UniformTensor.

    >>> from qlora_lab.quantization import quantize, quantize_affine
    >>> x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    >>> for q in (quantize(x), quantize_affine(x, bits=4, block_size=32)):
    ...     report = error_report(x, q)
    ...     print(f"{report.relative_rms:.1%} at {report.bits_per_parameter} bits")
    9.2% at 4.5 bits
    7.9% at 6.0 bits
    """
    restored = quantized.dequantize()
    return ErrorReport(
        relative_rms(x, restored), max_error(x, restored), snr_db(x, restored), quantized.bits_per_parameter
    )


def relative_rms(x: torch.Tensor, restored: torch.Tensor) -> float:
    """Root mean square of (restored - x) over that of x. 0 is perfect; 1 is as bad as restoring 0 everywhere."""
    x, error = _double(x, restored)
    return (error.norm() / x.norm()).item()


def max_error(x: torch.Tensor, restored: torch.Tensor) -> float:
    """Largest absolute difference, in the units of x; 0 for empty tensors."""
    _, error = _double(x, restored)
    return error.abs().max().item() if error.numel() else 0.0


def snr_db(x: torch.Tensor, restored: torch.Tensor) -> float:
    """Signal-to-noise ratio in decibels: 20 log10(1 / relative_rms). A further bit gains about 6. Infinite if equal."""
    ratio = relative_rms(x, restored)
    return -20 * math.log10(ratio) if ratio else math.inf


def level_usage(quantized) -> torch.Tensor:
    """Share of the elements that chose each level, lowest level first: float64, Tensor[levels], sum 1.

    Args:
        quantized: a QuantizedTensor or UniformTensor that is not empty.
    """
    counts = torch.bincount(quantized.indices().flatten(), minlength=quantized.levels)
    return counts.double() / counts.sum()


def entropy(shares: torch.Tensor) -> float:
    """Bits that a choice with these probabilities carries: -sum p log2 p. 4 for 16 equal shares."""
    used = shares[shares > 0].double()
    return -(used * used.log2()).sum().item()


def _double(x: torch.Tensor, restored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and the error, both in float64: in float32, sums over millions of squares would lose digits."""
    if x.shape != restored.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, restored {tuple(restored.shape)}: they must be the same")
    x = x.detach().double()
    return x, restored.detach().double() - x
