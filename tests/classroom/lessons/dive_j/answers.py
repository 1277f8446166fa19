"""Answers to the exercises of dive_j_how_few_bits: right ones, found by another way, and likely mistakes."""

import torch
from torch import nn

from qlora_lab.classroom.checks import (
    check_my_text,
    check_quantizable,
    check_share_of_zeros,
    check_spending,
    check_taken_back,
)
from qlora_lab.quantization import quantize_absmax


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def embedding(model):
    return next(module.weight for module in model.modules() if isinstance(module, nn.Embedding))


def quantizable(model):
    return [name for name, linear in linears(model).items() if linear.weight is not embedding(model)]


def quantizable_by_counting(model):
    seen = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    return {name for name, linear in linears(model).items() if seen.count(id(linear.weight)) == 1}


def zeros_by_quantizing(weight, bits):
    return (quantize_absmax(weight, bits, None).dequantize() == 0).float().mean()


def zeros_by_hand(weight, bits):
    step = max(weight.max(), -weight.min()) / (2 ** (bits - 1) - 1)
    return sum(abs(number) < step / 2 for number in weight.flatten().tolist()) / weight.numel()


def limit(weight, divisor):
    return (weight.abs() < weight.abs().max() / divisor / 2).float().mean()


def taken_by_building(damage, rank):
    u, s, v = torch.linalg.svd(damage, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    return 1 - (damage - best).square().sum() / damage.square().sum()


def singular(damage):
    return torch.linalg.svdvals(damage)


LOSSES = {"not quantized": 3.0, "NF4, double": 3.1}
MINE = "The river rose in the night, and by morning two of the old willows beside the bridge were standing in water"
SIZES = {"q_proj": 100, "v_proj": 50, "down_proj": 350}


def spending(choice):
    """Arguments of check_spending, with a loss that only the bits of v_proj lower."""
    return choice, SIZES, lambda chosen: 6 - chosen["v_proj"][0] / 2, 4.5


EVEN = dict.fromkeys(SIZES, (3, 64))

RIGHT = [
    (check_quantizable, (quantizable,)),
    (check_quantizable, (quantizable_by_counting,)),
    (check_share_of_zeros, (zeros_by_quantizing,)),
    (check_share_of_zeros, (zeros_by_hand,)),
    (check_my_text, (MINE, LOSSES, 60)),
    (check_taken_back, (taken_by_building,)),
    (check_spending, spending(EVEN | {"v_proj": (4, 64), "q_proj": (3, 128), "down_proj": (3, 128)})),
]

WRONG = [  # and what the learner must be told
    (check_quantizable, lambda model: list(linears(model)), "the embedding matrix too"),
    (check_quantizable, lambda model: [n for n in linears(model) if n != "lm_head"], "A name proves nothing"),
    (check_quantizable, lambda model: [n for n in linears(model) if "proj" in n], "a weight of its own"),
    (
        check_quantizable,
        lambda model: [
            name for name, linear in linears(model).items() if not torch.equal(linear.weight, embedding(model))
        ],
        "neither by name nor by value",
    ),  # the shapes differ in the blocks: torch.equal is False there
    (
        check_quantizable,
        lambda model: [n for n, m in model.named_modules() if hasattr(m, "weight") and "head" not in n],
        "looked up, not multiplied",
    ),
    (
        check_quantizable,
        lambda model: [n for n, m in model.named_modules() if n.endswith(("q_proj", "norm"))],
        "A norm is in the list",
    ),
    (check_quantizable, lambda model: ["q_proj"], "Names must be complete"),
    (check_quantizable, lambda model: list(linears(model).values()), "expected names"),
    (check_quantizable, lambda model: quantizable(model)[:1], "expected ['blocks.0.q_proj'"),
    (check_quantizable, lambda model: 210, "expected a list of names"),
    (check_share_of_zeros, lambda w, bits: limit(w, (2 ** (bits - 1) - 1) / 2), "a whole step"),
    (check_share_of_zeros, lambda w, bits: zeros_by_quantizing(w, bits) * w.numel(), "how many they are"),
    (check_share_of_zeros, lambda w, bits: 1 - zeros_by_quantizing(w, bits), "does not become 0"),
    (check_share_of_zeros, lambda w, bits: 100 * zeros_by_quantizing(w, bits), "in percent"),
    (
        check_share_of_zeros,
        lambda w, bits: (w.abs() < w.max() / (2 ** (bits - 1) - 1) / 2).float().mean(),
        "may be negative",
    ),
    (check_share_of_zeros, lambda w, bits: limit(w, 2**bits), "the largest code is 7"),
    (check_share_of_zeros, lambda w, bits: limit(w, 2**bits - 1), "the largest code is 7"),
    (check_share_of_zeros, lambda w, bits: limit(w, 2 ** (bits - 1)), "2^(bits - 1) - 1"),
    (
        check_share_of_zeros,
        lambda w, bits: (w < w.abs().max() / (2 ** (bits - 1) - 1) / 2).float().mean(),
        "Negative weights are small by their size",
    ),
    (check_my_text, (7, LOSSES, 60), "expected a text"),
    (check_my_text, ("Too short.", LOSSES, 4), "chance decides"),
    (check_my_text, ("ha " * 100, LOSSES, 200), "repeats itself"),
    (check_taken_back, lambda d, r: singular(d)[:r].sum() / singular(d).sum(), "*squared* singular values"),
    (check_taken_back, lambda d, r: singular(d)[:r].square().sum(), "divide by the squared norm"),
    (check_taken_back, lambda d, r: 1 - taken_by_building(d, r), "the share that stays"),
    (check_taken_back, lambda d, r: taken_by_building(d, r) ** 0.5, "the share of the norm"),
    (check_taken_back, lambda d, r: 100 * taken_by_building(d, r), "in percent"),
    (check_taken_back, lambda d, r: singular(d)[-r:].square().sum() / d.square().sum(), "Those are the smallest"),
    (check_taken_back, lambda d, r: r / min(d.shape), "Not each direction"),
    (check_spending, spending({"q_proj": (3, 64)}), "expected a dict with q_proj, v_proj, down_proj"),
    (check_spending, spending(EVEN | {"q_proj": (1, 64)}), "expected bits from 2 to 8"),
    (check_spending, spending(EVEN | {"q_proj": 3}), "expected bits from 2 to 8"),
    (check_spending, spending(EVEN | {"v_proj": (8, 64)}), "and you have 4."),
    (check_spending, spending(dict.fromkeys(SIZES, (3, 32))), "forget the scales and minima"),
    (check_spending, spending(EVEN), "suffers most from few bits"),
]
