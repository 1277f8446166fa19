"""Answers to the exercises of dive_i_the_offset: right ones, found by another way than the check's, and mistakes."""

import torch

from qlora_lab.classroom.checks import check_best_offset, check_suspects
from qlora_lab.quantization import normal_float


def misses(x, block_size, offset):
    """Errors of all numbers, by comparing each with each level."""
    blocks = x.reshape(-1, block_size)
    absmax = blocks.abs().amax(1, keepdim=True)
    levels = normal_float(4, offset)
    nearest = (blocks[..., None] / absmax[..., None] - levels).abs().argmin(-1)
    return levels[nearest] * absmax - blocks


def with_least(cost, block_size=None, pick=min):
    def best_offset(x, size, offsets):
        return pick(offsets, key=lambda offset: cost(misses(x, block_size or size, offset)))

    return best_offset


def index_of_least(x, block_size, offsets):
    return offsets.index(with_least(torch.norm)(x, block_size, offsets))


VERDICT = {
    "A": "swapped digits",
    "B": "one scale",
    "C": "midpoint formula",
    "D": "innocent",
    "E": "15 values",
    "F": "nibbles swapped",
}

RIGHT = [
    (check_best_offset, (with_least(torch.norm),)),
    (check_suspects, (VERDICT,)),
]

WRONG = [  # and what the learner must be told
    (check_best_offset, index_of_least, "That is an index"),
    (check_best_offset, lambda x, block_size, offsets: 0.9677083, "expected 0.92"),
    (check_best_offset, lambda x, block_size, offsets: offsets[4], "expected 0.92"),
    (check_best_offset, lambda x, block_size, offsets: "0.93", "expected one number"),
    (check_best_offset, with_least(torch.norm, pick=max), "the error is the largest"),
    (check_best_offset, with_least(torch.norm, block_size=64), "is block_size used?"),
    (check_best_offset, with_least(lambda error: error.abs().max()), "miss is smallest"),
    (check_suspects, VERDICT | {"C": "innocent", "D": "midpoint formula"}, "4 of 6 are right. C is not 'innocent'"),
    (check_suspects, VERDICT | {"A": "innocent"}, "Which one differs"),
    (check_suspects, VERDICT | {"F": "broken"}, "is no diagnosis"),
    (check_suspects, list(VERDICT.values()), 'keys "A" to "F"'),
]
