"""Answers to the exercises of 10_memory_comparison: right ones, found by another way, and likely mistakes."""

from qlora_lab.classroom.checks import check_card_usage, check_fastest_preset, check_savings

NAMES = ["shape", "rank", "targets", "batch_size", "sequence_length"]
NAMES += ["gradient_checkpointing", "optimizer", "adapter_dtype"]


def pairs_of(rows, names=NAMES):
    for lora in rows:
        for qlora in rows:
            if (lora["method"], qlora["method"]) == ("lora", "qlora") and all(lora[n] == qlora[n] for n in names):
                yield lora, qlora


def peak(row):
    return row["measured"]["peak_allocated"]


def savings(rows, names=NAMES, size=peak):
    return [100 - 100 * size(qlora) / size(lora) for lora, qlora in pairs_of(rows, names)]


def least_saving(rows):
    return sorted(savings(rows))[0]


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


RIGHT = [
    (check_savings, (least_saving,)),
    (check_card_usage, (on_the_card,)),
    (check_fastest_preset, (fastest,)),
    (check_fastest_preset, (lambda rows, shape, card: chosen(rows, shape, card, step_seconds),)),
]

WRONG = [  # and what the learner must be told
    (check_savings, lambda rows: least_saving(rows) / 100, "That is a share"),
    (check_savings, lambda rows: 100 - least_saving(rows), "what is left"),
    (check_savings, lambda rows: min(100 - s for s in savings(rows)), "so the *largest* saving"),
    (check_savings, lambda rows: min(100 * (peak(a) / peak(b) - 1) for a, b in pairs_of(rows)), "divided by QLoRA's"),
    (check_savings, lambda rows: min((peak(a) - peak(b)) / 1e9 for a, b in pairs_of(rows)), "These are GB saved"),
    (check_savings, lambda rows: -least_saving(rows), "a saving is positive"),
    (check_savings, lambda rows: min(savings(rows, size=reserved)), "of `peak_reserved`"),
    (
        check_savings,
        lambda rows: min(savings(rows, size=lambda row: row["phases"]["load"]["allocated"])),
        "the saving at load",
    ),
    (check_savings, lambda rows: min(savings(rows, [n for n in NAMES if n != "targets"])), "differs in `targets`"),
    (check_savings, lambda rows: min(savings(rows, [])), "everything but the method"),
    (check_savings, lambda rows: min(savings(rows, ["shape", "batch_size"])), "`SETTINGS` names all"),
    (check_savings, lambda rows: savings(rows)[0], "the first pair's"),
    (check_savings, lambda rows: savings(rows)[-1], "the last pair's"),
    (check_savings, lambda rows: max(savings(rows)), "the largest saving"),
    (check_savings, lambda rows: sum(savings(rows)) / len(savings(rows)), "the mean"),
    (check_savings, lambda rows: savings(rows), "expected one number"),
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
        "return None, not the str 'none'",
    ),  # fmt: skip
    (check_fastest_preset, lambda rows, shape, card: rows[1], "a whole row"),
    (check_fastest_preset, lambda rows, shape, card: min(r["card_gb"] for r in rows), "expected the name of a preset"),
]
