"""Answers to the exercises of 01_first_run: right ones, found by another way than the check's, and likely mistakes."""

import statistics

import torch
from torch import bfloat16, float16, float32
from transformers import BitsAndBytesConfig

from qlora_lab.classroom.checks import (
    check_bnb_config,
    check_labels,
    check_token_weighted_loss,
    check_trainable_parameters,
)


def mask(prompt, response):
    ids = prompt + response
    return ids, [-100 if i < len(prompt) else token for i, token in enumerate(ids)]


def mask_as_tensors(prompt, response):
    ids = torch.tensor(prompt + response)
    return ids, torch.where(torch.arange(len(ids)) < len(prompt), -100, ids)


def loss_of_every_token(losses, tokens):
    return statistics.fmean(loss for loss, n in zip(losses, tokens, strict=True) for _ in range(n))


def loss_in_float32(losses, tokens):
    return torch.tensor(losses) @ torch.tensor(tokens, dtype=float32) / sum(tokens)


def count_real_matrices(rank, shapes):
    linears = [
        torch.nn.Linear(*sides, bias=False, device="meta")
        for inputs, outputs in shapes
        for sides in ((inputs, rank), (rank, outputs))
    ]
    return sum(linear.weight.numel() for linear in linears)


def bnb(**options):
    best = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": bfloat16,
    }
    kept = {name: value for name, value in (best | options).items() if value is not None}
    return BitsAndBytesConfig(**kept), bfloat16


RIGHT = [
    (check_bnb_config, bnb()),
    (check_bnb_config, (bnb(bnb_4bit_compute_dtype=None)[0], float32)),
    (check_labels, (mask,)),
    (check_labels, (mask_as_tensors,)),
    (check_token_weighted_loss, (loss_of_every_token,)),
    (check_token_weighted_loss, (loss_in_float32,)),
    (check_trainable_parameters, (count_real_matrices,)),
]

WRONG = [  # and what the learner must be told
    (check_bnb_config, bnb(bnb_4bit_quant_type=None), "fp4 is the default"),
    (check_bnb_config, bnb(bnb_4bit_use_double_quant=None), "double_quant is False"),
    (check_bnb_config, bnb(bnb_4bit_compute_dtype=None), "float32 is the default"),
    (check_bnb_config, bnb(bnb_4bit_compute_dtype=float16), "is torch.float16, expected torch.bfloat16"),
    (check_bnb_config, bnb(load_in_4bit=None), "say what you want"),
    (check_bnb_config, bnb(load_in_4bit=None, load_in_8bit=True), "LLM.int8()"),
    (check_bnb_config, ({"load_in_4bit": True}, bfloat16), "BitsAndBytesConfig(**options)"),
    (check_bnb_config, (BitsAndBytesConfig, bfloat16), "expected a BitsAndBytesConfig, got the type"),
    (check_labels, lambda p, r: (p + r, ([-100] * len(p) + r)[1:] + [-100]), "shifted by one"),
    (check_labels, lambda p, r: (p + r, [-100] * (len(p) + 1) + r[:-1]), "shifted by one"),
    (check_labels, lambda p, r: (p + r, ([-100] * len(p) + r)[1:]), "shifted by one"),
    (check_labels, lambda p, r: (p + r, [-100] * len(p) + r[:-1] + [-100]), "never learn to stop"),
    (check_labels, lambda p, r: (p + r, [-100 if t in p or t == 2 else t for t in p + r]), "never learn to stop"),
    (check_labels, lambda p, r: (p + r, p + r), "prompt is not masked"),
    (check_labels, lambda p, r: (p + r, [0] * len(p) + r), "masked with 0"),
    (check_labels, lambda p, r: (p + r, r), "Every token needs a label"),
    (check_labels, lambda p, r: (p + r, [-100] * len(p) + r[:-1]), "7 labels for 8 tokens"),
    (check_labels, lambda p, r: (p + r, p + [-100] * len(r)), "other way round"),
    (check_labels, lambda p, r: (p + r, [-100] * len(p + r)), "nothing is left to learn"),
    (check_labels, lambda p, r: (p + r, [-100] * (len(p) + 1) + r[1:]), "off by one"),
    (check_labels, lambda p, r: (p + r, [-100] * (len(p) - 1) + p[-1:] + r), "off by one"),
    (check_labels, lambda p, r: (p + r, [-100] * 5 + (p + r)[5:]), "expected [-100, -100, 53, 54, 55, 2]"),
    (check_labels, lambda p, r: ([-100] * len(p) + r, p + r), "swap"),
    (check_labels, lambda p, r: ([-100] * len(p) + r, [-100] * len(p) + r), "one and the same list"),
    (check_labels, lambda p, r: (p, [-100] * len(p) + r), "expected prompt and response"),
    (check_labels, lambda p, r: [-100] * len(p) + r, "expected the pair"),
    (check_labels, lambda p, r: {"input_ids": p + r, "labels": p + r}, "expected the pair"),
    (check_labels, lambda p, r: tuple(t[None] for t in mask_as_tensors(p, r)), "two dimensions"),
    (check_token_weighted_loss, lambda losses, n: statistics.fmean(losses), "gradient accumulation bug"),
    (check_token_weighted_loss, lambda losses, n: sum(a * b for a, b in zip(losses, n, strict=True)), "is the sum"),
    (
        check_token_weighted_loss,
        lambda losses, n: sum(a * b for a, b in zip(losses, n, strict=True)) / len(n),
        "number of micro-batches",
    ),
    (check_token_weighted_loss, lambda losses, n: sum(losses), "without their weights"),
    (check_token_weighted_loss, lambda losses, n: sum(losses) / sum(n), "Weigh each loss"),
    (check_token_weighted_loss, lambda losses, n: statistics.fmean(losses, [1 / k for k in n]), "weighed by 1/n"),
    (check_token_weighted_loss, lambda losses, n: sum(a / b for a, b in zip(losses, n, strict=True)), "multiply"),
    (check_token_weighted_loss, lambda losses, n: 1.7, "gives 1.7, expected 1.125"),
    (check_trainable_parameters, lambda r, shapes: sum(a * b for a, b in shapes), "whole matrix. LoRA trains A"),
    (check_trainable_parameters, lambda r, shapes: sum(r * a * b for a, b in shapes), "more than the whole matrix"),
    (check_trainable_parameters, lambda r, shapes: sum((r * a) * (r * b) for a, b in shapes), "add them"),
    (check_trainable_parameters, lambda r, shapes: sum(r * a for a, b in shapes), "A alone"),
    (check_trainable_parameters, lambda r, shapes: sum(r * b for a, b in shapes), "B alone"),
    (check_trainable_parameters, lambda r, shapes: sum(a + b for a, b in shapes), "without the rank"),
    (check_trainable_parameters, lambda r, shapes: sum(2 * r * a for a, b in shapes), "square matrices only"),
    (check_trainable_parameters, lambda r, shapes: r * sum(shapes[0]), "the first of 2 layers"),
    (check_trainable_parameters, lambda r, shapes: r * sum(shapes[-1]), "the last of 2 layers"),
    (check_trainable_parameters, lambda r, shapes: r * sum(shapes[0]) * len(shapes), "2 times the first layer"),
]
