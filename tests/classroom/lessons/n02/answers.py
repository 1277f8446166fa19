"""Answers to the exercises of 02_memory_wall: right ones, found in another way than the check, and likely mistakes."""

import math

from qlora_lab.classroom.checks import check_12_gb, check_largest_model, check_logits, check_model_bytes
from qlora_lab.memory.prediction import estimate


def largest_by_bisection(card, bits, moment_bits, copy):
    low, high = 0, 10**13
    while high - low > 1:
        middle = (low + high) // 2
        numbers = [bits, bits, moment_bits, moment_bits] + [32] * copy  # of one parameter
        low, high = (middle, high) if sum(n / 8 for n in numbers) * middle <= card * 10**9 else (low, middle)
    return low


def bytes_of_every_matrix(shape):
    total = 0
    for _ in range(shape.num_hidden_layers):
        for inputs, outputs in shape.linears().values():
            scales = inputs * outputs / 64
            total += inputs * outputs / 2 + scales + 4 * scales / 256
        total += 2 * 2 * shape.hidden_size
    matrices = 1 if shape.tie_word_embeddings else 2
    return total + 2 * shape.hidden_size + matrices * 2 * shape.vocab_size * shape.hidden_size


def bytes_from_the_estimate(shape):
    parts = estimate(shape, "qlora").parts
    return sum(parts[name] for name in ("base weights", "quantization constants", "embeddings and head", "norms"))


def token_by_token(vocabulary, gigabytes):
    tokens = 0
    while (tokens + 1) * vocabulary * (4 + 4 + 4) <= gigabytes * 10**9:
        tokens += 1
    return tokens


def largest(total_bits):
    """largest_model with another sum of bits."""
    return lambda card, bits, moment, copy: card * 8e9 / total_bits(bits, moment, 32 * copy)


def at_rest(of):
    return lambda s: of(s.linear_parameters(), s.embedding_parameters(), s.norm_parameters())


def tokens(size):
    return lambda vocabulary, gigabytes: gigabytes * 1e9 // (size * vocabulary)


BITS = 4 + 8 / 64 + 32 / 64 / 256

SMALL = {"optimizer": "paged_adamw_8bit", "adapter_dtype": "bfloat16"}

RIGHT = [
    (check_largest_model, (largest_by_bisection,)),
    (check_largest_model, (largest(lambda b, m, c: b + b + m + m + c),)),
    (check_model_bytes, (bytes_of_every_matrix,)),
    (check_model_bytes, (bytes_from_the_estimate,)),
    (check_logits, (token_by_token,)),
    (check_12_gb, (SMALL | {"batch_size": 3, "sequence_length": 1024},)),
    (check_12_gb, (SMALL | {"batch_size": 6, "optimizer": "adamw_8bit", "gradient_checkpointing": True},)),
]

WRONG = [  # and what the learner must be told
    (check_largest_model, lambda c, b, m, k: c * 1e9 / (2 * b + 2 * m + 32 * k), "a byte has eight"),
    (check_largest_model, lambda c, b, m, k: c * 8 / (2 * b + 2 * m + 32 * k), "in billions"),
    (check_largest_model, lambda c, b, m, k: c * 8 * 2**30 / (2 * b + 2 * m + 32 * k), "GiB"),
    (check_largest_model, largest(lambda b, m, c: 2 * b + m + c), "two numbers"),
    (check_largest_model, largest(lambda b, m, c: b + 2 * m + c), "gradients are missing, or"),
    (check_largest_model, largest(lambda b, m, c: b), "weights alone"),
    (check_largest_model, largest(lambda b, m, c: 2 * b), "Adam's two numbers are missing"),
    (check_largest_model, largest(lambda b, m, c: 2 * b + 2 * m), "fp32 copy of the weights is missing"),
    (check_largest_model, largest(lambda b, m, c: 2 * b + 2 * m + b), "copy is too small"),
    (check_largest_model, largest(lambda b, m, c: 2 * b + 2 * m + 32), "copy` is False"),
    (check_largest_model, lambda *_: 5e9 + 7000, "expected 2,400,000,000"),
    (check_model_bytes, lambda s: s.parameters() / 2, "half a byte for each parameter"),
    (check_model_bytes, lambda s: s.parameters() * BITS / 8, "are not quantized: 2 bytes each"),
    (check_model_bytes, at_rest(lambda n, e, m: n / 2 + 2 * (e + m)), "constants are missing"),
    (check_model_bytes, at_rest(lambda n, e, m: n * BITS / 8), "Only the linears"),
    (check_model_bytes, at_rest(lambda n, e, m: n / 2), "Only the 4-bit codes"),
    (check_model_bytes, at_rest(lambda n, e, m: n * 4.5 / 8 + 2 * (e + m)), "without double quantization"),
    (check_model_bytes, at_rest(lambda n, e, m: n * BITS / 8 + 2 * e), "norms are missing"),
    (check_model_bytes, at_rest(lambda n, e, m: n * BITS / 8 + 4 * (e + m)), "2 bytes, not 4"),
    (check_model_bytes, at_rest(lambda n, e, m: n * BITS / 8 + (e + m) / 2), "not half a one"),
    (check_model_bytes, at_rest(lambda n, e, m: n * BITS + 16 * (e + m)), "These are bits"),
    (check_model_bytes, lambda s: bytes_of_every_matrix(s) / 1e9, "These are GB"),
    (
        check_model_bytes,
        lambda s: bytes_of_every_matrix(s) + 2 * s.tie_word_embeddings * s.vocab_size * s.hidden_size,
        "one matrix (tied)",
    ),
    (check_model_bytes, at_rest(lambda n, e, m: n * BITS / 8 + 2 * (e / 2 + m)), "one of them is missing"),
    (check_model_bytes, at_rest(lambda n, e, m: n / 32 * BITS / 8 + 2 * (e + m)), "one layer: there are 32"),
    (check_logits, lambda v, g: 20000, "gives 20,000, expected 20,833."),
    (check_logits, lambda v, g: g * 1e9 / 12 / v, "round down"),
    (check_logits, lambda v, g: math.floor(g * 1e9 / 12 / v) + 1, "does not fit"),
    (check_logits, tokens(4), "there are three"),
    (check_logits, tokens(2), "one 16-bit number"),
    (check_logits, tokens(6), "4 bytes each, not 2"),
    (check_logits, tokens(8), "not two"),
    (check_logits, tokens(16), "not four"),
    (check_logits, tokens(96), "bytes already"),
    (check_logits, lambda v, g: g * 2**30 // (12 * v), "GiB"),
    (check_logits, lambda v, g: g // (12 * v), "GB and bytes are mixed"),
    (check_12_gb, {"batch_size": 6}, "GB too many. The largest part that you can change: "),
    (check_12_gb, {"batch_size": 6, "gradient_checkpointing": False}, "activations"),
    (check_12_gb, SMALL, "512 tokens a step, expected 3,072"),
    (check_12_gb, {"batch_size": 6, "rank": 8}, "The task fixes it"),
    (check_12_gb, {"batch_size": 6, "checkpointing": True}, "not among the settings"),
    (check_12_gb, {"batch_size": 6, "optimizer": "adam"}, "does not take these settings"),
    (check_12_gb, {"batch_size": 0}, "whole number"),
    (check_12_gb, [4, 512], "expected a dict"),
]
