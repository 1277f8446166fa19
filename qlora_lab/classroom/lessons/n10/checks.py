"""Exercises of 10_memory_comparison."""

from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, described, exercise, expect_number, right, wrong

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


def row_of(method: str, loaded: int, allocated: int, reserved: int, **settings) -> dict:
    """A row like those of the record, in bytes."""
    return {
        **SETTINGS,
        **settings,
        "method": method,
        "measured": {"peak_allocated": allocated, "peak_reserved": reserved},
        "phases": {"load": {"allocated": loaded, "peak_allocated": loaded}},
    }


# Pairs that save 55 % (rank 64), 48 % (4 samples), 60 % (13B), 56 % (33B); rows without a partner try to mislead.
ROWS = [
    row_of("lora", 14_000_000_000, 15_000_000_000, 15_500_000_000),
    row_of("qlora", 4_000_000_000, 6_750_000_000, 7_000_000_000),
    row_of("qlora", 4_000_000_000, 10_400_000_000, 14_000_000_000, batch_size=4),
    row_of("lora", 14_000_000_000, 20_000_000_000, 25_000_000_000, batch_size=4),
    row_of("lora", 26_000_000_000, 25_000_000_000, 26_000_000_000, shape="llama-13b"),
    row_of("qlora", 7_000_000_000, 10_000_000_000, 12_000_000_000, shape="llama-13b"),
    row_of("lora", 14_000_000_000, 14_500_000_000, 15_000_000_000, rank=16, batch_size=16),
    row_of("qlora", 4_000_000_000, 12_000_000_000, 13_000_000_000, batch_size=16),
    row_of("qlora", 4_000_000_000, 11_500_000_000, 12_000_000_000, batch_size=4, targets=["q_proj", "v_proj"]),
    row_of("full", 27_000_000_000, 80_000_000_000, 82_000_000_000),
    row_of("qlora", 17_400_000_000, 22_000_000_000, 23_500_000_000, shape="llama-33b"),
    row_of("lora", 66_000_000_000, 50_000_000_000, 52_000_000_000, shape="llama-33b"),
]


@exercise("10.1", "the least saving", item="memory", points=2, todo="complete `least_saving`")
def check_savings(least_saving: Callable[[list[dict]], float]) -> Verdict:
    """least_saving(rows): per cent that QLoRA saves at the peak, for the pair of rows where that is least."""
    pairs = [(ROWS[0], ROWS[1]), (ROWS[3], ROWS[2]), (ROWS[4], ROWS[5]), (ROWS[11], ROWS[10])]
    for first, expected in [(0, 48.0), (4, 56.0)]:
        chosen = pairs if first == 0 else pairs[2:]
        peaks = [tuple(row["measured"]["peak_allocated"] for row in pair) for pair in chosen]
        reserved = [tuple(row["measured"]["peak_reserved"] for row in pair) for pair in chosen]
        loaded = [tuple(row["phases"]["load"]["allocated"] for row in pair) for pair in chosen]
        savings = [100 * (1 - qlora / lora) for lora, qlora in peaks]
        mixed = [
            100 * (1 - q["measured"]["peak_allocated"] / lo["measured"]["peak_allocated"])
            for lo in ROWS[first:]
            for q in ROWS[first:]
            if (lo["method"], q["method"]) == ("lora", "qlora")
        ]
        by_name = [
            100 * (1 - q["measured"]["peak_allocated"] / lo["measured"]["peak_allocated"])
            for lo in ROWS[first:]
            for q in ROWS[first:]
            if (lo["method"], q["method"], lo["shape"], lo["batch_size"])
            == ("lora", "qlora", q["shape"], q["batch_size"])
        ]
        no_targets = 100 * (1 - 11.5 / 20)
        mistakes = [
            (expected / 100, "That is a share: per cent are 100 times as much."),
            (100 - expected, "That is what is left: the saving is 100 % less this."),
            (max(100 * q / lora for lora, q in peaks), "That is what is left: the saving is 100 % less this."),
            (min(100 * q / lora for lora, q in peaks), "That is the least that is left, so the *largest* saving."),
            (
                min(100 * (lora / q - 1) for lora, q in peaks),
                "You divided by QLoRA's peak: a saving is a part of LoRA's.",
            ),
            (min((lora - q) / 1e9 for lora, q in peaks), "These are GB saved: per cent are asked for."),
            (-expected, "The sign: QLoRA takes less, and a saving is positive."),
            (min(100 * (1 - q / lora) for lora, q in reserved), "That is of `peak_reserved`: take `peak_allocated`."),
            (min(100 * (1 - q / lora) for lora, q in loaded), "That is the saving at load: take `measured`'s peak."),
            (no_targets, "That pair differs in `targets`: everything but the method must be equal."),
            (min(mixed), "You paired runs of different settings: everything but the method must be equal."),
            (min(by_name), "You paired runs that agree in some settings: `SETTINGS` names all that must be equal."),
            (savings[0], "That is the first pair's: take the least of all."),
            (savings[-1], "That is the last pair's: take the least of all."),
            (max(savings), "That is the largest saving: the least is asked for."),
            (sum(savings) / len(savings), "That is the mean: the least is asked for."),
        ]
        came = call(least_saving, [dict(row) for row in ROWS[first:]])
        expect_number("least_saving of a small made-up record", came, expected, mistakes)
    return right("In the H100's record it is 41 %: what grows with the tokens is not quantized.")


@exercise("10.2", "the missing gigabytes", item="memory", points=1, todo="complete `bytes_on_the_card`")
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


@exercise("10.3", "the fastest preset for a card", item="memory", points=2, todo="complete `fastest_preset`")
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
