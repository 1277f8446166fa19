"""What a run of examples/qlora_hf.py needs of a card, by arithmetic: memory and hours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_lab.memory import MemoryBreakdown

CARDS = {  # from the makers' data sheets; GB as torch finds them (10^9 bytes); FLOP/s: dense, 16 bits, fp32 sums
    "T4": {"GB": 15.6, "FLOP/s": 65e12, "bytes/s": 320e9},
    "L4": {"GB": 23.5, "FLOP/s": 121e12, "bytes/s": 300e9},
    "RTX 3090": {"GB": 25.3, "FLOP/s": 71e12, "bytes/s": 936e9},
}
SHARE = 1 / 3  # of the best speed: TRL on an H100, 16 samples of 512 tokens
TILE = (4096, 32_768)  # tokens and words that TRL 1.16 scores at a time


def needed_by_script(model: str, batch: int, length: int, **changes: Any) -> MemoryBreakdown:
    """`memory.estimate` of a step as the script trains: rank 16, torch's AdamW, gradient checkpointing, TRL's loss.

    TRL scores a tile of tokens and words at a time. `estimate` counts by whole rows of words, and 12 bytes a score,
    where TRL has 2 and some more: so as many scores are a little too much.

    Args:
        model: a name in `memory.SHAPES`. batch: samples at a time. length: tokens in each.
        changes: other arguments of `estimate`, such as `gradient_checkpointing=False`.
    """
    from qlora_lab.memory import SHAPES, estimate

    shape = SHAPES[model]
    scores = min(batch * length, TILE[0]) * min(shape.vocab_size, TILE[1])
    settings: dict[str, Any] = {"rank": 16, "optimizer": "adamw_torch", "batch_size": batch, "sequence_length": length}
    settings["loss_chunk"] = math.ceil(scores / shape.vocab_size)
    return estimate(shape, **settings | changes)


def largest_batches(model: str, length: int) -> dict[str, int]:
    """By card, the largest power of two of samples that it should hold by lesson 02's rule; 0 if not one does."""
    found = {}
    for name, card in CARDS.items():
        fits = (2**n for n in range(8) if needed_by_script(model, 2**n, length).card_bytes <= card["GB"] * 1e9)
        found[name] = max(fits, default=0)
    return found


def seconds_at_best(model: str, card: dict, tokens: int) -> float:
    """Of a step with checkpointing: multiplications, then three times reading 4 bits, writing 16 and reading them.

    card: with "FLOP/s" and "bytes/s". tokens: of all samples that are in memory together.
    """
    from qlora_lab.memory import SHAPES

    shape = SHAPES[model]
    weights = shape.linear_parameters() + shape.vocab_size * shape.hidden_size
    unpacking = 3 * shape.linear_parameters() * (0.5 + 2 + 2)
    return 6 * weights * tokens / card["FLOP/s"] + unpacking / card["bytes/s"]


def hours(model: str, card: dict, batch: int, length: int, samples: int, epochs: float) -> float:
    """Of a training at `SHARE` of the best speed."""
    steps = samples * epochs / batch
    return steps * seconds_at_best(model, card, batch * length) / SHARE / 3600


def reckon(case: dict, batch: int, samples: int) -> None:
    """Tell what a run needs: GB of its card's, and hours, as planned and at half the speed.

    case: with "model" (a name in `memory.SHAPES`), "card" (as in CARDS), "length" and "epochs".
    """
    model, card, length = case["model"], case["card"], case["length"]
    need = needed_by_script(model, batch, length).card_bytes / 1e9
    took = hours(model, card, batch, length, samples, case["epochs"])
    print(f"{need:.1f} of {card['GB']} GB; {took:.1f} hours as planned, {2 * took:.1f} at half the speed")
