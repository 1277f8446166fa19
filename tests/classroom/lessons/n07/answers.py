"""Answers to the exercises of 07_qlora_from_scratch: right ones, found by another way, and likely mistakes."""

import torch
from torch import nn

from qlora_lab.classroom.checks import (
    check_ill_layers,
    check_input_gradient,
    check_quantizable,
    check_short_version,
)

HEALED = {"A": "keeps x", "B": "transposed", "C": "healthy", "D": "keeps W"}


def by_autograd(gradient, q):
    weight = q.dequantize().to(gradient.dtype)
    x = torch.zeros(*gradient.shape[:-1], weight.shape[1], dtype=gradient.dtype, requires_grad=True)
    nn.functional.linear(x, weight).backward(gradient)
    return x.grad


def by_einsum(gradient, q):
    return torch.einsum("...o,oi->...i", gradient, q.dequantize().to(gradient.dtype))


def weight_gradient(gradient, q):
    return torch.zeros(q.shape)


def bytes_in_memory(parameters):
    blocks = parameters / 64
    return (parameters / 2 + blocks + 4 * blocks / 256 + 2 * parameters) / 1e9


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def embedding(model):
    return next(module.weight for module in model.modules() if isinstance(module, nn.Embedding))


def quantizable(model):
    return [name for name, linear in linears(model).items() if linear.weight is not embedding(model)]


def quantizable_by_counting(model):
    seen = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    return {name for name, linear in linears(model).items() if seen.count(id(linear.weight)) == 1}


RIGHT = [
    (check_input_gradient, (by_autograd,)),
    (check_input_gradient, (by_einsum,)),
    (check_short_version, (bytes_in_memory,)),
    (check_ill_layers, (HEALED,)),
    (check_ill_layers, (HEALED | {"note": "done"},)),
    (check_quantizable, (quantizable,)),
    (check_quantizable, (quantizable_by_counting,)),
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
    (check_short_version, lambda n: bytes_in_memory(n) - 2 * n / 1e9, "the 4-bit weights alone"),
    (check_short_version, lambda n: 2 * n / 1e9, "the dense copies alone"),
    (check_short_version, lambda n: bytes_in_memory(n) + 2 * n / 1e9, "float32 copies"),
    (check_short_version, lambda n: 2.5 * n / 1e9, "scales are missing"),
    (check_short_version, lambda n: (4.5 / 8 + 2) * n / 1e9, "float32 scales"),
    (check_short_version, lambda n: 8 * bytes_in_memory(n), "gigabits"),
    (check_short_version, lambda n: 1e9 * bytes_in_memory(n), "These are bytes"),
    (check_short_version, lambda n: 1e9 * bytes_in_memory(n) / 2**30, "GiB"),
    (check_short_version, lambda n: 4 * n / 1e9 - bytes_in_memory(n), "You subtracted"),
    (check_short_version, lambda n: 20.126953125, "bits per parameter"),
    (check_ill_layers, HEALED | {"A": "keeps W", "D": "keeps x"}, "grows with the number of tokens"),
    (check_ill_layers, HEALED | {"A": "healthy"}, "what does it keep?"),
    (check_ill_layers, HEALED | {"B": "healthy"}, "Compare its gradient"),
    (check_ill_layers, HEALED | {"B": "no scales"}, "the output would be wrong too"),
    (check_ill_layers, HEALED | {"C": "coarse"}, "error in float32"),
    (check_ill_layers, HEALED | {"D": "keeps x"}, "the same for 2 tokens"),
    (check_ill_layers, HEALED | {"D": "healthy"}, "what does it keep?"),
    (check_ill_layers, HEALED | {"C": "dense"}, "expected one of 'keeps W'"),
    (check_ill_layers, {"A": "keeps x"}, "a diagnosis for A, B, C and D"),
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
]
