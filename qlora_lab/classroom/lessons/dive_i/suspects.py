"""Six implementations of NF4 quantization, five of them with a bug. Solve exercise I.2 before reading.

Each takes a tensor and returns a QuantizedTensor, like `quantization.quantize(x, NF4, block_size=64)`.
"""

from dataclasses import replace

import torch

from qlora_lab.quantization import NF4, QuantizedTensor, nearest_level, normal_quantiles, pack, quantize

BLOCK_SIZE = 64


def suspect_a(x: torch.Tensor) -> QuantizedTensor:
    codebook = NF4.clone()
    codebook[3] = -0.39419748809814453  # two digits swapped: -0.39491748809814453
    return quantize(x, codebook, BLOCK_SIZE)


def suspect_b(x: torch.Tensor) -> QuantizedTensor:
    absmax = x.abs().max().float()  # of the tensor
    codes = pack(nearest_level(x.flatten().float() / absmax, NF4), padding=7)
    return QuantizedTensor(codes, absmax.repeat(-(-x.numel() // BLOCK_SIZE)), NF4, x.shape, x.dtype, BLOCK_SIZE)


def suspect_c(x: torch.Tensor) -> QuantizedTensor:
    middles = torch.tensor(normal_quantiles((torch.arange(16) + 0.5) / 16))
    return quantize(x, (middles / middles.max()).float(), BLOCK_SIZE)


def suspect_d(x: torch.Tensor) -> QuantizedTensor:
    return quantize(x, NF4, BLOCK_SIZE)  # innocent


def suspect_e(x: torch.Tensor) -> QuantizedTensor:
    negative = NF4[:8]
    codebook = torch.cat([negative, -negative[:-1].flip(0), torch.ones(1)])  # 15 values; the last one fills the table
    return quantize(x, codebook, BLOCK_SIZE)


def suspect_f(x: torch.Tensor) -> QuantizedTensor:
    q = quantize(x, NF4, BLOCK_SIZE)
    return replace(q, codes=(q.codes << 4) | (q.codes >> 4))  # low nibble first


SUSPECTS = {"A": suspect_a, "B": suspect_b, "C": suspect_c, "D": suspect_d, "E": suspect_e, "F": suspect_f}
