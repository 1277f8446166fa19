"""Answers to the exercises of dive_h_merging: right ones, found by another way than the check's, and mistakes."""

import torch
from torch import nn

from qlora_lab.classroom.checks import (
    check_adapters_that_fit,
    check_joined,
    check_verdicts,
    check_which_base,
)
from qlora_lab.classroom.lessons.dive_h.checks import unseen_configs
from qlora_lab.quantization import dequantize, quantize


def by_running(first, second):
    """What both adapters make of the unit vectors is one matrix; any two factors of it will do."""
    x = torch.eye(first[0].shape[1])
    linear = nn.functional.linear
    product = sum(scale * linear(linear(x, A), B) for A, B, scale in (first, second)).T
    U, S, Vh = torch.linalg.svd(product, full_matrices=False)
    return Vh, U * S


def row_by_row(first, second):
    rows, columns = [], []
    for A, B, scale in (second, first):
        rows += [scale * row for row in A]
        columns += list(B.T)
    return torch.stack(rows), torch.stack(columns, dim=1)


def joined_with(weights_a, weights_b):
    """Rows below rows, columns beside columns, each times a power of its scale."""

    def joined(first, second):
        (A1, B1, s1), (A2, B2, s2) = first, second
        rows, columns = torch.cat([s1**weights_a * A1, s2**weights_a * A2]), [s1**weights_b * B1, s2**weights_b * B2]
        return rows, torch.cat(columns, dim=1)

    return joined


def added_with(power_a, power_b):
    """A to A and B to B, where ranks allow it."""

    def added(first, second):
        (A1, B1, s1), (A2, B2, s2) = first, second
        return s1**power_a * A1 + s2**power_a * A2, s1**power_b * B1 + s2**power_b * B2

    return added


def other_scales(first, second):
    return joined_with(0, 1)((*first[:2], second[2]), (*second[:2], first[2]))


def only(place):
    def one(*both):
        A, B, scale = both[place]
        return A, scale * B

    return one


def nearest_candidate(merged, delta, original, rounded):
    candidates = {
        "pristine": original + delta,
        "dequantized": rounded + delta,
        "requantized": dequantize(quantize(rounded + delta)),
    }
    return min(candidates, key=lambda name: (candidates[name] - merged.float()).norm().item())


def by_what_is_left(merged, delta, original, rounded):
    """Few values in a block: rounded to 4 bits. Else subtract delta, and see which base is left."""
    if all(len(block.unique()) <= 16 for block in merged.reshape(-1, 64)):
        return "requantized"
    left = merged - delta
    return "pristine" if torch.dist(left, original) < torch.dist(left, rounded) else "dequantized"


def without_requantized(merged, delta, original, rounded):
    left = merged.float() - delta
    return "pristine" if torch.dist(left, original) < torch.dist(left, rounded) else "dequantized"


def without_pristine(merged, delta, original, rounded):
    exact = torch.equal(merged.float(), rounded + delta)
    return "dequantized" if exact else "requantized"


RIGHT_VERDICTS = {
    "Qwen2.5-1.5B": "fits",
    "Gemma-2-2B": "works, but",
    "Llama-3-8B": "fits",
    "Qwen3-30B-A3B": "hardly pays",
}
assert set(RIGHT_VERDICTS) == set(unseen_configs())


def count_one_by_one(card, merged, base, adapter):
    plan_a = plan_b = 0
    while (plan_a + 1) * merged <= card:
        plan_a += 1
    while base + (plan_b + 1) * adapter <= card:
        plan_b += 1
    return plan_a, plan_b


RIGHT = [
    (check_which_base, (nearest_candidate,)),
    (check_which_base, (by_what_is_left,)),
    (check_joined, (by_running,)),
    (check_joined, (row_by_row,)),
    (check_joined, (joined_with(0.5, 0.5),)),
    (check_verdicts, (RIGHT_VERDICTS,)),
    (check_adapters_that_fit, (count_one_by_one,)),
]

WRONG = [  # and what the learner must be told
    (check_which_base, without_requantized, "round `rounded + delta` yourself"),
    (check_which_base, without_pristine, "Compare all three candidates"),
    (check_which_base, lambda m, d, o, r: "pristine", "You took a dequantized checkpoint for a pristine one"),
    (check_which_base, lambda m, d, o, r: "dequantized", "You took a pristine checkpoint for a dequantized one"),
    (check_which_base, lambda m, d, o, r: "4-bit", "expected one of pristine, dequantized, requantized"),
    (check_joined, joined_with(0, 0), "Both scales are missing"),
    (check_joined, joined_with(1, 1), "Each scale is in twice"),
    (check_joined, only(0), "the first one alone"),
    (check_joined, only(1), "the second one alone"),
    (check_joined, other_scales, "the other one's scale"),
    (check_joined, added_with(0, 1), "B1 meets A2"),
    (check_joined, added_with(1, 0), "B1 meets A2"),
    (check_joined, added_with(0, 0), "B1 meets A2"),
    (check_joined, added_with(0.5, 0.5), "B1 meets A2"),
    (check_joined, lambda first, second: by_running(first, second)[::-1], "expected (rank, in) and (out, rank)"),
    (check_joined, lambda first, second: first, "expected the pair A, B"),
    (check_verdicts, {**RIGHT_VERDICTS, "Qwen2.5-1.5B": "works, but"}, "0.47 GB in 16 bits"),
    (check_verdicts, {**RIGHT_VERDICTS, "Gemma-2-2B": "fits"}, "256,000 tokens"),
    (check_verdicts, {**RIGHT_VERDICTS, "Qwen3-30B-A3B": "fits"}, "3-D parameters"),
    (check_verdicts, {**RIGHT_VERDICTS, "Llama-3-8B": "hardly pays"}, "Llama-3-8B fits: "),
    (check_verdicts, {**RIGHT_VERDICTS, "Llama-3-8B": "yes"}, "expected one of 'fits', 'works, but', 'hardly pays'"),
    (check_verdicts, {"Llama-3-8B": "fits"}, "expected a dict with the keys"),
    (check_adapters_that_fit, lambda c, m, b, a: (c // m, c // a), "The base has to fit too"),
    (check_adapters_that_fit, lambda c, m, b, a: (c // m, c // (b + a)), "One base serves all adapters"),
    (check_adapters_that_fit, lambda c, m, b, a: (c / m, (c - b) // a), "Half a model serves nobody"),
    (check_adapters_that_fit, lambda c, m, b, a: (c // m, (c - b) / a), "Part of an adapter"),
    (check_adapters_that_fit, lambda c, m, b, a: (c // m, (c - b) // a), "not a negative number"),
    (check_adapters_that_fit, lambda c, m, b, a: ((c - b) // a, c // m), "plan A comes first"),
    (check_adapters_that_fit, lambda c, m, b, a: c // m, "expected the pair"),
]
