"""Exercises of 02_memory_wall."""

from collections.abc import Callable

from qlora_lab.classroom.judging import (
    Mistake,
    Verdict,
    call,
    described,
    error_text,
    exercise,
    expect_number,
    right,
    wrong,
)
from qlora_lab.memory.prediction import MemoryBreakdown, estimate
from qlora_lab.memory.shapes import SHAPES, Shape

FOUR_BITS = 4 + 8 / 64 + 32 / (64 * 256)


@exercise("2.1", "the sum for any model", item="memory", points=2, todo="complete `gigabytes`")
def check_gigabytes(gigabytes: Callable[[Shape, float, int], float]) -> Verdict:
    """gigabytes(shape, bits, trained): GB of a frozen model, whose linears have `bits` bits, and of what is trained.

    trained: adapter parameters in fp32, each with its gradient and Adam's two numbers.
    """
    for name, bits, trained in [("llama-3-8b", FOUR_BITS, 40_000_000), ("llama-7b", 16, 0), ("smollm2-135m", 8, 10**7)]:
        shape = SHAPES[name]
        linear, all_of_them = shape.linear_parameters(), shape.parameters()
        others = all_of_them - linear

        def total(linear_bits: float, others_bytes: float, each: float, linear=linear, others=others, trained=trained):
            return (linear * linear_bits / 8 + others * others_bytes + each * trained) / 1e9

        expected = total(bits, 2, 16)
        mistakes = [
            (expected * 1e9, "These are bytes: GB are asked for, 10^9 bytes."),
            (expected * 1e9 / 2**30, "These are GiB (2^30 bytes): a GB has 10^9."),
            (total(8 * bits, 16, 16), "A byte has eight bits: the weights must be divided by 8."),
            (total(8 * bits, 2, 16), "A byte has eight bits: divide the linears' by 8."),
            (total(bits, bits / 8, 16), "Embeddings, output layer and norms are not quantized: 2 bytes each."),
            (total(bits, 0, 16), "The linears are not all: embeddings, output layer and norms come on top."),
            (total(bits, 4, 16), "The others have 16 bits here: 2 bytes each, not 4."),
            (
                (all_of_them * bits / 8 + 2 * others + 16 * trained) / 1e9,
                "The others are counted twice: once with the linears' bits, and once with 16.",
            ),
            (total(bits, 2, 0), "The adapter is missing, and all that training adds to it."),
            (total(bits, 2, 4), "This is the adapter at rest: its gradients and Adam's two numbers are missing."),
            (total(bits, 2, 8), "Adam's two numbers for each trained parameter are missing."),
            (total(bits, 2, 12), "Something has 12 bytes where it needs 16: parameter, gradient, and *two* of Adam's."),
            (total(bits, 2, 2), "An adapter parameter has 4 bytes here, and training adds twelve more."),
            (total(bits, 2, 20), "16 bytes each: an adapter in fp32 needs no other fp32 copy."),
        ]
        source = f"gigabytes(SHAPES[{name!r}], {bits:.7g}, {trained:,})"
        # 1e-6: 4.126953 bits are near enough
        expect_number(source, call(gigabytes, shape, bits, trained), expected, mistakes, 1e-6)
    return right("Llama-3-8B with an adapter of 40 million: 6.3 GB, of which embeddings and output layer take 2.1.")


# Four steps that do not fit their card by `room_for`, and five changes: with exactly one of these, each of them does.
PATIENTS = {
    "Ada": ("llama-7b", "lora", 16, {"rank": 128, "batch_size": 4}),
    "Ben": ("llama-3-8b", "qlora", 24, {"rank": 64, "batch_size": 8, "gradient_checkpointing": False}),
    "Carla": ("mistral-7b", "qlora", 16, {"rank": 256, "batch_size": 12}),
    "Dora": ("llama-3-8b", "qlora", 24, {"rank": 16, "batch_size": 16}),
}
CHANGES = ("4 bits", "checkpointing", "half the samples", "a quarter of the rank", "8-bit Adam")


def room_for(memory: MemoryBreakdown) -> float:
    """GB (10^9 bytes) that a card should have for a step."""
    return memory.card_bytes / 1e9


def step_of(patient: str, change: str = "") -> MemoryBreakdown:
    """A patient's step, as it is or with one of CHANGES."""
    model, method, _, settings = PATIENTS[patient]
    changed = dict(settings)
    if change == "checkpointing":
        changed["gradient_checkpointing"] = True
    elif change == "half the samples":
        changed["batch_size"] //= 2
    elif change == "a quarter of the rank":
        changed["rank"] //= 4
    elif change == "8-bit Adam":
        changed["optimizer"] = "paged_adamw_8bit"
    return estimate(SHAPES[model], "qlora" if change == "4 bits" else method, **changed)


@exercise("2.2", "four steps that do not fit", item="memory", points=2, todo="fill in `cures`")
def check_cures(cures: dict[str, str]) -> Verdict:
    """cures: by patient, the one of CHANGES with which the step fits the card."""
    if not isinstance(cures, dict) or not set(PATIENTS) <= set(cures):
        return wrong(f"expected a dict with a change for {', '.join(PATIENTS)}, got {described(cures)}.")
    for patient, (_, _, card, _) in PATIENTS.items():
        change = cures[patient]
        if not isinstance(change, str) or change not in CHANGES:
            return wrong(f"{patient} has {described(change)}, expected one of {', '.join(map(repr, CHANGES))}.")
        before, after = room_for(step_of(patient)), room_for(step_of(patient, change))
        if after > card:
            too_many = f"{before - card:.1f}"
            if after == before:
                return wrong(f"{patient}: '{change}' changes nothing, but {too_many} are too many for {card} GB.")
            saved = f"{before - after:.1f}"
            return wrong(f"{patient}: '{change}' saves {saved} GB, but {too_many} are too many for {card} GB.")
    return right("Four near misses, each of which costs an evening if it is found out by trying.")


def shape_of(model: object) -> Shape:
    """A shape, by its name in SHAPES or as it is. Raises Mistake for anything else."""
    if isinstance(model, str) and model.lower() in SHAPES:
        return SHAPES[model.lower()]
    if isinstance(model, Shape):
        return model
    raise Mistake(f"the model is {described(model)}: expected one of {', '.join(SHAPES)}, or what `from_config` gives.")


@exercise("2.3", "your model on your card", item="memory", points=2, todo="fill in `mine`")
def check_mine(mine: dict) -> Verdict:
    """mine: model, card (GB), tokens (in a sample) and the most samples whose QLoRA step fits by `room_for`."""
    names = ("model", "card", "tokens", "samples")
    if not isinstance(mine, dict) or set(mine) != set(names):
        return wrong(f"expected a dict with {', '.join(map(repr, names))}, got {described(mine)}.")
    shape, card = shape_of(mine["model"]), mine["card"]
    if not isinstance(card, (int, float)) or isinstance(card, bool) or not 1 <= card <= 1000:
        return wrong(f"the card is {described(card)}, expected its size in GB, such as 16.")
    for name in ("tokens", "samples"):
        if not isinstance(mine[name], int) or isinstance(mine[name], bool) or mine[name] < 1:
            return wrong(f"{name}: {described(mine[name])}, expected a whole number from 1 on.")
    samples, tokens = mine["samples"], mine["tokens"]
    if tokens < 2:
        return wrong("a sample of one token has nothing to learn: expected 2 tokens or more.")

    def needs(batch: int) -> float:
        return room_for(estimate(shape, batch_size=batch, sequence_length=tokens))

    try:
        least, now, more = needs(1), needs(samples), needs(samples + 1)
    except ValueError as error:
        return wrong(f"estimate does not take these settings: {error_text(error)}.")
    if least > card:
        return wrong(f"One sample asks for {least:.1f} GB of {card:g} already: a larger card, or a smaller model?")
    sum_alone = estimate(shape, batch_size=samples, sequence_length=tokens).total / 1e9
    if now > card and sum_alone <= card - 1:
        return wrong(f"{samples:,} samples leave a GB free, but the gaps grow, too: the rule asks for {now:.1f} GB.")
    if now > card:
        return wrong(f"{samples:,} samples ask for {now:.1f} GB, and the card has {card:g}.")
    if more <= card:
        return wrong(f"There is room: {samples + 1:,} samples ask for {more:.1f} GB, and the card has {card:g}.")
    return right(f"{samples:,} samples ask for {now:.1f} GB, one more for {more:.1f}, and the card has {card:g}.")
