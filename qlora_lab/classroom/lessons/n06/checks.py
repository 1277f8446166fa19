"""Exercises of 06_lora."""

from collections.abc import Callable

from qlora_lab.classroom.judging import (
    Verdict,
    call,
    described,
    exercise,
    expect_number,
    right,
    written,
    wrong,
)


@exercise("6.1", "LoRA's correction", item="train", points=1, todo="complete `correction`")
def check_correction(correction: Callable) -> Verdict:
    """correction(x, A, B, alpha) -> Tensor: what LoRA adds to base(x), for x of shape (..., in)."""
    import torch

    draw = torch.Generator().manual_seed(0)
    for leading, inputs, outputs, rank, alpha in [((3,), 6, 4, 2, 8), ((2, 3), 5, 5, 3, 4)]:
        x = torch.randn(*leading, inputs, generator=draw)
        A, B = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
        bare = x @ A.T @ B.T
        came = call(correction, x.clone(), A.clone(), B.clone(), alpha)
        if not isinstance(came, torch.Tensor):
            return wrong(f"correction gives {described(came)}, expected a tensor.")
        if came.shape != bare.shape:
            return wrong(
                f"For x of shape {tuple(x.shape)} correction has shape {tuple(came.shape)}, expected "
                f"{tuple(bare.shape)}: (..., in) goes in, (..., out) comes out."
            )
        if came.is_complex() or not torch.allclose(came.float(), alpha / rank * bare, rtol=1e-4, atol=1e-5):
            mistakes = {
                "The scale is missing: alpha / rank.": bare,
                "You scaled by alpha. Divide by the rank too, which is A's number of rows.": alpha * bare,
                "The scale is upside down: alpha / rank, not rank / alpha.": rank / alpha * bare,
                "You divided by the number of inputs: the rank is A's number of rows.": alpha / inputs * bare,
                "You divided by the number of outputs: the rank is B's number of columns.": alpha / outputs * bare,
                "You divided by √rank: that is rsLoRA, a later variant.": alpha / rank**0.5 * bare,
                "The sign: the correction is added.": -alpha / rank * bare,
            }
            if inputs == outputs:
                mistakes |= {"This is x B A: x meets A first, transposed.": alpha / rank * x @ B @ A}
            likely = [
                why for why, value in mistakes.items() if torch.allclose(came.float(), value, rtol=1e-4, atol=1e-5)
            ]
            return wrong(f"The shape is right, the values are not. {likely[0] if likely else ''}")
    return right("Through the narrow middle: x goes down to `rank` numbers and up again; no matrix in × out is built.")


@exercise("6.2", "the rank behind a printout", item="train", points=2, todo="complete `rank_of`")
def check_rank_of(rank_of: Callable) -> Verdict:
    """rank_of(shape, targets, trainable): the rank at which LoRA on these targets has so many parameters."""
    from qlora_lab.facts import LINEARS
    from qlora_lab.memory.shapes import SHAPES
    from qlora_lab.memory.tensors import trainable_parameters

    attention = list(LINEARS[:4])
    cases = [("smollm2-135m", list(LINEARS), 4), ("llama-3-8b", attention, 16), ("llama-7b", ["q_proj", "v_proj"], 8)]
    for name, targets, rank in cases:
        shape = SHAPES[name]
        layers, trainable = shape.num_hidden_layers, trainable_parameters(shape, rank, targets)
        sides = [shape.linears()[target] for target in targets]
        inputs, outputs = (sum(side) for side in zip(*sides, strict=True))
        mistakes = [
            (trainable / (inputs + outputs), f"The model has {layers} layers, and each has all the targets."),
            (trainable / inputs / layers, "A has rank × in numbers, but B has rank × out more."),
            (trainable / outputs / layers, "B has out × rank numbers, but A has rank × in more."),
            (trainable / (2 * shape.hidden_size * len(targets)) / layers, "Not all of these matrices are square."),
            (trainable / inputs, "B and the number of layers are missing."),
            (trainable / sum(i * o for i, o in sides) / layers, "in × out is the whole matrix: LoRA has in + out."),
            (trainable / (sum(sides[0]) * layers), f"This is with one target: there are {len(targets)}."),
            (1 / rank, "This is upside down."),
        ]
        came = call(rank_of, shape, list(targets), trainable)
        expect_number(written(rank_of, (name, targets, trainable)), came, rank, mistakes)
    return right("A printout that does not fit its settings gives itself away: it is of another rank.")


@exercise("6.3", "the rank that a budget buys", item="train", points=1, todo="complete `largest_rank`")
def check_largest_rank(largest_rank: Callable) -> Verdict:
    """largest_rank(shape, targets, gigabytes): the largest rank whose training numbers (16 bytes each) fit."""
    import math

    from qlora_lab.memory.shapes import SHAPES
    from qlora_lab.memory.tensors import trainable_parameters

    cases = [("llama-7b", "all-linear", 2), ("llama-65b", ["q_proj", "v_proj"], 1), ("llama-13b", "all-linear", 3.5)]
    for name, targets, gigabytes in cases:
        shape = SHAPES[name]
        numbers = gigabytes * 1e9 / trainable_parameters(shape, 1, targets)  # bytes for each number of rank 1
        exact, expected = numbers / 16, numbers // 16
        mistakes = [
            (exact, "A rank is a whole number: round down, for half a rank does not exist."),
            (math.ceil(exact), "One more than fits: round down."),
            (numbers // 4, "This pays for the weights alone: a gradient and two states come on top of each."),
            (numbers // 8, "This pays for half: weight, gradient and two states of AdamW are 4 × 4 bytes."),
            (numbers // 12, "Weight, gradient and *two* states of AdamW: 4 × 4 bytes."),
            (numbers * 2**30 / 1e9 // 16, "These are GiB: 1 GB is 10^9 bytes."),
            (numbers // 2, "The adapter is float32 here, and gradient and states count too: 16 bytes."),
        ]
        came = call(largest_rank, shape, targets, gigabytes)
        expect_number(written(largest_rank, (name, targets, gigabytes)), came, expected, mistakes)
    return right("Parameters grow in proportion to the rank, so rank 1 tells the price of all the others.")
