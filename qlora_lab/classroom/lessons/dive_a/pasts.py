"""Formats that a checkpoint may have been in before it was stored as bfloat16, and weights that were in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from qlora_lab.quantization import (
    NF4,
    quantize_affine,
    quantize_levels,
    quantize_mxfp4,
    quantize_nvfp4,
    quantize_q4_0,
)


def _q4_1(x: torch.Tensor) -> torch.Tensor:
    q = quantize_affine(x, 4, 32)
    assert q.minimum is not None
    return dataclasses.replace(q, scale=q.scale.half().float(), minimum=q.minimum.half().float()).dequantize()


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # what is left of a tensor after each
    "NF4": lambda x: quantize_levels(x, NF4, 64).dequantize(),
    "Q4_0": lambda x: quantize_q4_0(x).dequantize(),
    "Q4_1": _q4_1,
    "MXFP4": lambda x: quantize_mxfp4(x).dequantize(),
    "NVFP4": lambda x: quantize_nvfp4(x).dequantize(),
}


def weights(past: str, seed: int = 0, size: float = 0.02) -> torch.Tensor:
    """Random weights, in a format once ("never": in none), stored as bfloat16 since: float32, Tensor[64, 256].

    size: their standard deviation, about.
    """
    draw = torch.Generator().manual_seed(seed)
    x = size * torch.randn(64, 256, generator=draw) * (0.5 + torch.rand(64, 1, generator=draw))
    return (FORMATS[past](x) if past in FORMATS else x).bfloat16().float()
