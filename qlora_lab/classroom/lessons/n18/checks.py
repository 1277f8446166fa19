"""Exercises of 18_beyond_qlora."""

from collections.abc import Callable

import torch

from qlora_lab.adapters.initialization import low_rank
from qlora_lab.classroom.judging import Verdict, call, described, exercise, right, wrong
from qlora_lab.evaluation.intervals import paired_interval

CASES = [  # differences and how many methods are compared; each mistake is wrong about one of them
    ((3.0, 1.0, 4.0, 2.0, 0.5, 2.5), 1),  # told apart
    ((3.0, 1.0, 4.0, 2.0, 0.5, 2.5), 16),  # alone it would be
    ((-9.0, -8.0, -10.0, -9.5, -8.5), 16),  # worse is a difference, too
    ((2.0, -3.0, 1.0, -1.0), 16),
]


@exercise("18.1", "many comparisons", item="accuracy", points=2, todo="complete `told_apart`")
def check_told_apart(told_apart: Callable[..., bool]) -> Verdict:
    """told_apart(differences, compared): whether zero lies outside the corrected interval."""
    for differences, compared in CASES:
        came = call(told_apart, differences, compared)
        if came is not True and came is not False:
            return wrong(f"told_apart gives {came!r}: return True or False.")
        mean, half = paired_interval(differences, 1 - 0.05 / compared)
        if came == (abs(mean) > half):
            continue
        source = f"told_apart({differences}, {compared}) gives {came}."
        if compared == 16 and mean > 0 and came:
            return wrong(f"{source} The interval is too narrow for 16 comparisons: its level is 1 - 0.05 / 16.")
        if mean < 0:
            return wrong(f"{source} A method that is worse is told apart, too: compare abs(mean) with the half width.")
        return wrong(f"{source} The mean is {mean:.2f}, and half of the interval {half:.2f}.")
    return right("The more methods you try, the wider each interval must be, or one of them will win by luck.")


@exercise("18.2", "PiSSA by hand", item="train", points=3, todo="complete `pissa`")
def check_pissa(pissa: Callable) -> Verdict:
    """pissa(W, rank): A of (rank, in), B of (out, rank) and the rest, so that B A + rest is W and B A its best part."""
    for shape, rank in [((6, 4), 2), ((4, 6), 1), ((5, 5), 3)]:
        W = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
        came = call(pissa, W.clone(), rank)
        source = f"pissa(W, {rank}) with W of shape {shape}"
        if not isinstance(came, (tuple, list)) or len(came) != 3 or not all(isinstance(t, torch.Tensor) for t in came):
            return wrong(f"{source} gives {described(came)}: return the three tensors A, B, rest.")
        A, B, rest = came
        shapes = {"A": (rank, shape[1]), "B": (shape[0], rank), "rest": shape}
        for (name, expected), tensor in zip(shapes.items(), came, strict=True):
            if tuple(tensor.shape) != expected:
                return wrong(f"{source}: {name} has shape {tuple(tensor.shape)}, expected {expected}.")
        b, a = low_rank(W, rank)
        best = b @ a
        if not torch.allclose(B @ A + rest, W, atol=1e-4):
            if torch.allclose(W + B @ A, rest, atol=1e-4):
                return wrong(f"{source}: rest is W + B A. What is frozen is what A and B do *not* hold: subtract.")
            return wrong(f"{source}: B A + rest is not W, so the model would begin changed.")
        if torch.allclose(B @ A, best, atol=1e-4):
            continue
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        if torch.allclose(B @ A, (U[:, -rank:] * S[-rank:]) @ V[-rank:], atol=1e-4):
            return wrong(
                f"{source}: that is the *least* important part. svd sorts from large to small: take the first."
            )
        if torch.allclose(B @ A, U[:, :rank] @ V[:rank], atol=1e-4):
            return wrong(f"{source}: the directions are right, but they have lost their sizes S.")
        if torch.allclose(B @ A, (U[:, :rank] * S[:rank] ** 2) @ V[:rank], atol=1e-4):
            return wrong(f"{source}: S is in both A and B, so it counts twice. Give each its root.")
        return wrong(f"{source}: B A is not the part of W with the largest singular values.")
    return right("With an SVD in front, LoRA begins with what matters most in W, and the rest is frozen.")
