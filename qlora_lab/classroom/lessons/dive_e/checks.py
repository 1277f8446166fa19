"""Exercises of dive_e_beyond_qlora."""

import itertools
from collections.abc import Callable, Mapping, Sequence

from qlora_lab.classroom.judging import Verdict, call, described, exercise, expect_number, right, wrong

CASES = (  # by learning rate, a loss for each seed
    {0.001: [0.1, 0.5, 0.5, 0.1], 0.003: [0.6, 0.4, 0.4, 0.4]},  # one pair of six chooses otherwise
    {0.001: [0.2, 0.2, 0.2, 0.2, 0.2], 0.003: [0.35, 0.35, 0.1, 0.22, 0.25], 0.01: [0.05, 0.9, 0.9, 0.9, 0.9]},
)


def shares(losses: Mapping[float, Sequence[float]]) -> list[tuple[float, str]]:
    """What likely mistakes lead to, and how to tell the learner."""
    from qlora_lab.experiments.methods_compared import chosen_otherwise

    seeds = range(len(next(iter(losses.values()))))
    luckiest = min(losses, key=lambda rate: min(losses[rate]))

    def best(some: Sequence[int]) -> float:
        return min(losses, key=lambda rate: sum(losses[rate][seed] for seed in some))

    def other(pairs: Sequence[Sequence[int]], rate: float) -> float:
        return sum(best(pair) != rate for pair in pairs) / len(pairs)

    pairs = list(itertools.combinations(seeds, 2))
    share = chosen_otherwise(losses)
    return [
        (1 - share, "That is the share that agrees."),
        (share * len(pairs), "That is a count: divide it by the number of pairs."),
        (chosen_otherwise(losses, 1), "Each seed chose alone: take the mean of two."),
        (other(list(itertools.product(seeds, repeat=2)), best(seeds)), "Some of your pairs have the same seed twice."),
        (other(list(itertools.pairwise(seeds)), best(seeds)), "You took neighbours only: every two seeds are a pair."),
        (other(pairs, luckiest), "All seeds choose by their *mean* loss, not by the best single run."),
    ]


@exercise("E.1", "what two seeds would choose", item="accuracy", points=2, todo="complete `other_choices`")
def check_other_choices(other_choices: Callable[..., float]) -> Verdict:
    """other_choices(losses): the share of pairs of seeds that choose another rate than all of them together."""
    from qlora_lab.experiments.methods_compared import chosen_otherwise

    for losses in CASES:
        came = call(other_choices, {rate: list(each) for rate, each in losses.items()})
        expect_number(f"other_choices({losses})", came, chosen_otherwise(losses), shares(losses))
    return right("A comparison is no surer than the choice that stands before it.")


@exercise("E.2", "PiSSA by hand", item="train", points=3, todo="complete `pissa`")
def check_pissa(pissa: Callable) -> Verdict:
    """pissa(W, rank): A of (rank, in), B of (out, rank) and the rest, so that B A + rest is W and B A its best part."""
    import torch

    from qlora_lab.adapters.initialization import low_rank

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
