"""What dive_l_small_cards reads from the record; sizes are GB (10^9 bytes) where not said otherwise."""

from __future__ import annotations

import json

from qlora_lab.memory import CUDA_CONTEXT, MemoryBreakdown
from qlora_lab.places import RECORDS

GB = 1e9
SIZES = ("7B", "13B", "33B", "65B")
GROUPS = {
    "base weights, constants": ("base weights", "quantization constants"),
    "embeddings, head, norms": ("embeddings and head", "norms"),
    "adapters, gradients": ("adapters", "gradients", "optimizer states"),
    "activations": ("activations",),
    "logits and loss": ("logits and loss",),
}


def read_record(name: str) -> dict:
    """`data/records/NAME-nvidia-h100-80gb-hbm3.json`."""
    path = RECORDS / f"{name}-nvidia-h100-80gb-hbm3.json"
    return json.loads(path.read_text(encoding="utf-8"))


def one_step(record: dict, size: str) -> dict:
    """The QLoRA run of a LLaMA of some size: rank 64 on all linears, 1 × 512 tokens, checkpointing, paged AdamW."""
    wanted = {"shape": shape_name(size), "method": "qlora", "rank": 64, "batch_size": 1, "sequence_length": 512}
    wanted |= {"gradient_checkpointing": True, "targets": "all-linear", "optimizer": "paged_adamw_32bit"}
    wanted |= {"adapter_dtype": "float32"}
    return next(run for run in record["runs"] if wanted.items() <= run.items() and "measured" in run)


def shape_name(size: str) -> str:
    return f"llama-{size.lower()}"


def size_of(row: dict) -> str:
    """ "7B" of a row with "llama-7b"."""
    return row["shape"].removeprefix("llama-").upper()


def whole_step(row: dict, context: float = CUDA_CONTEXT) -> float:
    """All that a step takes: what torch has reserved, the paged states, and a context (bytes)."""
    return (row["measured"]["peak_reserved"] + row["measured"]["managed_bytes"] + context) / GB


def outcomes_of(caps: list[dict]) -> tuple[dict[tuple[str, str], dict[int, str]], list[int]]:
    """By model and preset, for each card (GB): "fits", "pages" or "fails"; and the cards.

    What trains on a card trains on larger ones. "pages": torch's part fits, with the paged states it is too much.
    """
    cards = sorted({row["card_gb"] for row in caps} | {16})
    outcomes: dict[tuple[str, str], dict[int, str]] = {}
    for row in caps:
        outcome = outcomes.setdefault((size_of(row), row["preset"]), {})
        if "measured" not in row:
            outcome[row["card_gb"]] = "fails"
            continue
        for card in cards:
            if card >= row["card_gb"]:
                outcome[card] = "fits" if whole_step(row) <= card else "pages"
    return outcomes, cards


def recorded_peaks(record: dict) -> dict[tuple, float]:
    """Measured peaks of torch's tensors by shape, method, batch, length, checkpointing and rank; usual settings."""
    keys = ("shape", "method", "batch_size", "sequence_length", "gradient_checkpointing", "rank")
    usual = ("all-linear", "paged_adamw_32bit", "float32")
    return {
        tuple(run[key] for key in keys): run["measured"]["peak_allocated"] / GB
        for run in record["runs"]
        if "measured" in run and (run["targets"], run["optimizer"], run["adapter_dtype"]) == usual
    }


def grouped(memory: MemoryBreakdown) -> dict[str, float]:
    """Five groups of torch's tensors at the peak, and what is left."""
    groups = {name: sum(memory.parts.get(part, 0) for part in members) / GB for name, members in GROUPS.items()}
    return groups | {"copies, workspaces": memory.peak_allocated / GB - sum(groups.values())}
