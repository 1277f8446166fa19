"""Answers to the exercises of dive_g_more_than_one_card: right ones, found by another way, and likely mistakes."""

import math

from qlora_lab.classroom.checks import check_cards_needed, check_tokens_to_hide
from qlora_lab.memory import SHAPES, estimate, traffic


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


def passes(run, shape, processes, speed, achieved=None, halves=2, sharding="full"):
    """Tokens that the forward pass needs, and the backward pass."""
    parts = received(shape, processes, sharding)
    operations = 6 * SHAPES[run["shape"]].linear_parameters() * run["batch_size"] * run["length"]
    achieved = achieved or operations / (run["milliseconds"] / 1e3)
    flops_a_token = shape.linear_parameters() / achieved
    gathered, summed = parts["weights"] / halves / speed, parts["gradients"] / speed
    return gathered / (2 * flops_a_token), (gathered + summed) / (4 * flops_a_token)


def tokens(*of, **otherwise):
    return math.ceil(max(passes(*of, **otherwise)))


def together(run, shape, processes, speed):
    moved = sum(received(shape, processes).values())
    pace = run["tokens_per_second"] / run["cards"] * SHAPES[run["shape"]].linear_parameters()
    return math.ceil(moved / speed * pace / shape.linear_parameters())


def pace_with(run, weights, tokens_a_second):
    return 6 * weights * tokens_a_second


def of_all_cards(run, *of):
    weights = SHAPES[run["shape"]].linear_parameters()
    return tokens(run, *of, achieved=pace_with(run, weights, run["tokens_per_second"]))


def of_the_wrong_shape(run, shape, *of):
    pace = run["tokens_per_second"] / run["cards"]
    return tokens(run, shape, *of, achieved=pace_with(run, shape.linear_parameters(), pace))


def data_parallel(*of):
    return math.ceil(passes(*of, sharding="data")[1])


RIGHT = [
    (check_cards_needed, (cards_needed,)),
    (check_tokens_to_hide, (tokens,)),
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
    (check_tokens_to_hide, of_all_cards, "of all cards of the run"),
    (check_tokens_to_hide, of_the_wrong_shape, "the weights of *its* shape"),
    (
        check_tokens_to_hide,
        lambda run, *of: tokens({**run, "milliseconds": 1e3 * run["milliseconds"]}, *of),
        "thousandths",
    ),
    (
        check_tokens_to_hide,
        lambda run, *of: tokens({**run, "milliseconds": run["milliseconds"] / 1e3}, *of),
        "thousandths",
    ),
    (check_tokens_to_hide, data_parallel, "data parallel traffic"),
    (check_tokens_to_hide, lambda *of: math.ceil(3 * max(passes(*of))), "2 are the forward pass's"),
    (check_tokens_to_hide, lambda *of: math.ceil(2 / 3 * max(passes(*of))), "it used checkpointing"),
]
