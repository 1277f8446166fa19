"""Answers to the exercises of dive_e_beyond_qlora: right ones, found by another way, and likely mistakes."""

import itertools

import torch

from qlora_lab.classroom.checks import check_other_choices, check_pissa


def other_choices(losses, pairs=itertools.combinations, everyone=torch.mean):
    """With tensors. pairs: of some seeds and 2. everyone: how all the seeds judge a rate."""
    table = torch.tensor(list(losses.values()))  # (rates, seeds)
    chosen = [int(table[:, list(pair)].mean(1).argmin()) for pair in pairs(range(table.shape[1]), 2)]
    usual = int(torch.stack([everyone(row) for row in table]).argmin())
    return sum(choice != usual for choice in chosen) / len(chosen)


def six_or_ten(losses):
    seeds = len(next(iter(losses.values())))
    return seeds * (seeds - 1) // 2


def pissa(W, rank, rows=slice(None), sign=-1, power=(0.5, 0.5)):
    """By the eigenvectors of W Wᵀ instead of the SVD. rows, sign, power: what a mistake changes."""
    squares, U = torch.linalg.eigh(W @ W.T)
    order = squares.argsort(descending=True)[: min(W.shape)]
    U, S = U[:, order], squares[order].clamp(min=0).sqrt()
    V = (U.T @ W) / S[:, None]
    part = slice(rank) if rows == slice(None) else slice(len(S) - rank, None)
    B, A = U[:, part] * S[part] ** power[0], S[part, None] ** power[1] * V[part]
    return A, B, W + sign * (B @ A)


RIGHT = [
    (check_other_choices, (other_choices,)),
    (check_pissa, (lambda *of: pissa(*of, power=(1, 0)),)),
    (check_pissa, (pissa,)),
]

WRONG = [  # and what the learner must be told
    (check_other_choices, lambda losses: 1 - other_choices(losses), "the share that agrees"),
    (check_other_choices, lambda losses: other_choices(losses) * six_or_ten(losses), "a count"),
    (
        check_other_choices,
        lambda losses: other_choices(losses, lambda n, _: ((i,) for i in n)),
        "Each seed chose alone",
    ),
    (
        check_other_choices,
        lambda losses: other_choices(losses, lambda n, _: itertools.product(n, n)),
        "the same seed twice",
    ),
    (check_other_choices, lambda losses: other_choices(losses, lambda n, _: itertools.pairwise(n)), "neighbours only"),
    (check_other_choices, lambda losses: other_choices(losses, everyone=torch.min), "not by the best single run"),
    (check_other_choices, lambda losses: [other_choices(losses)] * 2, "expected one number"),
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
