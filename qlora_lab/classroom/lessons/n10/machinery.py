"""What 10_memory_comparison reads from the record and prints in tables; sizes are GB (10^9 bytes) where not said."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from qlora_lab.memory import CUDA_CONTEXT, SHAPES, Shape, bits_per_parameter, estimate
from qlora_lab.places import RECORDS

GB = 1e9
SIZES = ("7B", "13B", "33B", "65B")
KNOBS = ("rank", "targets", "batch_size", "sequence_length", "gradient_checkpointing", "optimizer", "adapter_dtype",
         "full_precision")  # fmt: skip
PAPER = dict(
    zip(SIZES, (6.9, 11.3, 24.7, 45.0), strict=True)
)  # QLoRA's paper: totals of a step, 1 × 512 tokens, rank 64


def read_record() -> dict:
    """Training steps as one H100 measured them: "runs", "caps" (on smaller cards), device, date and versions."""
    path = RECORDS / "memory-nvidia-h100-80gb-hbm3.json"
    return json.loads(path.read_text(encoding="utf-8"))


def measured_runs(record: dict) -> list[dict]:
    """The settings that ran."""
    return [run for run in record["runs"] if "measured" in run]


def run_of(runs: list[dict], size: str, method: str = "qlora") -> dict:
    """A LLaMA of some size, rank 64 on all linears, one sample of 512 tokens, checkpointing, paged AdamW."""
    wanted = {"shape": f"llama-{size.lower()}", "method": method, "rank": 64, "batch_size": 1, "sequence_length": 512}
    wanted |= {"gradient_checkpointing": True, "targets": "all-linear", "optimizer": "paged_adamw_32bit"}
    wanted |= {"adapter_dtype": "float32"}
    return next(run for run in runs if wanted.items() <= run.items())


def peak_of(run: dict) -> float:
    """The measured peak of torch's tensors."""
    return run["measured"]["peak_allocated"] / GB


def sum_for(run: dict) -> float:
    """What lesson 02's sum says of that peak, from what the record says of the run."""
    return estimate(SHAPES[run["shape"]], run["method"], **{knob: run[knob] for knob in KNOBS}).peak_allocated / GB


def phases_of(run: dict) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """By phase of the first step: GB held at its end and GB held only for a moment; and a text with its peak."""
    rows, ends = {}, {}
    for name, phase in run["phases"].items():
        if "steady" in name:
            continue
        name = name.removeprefix("first ").removeprefix("step: ").replace("update", "weight update")
        kept, peak = phase["allocated"] / GB, phase["peak_allocated"] / GB
        rows[name] = {"held at its end": kept, "only for a moment": peak - kept}
        ends[name] = f"peak {peak:.2f}"
    return rows, ends


def errors_of(runs: list[dict]) -> dict[str, tuple[int, float, float]]:
    """By group of settings: how many, and the largest error in per cent, when they were measured and today.

    When the first ten were held out, two of them were not predicted.
    """
    held_out = [run for run in runs if run["held_out"]]
    groups = {
        "the formulas were made with them": [run for run in runs if not run["held_out"]],
        "held out": held_out[:-6],
        "held out, predicted before they ran": held_out[-6:],
    }
    errors = {}
    for name, some in groups.items():
        then = [abs(run["predicted"]["peak_allocated"] / GB / peak_of(run) - 1) for run in some if run["predicted"]]
        now = [abs(sum_for(run) / peak_of(run) - 1) for run in some]
        errors[name] = (len(some), 100 * max(then), 100 * max(now))
    return errors


def pairs_of(runs: list[dict]) -> list[tuple[dict, dict]]:
    """LoRA and QLoRA runs that differ in nothing else; those first where QLoRA saves the largest share."""
    settings = ("shape", *KNOBS)
    pairs = [
        (lora, qlora)
        for lora in runs
        for qlora in runs
        if (lora["method"], qlora["method"]) == ("lora", "qlora") and all(lora[n] == qlora[n] for n in settings)
    ]
    return sorted(pairs, key=lambda pair: peak_of(pair[1]) / peak_of(pair[0]))


def without_weights(shape: Shape, lora_peak: float) -> float:
    """QLoRA's peak from LoRA's: what the bits say that the linears lose."""
    return lora_peak - shape.linear_parameters() * (16 - bits_per_parameter()) / 8 / GB


def table_of_pairs(pairs: list[tuple[dict, dict]], qlora_peak: Callable[[Shape, float], Any]) -> str:
    """One line a pair: both peaks, what is saved, and what `qlora_peak` says of the second, with its error.

    qlora_peak: the learner's; as long as it gives no number, ours takes its place.
    """
    solved = isinstance(qlora_peak(SHAPES["llama-7b"], 15.0), int | float)
    whose = "by your function" if solved else "by our function"
    lines = [f"{'':<34}{'LoRA':>7}{'QLoRA':>8}{'saved':>14}{whose:>24}"]
    for lora, qlora in pairs:
        before, after = peak_of(lora), peak_of(qlora)
        size = lora["shape"].removeprefix("llama-").upper()
        what = f"{size}, {lora['batch_size']} × {lora['sequence_length']}, rank {lora['rank']}"
        what += "" if lora["gradient_checkpointing"] else ", no checkp."
        said = (qlora_peak if solved else without_weights)(SHAPES[lora["shape"]], before)
        mine = f"{said:.1f} ({said / after - 1:+.1%})"
        lines.append(f"{what:<34}{before:>7.1f}{after:>8.1f}{before - after:>7.1f}{1 - after / before:>7.0%}{mine:>24}")
    return "\n".join(lines)


def pieces_on_the_card(run: dict, context: int) -> dict[str, float]:
    """What the driver counts as used, as nvidia-smi shows it, by owner. context: bytes before the first tensor."""
    got = run["measured"]
    pieces = {
        "torch's tensors": got["peak_allocated"],
        "gaps between them": got["peak_reserved"] - got["peak_allocated"],
        "paged optimizer states": got["managed_bytes"],
        "CUDA context": context,
        "unexplained": got["outside_allocator"] - got["managed_bytes"] - context,
    }
    return {name: size / GB for name, size in pieces.items()}


def smallest_cards(record: dict) -> dict[str, tuple[int, dict[str, float]]]:
    """By size of model, the smallest card (GB) that torch could be held to, and what the whole step takes there."""
    found = {}
    for row in record["caps"]:
        if row["preset"] == "standard" and "measured" in row:
            got, size = row["measured"], row["shape"].removeprefix("llama-").upper()
            whole = {"torch": got["peak_reserved"], "paged states": got["managed_bytes"], "context": CUDA_CONTEXT}
            found[size] = (row["card_gb"], {name: part / GB for name, part in whole.items()})
    return found
