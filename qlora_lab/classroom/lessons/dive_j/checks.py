"""Exercises of dive_j_how_few_bits."""

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


@exercise("J.1", "what may be quantized", item="train", points=2, todo="complete `quantizable`")
def check_quantizable(quantizable: Callable) -> Verdict:
    """quantizable(model) -> names of the nn.Linear modules whose weight is not an embedding's weight too."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self, head: str, tied: bool, like_embeddings: bool = False):
            super().__init__()
            self.embed = nn.Embedding(40, 16)
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"q_proj": nn.Linear(16, 16), "norm": nn.LayerNorm(16)}) for _ in range(2)
            )
            self.add_module(head, nn.Linear(16, 40, bias=False))
            if tied:
                getattr(self, head).weight = self.embed.weight
            elif like_embeddings:
                getattr(self, head).weight.data.copy_(self.embed.weight.data)

    inner = ["blocks.0.q_proj", "blocks.1.q_proj"]
    torch.manual_seed(0)
    for head, tied, equal in [("lm_head", True, False), ("output", True, False), ("lm_head", False, True)]:
        model = Model(head, tied, equal)
        expected = inner if tied else [*inner, head]
        came = call(quantizable, model)
        if isinstance(came, (str, bytes, dict)) or not hasattr(came, "__iter__"):
            return wrong(f"quantizable gives {described(came)}, expected a list of names.")
        names = list(came)
        if not all(isinstance(name, str) for name in names):
            return wrong(f"The list holds {described(names[0])}, expected names, as named_modules() gives them.")
        if sorted(names) == sorted(expected):
            continue
        if tied and head in names:
            if head == "output":
                return wrong(
                    "This model calls its head `output`, and you let it through. A name proves nothing: is its weight "
                    "the very tensor that the embedding holds?"
                )
            return wrong(f"{head} is in the list, but its weight is the embedding matrix too.")
        if not tied and head not in names and sorted(names) == inner:
            return wrong(
                "This model's head has a weight of its own, so it belongs in the list. Its values equal the "
                "embedding's (a copy): compare with `is`, neither by name nor by value."
            )
        if "embed" in names:
            return wrong("embed is in the list: an nn.Embedding is looked up, not multiplied by.")
        if any("norm" in name for name in names):
            return wrong("A norm is in the list: only nn.Linear modules are quantized.")
        if "q_proj" in names:
            return wrong("Names must be complete: blocks.0.q_proj, since every block has a q_proj.")
        return wrong(f"quantizable gives {names}, expected {expected}.")
    return right("Tied weights serve two masters: the one quantized, the other must stay, and nothing is saved.")


@exercise("J.2", "what becomes zero", item="quantization", points=2, todo="complete `share_of_zeros`")
def check_share_of_zeros(share_of_zeros: Callable) -> Verdict:
    """share_of_zeros(weight, bits): the share of the weights that absmax with one scale for all rounds to 0."""
    import torch

    draw = torch.Generator().manual_seed(3)
    for bits, outlier in [(4, -9.0), (3, 6.0), (4, 2.0)]:
        weight = torch.randn(64, 80, generator=draw)
        weight[5, 7] = outlier
        sizes, largest, levels = weight.abs(), weight.abs().max(), 2 ** (bits - 1) - 1

        def below(limit, sizes=sizes):
            return (sizes < limit).float().mean().item()

        half = largest / levels / 2
        mistakes = [
            (below(2 * half), "You counted up to a whole step: from half a step on, a weight is rounded away from 0."),
            (below(half) * weight.numel(), "That is how many they are: the share is asked for."),
            (1 - below(half), "That is the share that does not become 0."),
            (100 * below(half), "That is in percent: a share lies between 0 and 1."),
            (below(weight.max() / levels / 2), "The largest weight may be negative: take absolute values first."),
            (below(largest / 2**bits / 2), f"With {bits} bits and a sign, the largest code is {levels}."),
            (below(largest / (2**bits - 1) / 2), f"With {bits} bits and a sign, the largest code is {levels}."),
            (below(largest / 2 ** (bits - 1) / 2), f"The largest code is {levels}: 2^(bits - 1) - 1."),
            ((weight < half).float().mean().item(), "Negative weights are small by their size: take absolute values."),
        ]
        came = call(share_of_zeros, weight.clone(), bits)
        source = f"share_of_zeros for {bits} bits and a largest weight of {outlier:g}"
        expect_number(source, came, below(half), mistakes, 1e-4)
    return right("Nothing but the largest weight decides it. One large weight, and its neighbours are gone.")


LEAST = 60


@exercise("J.3", "your text", item="quantization", points=1, todo="put a text of yours into `my_text`")
def check_my_text(my_text: str, losses: dict[str, float], tokens: int) -> Verdict:
    """my_text: a text of the learner's. losses: by base, "not quantized" among them. tokens: how long the text is."""
    if not isinstance(my_text, str):
        return wrong(f"expected a text in quotation marks, got {described(my_text)}.")
    if tokens < LEAST:
        return wrong(f"It has {tokens} tokens, expected {LEAST} or more: chance decides on so short a text.")
    if len(set(my_text.split())) < tokens / 10:
        return wrong("It repeats itself: a model guesses repeated words, whatever its weights are.")
    dense = losses["not quantized"]
    added = ", ".join(f"{loss - dense:+.2f} with {name}" for name, loss in losses.items() if name != "not quantized")
    return right(f"{tokens} tokens of yours: {dense:.2f} nats per token, {added}.")


@exercise("J.4", "what a low rank can take back", item="quantization", points=2, todo="complete `taken_back`")
def check_taken_back(taken_back: Callable) -> Verdict:
    """taken_back(damage, rank): the share of the squared norm of `damage` that its best matrix of that rank has."""
    import torch

    draw = torch.Generator().manual_seed(4)
    for shape, rank in [((40, 60), 4), ((60, 40), 10), ((30, 30), 1)]:
        damage = torch.randn(shape, generator=draw) @ torch.diag(torch.linspace(0.2, 2, shape[1]))
        values = torch.linalg.svdvals(damage)
        squares = values.square()
        share = (squares[:rank].sum() / squares.sum()).item()
        mistakes = [
            (
                (values[:rank].sum() / values.sum()).item(),
                "The squared norm is the sum of the *squared* singular values.",
            ),
            (squares[:rank].sum().item(), "That is what it takes back: divide by the squared norm of all the damage."),
            (1 - share, "That is the share that stays."),
            (share**0.5, "That is the share of the norm: of the *squared* norm is asked for."),
            (100 * share, "That is in percent: a share lies between 0 and 1."),
            (
                (squares[-rank:].sum() / squares.sum()).item(),
                "Those are the smallest: `svdvals` begins with the largest.",
            ),
            (rank / min(shape), "Not each direction holds the same: look at the singular values."),
        ]
        came = call(taken_back, damage.clone(), rank)
        expect_number(written(taken_back, (f"damage of {shape}", rank)), came, share, mistakes, 1e-3)
    return right("Lesson 06's truncation, now for an error in place of an update.")


BUDGET = 4.0


@exercise("J.5", "spend your bits", item="quantization", points=3, todo="choose bits and block sizes")
def check_spending(
    choice: dict[str, tuple[int, int]], parameters: dict[str, int], loss_of: Callable, beat: float
) -> Verdict:
    """choice: bits and block size by kind of layer; at most BUDGET bits per parameter, scales and minima included.

    parameters: by kind, how many there are. loss_of: a choice -> loss on prose. beat: the loss to get below.
    """
    if not isinstance(choice, dict) or set(choice) != set(parameters):
        return wrong(f"expected a dict with {', '.join(parameters)}, got {described(choice)}.")
    for name, pair in choice.items():
        whole = isinstance(pair, tuple | list) and len(pair) == 2 and all(type(number) is int for number in pair)
        if not whole or not 2 <= pair[0] <= 8 or not 8 <= pair[1] <= 4096:
            return wrong(f"{name} has {described(pair)}, expected bits from 2 to 8 and a block size from 8 to 4096.")
    total = sum(parameters.values())
    bits = sum((width + 64 / size) * parameters[name] for name, (width, size) in choice.items()) / total
    if bits > BUDGET + 1e-9:
        codes = sum(width * parameters[name] for name, (width, _) in choice.items()) / total
        forgot = " Did you forget the scales and minima, 64 bits a block?" if codes <= BUDGET else ""
        return wrong(f"That is {bits:.3f} bits per parameter, and you have {BUDGET:g}.{forgot}")
    loss = loss_of(choice)
    if loss >= beat:
        return wrong(
            f"{bits:.3f} bits and a loss of {loss:.2f}, to be below {beat:.2f}. Which kind of layer suffers most from "
            "few bits, and which is so small that more bits for it cost little?"
        )
    return right(f"{bits:.3f} bits and a loss of {loss:.2f}: more for some kinds of layers, paid by the others.")
