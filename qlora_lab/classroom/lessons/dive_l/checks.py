"""Exercises of dive_l_small_cards."""

from collections.abc import Callable

from qlora_lab.classroom.judging import (
    Verdict,
    call,
    described,
    error_text,
    exercise,
    expect_number,
    right,
    written,
    wrong,
)
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import SHAPES

SETTINGS = {
    "shape": "llama-7b",
    "rank": 64,
    "targets": "all-linear",
    "batch_size": 1,
    "sequence_length": 512,
    "gradient_checkpointing": True,
    "optimizer": "paged_adamw_32bit",
    "adapter_dtype": "float32",
    "full_precision": "float32",
}


@exercise("L.1", "the missing gigabytes", item="memory", points=1, todo="complete `bytes_on_the_card`")
def check_card_usage(bytes_on_the_card: Callable[[dict, int], float]) -> Verdict:
    """bytes_on_the_card(run, context): bytes that the driver should count, reserved and managed and context."""
    for allocated, reserved, managed, context in [
        (5_434_365_952, 5_658_116_096, 1_279_262_720, 648_871_936),
        (20_000_000_000, 23_000_000_000, 0, 300_000_000),
    ]:
        expected = reserved + managed + context
        mistakes = [
            (allocated + managed + context, "Torch also holds the gaps between tensors: begin with what is reserved."),
            (allocated + expected, "Tensors lie inside what is reserved: you counted them twice."),
            (allocated + reserved + context, "Tensors lie inside what is reserved, and managed memory is missing."),
            (expected / 1e9, "These are GB: return bytes."),
            (expected / 2**30, "These are GiB: return bytes."),
            (reserved + managed + 500_000_000, "That is `estimate`'s context: this machine's comes as an argument."),
            (allocated, "These are the tensors alone."),
            (reserved - allocated + managed + context, "That is what is missing: the tensors belong to the sum too."),
        ]
        if managed:  # otherwise these are right
            mistakes += [(reserved + context, "The optimizer's states are missing: they lie in managed memory.")]
            mistakes += [(allocated + context, "Reserved instead of allocated, and managed memory on top.")]
        mistakes += [
            (reserved + managed, "The CUDA context is missing: the driver counts its own too."),
            (reserved, "This is torch's part alone: managed memory and the context lie beside it."),
        ]
        measured = {"peak_allocated": allocated, "peak_reserved": reserved, "managed_bytes": managed}
        came = call(bytes_on_the_card, {**SETTINGS, "method": "qlora", "measured": measured}, context)
        expect_number(f"bytes_on_the_card with {reserved:,} bytes reserved", came, expected, mistakes)
    return right("7.59 GB for the 7B step: the driver counts 7.80, torch's allocator knows of 5.43.")


def cap_of(shape: str, preset: str, card: int, seconds: float | None, reserved: int = 1) -> dict:
    """A row like those of `record["caps"]`; seconds: None if it ran out of memory."""
    row = {**SETTINGS, "shape": shape, "preset": preset, "card_gb": card, "method": "qlora"}
    if seconds is None:
        return {**row, "out_of_memory": {"after": "adapter", "message": "CUDA out of memory."}}
    return {**row, "measured": {"step_seconds": seconds, "peak_reserved": reserved * 10**9}}


CAPS = [
    cap_of("llama-7b", "standard", 6, None),
    cap_of("llama-7b", "standard", 8, 0.6, 6),
    cap_of("llama-7b", "lean", 5, 0.9, 4),
    cap_of("llama-7b", "bf16-adapters", 5, None),
    cap_of("llama-7b", "bf16-adapters", 6, 0.7, 5),
    cap_of("llama-7b", "in-backward", 6, 0.8, 5),
    cap_of("llama-13b", "in-backward", 10, 0.5, 9),
]


@exercise("L.2", "the fastest preset for a card", item="memory", points=2, todo="complete `fastest_preset`")
def check_fastest_preset(fastest_preset: Callable[[list[dict], str, int], str | None]) -> Verdict:
    """fastest_preset(rows, shape, card_gb): the preset with the fewest seconds a step among those that train there."""
    asked = [
        (24, "standard", "Runs on smaller cards count: what trains on 8 GB trains on 24."),
        (6, "bf16-adapters", ""),
        (7, "bf16-adapters", "No run has a cap of 7 GB, but those of 6 GB and less count."),
        (5, "lean", ""),
    ]
    for card, expected, hint in asked:
        try:
            came = call(fastest_preset, [dict(row) for row in CAPS], "llama-7b", card)
        except NotImplementedError:
            if card != 24:
                return wrong(f"On {card} GB fastest_preset gives nothing, expected {expected!r}. {hint}")
            raise
        if isinstance(came, dict):
            return wrong(f"fastest_preset gives a whole row: its name is in row['preset'], here {expected!r}.")
        if not isinstance(came, str):
            return wrong(f"fastest_preset gives {described(came)}, expected the name of a preset, {expected!r}.")
        if came != expected:
            why = {
                (24, "in-backward"): "That is 13B's: look at the shape.",
                (24, "lean"): "It needs the least memory, or is the slowest: the fewest seconds are asked for.",
                (6, "standard"): "On 6 GB it ran out of memory, and the run on 8 GB does not count.",
                (6, "lean"): "It trains on 6 GB, but takes more seconds a step than another.",
                (6, "in-backward"): "It trains on 6 GB, but takes more seconds a step than another.",
                (5, "bf16-adapters"): "On 5 GB it ran out of memory.",
            }.get((card, came), hint)
            return wrong(f"For 7B on {card} GB fastest_preset gives {came!r}, expected {expected!r}. {why}")
    try:
        nothing = call(fastest_preset, [dict(row) for row in CAPS], "llama-7b", 4)
    except NotImplementedError:  # None, as it should be
        nothing = None
    if nothing is not None:
        return wrong(f"Nothing trains 7B on 4 GB: return None, not {described(nothing)}.")
    return right("With a preset for every card, none is too small by a little.")


@exercise("L.3", "what logits leave room for", item="memory", points=2, todo="complete `tokens_that_fit`")
def check_logits(tokens_that_fit: Callable[[int, float], int]) -> Verdict:
    """tokens_that_fit(vocabulary, gigabytes): how many whole tokens' logits and loss fit, 3 fp32 numbers for each."""
    for vocabulary, gigabytes in [(32000, 8), (128256, 8), (49152, 2.5)]:
        room = gigabytes * 1e9
        expected = int(room // (12 * vocabulary))
        mistakes = [
            (room / (12 * vocabulary), "A fraction of a token is no token: round down."),
            (expected + 1, "Rounded up, the last token does not fit: round down."),
            (room // (4 * vocabulary), "This is one fp32 number for each word: at the peak there are three."),
            (room // (2 * vocabulary), "This is one 16-bit number for each word: at the peak there are three in fp32."),
            (room // (6 * vocabulary), "The three numbers are fp32: 4 bytes each, not 2."),
            (room // (8 * vocabulary), "Three fp32 numbers for each word, not two."),
            (room // (16 * vocabulary), "Three fp32 numbers for each word, not four."),
            (room // (96 * vocabulary), "The 12 are bytes already: no factor of 8."),
            (gigabytes * 2**30 // (12 * vocabulary), "These are GiB: 1 GB is 10^9 bytes."),
            (gigabytes // (12 * vocabulary), "GB and bytes are mixed: 1 GB is 10^9 bytes."),
        ]
        source = written(tokens_that_fit, (vocabulary, gigabytes))
        expect_number(source, call(tokens_that_fit, vocabulary, gigabytes), expected, mistakes)
    return right("8 GB hold 20,833 tokens of LLaMA's vocabulary, and 5,197 of Llama 3's, which is four times as large.")


KNOBS = ("batch_size", "sequence_length", "gradient_checkpointing", "optimizer", "adapter_dtype", "double_quant")


@exercise("L.4", "13B on a 12 GB card", item="memory", points=2, todo="fill in `settings`")
def check_12_gb(settings: dict) -> Verdict:
    """settings: arguments of `estimate` under which LLaMA-13B trains within 12 GB, rank 64, 3,072 tokens a step."""
    if not isinstance(settings, dict):
        return wrong(f"expected a dict of estimate's settings, got {described(settings)}.")
    if unknown := [name for name in settings if name not in KNOBS]:
        why = "The task fixes it." if unknown[0] in ("rank", "targets", "method", "shape") else ""
        return wrong(f"{unknown[0]!r} is not among the settings to choose: {', '.join(KNOBS)}. {why}")
    batch, length = settings.get("batch_size", 1), settings.get("sequence_length", 512)
    for name, value in (("batch_size", batch), ("sequence_length", length)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return wrong(f"{name} is {described(value)}, expected a whole number from 1 on.")
    try:
        needed = estimate(SHAPES["llama-13b"], "qlora", rank=64, targets="all-linear", **settings)
        total = needed.total
    except Exception as error:
        return wrong(f"estimate does not take these settings: {error_text(error)}.")
    if batch * length < 3072:
        return wrong(f"{batch} × {length} are {batch * length} tokens a step, expected 3,072 at least. Pay elsewhere.")
    if total > 12e9:
        parts = needed.parts | needed.outside
        fixed = ("base weights", "quantization constants", "embeddings and head", "norms", "CUDA context")
        largest = max((name for name in parts if name not in fixed), key=parts.__getitem__)
        return wrong(
            f"{total / 1e9:.2f} GB, {(total - 12e9) / 1e9:.2f} GB too many. The largest part that you can change: "
            f"{largest}, {parts[largest] / 1e9:.2f} GB."
        )
    return right(f"{total / 1e9:.2f} GB: a model of 26 GB in 16 bits trains on a 12 GB card, by arithmetic.")
