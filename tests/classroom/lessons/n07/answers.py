"""Answers to the exercises of 07_qlora_from_scratch: right ones, found by another way, and likely mistakes."""

import torch
from torch import nn

from qlora_lab.classroom.checks import (
    check_ill_layers,
    check_input_gradient,
    check_short_version,
)

HEALED = {"A": "keeps x", "B": "coarse", "C": "healthy", "D": "keeps W"}


def by_autograd(gradient, q):
    weight = q.dequantize().to(gradient.dtype)
    x = torch.zeros(*gradient.shape[:-1], weight.shape[1], dtype=gradient.dtype, requires_grad=True)
    nn.functional.linear(x, weight).backward(gradient)
    return x.grad


def by_einsum(gradient, q):
    return torch.einsum("...o,oi->...i", gradient, q.dequantize().to(gradient.dtype))


def weight_gradient(gradient, q):
    return torch.zeros(q.shape)


def mine(parameters, **changed):
    """Counted by blocks of 64 and of 64 x 256, in bytes."""
    blocks = parameters / 64
    low = (parameters / 2 + blocks + 4 * blocks / 256) / 1e9
    named = {"parameters": parameters, "FrozenMatmul": low, "short version": low + 2 * parameters / 1e9}
    return named | {name.replace("_", " "): value for name, value in changed.items()}


LOW, HIGH = mine(7e9)["FrozenMatmul"], mine(7e9)["short version"]


RIGHT = [
    (check_input_gradient, (by_autograd,)),
    (check_input_gradient, (by_einsum,)),
    (check_short_version, (mine(7e9),)),
    (check_short_version, (mine(134_515_008) | {"name": "the bundled one"},)),
    (check_ill_layers, (HEALED,)),
    (check_ill_layers, (HEALED | {"note": "done"},)),
]

WRONG = [  # and what the learner must be told
    (check_input_gradient, lambda g, q: g @ q.dequantize().to(g.dtype).T, "the way forward"),
    (check_input_gradient, lambda g, q: (g @ q.dequantize().to(g.dtype)) * 2, "differ from gradient @ W"),
    (check_input_gradient, lambda g, q: g @ q.dequantize(), "cast the weight to gradient.dtype"),
    (check_input_gradient, lambda g, q: g.float() @ q.dequantize(), "cast the weight, not the gradient"),
    (check_input_gradient, lambda g, q: g @ q.codebook[q.indices()].to(g.dtype), "without their scales"),
    (check_input_gradient, lambda g, q: nn.functional.linear(g, q.dequantize().to(g.dtype)), "the way forward"),
    (check_input_gradient, lambda g, q: (by_autograd(g, q), None), "expected one tensor"),
    (check_input_gradient, weight_gradient, "The weight is frozen"),
    (
        check_input_gradient,
        lambda g, q: by_autograd(g, q) if q.shape[0] == q.shape[1] else g @ q.dequantize().to(g.dtype).T,
        "a .T too many",
    ),
    (check_short_version, 8e9, "expected a dict"),
    (check_short_version, {"parameters": 7e9}, "expected a dict with 'parameters', 'FrozenMatmul'"),
    (check_short_version, mine(7e9) | {"parameters": 7}, "8 billion are 8e9"),
    (check_short_version, mine(7e9) | {"parameters": "7B"}, "expected a number"),
    (check_short_version, mine(7e9, FrozenMatmul="3.6 GB"), "expected one number"),
    (check_short_version, mine(7e9, FrozenMatmul=3.5), "the codes alone"),
    (check_short_version, mine(7e9, FrozenMatmul=8 * LOW), "gigabits"),
    (check_short_version, mine(7e9, FrozenMatmul=1e9 * LOW), "These are bytes"),
    (check_short_version, mine(7e9, FrozenMatmul=1e9 * LOW / 2**30), "GiB"),
    (check_short_version, mine(7e9, FrozenMatmul=4.126953125), "bits for one weight"),
    (check_short_version, mine(7e9, short_version=LOW), "the 4-bit weights alone"),
    (check_short_version, mine(7e9, short_version=14.0), "the dense copies alone"),
    (check_short_version, mine(7e9, short_version=LOW + 28), "float32 copies"),
    (check_short_version, mine(7e9, short_version=17.5), "the scales are missing"),
    (check_short_version, mine(7e9, short_version=14 - LOW), "You subtracted"),
    (check_short_version, mine(7e9, short_version=8 * HIGH), "gigabits"),
    (check_short_version, mine(7e9, short_version=20.126953125), "bits for one weight"),
    (check_ill_layers, HEALED | {"A": "keeps W", "D": "keeps x"}, "grows with the number of tokens"),
    (check_ill_layers, HEALED | {"A": "healthy"}, "what does it keep?"),
    (check_ill_layers, HEALED | {"B": "healthy"}, "error in float32"),
    (check_ill_layers, HEALED | {"B": "no scales"}, "more than a few thousandths"),
    (check_ill_layers, HEALED | {"B": "transposed"}, "more than its own size"),
    (check_ill_layers, HEALED | {"C": "coarse"}, "error in float32"),
    (check_ill_layers, HEALED | {"C": "keeps x"}, "It keeps 0 bytes"),
    (check_ill_layers, HEALED | {"D": "keeps x"}, "the same for 2 tokens"),
    (check_ill_layers, HEALED | {"D": "healthy"}, "what does it keep?"),
    (check_ill_layers, HEALED | {"C": "dense"}, "expected one of 'keeps W'"),
    (check_ill_layers, {"A": "keeps x"}, "a diagnosis for A, B, C and D"),
]
