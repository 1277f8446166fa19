"""Answers to the exercises of 14_more_than_one_card: right ones, found by another way, and likely mistakes."""

import math

from qlora_lab.classroom.checks import check_cards_needed, check_tokens_to_hide
from qlora_lab.memory import estimate, traffic


def fits(shape, card, knobs, size="total", share=0.95, sharding="full"):
    """The numbers of cards that are enough."""
    limit = share * card * 1e9
    return [n for n in range(1, 65) if getattr(estimate(shape, processes=n, sharding=sharding, **knobs), size) < limit]


def cards_needed(shape, card, knobs, **otherwise):
    return min(fits(shape, card, knobs, **otherwise), default=0)


def received(shape, processes, sharding="full"):
    return traffic(shape, processes=processes, sharding=sharding, rank=16)


def tokens(shape, processes, speed, flops, operations=6, moved=None):
    wires = (moved or sum(received(shape, processes).values())) / speed
    return math.ceil(wires / (operations * shape.linear_parameters() / flops))


RIGHT = [
    (check_cards_needed, (cards_needed,)),
    (check_tokens_to_hide, (tokens,)),
]

WRONG = [  # and what the learner must be told
    (check_cards_needed, lambda *of: cards_needed(*of, share=1), "to the last byte"),
    (check_cards_needed, lambda *of: cards_needed(*of, size="peak_allocated"), "the CUDA context counts"),
    (check_cards_needed, lambda *of: cards_needed(*of, sharding="data"), "holds the whole model"),
    (check_cards_needed, lambda *of: cards_needed(*of) - 1, "one card too few"),
    (check_cards_needed, lambda *of: cards_needed(*of) + 1, "one card too many"),
    (check_cards_needed, lambda *of: cards_needed(*of) or 64, "if none fits, return 0"),
    (
        check_cards_needed,
        lambda shape, card, knobs: math.ceil(estimate(shape, **knobs).total / (0.95e9 * card)),
        "Not everything is shared out",
    ),
    (check_tokens_to_hide, lambda *of: tokens(*of) - 1, "round up"),
    (check_tokens_to_hide, lambda *of: tokens(*of, operations=4), "runs twice"),
    (check_tokens_to_hide, lambda *of: tokens(*of, operations=2), "the forward pass alone"),
    (check_tokens_to_hide, lambda *of: tokens(*of, operations=1), "6 operations a token, not one"),
    (check_tokens_to_hide, lambda *of: tokens(*of, moved=received(*of[:2])["weights"]), "gradients travel, too"),
    (check_tokens_to_hide, lambda *of: tokens(*of, moved=received(*of[:2])["weights"] / 2), "counts that already"),
    (check_tokens_to_hide, lambda *of: tokens(*of, moved=of[1] * sum(received(*of[:2]).values())), "do not multiply"),
    (check_tokens_to_hide, lambda *of: tokens(*of, moved=sum(received(*of[:2]).values()) / of[1]), "do not divide"),
    (
        check_tokens_to_hide,
        lambda *of: tokens(*of, moved=sum(received(*of[:2], sharding="data").values())),
        "data parallel traffic",
    ),
]
