"""Answers to the exercises of 03_number_formats: right ones, found by another way than the check's, and mistakes."""

import math

import torch

from qlora_lab.classroom.checks import check_best_in_budget, check_fixed_rows
from qlora_lab.quantization import bits_per_parameter, quantize_absmax


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


def costs(bits, size):
    return bits_per_parameter(size, False, bits=bits)


def search(weights, budget, fits=lambda cost, budget: cost <= budget, worst=False, cost=costs):
    """All choices, measured with numbers of double width."""
    found, least = None, -1.0 if worst else math.inf
    for size in (4096, 2048, 1024, 512, 256, 128, 64, 32):
        blocks = weights.double().view(-1, size)
        for bits in (8, 7, 6, 5, 4, 3, 2):
            step = blocks.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            lost = ((blocks / step).round() * step - blocks).norm().item()
            if fits(cost(bits, size), budget) and (lost > least if worst else lost < least):
                found, least = (bits, size), lost
    return found


def longest_code_first(weights, budget):
    return next((bits, n) for bits in range(8, 1, -1) for n in SIZES if costs(bits, n) <= budget)


def smallest_block_first(weights, budget):
    return next((bits, n) for n in SIZES for bits in range(8, 1, -1) if costs(bits, n) <= budget)


SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


RIGHT = [
    (check_fixed_rows, (by_row,)),
    (check_fixed_rows, (row_by_row,)),
    (check_best_in_budget, (search,)),
    (check_best_in_budget, (lambda weights, budget: list(search(weights, budget)),)),
]

WRONG = [  # and what the learner must be told
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
    (check_best_in_budget, lambda w, budget: search(w, budget, lambda cost, limit: cost < limit), "to the last bit"),
    (check_best_in_budget, lambda w, budget: search(w, budget, worst=True), "the largest error"),
    (check_best_in_budget, lambda w, budget: search(w, budget, cost=lambda bits, size: bits), "over the budget: each"),
    (check_best_in_budget, longest_code_first, "the longest code first"),
    (check_best_in_budget, smallest_block_first, "the smallest block first"),
    (check_best_in_budget, lambda w, budget: search(w, budget)[::-1], "Bits first"),
    (check_best_in_budget, lambda w, budget: (4, 48), "not on offer"),
    (check_best_in_budget, lambda w, budget: (3, 64), "Its error is"),
    (check_best_in_budget, lambda w, budget: 64, "expected the pair"),
    (check_best_in_budget, lambda w, budget: (*search(w, budget), 0.1), "expected the pair"),
]
