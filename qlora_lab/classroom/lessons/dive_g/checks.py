"""Exercises of dive_g_more_than_one_card."""

import math
from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, exercise, expect_number, right
from qlora_lab.memory import SHAPES, estimate, traffic

KNOBS = {"rank": 16, "optimizer": "adamw_torch"}


def least(shape, limit: float, size=lambda breakdown: breakdown.total, sharding: str = "full", **knobs) -> int:
    """The least number of cards on which `size` of the prediction stays below the limit in bytes; 0: there is none."""
    predictions = ((n, estimate(shape, processes=n, sharding=sharding, **knobs)) for n in divisors(knobs["rank"]))
    return next((n for n, breakdown in predictions if size(breakdown) < limit), 0)


def divisors(rank: int) -> list[int]:
    return [n for n in range(1, rank + 1) if rank % n == 0]


@exercise("G.1", "which cards fit", item="memory", points=2, todo="complete `cards_needed`")
def check_cards_needed(cards_needed: Callable[..., int]) -> Verdict:
    """cards_needed(shape, card_gb, knobs): the least number of cards that train the shape; 0: none."""
    for name, card, knobs in [
        ("llama-33b", 7, {**KNOBS, "rank": 60, "batch_size": 4}),  # each mistake gives another number
        ("llama-65b", 23, KNOBS),
        ("llama-7b", 16, KNOBS),
        ("llama-65b", 2, KNOBS),  # the scales alone fill half of one: none
    ]:
        shape, limit = SHAPES[name], 0.95 * card * 1e9
        expected = least(shape, limit, **knobs)
        mistakes = [
            (least(shape, card * 1e9, **knobs), "You let a card be full to the last byte: leave 5 % for the gaps."),
            (least(shape, limit, lambda b: b.peak_allocated, **knobs), "Take `.total`: the CUDA context counts, too."),
            (
                least(shape, limit, sharding="data", **knobs),
                'Say sharding="full": each of yours holds the whole model.',
            ),
            (knobs["rank"], "That is the last that was tried: return the first that fits, or 0 if none does."),
            (
                math.ceil(estimate(shape, **knobs).total / limit),
                "Not everything is shared out: ask `estimate` each time.",
            ),
        ]
        came = call(cards_needed, shape, card, dict(knobs))
        expect_number(f"cards_needed({name}, {card})", came, expected, mistakes)
    return right("How small a card may be is decided by what every card holds, however many there are.")


@exercise("G.2", "hide the wires", item="memory", points=3, todo="complete `tokens_to_hide`")
def check_tokens_to_hide(tokens_to_hide: Callable[..., int]) -> Verdict:
    """tokens_to_hide(pace, shape, processes, bytes_per_second): least tokens for which each pass takes as long.

    pace: operations a second that a card gets done, 6 for each weight of a linear layer and token.
    """
    for pace, name, processes, speed in [(4e14, "llama-65b", 2, 25e9), (9e13, "llama-7b", 8, 1.25e9)]:
        shape = SHAPES[name]
        parts = traffic(shape, processes=processes, sharding="full", rank=16)
        operation = shape.linear_parameters() / pace  # seconds, one for each weight
        forward = parts["weights"] / 2 / speed / (2 * operation)
        backward = (parts["weights"] / 2 + parts["gradients"]) / speed / (4 * operation)
        of_data = sum(traffic(shape, processes=processes, sharding="data", rank=16).values())
        mistakes = [
            (math.floor(forward), "Rounded down, the computing ends first: round up."),
            (
                math.ceil(sum(parts.values()) / speed / (6 * operation)),
                "A pass cannot hide the other's traffic: take each by itself, and return the larger.",
            ),
            (math.ceil(backward), "That is enough for the backward pass: return the larger of both."),
            (math.ceil(2 * forward), "Each pass gathers half of what `traffic` counts as weights."),
            (math.ceil(of_data / speed / (4 * operation)), 'That is data parallel traffic: say sharding="full".'),
            (math.ceil(forward / 2), "The forward pass has 2 operations for each weight and token."),
            (math.ceil(forward / 3), "Of the 6 operations, 2 are the forward pass's, and 4 the backward pass's."),
            (
                math.ceil(forward * shape.linear_parameters() / shape.parameters()),
                "The pace counts the weights of linear layers: take `shape.linear_parameters()`.",
            ),
        ]
        came = call(tokens_to_hide, pace, shape, processes, speed)
        expect_number(f"tokens_to_hide({pace:g}, {name}, {processes}, {speed:g})", came, math.ceil(forward), mistakes)
    return right("The forward pass decides: it has half of the weights to wait for, and a third of the computing.")
