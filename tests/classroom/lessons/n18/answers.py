"""Answers to the exercises of 18_beyond_qlora: right ones, found by another way, and likely mistakes."""

import torch

from qlora_lab.classroom.checks import check_pissa, check_told_apart
from qlora_lab.evaluation.intervals import paired_interval, paired_p_value


def told_apart(differences, compared):
    """By Bonferroni's p-value instead of the interval."""
    return compared * paired_p_value(differences) < 0.05


def one_sided(differences, compared):
    mean, half = paired_interval(differences, 1 - 0.05 / compared)
    return bool(mean > half)


def pissa(W, rank, rows=slice(None), sign=-1, power=(0.5, 0.5)):
    """By the eigenvectors of W Wᵀ instead of the SVD. rows, sign, power: what a mistake changes."""
    squares, U = torch.linalg.eigh(W @ W.T)
    order = squares.argsort(descending=True)[: min(W.shape)]
    U, S = U[:, order], squares[order].clamp(min=0).sqrt()
    V = (U.T @ W) / S[:, None]
    part = slice(rank) if rows == slice(None) else slice(len(S) - rank, None)
    B, A = U[:, part] * S[part] ** power[0], S[part, None] ** power[1] * V[part]
    return A, B, W + sign * (B @ A)


RIGHT = [(check_told_apart, (told_apart,)), (check_pissa, (pissa, lambda *of: pissa(*of, power=(1, 0))))]

WRONG = [  # and what the learner must be told
    (check_told_apart, lambda differences, compared: told_apart(differences, 1), "too narrow for 16"),
    (check_told_apart, one_sided, "is told apart, too"),
    (check_told_apart, lambda differences, compared: True, "too narrow for 16"),
    (check_told_apart, lambda differences, compared: False, "half of the interval"),
    (check_told_apart, lambda differences, compared: 1, "return True or False"),
    (check_pissa, lambda *of: pissa(*of)[:2], "the three tensors"),
    (check_pissa, lambda *of: (pissa(*of)[1], pissa(*of)[0], pissa(*of)[2]), "A has shape"),
    (check_pissa, lambda *of: pissa(*of, sign=1), "subtract"),
    (check_pissa, lambda W, rank: (*pissa(W, rank)[:2], W), "would begin changed"),
    (check_pissa, lambda *of: pissa(*of, rows=None), "the *least* important"),
    (check_pissa, lambda *of: pissa(*of, power=(0, 0)), "lost their sizes"),
    (check_pissa, lambda *of: pissa(*of, power=(1, 1)), "counts twice"),
    (
        check_pissa,
        lambda W, rank: (W.new_zeros(rank, W.shape[1]), W.new_zeros(W.shape[0], rank), W),
        "largest singular",
    ),
]
