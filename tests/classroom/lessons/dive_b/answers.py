"""Answers to the exercises of dive_b_why_low_rank: right ones, found by another way, and likely mistakes."""

import numpy as np
import torch

from qlora_lab.classroom.checks import check_best_of_rank, check_lora_suspects, check_needed_rank

FOUND = {"A": "transposed", "B": "healthy", "C": "wet base", "D": "both zero", "E": "upside down"}


def by_projection(matrix, rank):
    """Onto the largest eigenvectors of M Mᵀ."""
    _, vectors = np.linalg.eigh((matrix @ matrix.T).double().numpy())
    largest = torch.tensor(vectors[:, ::-1][:, :rank].copy())
    return (largest @ largest.T @ matrix.double()).float()


def directions(matrix, part, power=1):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, part] * s[part] ** power) @ v[part]


def transposed(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v.T[:rank] if u.shape == v.shape else directions(matrix, slice(rank))


def values(matrix):
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


def first_at_least(numbers, share):
    total, held = sum(numbers), 0.0
    for count, number in enumerate(numbers, start=1):
        held += number
        if held >= share * total:
            return count
    return len(numbers)


def needed_rank(A, B, share):
    return first_at_least(values(B @ A) ** 2, share)


RIGHT = [
    (check_best_of_rank, (by_projection,)),
    (check_best_of_rank, (lambda m, r: directions(m, slice(r)),)),
    (check_needed_rank, (needed_rank,)),
    (check_needed_rank, (lambda A, B, share: torch.tensor(needed_rank(A, B, share)),)),
    (check_lora_suspects, (FOUND,)),
    (check_lora_suspects, (FOUND | {"note": "done"},)),
]

WRONG = [  # and what the learner must be told
    (check_best_of_rank, lambda m, r: directions(m, slice(r), 0), "singular values are missing"),
    (check_best_of_rank, lambda m, r: directions(m, slice(len(m) - r, len(m))), "kept the smallest"),
    (check_best_of_rank, lambda m, r: m, "the matrix itself"),
    (check_best_of_rank, lambda m, r: directions(m, slice(r, None)), "the other directions"),
    (check_best_of_rank, lambda m, r: directions(m, slice(r + 1)), "one direction too many"),
    (check_best_of_rank, lambda m, r: directions(m, slice(r - 1)), "one direction too few"),
    (check_best_of_rank, lambda m, r: directions(m, slice(r), 2), "twice"),
    (check_best_of_rank, transposed, "do not transpose"),
    (check_best_of_rank, lambda m, r: 2 * directions(m, slice(r)), "the values are not"),
    (check_best_of_rank, lambda m, r: directions(m, slice(r))[:r], "first 2 *rows* of v"),
    (check_best_of_rank, lambda m, r: torch.linalg.svd(m), "expected a tensor"),
    (check_needed_rank, lambda A, B, share: needed_rank(A, B, share) - 1, "one too few"),
    (check_needed_rank, lambda A, B, share: needed_rank(A, B, share) + 1, "one too many"),
    (check_needed_rank, lambda A, B, share: first_at_least(values(B @ A), share), "their squares"),
    (check_needed_rank, lambda A, B, share: first_at_least(values(A) ** 2, share), "A's directions"),
    (check_needed_rank, lambda A, B, share: first_at_least(values(B) ** 2, share), "B's directions"),
    (check_needed_rank, lambda A, B, share: len(A), "the rank itself"),
    (check_needed_rank, lambda A, B, share: B @ A, "expected one number"),
    (check_lora_suspects, FOUND | {"A": "healthy", "B": "transposed"}, "what it would merge"),
    (check_lora_suspects, FOUND | {"A": "upside down"}, "correction's size"),
    (check_lora_suspects, FOUND | {"B": "wet base"}, "exactly what the base computes"),
    (check_lora_suspects, FOUND | {"C": "healthy"}, "before anything is learned"),
    (check_lora_suspects, FOUND | {"C": "both zero"}, "B gets a gradient"),
    (check_lora_suspects, FOUND | {"D": "healthy"}, "neither A nor B"),
    (check_lora_suspects, FOUND | {"D": "wet base"}, "ever do anything else"),
    (check_lora_suspects, FOUND | {"E": "healthy"}, "64 times too small"),
    (check_lora_suspects, FOUND | {"E": "transposed"}, "Both are wrong"),
    (check_lora_suspects, FOUND | {"E": "both zero"}, "E is not 'both zero'"),
    (check_lora_suspects, FOUND | {"E": "scale"}, "expected one of 'upside down'"),
    (check_lora_suspects, {"A": "healthy"}, "a diagnosis for A, B, C, D and E"),
]
