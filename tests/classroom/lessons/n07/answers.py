"""Answers to the exercises of 07_qlora_from_scratch: right ones, found by another way, and likely mistakes."""

import torch

from qlora_lab.classroom.checks import check_frozen_matmul, check_naive


def function(forward, backward):
    """An autograd.Function of these two."""
    return type(
        "Answer", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


def remember(ctx, x, q):
    ctx.weight = q
    return torch.einsum("...i,oi->...o", x, q.dequantize().to(x.dtype))


def by_autograd(ctx, gradient):
    dense = ctx.weight.dequantize().to(gradient.dtype)
    x = torch.zeros(*gradient.shape[:-1], dense.shape[1], dtype=gradient.dtype, requires_grad=True)
    with torch.enable_grad():
        y = torch.nn.functional.linear(x, dense)
    return torch.autograd.grad(y, x, gradient)[0], None


def by_einsum(ctx, gradient):
    return torch.einsum("...o,oi->...i", gradient, ctx.weight.dequantize().to(gradient.dtype)), None


def keep_dense(ctx, x, q):
    ctx.W = q.dequantize().to(x.dtype)
    return x @ ctx.W.T


def save_dense(ctx, x, q):
    W = q.dequantize().to(x.dtype)
    ctx.save_for_backward(W)
    return x @ W.T


def no_scales(ctx, x, q):
    ctx.weight = q
    return x @ q.codebook[q.indices()].to(x.dtype).T


def in_float32(ctx, x, q):
    ctx.weight = q
    return x.float() @ q.dequantize().T


def no_cast(ctx, x, q):
    ctx.weight = q
    return x @ q.dequantize().T


def back(change):
    return lambda ctx, gradient: change(gradient, ctx.weight.dequantize().to(gradient.dtype))


def mine(parameters, **changed):
    """Counted by blocks of 64 and of 64 x 256, in bytes."""
    blocks = parameters / 64
    low = (parameters / 2 + blocks + 4 * blocks / 256) / 1e9
    dense = 2 * parameters / 1e9
    return {"parameters": parameters, "FrozenMatmul": low, "naive": low + dense, "bfloat16": dense} | changed


LOW, HIGH = mine(7e9)["FrozenMatmul"], mine(7e9)["naive"]


RIGHT = [
    (check_frozen_matmul, (function(remember, by_autograd),)),
    (check_frozen_matmul, (function(remember, by_einsum),)),
    (check_naive, (mine(7e9),)),
    (check_naive, (mine(134_515_008) | {"name": "the bundled one"},)),
]

WRONG = [  # and what the learner must be told
    (check_frozen_matmul, remember, "expected the class"),
    (check_frozen_matmul, function(keep_dense, by_einsum), "The dense matrix waits on ctx.W"),
    (check_frozen_matmul, function(save_dense, by_einsum), "save_for_backward keeps the dense matrix"),
    (check_frozen_matmul, function(no_scales, by_einsum), "forward gives other numbers"),
    (check_frozen_matmul, function(in_float32, by_einsum), "forward gives torch.float32 for torch.bfloat16"),
    (check_frozen_matmul, function(no_cast, by_einsum), "raised RuntimeError"),
    (check_frozen_matmul, function(lambda ctx, x, q: remember(ctx, x, q)[0], by_einsum), "forward gives the shape"),
    (check_frozen_matmul, function(remember, back(lambda g, W: (g @ W.T, None))), "that is the way forward"),
    (check_frozen_matmul, function(remember, back(lambda g, W: (2 * (g @ W), None))), "backward gives other numbers"),
    (check_frozen_matmul, function(remember, back(lambda g, W: (None, g @ W))), "different than None at position 2"),
    (check_frozen_matmul, function(remember, back(lambda g, W: (None, None))), "returns dL/dx first"),
    (check_frozen_matmul, function(remember, back(lambda g, W: g @ W)), "returned an incorrect number of gradients"),
    (check_naive, 8e9, "expected a dict"),
    (check_naive, {"parameters": 7e9}, "expected a dict with 'parameters', 'FrozenMatmul'"),
    (check_naive, mine(7e9) | {"parameters": 7}, "8 billion are 8e9"),
    (check_naive, mine(7e9) | {"parameters": "7B"}, "expected a number"),
    (check_naive, mine(7e9, FrozenMatmul="3.6 GB"), "expected one number"),
    (check_naive, mine(7e9, FrozenMatmul=3.5), "the codes alone"),
    (check_naive, mine(7e9, FrozenMatmul=8 * LOW), "gigabits"),
    (check_naive, mine(7e9, FrozenMatmul=1e9 * LOW), "These are bytes"),
    (check_naive, mine(7e9, FrozenMatmul=1e9 * LOW / 2**30), "GiB"),
    (check_naive, mine(7e9, FrozenMatmul=4.126953125), "bits for one weight"),
    (check_naive, mine(7e9, naive=LOW), "the 4-bit weights alone"),
    (check_naive, mine(7e9, naive=14.0), "the dense copies alone"),
    (check_naive, mine(7e9, naive=LOW + 28), "float32 copies"),
    (check_naive, mine(7e9, naive=17.5), "the scales are missing"),
    (check_naive, mine(7e9, naive=14 - LOW), "You subtracted"),
    (check_naive, mine(7e9, naive=8 * HIGH), "gigabits"),
    (check_naive, mine(7e9, naive=20.126953125), "bits for one weight"),
    (check_naive, mine(7e9, bfloat16=28.0), "That is float32"),
    (check_naive, mine(7e9, bfloat16=HIGH), "no codes and scales"),
]
