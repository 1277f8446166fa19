"""Answers to the exercises of 05_double_quantization: right ones, found by another way, and likely mistakes."""

from qlora_lab import quantization
from qlora_lab.classroom.checks import (
    check_bits_per_parameter,
    check_diagnosis,
    check_smaller_blocks,
)

HEALED = {"A": "no sign", "B": "healthy", "C": "one scale"}


def count_bits(block_size, scale_block_size):
    """Of a tensor that both divide."""
    scales = scale_block_size * 3
    weights = scales * block_size
    return (4 * weights + 8 * scales + 32 * 3) / weights


def bits_of_the_package(block_size, scale_block_size):
    return quantization.bits_per_parameter(block_size, True, scale_block_size)


def one_by_one(parameters):
    """Bytes of the scales that come on top: one for each block of 64, since there are two blocks of 32 in it."""
    more = parameters // 64
    return (more + 4 * more / 256) / 1e9


def with_the_package(parameters):
    more_bits = quantization.bits_per_parameter(32) - quantization.bits_per_parameter(64)
    return parameters * more_bits / 8 / 1e9


RIGHT = [
    (check_diagnosis, (HEALED,)),
    (check_diagnosis, (HEALED | {"note": "done"},)),
    (check_bits_per_parameter, (count_bits,)),
    (check_bits_per_parameter, (bits_of_the_package,)),
    (check_smaller_blocks, (one_by_one,)),
    (check_smaller_blocks, (with_the_package,)),
]

WRONG = [  # and what the learner must be told
    (check_diagnosis, HEALED | {"A": "healthy"}, "dots of small scales"),
    (check_diagnosis, HEALED | {"A": "no mean"}, "too small by the mean, 2.6. Those above"),
    (check_diagnosis, HEALED | {"A": "one scale"}, "as fine as it should be"),
    (check_diagnosis, HEALED | {"B": "one scale", "C": "healthy"}, "the large one's block"),
    (check_diagnosis, HEALED | {"B": "no mean"}, "B is not 'no mean'"),
    (check_diagnosis, HEALED | {"C": "healthy"}, "far coarser"),
    (check_diagnosis, HEALED | {"C": "no mean"}, "too small by the mean"),
    (check_diagnosis, HEALED | {"C": "no sign"}, "would come back right"),
    (check_diagnosis, HEALED | {"B": "levels"}, "expected one of 'no mean'"),
    (check_diagnosis, {"A": "no sign"}, "a diagnosis for A, B and C"),
    (check_bits_per_parameter, lambda b, s: 4 + 8 / b, "scales have scales"),
    (check_bits_per_parameter, lambda b, s: 8 / b + 32 / (b * s), "the scales alone"),
    (check_bits_per_parameter, lambda b, s: count_bits(b, s) / 8, "These are bytes"),
    (check_bits_per_parameter, lambda b, s: 4 + 32 / b, "without double quantization"),
    (check_bits_per_parameter, lambda b, s: 4 + 8 / b + 32 / s, "each of them serves 64 weights"),
    (check_bits_per_parameter, lambda b, s: 4 + 8 / b + 8 / (b * s), "scales are float32: 32 bits"),
    (check_bits_per_parameter, lambda b, s: 4 + 1 / b + 4 / (b * s), "counted in bytes"),
    (check_bits_per_parameter, lambda b, s: 4 + 8 / b + 4 / (b * s), "float32 is 4 bytes"),
    (check_bits_per_parameter, lambda b, s: 4 + 32 / b + 8 / (b * s), "Swapped"),
    (check_bits_per_parameter, lambda b, s: 4 + 32 / b + 32 / (b * s), "no longer 32"),
    (check_bits_per_parameter, lambda b, s: 4 + 2 * (8 / b + 32 / (b * s)), "no zero point"),
    (check_bits_per_parameter, lambda b, s: 4.126953125, "are the arguments used?"),
    (check_bits_per_parameter, lambda b, s: round(count_bits(b, s), 6), "Do not round"),
    (check_smaller_blocks, lambda n: 8 * one_by_one(n), "gigabits"),
    (check_smaller_blocks, lambda n: 1e9 * one_by_one(n), "These are bytes"),
    (check_smaller_blocks, lambda n: 1e9 * one_by_one(n) / 2**30, "GiB"),
    (check_smaller_blocks, lambda n: -one_by_one(n), "the other way round"),
    (check_smaller_blocks, lambda n: n / 64 / 1e9, "second-level scales"),
    (check_smaller_blocks, lambda n: n / 64 * 4 / 1e9, "for float32 scales"),
    (check_smaller_blocks, lambda n: 2 * one_by_one(n), "all scales of blocks of 32"),
    (check_smaller_blocks, lambda n: n * bits_of_the_package(64, 256) / 8 / 1e9, "whole model in blocks of 64"),
    (check_smaller_blocks, lambda n: n * bits_of_the_package(32, 256) / 8 / 1e9, "whole model in blocks of 32"),
    (check_smaller_blocks, lambda n: 8 / 64 + 32 / 64 / 256, "bits per parameter"),
]
