"""Answers to the exercises of dive_g_more_than_one_card: right ones, found by another way, and likely mistakes."""

import math

from qlora_lab.classroom.checks import check_cards_needed, check_tokens_to_hide
from qlora_lab.memory import estimate, traffic


def fits(shape, card, knobs, size="total", share=0.95, sharding="full"):
    """The numbers of cards that are enough."""
    limit = share * card * 1e9
    possible = {math.gcd(n, knobs["rank"]) for n in range(1, knobs["rank"] + 1)}
    sizes = {n: getattr(estimate(shape, processes=n, sharding=sharding, **knobs), size) for n in possible}
    return [n for n in possible if sizes[n] < limit]


def cards_needed(shape, card, knobs, **otherwise):
    return min(fits(shape, card, knobs, **otherwise), default=0)


def every_number(shape, card, knobs):
    predicted = (estimate(shape, processes=n, sharding="full", **knobs).total for n in range(1, 65))
    return next(n for n, total in enumerate(predicted, 1) if total < 0.95e9 * card)


def received(shape, processes, sharding="full"):
    return traffic(shape, processes=processes, sharding=sharding, rank=16)


def passes(pace, shape, processes, speed, halves=2, sharding="full", forward_share=2, weights=None):
    """Tokens that the forward pass needs, and the backward pass."""
    parts = received(shape, processes, sharding)
    tokens_a_second = pace / (weights or shape.linear_parameters())  # at one operation a weight
    gathered, summed = parts.get("weights", 0) / halves, parts["gradients"]
    return gathered / speed * tokens_a_second / forward_share, (gathered + summed) / speed * tokens_a_second / 4


def tokens(*of, **otherwise):
    return math.ceil(max(passes(*of, **otherwise)))


def by_trying(pace, shape, processes, speed):
    """Seconds of both passes with more and more tokens, until each has as long to compute as to receive."""
    parts = received(shape, processes)
    half = parts["weights"] / 2
    enough = 0
    for bytes_of_pass, operations in ((half, 2), (half + parts["gradients"], 4)):
        low, high = 0, 10**9
        while low + 1 < high:
            middle = (low + high) // 2
            computes = operations * shape.linear_parameters() * middle / pace
            low, high = (low, middle) if computes >= bytes_of_pass / speed else (middle, high)
        enough = max(enough, high)
    return enough


def together(pace, shape, processes, speed):
    return math.ceil(sum(received(shape, processes).values()) / speed * pace / (6 * shape.linear_parameters()))


RIGHT = [
    (check_cards_needed, (cards_needed,)),
    (check_tokens_to_hide, (tokens,)),
    (check_tokens_to_hide, (by_trying,)),
]

WRONG = [  # and what the learner must be told
    (check_cards_needed, lambda *of: cards_needed(*of, share=1), "to the last byte"),
    (check_cards_needed, lambda *of: cards_needed(*of, size="peak_allocated"), "the CUDA context counts"),
    (check_cards_needed, lambda *of: cards_needed(*of, sharding="data"), "holds the whole model"),
    (check_cards_needed, lambda shape, card, knobs: knobs["rank"], "the last that was tried"),
    (check_cards_needed, lambda *of: cards_needed(*of) or of[2]["rank"], "or 0 if none does"),
    (check_cards_needed, every_number, "cannot be shared evenly"),
    (
        check_cards_needed,
        lambda shape, card, knobs: math.ceil(estimate(shape, **knobs).total / (0.95e9 * card)),
        "Not everything is shared out",
    ),
    (check_tokens_to_hide, lambda *of: tokens(*of) - 1, "round up"),
    (check_tokens_to_hide, together, "cannot hide the other's traffic"),
    (check_tokens_to_hide, lambda *of: math.ceil(passes(*of)[1]), "enough for the backward pass"),
    (check_tokens_to_hide, lambda *of: tokens(*of, halves=1), "gathers half"),
    (check_tokens_to_hide, lambda *of: math.ceil(passes(*of, sharding="data")[1]), "data parallel traffic"),
    (check_tokens_to_hide, lambda *of: math.ceil(passes(*of, forward_share=4)[0]), "has 2 operations"),
    (check_tokens_to_hide, lambda *of: math.ceil(passes(*of, forward_share=6)[0]), "2 are the forward pass's"),
    (check_tokens_to_hide, lambda *of: tokens(*of, weights=of[1].parameters()), "take `shape.linear_parameters()`"),
]
