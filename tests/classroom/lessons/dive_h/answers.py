"""Answers to the exercises of dive_h_merging: right ones, found by another way than the check's, and mistakes."""

import torch
from torch import nn

from qlora_lab.classroom.checks import (
    check_adapters_that_fit,
    check_merged_weight,
    check_real_parameters,
    check_verdicts,
    check_which_base,
)
from qlora_lab.classroom.lessons.dive_h.checks import unseen_configs
from qlora_lab.quantization import dequantize, quantize


def merge_by_running(weight, a, b, alpha):
    """What the layer and its adapter make of the unit vectors is the merged weight, transposed."""
    x = torch.eye(weight.shape[1])
    linear = nn.functional.linear
    return (linear(x, weight) + linear(linear(x, a), b) * (alpha / len(a))).T


def merge_by_columns(weight, a, b, alpha):
    merged = weight.clone()
    for row, column in zip(a, b.T, strict=True):
        merged += alpha / a.shape[0] * torch.outer(column, row)
    return merged


def merge_in_place(weight, a, b, alpha):
    weight += alpha / len(a) * b @ a
    return weight


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
    "Llama-3-8B": "fits",
    "Gemma-2-2B": "works, but",
    "T5-large": "works, but",
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


# --- H.5 --------------------------------------------------------------------------------------------------------------


def count_restored(model):
    from bitsandbytes.functional import dequantize_4bit

    total = 0
    for p in model.parameters():
        packed = getattr(p, "quant_state", None)
        total += (dequantize_4bit(p.data, packed) if packed else p).numel()
    return total


def count_by_module(model):
    seen, total = set(), 0
    for module in model.modules():
        for p in module.parameters(recurse=False):
            if id(p) not in seen:
                seen.add(id(p))
                packed = hasattr(p, "quant_state")
                total += module.in_features * module.out_features if packed else p.numel()
    return total


def held(model):
    return sum(p.numel() for p in model.parameters())


def doubled(model):
    return sum(p.numel() * (2 if hasattr(p, "quant_state") else 1) for p in model.parameters())


def tied_twice(model):
    found = [p for _, p in model.named_parameters(remove_duplicate=False)]
    return sum(p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in found)


def with_constants(model):
    return count_restored(model) + sum(v.numel() for k, v in model.state_dict().items() if ".weight." in k)


RIGHT = [
    (check_merged_weight, (merge_by_running,)),
    (check_merged_weight, (merge_by_columns,)),
    (check_which_base, (nearest_candidate,)),
    (check_which_base, (by_what_is_left,)),
    (check_verdicts, (RIGHT_VERDICTS,)),
    (check_adapters_that_fit, (count_one_by_one,)),
    (check_real_parameters, (count_restored,)),
    (check_real_parameters, (count_by_module,)),
]

WRONG = [  # and what the learner must be told
    (check_merged_weight, lambda w, a, b, alpha: w + b @ a, "the factor alpha / rank is missing"),
    (check_merged_weight, lambda w, a, b, alpha: w + alpha * b @ a, "divide by the rank"),
    (check_merged_weight, lambda w, a, b, alpha: w + b @ a / len(a), "multiply by alpha"),
    (check_merged_weight, lambda w, a, b, alpha: w + len(a) / alpha * b @ a, "upside down"),
    (check_merged_weight, lambda w, a, b, alpha: w + alpha / a.shape[1] * b @ a, "number of inputs"),
    (check_merged_weight, lambda w, a, b, alpha: w + alpha / b.shape[0] * b @ a, "number of outputs"),
    (check_merged_weight, lambda w, a, b, alpha: alpha / len(a) * b @ a, "the correction alone"),
    (check_merged_weight, lambda w, a, b, alpha: w - alpha / len(a) * b @ a, "that would unmerge"),
    (check_merged_weight, lambda w, a, b, alpha: w.clone(), "unchanged"),
    (check_merged_weight, lambda w, a, b, alpha: (w + alpha / len(a) * b @ a).T, "transposed"),
    (check_merged_weight, lambda w, a, b, alpha: w + a @ b, "raised RuntimeError"),
    (check_merged_weight, lambda w, a, b, alpha: 3, "expected a tensor"),
    (check_merged_weight, merge_in_place, "the base should stay as it is"),
    (check_which_base, without_requantized, "round `rounded + delta` yourself"),
    (check_which_base, without_pristine, "Compare all three candidates"),
    (check_which_base, lambda m, d, o, r: "pristine", "You took a dequantized checkpoint for a pristine one"),
    (check_which_base, lambda m, d, o, r: "dequantized", "You took a pristine checkpoint for a dequantized one"),
    (check_which_base, lambda m, d, o, r: "4-bit", "expected one of pristine, dequantized, requantized"),
    (check_verdicts, {**RIGHT_VERDICTS, "Gemma-2-2B": "fits"}, "256,000 tokens"),
    (check_verdicts, {**RIGHT_VERDICTS, "T5-large": "fits"}, "_keep_in_fp32_modules"),
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
    (check_real_parameters, held, "two 4-bit codes hide in each"),
    (check_real_parameters, lambda model: 2 * held(model), "expected 40"),
    (check_real_parameters, doubled, "last half byte is padding"),
    (check_real_parameters, tied_twice, "one parameter with two names"),
    (check_real_parameters, with_constants, "Scales and code tables are not parameters"),
    (
        check_real_parameters,
        lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad),
        "trainable ones alone",
    ),
    (
        check_real_parameters,
        lambda model: (
            held(model) if not hasattr(model, "__len__") else sum(v.numel() for v in model.state_dict().values())
        ),
        "gives",
    ),
    (check_real_parameters, lambda model: "40", "expected one number"),
]
