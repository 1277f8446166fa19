"""Answers to the exercises of 03_number_formats: right ones, found by another way than the check's, and mistakes."""

import math

import torch

from qlora_lab.classroom.checks import check_fixed_rows, check_smallest_block, check_zero_point
from qlora_lab.quantization import bits_per_parameter, quantize_absmax


def fake_quantize(x, bits):
    """PyTorch's own integer quantization, which has the same definition."""
    scale = (x.max() - x.min()) / (2**bits - 1)
    zero = round(-x.min().item() / scale.item())
    restored = torch.fake_quantize_per_tensor_affine(x, scale.item(), zero, 0, 2**bits - 1)
    return (restored / scale).round().to(torch.int32) + zero, scale.item(), zero


def with_zero_point(x, bits, steps=None, rounded=torch.round, clamp=True, sign=1, zero_rounded=torch.round, both=True):
    """A right answer, or one with a mistake."""
    scale = (x.max() - x.min()) / (steps or 2**bits - 1)
    zero = zero_rounded(-x.min() / scale)
    codes = rounded(x / scale) + (sign * zero if both else 0)
    return codes.clamp(0, 2**bits - 1) if clamp else codes, scale, zero


def answer_with(codes):
    """The right scale and zero point, and other codes."""

    def zero_point_quantize(x, bits):
        _, scale, zero = with_zero_point(x, bits)
        return codes(x, scale, zero, bits), scale, zero

    return zero_point_quantize


def by_row(x):
    q = quantize_absmax(x, 8, "row")
    return q.codes, q.scale[:, None]


def row_by_row(x):
    scales = [max(abs(value) for value in row) / 127 for row in x.tolist()]
    codes = [[round(value / scale) for value in row] for row, scale in zip(x.tolist(), scales, strict=True)]
    return torch.tensor(codes, dtype=torch.int8), torch.tensor(scales)[:, None]


def rows_with(scale_of, last=128):
    def quantize_rows(x):
        scale = scale_of(x)
        return (x / scale).round().clamp(-last, last).to(torch.int16).to(torch.int8), scale

    return quantize_rows


def absmax(x):
    return x.abs().amax(1, keepdim=True)


def search(budget, bits, constant_bits):
    size = 4096
    while size > 32 and bits_per_parameter(size // 2, False, bits=bits, scale_bits=constant_bits) <= budget:
        size //= 2
    return size


RIGHT = [
    (check_zero_point, (fake_quantize,)),
    (check_zero_point, (with_zero_point,)),
    (check_fixed_rows, (by_row,)),
    (check_fixed_rows, (row_by_row,)),
    (check_smallest_block, (search,)),
    (check_smallest_block, (lambda *arguments: torch.tensor(search(*arguments)),)),
]

WRONG = [  # and what the learner must be told
    (check_zero_point, lambda x, b: with_zero_point(x, b, steps=2**b), "16 levels have 15 steps"),
    (check_zero_point, lambda x, b: with_zero_point(x, b, rounded=torch.trunc), "cut off the decimals: round to"),
    (check_zero_point, lambda x, b: with_zero_point(x, b, rounded=torch.floor), "rounded down"),
    (check_zero_point, lambda x, b: with_zero_point(x, b, rounded=lambda t: t), "not rounded: a code"),
    (check_zero_point, lambda x, b: with_zero_point(x, b, clamp=False), "15 is the last code"),
    (check_zero_point, lambda x, b: with_zero_point(x, b, both=False, clamp=False), "forgot the zero point"),
    (check_zero_point, lambda x, b: with_zero_point(x, b, sign=-1), "subtracted the zero point"),
    (check_zero_point, lambda x, b: with_zero_point(x, b, zero_rounded=lambda t: t), "not rounded yet"),
    (check_zero_point, lambda x, b: with_zero_point(x, b, zero_rounded=torch.floor), "cut off the decimals: round"),
    (check_zero_point, lambda x, b: with_zero_point(x, b, zero_rounded=lambda t: -t.round()), "The sign is wrong"),
    (check_zero_point, lambda x, b: (*with_zero_point(x, b)[:2], x.min()), "This is the minimum"),
    (check_zero_point, lambda x, b: (x, x.abs().max() / 7, 0), "of the absmax scheme"),
    (check_zero_point, lambda x, b: (x, x.max() / 15, 0), "forgot the minimum"),
    (check_zero_point, lambda x, b: (x, 15 / (x.max() - x.min()), 0), "the reciprocal"),
    (check_zero_point, lambda x, b: with_zero_point(x, b)[0], "expected codes, scale, zero_point"),
    (check_zero_point, answer_with(lambda x, s, z, b: ((x - x.min()) / s).round()), "scheme with a minimum"),
    (check_zero_point, answer_with(lambda x, s, z, b: (x / s).round().clamp(0, 15) + z), "clamped too early"),
    (check_zero_point, answer_with(lambda x, s, z, b: x / 0), "not all finite"),
    (check_zero_point, answer_with(lambda x, s, z, b: [12, 0, 15]), "expected a tensor"),
    (check_zero_point, answer_with(lambda x, s, z, b: x[:1]), "have the shape (1,)"),
    (check_fixed_rows, rows_with(lambda x: x.abs().max() / 127), "All rows have the same scale"),
    (check_fixed_rows, rows_with(lambda x: (x.abs().max() / 127).expand(len(x), 1)), "All rows have the same scale"),
    (check_fixed_rows, rows_with(lambda x: absmax(x) / 128), "128 wraps around"),
    (check_fixed_rows, rows_with(lambda x: absmax(x) / 128, last=127), "you clamped 128 away"),
    (check_fixed_rows, rows_with(lambda x: absmax(x) / 255, last=127), "divided by 255"),
    (check_fixed_rows, rows_with(lambda x: absmax(x) / 100), "expected absmax / 127"),
    (check_fixed_rows, rows_with(lambda x: x.abs().amax(0, keepdim=True) / 127), "one for each column"),
    (check_fixed_rows, lambda x: (by_row(x)[0], by_row(x)[1][:, 0]), "so that codes * scale works"),
    (check_fixed_rows, lambda x: ((x / by_row(x)[1]).to(torch.int8), by_row(x)[1]), "cut off the decimals"),
    (check_fixed_rows, lambda x: (by_row(x)[0].float(), by_row(x)[1]), "expected torch.int8"),
    (check_fixed_rows, lambda x: by_row(x)[0], "expected the pair"),
    (check_fixed_rows, lambda x: (by_row(x)[0], 0.1), "expected two tensors"),
    (check_smallest_block, lambda budget, bits, c: 4096, "That is the largest"),
    (check_smallest_block, lambda budget, bits, c: search(budget - 1e-6, bits, c), "to the last bit"),
    (check_smallest_block, lambda budget, bits, c: c / (budget - bits), "no power of two"),
    (check_smallest_block, lambda budget, bits, c: math.ceil(c / (budget - bits)), "no power of two"),
    (check_smallest_block, lambda budget, bits, c: search(budget, bits, c) // 2, "takes 5 bits: over the budget"),
    (
        check_smallest_block,
        lambda budget, bits, c: 2 ** math.ceil(math.log2(c / (budget - bits))),
        "32 is the smallest",
    ),
    (check_smallest_block, lambda budget, bits, c: bits + c / search(budget, bits, c), "Return the block size"),
    (check_smallest_block, lambda budget, bits, c: "64", "expected one number"),
    (check_smallest_block, lambda budget, bits, c: 32, "over the budget"),
]
