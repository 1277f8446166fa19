"""What 02_memory_wall computes behind its folded cells: parts of memory taken together, tables, and a measured step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lab.classroom.lessons.n02.checks import PATIENTS, needed_by
from qlora_lab.classroom.lessons.n02.figures import MEMORY_STYLES
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.memory import SHAPES, MemoryBreakdown, estimate

GROUPS = {  # `estimate`'s parts by the lesson's names; parts that are not here keep theirs
    **dict.fromkeys(("base weights", "quantization constants", "embeddings and head", "norms", "biases"), "weights"),
    **dict.fromkeys(("bf16 copies", "dequantized weight", "update", "cuBLAS workspace"), "helpers"),
    "master weights": "fp32 copy",
    "paged optimizer states": "optimizer states",
    "logits and loss": "logits",
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


def measured_step() -> MeasuredStep:
    """Rank 64 on all linears, one sample of 512 tokens, checkpointing, paged AdamW: from data/records/."""
    path = REPOSITORY / "data" / "records" / "memory-nvidia-h100-80gb-hbm3.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"shape": "llama-7b", "method": "qlora", "rank": 64, "batch_size": 1, "sequence_length": 512}
    run = next(run for run in record["runs"] if wanted.items() <= run.items())
    measured = run["measured"]
    on_the_card = measured["peak_reserved"] + measured["outside_allocator"]
    return MeasuredStep(record["device"], record["date"], measured["peak_allocated"], on_the_card)


def fitting_methods(models: Sequence[str], cards: Sequence[int]) -> dict[str, list[str]]:
    """By model: for each card (GB), the first of full fine-tuning, LoRA and QLoRA that fits, or "–".

    One sample of 512 tokens, rank 64, checkpointing, paged AdamW.
    """
    fitting = {}
    for model in models:
        totals = {
            name: estimate(SHAPES[model], method, full_precision="mixed").total for name, method in METHODS.items()
        }
        fitting[model] = [next((name for name, size in totals.items() if size <= card * 1e9), "–") for card in cards]
    return fitting


def steps_that_fail() -> str:
    """The steps of exercise 2.2 in a table: their settings, the card in GB, and what they need."""
    lines = [f"{'':<8}{'model':<12}{'method':<8}{'rank':>5}{'samples':>9}{'checkpointing':>15}{'card':>9}{'needs':>11}"]
    for patient, (model, method, card, settings) in PATIENTS.items():
        name = {method: name for name, method in METHODS.items()}[method]
        on = "yes" if settings.get("gradient_checkpointing", True) else "no"
        line = f"{patient:<8}{model:<12}{name:<8}{settings['rank']:>5}{settings['batch_size']:>9}{on:>15}"
        lines.append(f"{line}{card:>6} GB{needed_by(patient) / 1e9:>8.1f} GB")
    return "\n".join(lines)


def answers(real: MeasuredStep) -> str:
    """What is said of the memory that QLoRA needs for LLaMA-7B, in GB, smallest first, and what each number counts."""
    shape, rank_64 = SHAPES["llama-7b"], estimate(SHAPES["llama-7b"], rank=64)
    said = [
        (
            shape.parameters() / 2,
            "half a byte for each parameter",
            "without scales, and as if embedding and output layer had 4 bits",
        ),
        (1e9 * grouped(rank_64)["weights"], "the loaded model", "before training"),
        (estimate(shape, rank=16).total, "everything, rank 16", "our sum"),
        (rank_64.peak_allocated, "torch's tensors, rank 64", "our sum"),
        (real.allocated, "torch's tensors, rank 64", "measured"),
        (6.9e9, "everything, rank 64", "QLoRA's paper, which does not say what it counts"),
        (rank_64.total, "everything, rank 64", "our sum"),
        (real.on_the_card, "everything, rank 64", "measured, as nvidia-smi shows it"),
    ]
    lines = [f"{size / 1e9:.2f} GB  {what:<32}{how}" for size, what, how in said]
    how = f"measured on one {real.device} ({real.date}), with random weights"
    return "\n".join([*lines, "", f"from the third line on: a step with one sample of 512 tokens; {how}"])
