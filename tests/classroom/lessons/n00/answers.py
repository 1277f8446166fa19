"""Answers to the exercises of 00_start_here: right ones, found by another way than the check's, and likely mistakes."""

from qlora_lab.classroom.checks import check_bytes_of_weights


def count_bytes(parameters, bits):
    by_hand = {(134515008, 32): 538060032, (134515008, 16): 269030016, (134515008, 4): 67257504, (7e9, 4): 3.5e9}
    return by_hand[parameters, bits]


RIGHT = [
    (check_bytes_of_weights, (count_bytes,)),
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
]
