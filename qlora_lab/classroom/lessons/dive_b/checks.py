"""Exercises of dive_b_why_low_rank."""

from collections.abc import Callable

from qlora_lab.classroom.judging import (
    Verdict,
    call,
    described,
    exercise,
    expect_diagnosis,
    expect_number,
    right,
    wrong,
)

LORA_BUGS = {
    "upside down": "the correction is scaled by rank / alpha",
    "both zero": "A and B both start at zero",
    "wet base": "dropout hits the base's input too",
    "transposed": "merging adds the transposed correction",
    "healthy": "nothing is wrong",
}
LORA_SUSPECTS = {"A": "transposed", "B": "healthy", "C": "wet base", "D": "both zero", "E": "upside down"}


def lora_suspects(base) -> dict:
    """Five LoRA layers around a square nn.Linear, by name: rank 4, alpha 32, dropout 0.1. Decide before you read on."""
    import torch
    from torch import nn

    class Suspect(nn.Module):
        """Call it like a layer; `merged_weight()` is what it would write over the base's weight."""

        def __init__(self, bug: str):
            super().__init__()
            self.bug, self.rank, self.alpha, self.dropout = [bug], 4, 32, nn.Dropout(0.1)
            self.A = nn.Parameter(torch.randn(4, base.in_features, generator=torch.Generator().manual_seed(0)) / 24)
            self.B = nn.Parameter(torch.zeros(base.out_features, 4))
            if bug == "both zero":
                nn.init.zeros_(self.A)

        def scale(self) -> float:
            return self.rank / self.alpha if "upside down" in self.bug else self.alpha / self.rank

        def forward(self, x):
            dropped = self.dropout(x)
            return base(dropped if "wet base" in self.bug else x) + self.scale() * dropped @ self.A.T @ self.B.T

        def merged_weight(self):
            delta = self.scale() * (self.B @ self.A).detach()
            return base.weight.detach() + (delta.T if "transposed" in self.bug else delta)

    return {name: Suspect(bug) for name, bug in LORA_SUSPECTS.items()}


@exercise("B.1", "the nearest matrix of a rank", item="train", points=1, todo="complete `best_of_rank`")
def check_best_of_rank(best_of_rank: Callable) -> Verdict:
    """best_of_rank(matrix, rank) -> Tensor: the largest directions of the matrix, added up."""
    import torch

    for rows, columns, rank in [(6, 6, 2), (5, 8, 3)]:
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        expected = u[:, :rank] * s[:rank] @ v[:rank]
        came = call(best_of_rank, matrix.clone(), rank)
        if not isinstance(came, torch.Tensor):
            return wrong(f"best_of_rank gives {described(came)}, expected a tensor.")
        if came.shape != matrix.shape:
            return wrong(
                f"From {tuple(matrix.shape)} you come to {tuple(came.shape)}: keep the first {rank} columns of u, "
                f"the first {rank} values of s, and the first {rank} *rows* of v."
            )
        if not torch.allclose(came.float(), expected, atol=1e-4):
            mistakes = {
                "The singular values are missing: each product has its size from them.": u[:, :rank] @ v[:rank],
                "You kept the smallest directions.": u[:, -rank:] * s[-rank:] @ v[-rank:],
                "This is the matrix itself: keep `rank` directions only.": matrix,
                "These are the other directions: keep what you threw away.": matrix - expected,
                "These are one direction too many.": u[:, : rank + 1] * s[: rank + 1] @ v[: rank + 1],
                "These are one direction too few.": u[:, : rank - 1] * s[: rank - 1] @ v[: rank - 1],
                "You multiplied by the singular values twice.": u[:, :rank] * s[:rank] ** 2 @ v[:rank],
            }
            if rows == columns:
                mistakes["v's rows are the rows already: do not transpose it."] = u[:, :rank] * s[:rank] @ v.T[:rank]
            likely = [why for why, value in mistakes.items() if torch.allclose(came.float(), value, atol=1e-4)]
            return wrong(f"The shape is right, the values are not. {likely[0] if likely else ''}".rstrip())
    return right("No matrix of that rank comes nearer, by the squares of the differences.")


@exercise("B.2", "the rank that an adapter uses", item="train", points=2, todo="complete `needed_rank`")
def check_needed_rank(needed_rank: Callable) -> Verdict:
    """needed_rank(A, B, share): how many directions of B A hold at least that share of its squared norm."""
    import torch

    # twelve directions, each 3/4 as large as the one before, hidden in factors that are not orthogonal
    draw = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(size, 12, generator=draw)).Q for size in (14, 20))
    mix = torch.eye(12) + 0.6 * torch.randn(12, 12, generator=draw) / 12**0.5
    sizes = 0.75 ** torch.arange(12)
    B, A = u * sizes**0.5 @ mix, torch.linalg.inv(mix) @ (sizes[:, None] ** 0.5 * v.T)

    def count(values: torch.Tensor, share: float) -> int:
        return int((values.cumsum(0) / values.sum() < share).sum()) + 1

    for share in (0.9, 0.5, 0.99):
        expected = count(sizes**2, share)
        mistakes = [
            (count(sizes, share), "These are shares of the singular values: the squared norm needs their squares."),
            (count(torch.linalg.svdvals(A) ** 2, share), "These are A's directions: ask for those of the product B A."),
            (count(torch.linalg.svdvals(B) ** 2, share), "These are B's directions: ask for those of the product B A."),
            (expected - 1, "This is one too few: the sum must reach the share."),
            (expected + 1, "This is one too many: stop at the first sum that reaches the share."),
            (12, "This is the rank itself. How few of its directions hold the share?"),
        ]
        came = call(needed_rank, A.clone(), B.clone(), share)
        source = f"needed_rank(A, B, {share}), with A {tuple(A.shape)} and B {tuple(B.shape)},"
        expect_number(source, came, expected, mistakes)
    return right("The rank that you set is an upper limit. This is how much of it the adapter has used.")


@exercise("B.3", "five LoRA layers", item="train", points=2, todo="name what is wrong with each of the five")
def check_lora_suspects(diagnosis: dict[str, str]) -> Verdict:
    """diagnosis: for each of the layers A to E, a key of LORA_BUGS."""
    clues = {
        ("A", "healthy"): "Compare what it computes with what it would merge.",
        ("A", "upside down"): "In evaluation its output is right: the correction's size is what it should be.",
        ("B", "wet base"): "Untrained, it computes exactly what the base computes.",
        ("C", "healthy"): "It changes the base's output in training mode before anything is learned.",
        ("C", "both zero"): "Its A is not zero, and B gets a gradient.",
        ("D", "healthy"): "Look at its gradients: neither A nor B gets one.",
        ("D", "wet base"): "Untrained, it computes exactly what the base computes. Will it ever do anything else?",
        ("E", "healthy"): "Its correction is 64 times too small.",
        ("E", "transposed"): "What it would merge and what it computes agree. Both are wrong.",
    }
    expect_diagnosis(diagnosis, LORA_SUSPECTS, LORA_BUGS, clues)
    return right("None of the four bugs raises an error, and three of the four still learn something.")
