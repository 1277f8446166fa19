"""Answers to the exercises of 10_memory_comparison: right ones, found by another way, and likely mistakes."""

from qlora_lab.classroom.checks import check_choice, check_qlora_peak
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import SHAPES


def by_hand(shape, lora_peak):
    total = 0
    for inputs, outputs in shape.linears().values():
        blocks = inputs * outputs / 64
        total += 2 * inputs * outputs - inputs * outputs / 2 - blocks - 4 * blocks / 256
    return lora_peak - shape.num_hidden_layers * total / 10**9


def with_saving(of):
    """qlora_peak with another result, from LoRA's peak and the billions of linear and of all parameters."""
    return lambda s, peak: of(peak, s.linear_parameters() / 1e9, s.parameters() / 1e9)


def totals(model, samples, tokens):
    both = (estimate(SHAPES[model], method, batch_size=samples, sequence_length=tokens) for method in ("lora", "qlora"))
    return [memory.total / 1e9 for memory in both]


LEFT = (4 + 8 / 64 + 32 / 64 / 256) / 8  # bytes of a linear's parameter
LORA, QLORA = totals("llama-7b", 4, 512)
SAVED = (LORA - QLORA) / LORA * 100
TENSORS = [
    estimate(SHAPES["llama-7b"], method, batch_size=4, sequence_length=512).peak_allocated
    for method in ("lora", "qlora")
]
CHOICE = {"model": "llama-7b", "card": 16, "samples": 4, "tokens": 512, "saved": SAVED, "method": "QLoRA"}

RIGHT = [
    (check_qlora_peak, (by_hand,)),
    (check_qlora_peak, (lambda shape, peak: peak - (16 - 4.127) / 8 * shape.linear_parameters() / 1e9,)),
    (check_choice, (CHOICE,)),
    (check_choice, (CHOICE | {"saved": round(SAVED)},)),
    (check_choice, (CHOICE | {"model": SHAPES["llama-7b"], "card": 24.0, "method": "LoRA"},)),
]

WRONG = [  # and what the learner must be told
    (check_qlora_peak, with_saving(lambda peak, n, _: n * (2 - LEFT)), "This is what is saved"),
    (check_qlora_peak, with_saving(lambda peak, n, _: peak + n * (2 - LEFT)), "QLoRA needs less"),
    (check_qlora_peak, with_saving(lambda peak, n, _: 1e9 * (peak - n * (2 - LEFT))), "These are bytes"),
    (check_qlora_peak, with_saving(lambda peak, n, _: peak - 1e9 * n * (2 - LEFT)), "The saving is in bytes"),
    (check_qlora_peak, with_saving(lambda peak, n, _: peak - 8 * n * (2 - LEFT)), "The saving is in bits"),
    (check_qlora_peak, with_saving(lambda peak, n, _: peak - 1.5 * n), "The scales are missing"),
    (check_qlora_peak, with_saving(lambda peak, n, _: peak - 2 * n), "gone altogether"),
    (check_qlora_peak, with_saving(lambda peak, n, _: peak - LEFT * n), "what is *left* of the linears"),
    (check_qlora_peak, with_saving(lambda peak, _, n: peak - n * (2 - LEFT)), "are not quantized: linears only"),
    (check_qlora_peak, with_saving(lambda peak, *_: peak * LEFT / 2), "Only the linears shrink"),
    (check_qlora_peak, with_saving(lambda peak, *_: peak * (1 - 0.71)), "A percentage does not carry over"),
    (check_qlora_peak, lambda shape, peak: 5.0, "expected 5.3887"),
    (check_choice, CHOICE | {"saved": SAVED / 100}, "That is a share"),
    (check_choice, CHOICE | {"saved": 100 - SAVED}, "what is left"),
    (check_choice, CHOICE | {"saved": 100 * (LORA / QLORA - 1)}, "divided by QLoRA's total"),
    (check_choice, CHOICE | {"saved": LORA - QLORA}, "These are GB saved"),
    (check_choice, CHOICE | {"saved": 100 * (1 - TENSORS[1] / TENSORS[0])}, "of torch's tensors"),
    (check_choice, CHOICE | {"saved": -SAVED}, "a saving is positive"),
    (check_choice, CHOICE | {"card": 8}, "QLoRA asks for 9.6 GB, and the card has 8"),
    (check_choice, CHOICE | {"method": "LoRA"}, "which is too small for it"),
    (check_choice, CHOICE | {"card": 24}, "so four bits are not needed"),
    (check_choice, CHOICE | {"method": "full"}, "expected 'LoRA' or 'QLoRA'"),
    (check_choice, CHOICE | {"model": "llama-9b"}, "expected one of llama-7b"),
    (check_choice, CHOICE | {"card": "T4"}, "expected its size in GB"),
    (check_choice, CHOICE | {"samples": 0}, "whole number from 1 on"),
    (check_choice, CHOICE | {"tokens": 1}, "whole number from 2 on"),
    (check_choice, {"model": "llama-7b"}, "expected a dict with 'model', 'card'"),
]
