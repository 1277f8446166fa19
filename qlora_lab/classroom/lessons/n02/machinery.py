"""What 02_memory_wall computes behind its folded cells: parts of memory taken together, tables, and a measured step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_lab.classroom.lessons.n02.checks import PATIENTS, room_for, step_of
from qlora_lab.classroom.lessons.n02.figures import MEMORY_STYLES
from qlora_lab.memory import SHAPES, MemoryBreakdown, estimate
from qlora_lab.places import RECORDS

GROUPS = {  # `estimate`'s parts by the lesson's names; parts that are not here keep theirs
    **dict.fromkeys(("base weights", "quantization constants", "embeddings and head", "norms", "biases"), "weights"),
    **dict.fromkeys(("bf16 copies", "dequantized weight", "update", "cuBLAS workspace"), "helpers"),
    "master weights": "fp32 copy",
    "paged optimizer states": "optimizer states",
}
METHODS = {"full fine-tuning": "full", "LoRA": "lora", "QLoRA": "qlora"}
TARGETS = {
    "all linears": "all-linear",
    "q, k, v, o": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "q, v": ("q_proj", "v_proj"),
}


def grouped(memory: MemoryBreakdown) -> dict[str, float]:
    """GB (10^9 bytes) by the lesson's parts, keys of MEMORY_STYLES; only those that are there at the peak."""
    groups: dict[str, float] = {}
    for part, size in (memory.parts | memory.outside).items():
        group = GROUPS.get(part, part)
        groups[group] = groups.get(group, 0) + size / 1e9
    return {group: size for group, size in groups.items() if size}


def table(columns: dict[str, dict[str, float]]) -> str:
    """One row a part and one column a bar, in GB, with the sums in the last row."""
    lines = [" " * 18 + "".join(f"{name:>18}" for name in columns)]
    for part in (part for part in MEMORY_STYLES if any(part in column for column in columns.values())):
        cells = [f"{column[part]:.2f}" if part in column else "–" for column in columns.values()]
        lines.append(f"{part:<18}" + "".join(f"{cell:>18}" for cell in cells))
    sums = [f"{sum(column.values()):.2f} GB" for column in columns.values()]
    return "\n".join([*lines, f"{'in all':<18}" + "".join(f"{cell:>18}" for cell in sums)])


@dataclass(frozen=True)
class MeasuredStep:
    """A QLoRA step of LLaMA-7B's shape as it was measured: device and date, and bytes.

    allocated: the most that torch's tensors took. on_the_card: the most that the driver counted, as in nvidia-smi.
    """

    device: str
    date: str
    allocated: int
    on_the_card: int


def read_record() -> dict:
    """Steps as one H100 measured them."""
    path = RECORDS / "memory-nvidia-h100-80gb-hbm3.json"
    return json.loads(path.read_text(encoding="utf-8"))


def measured_runs(batch_size: int = 1) -> tuple[dict, dict]:
    """The record, and its run of LLaMA-7B with QLoRA: rank 64, samples of 512 tokens, checkpointing, paged AdamW."""
    record = read_record()
    wanted = {"shape": "llama-7b", "method": "qlora", "rank": 64, "batch_size": batch_size, "sequence_length": 512}
    wanted |= {"gradient_checkpointing": True, "targets": "all-linear", "optimizer": "paged_adamw_32bit"}
    return record, next(run for run in record["runs"] if wanted.items() <= run.items() and "measured" in run)


def measured_step(batch_size: int = 1) -> MeasuredStep:
    """That run, from data/records/."""
    record, run = measured_runs(batch_size)
    measured = run["measured"]
    on_the_card = measured["peak_reserved"] + measured["outside_allocator"]
    return MeasuredStep(record["device"], record["date"], measured["peak_allocated"], on_the_card)


def batches_on_the_card() -> list[tuple[int, MemoryBreakdown, float]]:
    """(samples, our sum, GB on the card) of the measured batches."""
    shape = SHAPES["llama-7b"]
    return [(batch, estimate(shape, batch_size=batch), measured_step(batch).on_the_card / 1e9) for batch in (1, 4, 16)]


def recorded_needs(models: Sequence[str]) -> list[tuple[MemoryBreakdown, float]]:
    """(our sum, GB on the card) of all QLoRA steps of these models in the record.

    What lies outside torch's memory piles up over the runs of one process. So it is counted here as the states of the
    paged optimizer, the driver's own memory at the start, and what `measured_step` has beyond those.
    """
    record = read_record()
    first, context = measured_runs()[1]["measured"], record["outside_allocator_at_start"]
    unexplained = measured_step().on_the_card - first["peak_reserved"] - first["managed_bytes"] - context
    settings = ("rank", "batch_size", "sequence_length", "gradient_checkpointing", "targets", "optimizer")
    needs = []
    for run in record["runs"]:
        if run["shape"] in models and run["method"] == "qlora" and "measured" in run:
            memory = estimate(SHAPES[run["shape"]], **{name: run[name] for name in settings})
            measured = run["measured"]
            taken = measured["peak_reserved"] + measured["managed_bytes"] + context + unexplained
            needs.append((memory, taken / 1e9))
    return needs


def fitting_methods(models: Sequence[str], cards: Sequence[int]) -> dict[str, list[str]]:
    """By model: for each card (GB), the first of full fine-tuning, LoRA and QLoRA that fits it by `room_for`.

    One sample of 512 tokens, rank 64, checkpointing, paged AdamW.
    """
    fitting = {}
    for model in models:
        needs = {
            name: room_for(estimate(SHAPES[model], method, full_precision="mixed")) for name, method in METHODS.items()
        }
        fitting[model] = [next((name for name, size in needs.items() if size <= card), "–") for card in cards]
    return fitting


def steps_that_fail() -> dict[str, dict[str, float]]:
    """The steps of exercise 2.2: their parts in GB."""
    return {patient: grouped(step_of(patient)) for patient in PATIENTS}


def table_of_steps(steps: dict[str, dict[str, float]]) -> str:
    """Settings of the steps of exercise 2.2, their parts, their card, and what they lack, in GB: one column a step.

    The parts are as the rule counts them: activations and logits one and a half times, and one GB to spare.
    """
    rows: dict[str, list[str]] = {"": list(steps)}
    rows["model"] = [model for model, _, _, _ in PATIENTS.values()]
    rows["method"] = [{"lora": "LoRA", "qlora": "QLoRA"}[method] for _, method, _, _ in PATIENTS.values()]
    settings = [settings for *_, settings in PATIENTS.values()]
    rows["rank"] = [str(each["rank"]) for each in settings]
    rows["samples"] = [str(each["batch_size"]) for each in settings]
    rows["checkpointing"] = ["yes" if each.get("gradient_checkpointing", True) else "no" for each in settings]
    for part in MEMORY_STYLES:
        if any(part in step for step in steps.values()):
            times = 1.5 if part in ("activations", "logits and loss") else 1
            name = part if times == 1 else f"{part} × {times}"
            rows[name] = [f"{times * step[part]:.2f}" if part in step else "–" for step in steps.values()]
    rows["to spare"] = ["1.00"] * len(steps)
    needs = [room_for(step_of(patient)) for patient in PATIENTS]
    rows["by the rule"] = [f"{need:.2f} GB" for need in needs]
    cards = [card for _, _, card, _ in PATIENTS.values()]
    rows["card"] = [f"{card} GB" for card in cards]
    rows["too much"] = [f"{need - card:.2f} GB" for need, card in zip(needs, cards, strict=True)]
    return "\n".join(f"{name:<22}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows.items())


def beside_ours(gigabytes: Callable[..., Any], needed: dict[str, MemoryBreakdown]) -> str:
    """What the learner's sum says of LoRA and QLoRA for LLaMA-7B at rank 64, beside `estimate`'s totals."""
    shape, trained = SHAPES["llama-7b"], 159_907_840
    lines = []
    for name, bits in {"LoRA": 16, "QLoRA": 4.126953}.items():
        mine, total = gigabytes(shape, bits, trained), needed[name].total / 1e9
        if not isinstance(mine, int | float):
            return "(exercise 2.1 is open)"
        lines.append(
            f"{name:<6}your sum {mine:5.2f} GB, everything {total:5.2f} GB: {total - mine:.2f} GB were left aside"
        )
    return "\n".join(lines)


def answers(real: MeasuredStep) -> str:
    """What is said of the memory that QLoRA needs for LLaMA-7B, in GB, smallest first, and what each number counts."""
    shape = SHAPES["llama-7b"]
    said = [
        (shape.parameters() / 2, "half a byte for each parameter", "forgets scales, and what keeps 16 bits"),
        (real.allocated, "torch's tensors", "measured: torch.cuda.max_memory_allocated()"),
        (estimate(shape).total, "everything that we count", "our sum"),
        (real.on_the_card, "on the card", "measured: what the driver counts, as in nvidia-smi"),
    ]
    lines = [f"{size / 1e9:.2f} GB  {what:<32}{how}" for size, what, how in said]
    how = f"Measured on one {real.device}, with random weights: bytes do not depend on values."
    return "\n".join([*lines, "", "From the second line on: a step with one sample of 512 tokens.", how])
