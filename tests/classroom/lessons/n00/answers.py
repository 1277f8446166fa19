"""Answers to the exercises of 00_start_here: right ones, found by another way than the check's, and likely mistakes."""

import torch
from torch import bfloat16, float16, float32

from qlora_lab.classroom.checks import check_bytes_of_weights, check_compute_dtype


def count_bytes(parameters, bits):
    by_hand = {(134515008, 32): 538060032, (134515008, 16): 269030016, (134515008, 4): 67257504, (7e9, 4): 3.5e9}
    return by_hand[parameters, bits]


def choose_dtype(device_type, has_bf16):
    return bfloat16 if has_bf16 else {"cpu": float32, "cuda": float16}[device_type]


RIGHT = [
    (check_bytes_of_weights, (count_bytes,)),
    (check_compute_dtype, (choose_dtype,)),
]

WRONG = [  # and what the learner must be told
    (check_bytes_of_weights, lambda p, bits: p * bits, "eight make a byte"),
    (check_bytes_of_weights, lambda p, bits: p * bits * 8, "divide"),
    (check_bytes_of_weights, lambda p, bits: p * (bits // 8), "turns half a byte into 0"),
    (check_bytes_of_weights, lambda p, bits: p * bits / 8 / 2**30, "These are GiB"),
    (check_bytes_of_weights, lambda p, bits: p * bits / 8 / 2**20, "These are MiB"),
    (check_bytes_of_weights, lambda p, bits: round(p * bits / 8 / 1e9), "These are GB"),
    (check_bytes_of_weights, lambda p, bits: int(p * bits / 8 / 1e6), "These are MB"),
    (check_bytes_of_weights, lambda p, bits: p / bits * 8, "divided by `bits`"),
    (check_bytes_of_weights, lambda p, bits: p * 4, "is `bits` used?"),
    (check_bytes_of_weights, lambda p, bits: "538060032", "expected one number"),
    (check_bytes_of_weights, 538060032, "expected a function"),
    (check_bytes_of_weights, lambda p: p, "TypeError"),
    (check_compute_dtype, lambda device, has: bfloat16, "far slower in bfloat16"),
    (check_compute_dtype, lambda device, has: bfloat16 if has else float16, "slow on a CPU"),
    (check_compute_dtype, lambda device, has: str(choose_dtype(device, has)), "torch.float32."),
    (check_compute_dtype, lambda device, has: "float32", "torch.float32."),
    (check_compute_dtype, lambda device, has: bfloat16 if has else float32, "tensor cores want float16"),
    (check_compute_dtype, lambda device, has: float32, "bf16 instructions unused"),
    (check_compute_dtype, lambda device, has: float32 if device == "cpu" else bfloat16, "bf16 instructions unused"),
    (
        check_compute_dtype,
        lambda device, has: choose_dtype(device, has) if device == "cpu" else bfloat16,
        "float16 is native",
    ),
    (
        check_compute_dtype,
        lambda device, has: choose_dtype(device, has) if device == "cpu" else float16,
        "float32's range",
    ),
    (check_compute_dtype, lambda device, has: torch.int8, "gives torch.int8, expected torch.float32"),
    (check_compute_dtype, lambda device, has: 16, "expected a torch.dtype"),
]
