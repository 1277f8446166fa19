"""Answers to the exercises of dive_l_small_cards: right ones, found in another way than the check, and mistakes."""

import math

from qlora_lab.classroom.checks import check_12_gb, check_card_usage, check_fastest_preset, check_logits


def peak(row):
    return row["measured"]["peak_allocated"]


def on_the_card(run, context):
    tensors = run["measured"]["peak_allocated"]
    gaps = run["measured"]["peak_reserved"] - tensors
    return sum([tensors, gaps, run["measured"]["managed_bytes"], context])


def fastest(rows, shape, card):
    best, seconds = None, float("inf")
    for row in rows:
        if "out_of_memory" in row or row["shape"] != shape or row["card_gb"] > card:
            continue
        if row["measured"]["step_seconds"] < seconds:
            best, seconds = row["preset"], row["measured"]["step_seconds"]
    return best


def chosen(rows, shape, card, key, best=min, same=False, default=None):
    rows = [row for row in rows if row["shape"] == shape and "measured" in row]
    rows = [row for row in rows if (row["card_gb"] == card if same else row["card_gb"] <= card)]
    row = best(rows, key=key, default=None)
    return row["preset"] if row else default


def step_seconds(row):
    return row["measured"]["step_seconds"]


def reserved(row):
    return row["measured"]["peak_reserved"]


def of(run, *names):
    return sum(run["measured"][name] for name in names)


def keep_failures(rows, shape, card):
    row = min(
        (row for row in rows if row["shape"] == shape and row["card_gb"] <= card),
        key=lambda row: row.get("measured", {"step_seconds": 0})["step_seconds"],
    )
    return row["preset"]


def token_by_token(vocabulary, gigabytes):
    tokens = 0
    while (tokens + 1) * vocabulary * (4 + 4 + 4) <= gigabytes * 10**9:
        tokens += 1
    return tokens


def tokens(size):
    return lambda vocabulary, gigabytes: gigabytes * 1e9 // (size * vocabulary)


SMALL = {"optimizer": "paged_adamw_8bit", "adapter_dtype": "bfloat16"}

RIGHT = [
    (check_card_usage, (on_the_card,)),
    (check_fastest_preset, (fastest,)),
    (check_fastest_preset, (lambda rows, shape, card: chosen(rows, shape, card, step_seconds),)),
    (check_logits, (token_by_token,)),
    (check_12_gb, (SMALL | {"batch_size": 3, "sequence_length": 1024},)),
    (check_12_gb, (SMALL | {"batch_size": 6, "optimizer": "adamw_8bit", "gradient_checkpointing": True},)),
]

WRONG = [  # and what the learner must be told
    (check_card_usage, lambda r, c: of(r, "peak_allocated", "managed_bytes") + c, "gaps between tensors"),
    (check_card_usage, lambda r, c: peak(r) + on_the_card(r, c), "counted them twice"),
    (check_card_usage, lambda r, c: of(r, "peak_allocated", "peak_reserved") + c, "managed memory is missing"),
    (check_card_usage, lambda r, c: on_the_card(r, c) / 1e9, "These are GB"),
    (check_card_usage, lambda r, c: on_the_card(r, c) / 2**30, "These are GiB"),
    (check_card_usage, lambda r, c: of(r, "peak_reserved", "managed_bytes") + 500_000_000, "as an argument"),
    (check_card_usage, lambda r, c: peak(r), "the tensors alone"),
    (check_card_usage, lambda r, c: on_the_card(r, c) - peak(r), "what is missing"),
    (check_card_usage, lambda r, c: of(r, "peak_reserved") + c, "states are missing"),
    (check_card_usage, lambda r, c: of(r, "peak_allocated") + c, "Reserved instead of allocated"),
    (check_card_usage, lambda r, c: of(r, "peak_reserved", "managed_bytes"), "context is missing"),
    (check_card_usage, lambda r, c: of(r, "peak_reserved"), "torch's part alone"),
    (check_fastest_preset, lambda rows, shape, card: chosen(rows, shape, card, reserved), "the least memory"),
    (check_fastest_preset, lambda rows, shape, card: chosen(rows, shape, card, step_seconds, max), "the slowest"),
    (
        check_fastest_preset,
        lambda rows, shape, card: chosen(rows, shape, card, step_seconds, same=True) or "standard",
        "No run has a cap of 7 GB",
    ),  # fmt: skip
    (check_fastest_preset, lambda rows, shape, card: min(rows[1:3] + rows[4:], key=step_seconds)["preset"], "13B's"),
    (check_fastest_preset, lambda rows, shape, card: chosen(rows, shape, 24, step_seconds), "the run on 8 GB does not"),
    (
        check_fastest_preset,
        lambda rows, shape, card: fastest(rows, shape, card) if card > 6 else "in-backward",
        "more seconds a step",
    ),
    (
        check_fastest_preset,
        lambda rows, shape, card: fastest(rows, shape, card) if card > 5 else "bf16-adapters",
        "On 5 GB it ran out",
    ),  # fmt: skip
    (check_fastest_preset, keep_failures, "On 6 GB it ran out of memory"),
    (
        check_fastest_preset,
        lambda rows, shape, card: chosen(rows, shape, card, step_seconds, default="none"),
        "return None, not 'none' (str)",
    ),  # fmt: skip
    (check_fastest_preset, lambda rows, shape, card: rows[1], "a whole row"),
    (check_fastest_preset, lambda rows, shape, card: min(r["card_gb"] for r in rows), "expected the name of a preset"),
    (check_logits, lambda v, g: 20000, "gives 20,000, expected 20,833."),
    (check_logits, lambda v, g: g * 1e9 / 12 / v, "round down"),
    (check_logits, lambda v, g: math.floor(g * 1e9 / 12 / v) + 1, "does not fit"),
    (check_logits, tokens(4), "there are three"),
    (check_logits, tokens(2), "one 16-bit number"),
    (check_logits, tokens(6), "4 bytes each, not 2"),
    (check_logits, tokens(8), "not two"),
    (check_logits, tokens(16), "not four"),
    (check_logits, tokens(96), "bytes already"),
    (check_logits, lambda v, g: g * 2**30 // (12 * v), "GiB"),
    (check_logits, lambda v, g: g // (12 * v), "GB and bytes are mixed"),
    (check_12_gb, {"batch_size": 6}, "GB too many. The largest part that you can change: "),
    (check_12_gb, {"batch_size": 6, "gradient_checkpointing": False}, "activations"),
    (check_12_gb, SMALL, "512 tokens a step, expected 3,072"),
    (check_12_gb, {"batch_size": 6, "rank": 8}, "The task fixes it"),
    (check_12_gb, {"batch_size": 6, "checkpointing": True}, "not among the settings"),
    (check_12_gb, {"batch_size": 6, "optimizer": "adam"}, "does not take these settings"),
    (check_12_gb, {"batch_size": 0}, "whole number"),
    (check_12_gb, [4, 512], "expected a dict"),
]
