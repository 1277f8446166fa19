"""Answers to the exercises of 05_double_quantization: right ones, found by another way, and likely mistakes."""

from qlora_lab import quantization
from qlora_lab.classroom.checks import (
    check_bits_per_parameter,
    check_diagnosis,
    check_zero_point_cost,
)

HEALED = {"A": "wrong block", "B": "no sign", "C": "healthy", "D": "one scale"}


def count_bits(block_size, scale_block_size):
    """Of a tensor that both divide."""
    scales = scale_block_size * 3
    weights = scales * block_size
    return (4 * weights + 8 * scales + 32 * 3) / weights


def bits_of_the_package(block_size, scale_block_size):
    return quantization.bits_per_parameter(block_size, True, scale_block_size)


def zero_points(parameters):
    blocks = parameters // 64
    return (blocks + 4 * blocks / 256) / 1e9


RIGHT = [
    (check_diagnosis, (HEALED,)),
    (check_diagnosis, (HEALED | {"note": "done"},)),
    (check_bits_per_parameter, (count_bits,)),
    (check_bits_per_parameter, (bits_of_the_package,)),
    (check_zero_point_cost, (zero_points,)),
]

WRONG = [  # and what the learner must be told
    (check_diagnosis, HEALED | {"A": "healthy"}, "A is not 'healthy'"),
    (check_diagnosis, HEALED | {"A": "one scale"}, "grows with the distance"),
    (check_diagnosis, HEALED | {"B": "no mean"}, "too small by the mean"),
    (check_diagnosis, HEALED | {"B": "one scale"}, "as fine as it should be"),
    (check_diagnosis, HEALED | {"C": "one scale", "D": "healthy"}, "the large one's block"),
    (check_diagnosis, HEALED | {"D": "healthy"}, "far coarser"),
    (check_diagnosis, HEALED | {"D": "wrong block"}, "fan out"),
    (check_diagnosis, HEALED | {"D": "no mean"}, "D is not 'no mean'"),
    (check_diagnosis, HEALED | {"B": "levels"}, "expected one of 'no mean'"),
    (check_diagnosis, {"A": "wrong block"}, "a diagnosis for A, B, C and D"),
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
    (check_zero_point_cost, lambda n: 8 * zero_points(n), "gigabits"),
    (check_zero_point_cost, lambda n: 1e9 * zero_points(n), "These are bytes"),
    (check_zero_point_cost, lambda n: 1e9 * zero_points(n) / 2**30, "GiB"),
    (check_zero_point_cost, lambda n: n / 64 / 1e9, "own float32 scales"),
    (check_zero_point_cost, lambda n: n / 64 * 4 / 1e9, "a float32 constant"),
    (check_zero_point_cost, lambda n: 2 * zero_points(n), "Only what the second one adds"),
    (check_zero_point_cost, lambda n: n * bits_of_the_package(64, 256) / 8 / 1e9, "the whole model"),
    (check_zero_point_cost, lambda n: (n / 2 + 2e9 * zero_points(n)) / 1e9, "the whole model"),
    (check_zero_point_cost, lambda n: 8 / 64 + 32 / 64 / 256, "bits per parameter"),
]
