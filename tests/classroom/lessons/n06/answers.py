"""Answers to the exercises of 06_lora: right ones, found by another way, and likely mistakes."""

import math

import torch

from qlora_lab.classroom.checks import check_correction, check_largest_rank, check_rank_of
from qlora_lab.memory import estimate, trainable_parameters


def through_the_whole_matrix(x, A, B, alpha):
    delta = torch.einsum("or,ri->oi", B, A) * (alpha / B.shape[1])
    return torch.einsum("...i,oi->...o", x, delta)


def in_float64(x, A, B, alpha):
    z = torch.nn.functional.linear(torch.nn.functional.linear(x.double(), A.double()), B.double())
    return z * alpha / len(A)


def bare(x, A, B):
    return x @ A.T @ B.T


def by_trying(shape, targets, trainable):
    return next(rank for rank in range(1, 1000) if trainable_parameters(shape, rank, targets) == trainable)


def sides_of(shape, targets):
    return [shape.linears()[target] for target in targets]


def over(shape, trainable, numbers):
    return trainable / (shape.num_hidden_layers * numbers)


def by_walking(shape, targets, gigabytes):
    rank = 0
    while 16 * trainable_parameters(shape, rank + 1, targets) <= gigabytes * 1e9:
        rank += 1
    return rank


def whole(shape, targets, gigabytes, size=16, unit=1e9):
    return gigabytes * unit // (size * trainable_parameters(shape, 1, targets))


RIGHT = [
    (check_correction, (through_the_whole_matrix,)),
    (check_correction, (in_float64,)),
    (check_rank_of, (by_trying,)),
    (check_rank_of, (lambda s, t, n: over(s, n, sum(i + o for i, o in sides_of(s, t))),)),
    (check_largest_rank, (by_walking,)),
    (check_largest_rank, (whole,)),
]

WRONG = [  # and what the learner must be told
    (check_correction, lambda x, A, B, alpha: bare(x, A, B), "scale is missing"),
    (check_correction, lambda x, A, B, alpha: alpha * bare(x, A, B), "Divide by the rank"),
    (check_correction, lambda x, A, B, alpha: len(A) / alpha * bare(x, A, B), "upside down"),
    (check_correction, lambda x, A, B, alpha: alpha / x.shape[-1] * bare(x, A, B), "number of inputs"),
    (check_correction, lambda x, A, B, alpha: alpha / len(B) * bare(x, A, B), "number of outputs"),
    (check_correction, lambda x, A, B, alpha: alpha / len(A) ** 0.5 * bare(x, A, B), "rsLoRA"),
    (check_correction, lambda x, A, B, alpha: -alpha / len(A) * bare(x, A, B), "sign"),
    (check_correction, lambda x, A, B, alpha: alpha / len(A) * B @ A, "correction has shape (4, 6)"),
    (check_correction, lambda x, A, B, alpha: alpha / len(A) * x @ A.T, "correction has shape (3, 2)"),
    (check_correction, lambda x, A, B, alpha: alpha / len(A) * x @ A @ B, "raised RuntimeError"),
    (check_correction, lambda x, A, B, alpha: bare(x, A, B).tolist(), "expected a tensor"),
    (check_correction, lambda x, A, B, alpha: 0 * bare(x, A, B), "the values are not"),
    (check_rank_of, lambda s, t, n: n / sum(i + o for i, o in sides_of(s, t)), "30 layers"),
    (check_rank_of, lambda s, t, n: over(s, n, sum(i for i, _ in sides_of(s, t))), "out more"),
    (check_rank_of, lambda s, t, n: over(s, n, 2 * s.hidden_size * len(t)), "square"),
    (check_rank_of, lambda s, t, n: over(s, n, sum(i * o for i, o in sides_of(s, t))), "the whole matrix"),
    (check_rank_of, lambda s, t, n: over(s, n, sum(sides_of(s, t)[0])), "there are 7"),
    (check_rank_of, lambda s, t, n: n / sum(i for i, _ in sides_of(s, t)), "number of layers are missing"),
    (check_rank_of, lambda s, t, n: 1 / by_trying(s, t, n), "upside down"),
    (check_rank_of, lambda s, t, n: 4, "expected 16"),
    (check_largest_rank, lambda s, t, g: g * 1e9 / 16 / trainable_parameters(s, 1, t), "round down"),
    (check_largest_rank, lambda s, t, g: math.ceil(g * 1e9 / 16 / trainable_parameters(s, 1, t)), "One more than fits"),
    (check_largest_rank, lambda s, t, g: whole(s, t, g, 4), "weights alone"),
    (check_largest_rank, lambda s, t, g: whole(s, t, g, 8), "pays for half"),
    (check_largest_rank, lambda s, t, g: whole(s, t, g, 12), "two* states"),
    (check_largest_rank, lambda s, t, g: whole(s, t, g, 2), "16 bytes"),
    (check_largest_rank, lambda s, t, g: whole(s, t, g, unit=2**30), "GiB"),
    (check_largest_rank, lambda s, t, g: estimate(s).peak_allocated, "expected 50"),
]
