"""Exercises of 10_memory_comparison."""

from collections.abc import Callable

from qlora_lab.classroom.judging import (
    Verdict,
    call,
    described,
    error_text,
    exercise,
    expect_number,
    right,
    wrong,
)
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import SHAPES, Shape

FOUR_BITS = 4 + 8 / 64 + 32 / (64 * 256)


@exercise("10.1", "QLoRA's peak from LoRA's", item="memory", points=2, todo="complete `qlora_peak`")
def check_qlora_peak(qlora_peak: Callable[[Shape, float], float]) -> Verdict:
    """qlora_peak(shape, lora_peak): GB of torch's tensors with QLoRA, from those with LoRA."""
    for name, lora in [("llama-7b", 15.0), ("llama-3-8b", 25.0)]:
        shape = SHAPES[name]
        linear, others = shape.linear_parameters() / 1e9, shape.parameters() / 1e9
        expected = lora - linear * (2 - FOUR_BITS / 8)
        mistakes = [
            (linear * (2 - FOUR_BITS / 8), "This is what is saved: take it from LoRA's peak."),
            (lora + linear * (2 - FOUR_BITS / 8), "QLoRA needs less: take the saving away, do not add it."),
            (lora * 1e9 - linear * 1e9 * (2 - FOUR_BITS / 8), "These are bytes: LoRA's peak is in GB."),
            (lora - linear * 1e9 * (2 - FOUR_BITS / 8), "The saving is in bytes and LoRA's peak in GB."),
            (lora - linear * (16 - FOUR_BITS), "The saving is in bits: a byte has eight."),
            (lora - linear * 1.5, "The scales are missing: 4.127 bits are left of 16, not 4."),
            (lora - linear * 2, "The linears are gone altogether here: they keep 4.127 bits each."),
            (
                lora - linear * FOUR_BITS / 8,
                "This takes away what is *left* of the linears: 16 bits less 4.127 are saved.",
            ),
            (lora - others * (2 - FOUR_BITS / 8), "Embedding, output layer and norms are not quantized: linears only."),
            (lora * FOUR_BITS / 16, "Only the linears shrink, not everything that LoRA needs."),
            (lora * 0.29, "A percentage does not carry over: count the bits that the linears lose."),
        ]
        came = call(qlora_peak, shape, lora)
        # 1e-4: 4.127 bits are near enough
        expect_number(f"qlora_peak(SHAPES[{name!r}], {lora:g})", came, expected, mistakes, 1e-4)
    return right("The cell below holds it against nine measured pairs.")


@exercise("10.2", "LoRA or QLoRA, on your card", item="memory", points=2, todo="fill in `choice`")
def check_choice(choice: dict) -> Verdict:
    """choice: model, card (GB), samples, tokens (in each), saved (per cent of LoRA's total) and the method to take."""
    names = ("model", "card", "samples", "tokens", "saved", "method")
    if not isinstance(choice, dict) or set(choice) != set(names):
        return wrong(f"expected a dict with {', '.join(map(repr, names))}, got {described(choice)}.")
    model, card, method = choice["model"], choice["card"], choice["method"]
    if not isinstance(model, Shape) and not (isinstance(model, str) and model in SHAPES):
        return wrong(f"the model is {described(model)}: expected one of {', '.join(SHAPES)}, or a shape.")
    if not isinstance(card, (int, float)) or isinstance(card, bool) or not 1 < card <= 1000:
        return wrong(f"the card is {described(card)}, expected its size in GB, such as 16.")
    for name, least in (("samples", 1), ("tokens", 2)):
        value = choice[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            return wrong(f"{name}: {described(value)}, expected a whole number from {least} on.")
    if method not in ("LoRA", "QLoRA"):
        return wrong(f"the method is {described(method)}, expected 'LoRA' or 'QLoRA'.")
    shape = model if isinstance(model, Shape) else SHAPES[model]
    settings = {"batch_size": choice["samples"], "sequence_length": choice["tokens"]}
    try:
        both = [estimate(shape, name, **settings) for name in ("lora", "qlora")]
    except ValueError as error:
        return wrong(f"estimate does not take these settings: {error_text(error)}.")
    lora, qlora = (memory.total / 1e9 for memory in both)
    expected, tensors = 100 * (1 - qlora / lora), [memory.peak_allocated for memory in both]
    mistakes = [
        (expected / 100, "That is a share: per cent are 100 times as much."),
        (100 - expected, "That is what is left: the saving is the rest."),
        (100 * (lora / qlora - 1), "You divided by QLoRA's total: a saving is a part of LoRA's."),
        (lora - qlora, "These are GB saved: per cent are asked for."),
        (100 * (1 - tensors[1] / tensors[0]), "That is of torch's tensors: the card must hold the total."),
        (-expected, "The sign: QLoRA takes less, and a saving is positive."),
    ]
    # whole per cents are near enough
    expect_number("the saving", choice["saved"], expected, mistakes, 0.5 / expected)
    for_lora, for_qlora = (memory.card_bytes / 1e9 for memory in both)
    if for_qlora > card:
        return wrong(f"QLoRA asks for {for_qlora:.1f} GB, and the card has {card:g}: a smaller step, or a larger card?")
    needed = "LoRA" if for_lora <= card else "QLoRA"
    if method != needed:
        why = "so four bits are not needed" if needed == "LoRA" else "which is too small for it"
        return wrong(f"LoRA asks for {for_lora:.1f} GB, and the card has {card:g}, {why}.")
    return right(f"LoRA asks for {for_lora:.1f} GB, QLoRA for {for_qlora:.1f}, and the card has {card:g}: {needed}.")
