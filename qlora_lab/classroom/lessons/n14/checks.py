"""Exercises of 14_more_than_one_card."""

import math
from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, exercise, expect_number, right
from qlora_lab.memory import SHAPES, estimate, traffic

KNOBS = {"rank": 16, "optimizer": "adamw_torch"}
MOST = 64


def least(shape, limit: float, size=lambda breakdown: breakdown.total, sharding: str = "full", **knobs) -> int:
    """The least number of cards on which `size` of the prediction stays below the limit in bytes; 0: there is none."""
    predictions = ((n, estimate(shape, processes=n, sharding=sharding, **knobs)) for n in range(1, MOST + 1))
    return next((n for n, breakdown in predictions if size(breakdown) < limit), 0)


@exercise("14.1", "which cards fit", item="memory", points=2, todo="complete `cards_needed`")
def check_cards_needed(cards_needed: Callable[..., int]) -> Verdict:
    """cards_needed(shape, card_gb, knobs): the least number of cards that train the shape together; 0: over 64."""
    for name, card, knobs in [
        ("llama-65b", 24, KNOBS),
        ("llama-33b", 12, {**KNOBS, "batch_size": 4}),
        ("llama-7b", 16, KNOBS),
        ("llama-65b", 2, KNOBS),  # the scales alone fill half of one
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
            (expected - 1, "That is one card too few: the count begins at 1."),
            (expected + 1, "That is one card too many: return the first that fits."),
            (MOST, "That is the last that was tried: if none fits, return 0."),
            (
                math.ceil(estimate(shape, **knobs).total / limit),
                "Not everything is shared out: ask `estimate` each time.",
            ),
        ]
        came = call(cards_needed, shape, card, dict(knobs))
        expect_number(f"cards_needed({name}, {card})", came, expected, mistakes)
    return right("65B needs two cards of 24 GB; what all of them hold decides how small a card may be.")


def tokens(shape, processes: int, speed: float, flops: float, passes: float = 6, weights=None, moved=None) -> float:
    moved = moved or sum(traffic(shape, processes=processes, sharding="full", rank=16).values())
    return moved / speed * flops / (passes * (weights or shape.linear_parameters()))


@exercise("14.2", "hide the wires", item="memory", points=3, todo="complete `tokens_to_hide`")
def check_tokens_to_hide(tokens_to_hide: Callable[..., int]) -> Verdict:
    """tokens_to_hide(shape, processes, bytes_per_second, flops): least tokens for which computing takes as long."""
    for name, processes, speed, flops in [
        ("llama-65b", 2, 25e9, 4e14),
        ("llama-7b", 8, 1.25e9, 1e14),
    ]:
        shape = SHAPES[name]
        case = (shape, processes, speed, flops)
        parts = traffic(shape, processes=processes, sharding="full", rank=16)
        gathered_once = parts["weights"] / 2
        of_data = traffic(shape, processes=processes, sharding="data", rank=16)
        expected = math.ceil(tokens(*case))
        mistakes = [
            (math.floor(tokens(*case)), "Rounded down, the computing ends first: round up."),
            (math.ceil(tokens(*case, passes=4)), "With checkpointing the forward pass runs twice: 6, not 4."),
            (math.ceil(tokens(*case, passes=2)), "That is the forward pass alone: 6 operations a weight and token."),
            (math.ceil(tokens(*case, passes=1)), "Each weight takes 6 operations a token, not one."),
            (math.ceil(tokens(*case, moved=parts["weights"])), "The gradients travel, too: add up all of `traffic`."),
            (
                math.ceil(tokens(*case, moved=gathered_once)),
                "Layers are gathered twice: `traffic` counts that already.",
            ),
            (math.ceil(tokens(*case) * processes), "Each card computes its own samples: do not multiply by the cards."),
            (math.ceil(tokens(*case) / processes), "Each card has its own samples: do not divide by the cards."),
            (
                math.ceil(tokens(*case, moved=sum(of_data.values()))),
                'That is data parallel traffic: say sharding="full".',
            ),
        ]
        came = call(tokens_to_hide, *case)
        expect_number(f"tokens_to_hide({name}, {processes}, ...)", came, expected, mistakes)
    return right("Fast wires or many tokens: whoever has neither had better share the data alone.")
