"""What does each setting buy, alone? The bundled 4-bit model learns the same with one knob turned.

Needs a GPU; writes `knobs-<gpu>.json`, anew after each run. See `orders` for what the runs have in common.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

import torch

from qlora_lab.adapters.peft_adapter import add_adapter, trainable_parameters
from qlora_lab.arguments import Parser
from qlora_lab.evaluation.judge import Judge
from qlora_lab.experiments import orders
from qlora_lab.experiments.gpu import require_gpu
from qlora_lab.experiments.orders import (
    BATCH_SIZE,
    LEARNING_RATE,
    MAX_LENGTH,
    RANK,
    STEPS,
    Ready,
    held_out,
    per_token,
    speed,
    trained,
)
from qlora_lab.models.loading import load_model


@dataclass(frozen=True)
class Settings:
    """QLoRA's (NF4, double quantization), as `train_qlora` has them on a GPU with room; a knob changes some."""

    rank: int = RANK
    targets: str | tuple[str, ...] = "all-linear"
    learning_rate: float = LEARNING_RATE
    batch_size: int = BATCH_SIZE
    accumulation: int = 1
    packing: bool = False
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    compute_dtype: torch.dtype = torch.bfloat16


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
KNOBS = {
    "as it is": {},
    "checkpointing": {"gradient_checkpointing": True},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "paged_adamw_32bit": {"optimizer": "paged_adamw_32bit"},
    "paged_adamw_8bit": {"optimizer": "paged_adamw_8bit"},
    "batch 4 x 2": {"batch_size": 4, "accumulation": 2},
    "batch 1 x 8": {"batch_size": 1, "accumulation": 8},
    "batch 32": {"batch_size": 32},
    "packing": {"batch_size": 3, "packing": True},  # rows of MAX_LENGTH tokens: about as many as 8 orders have
    "float16": {"compute_dtype": torch.float16},
    "float32": {"compute_dtype": torch.float32},
    "rank 4": {"rank": 4},
    "rank 64": {"rank": 64},
    "q, v": {"targets": ("q_proj", "v_proj")},
    "q, k, v, o": {"targets": ATTENTION},
    "lr 1.5e-4": {"learning_rate": 1.5e-4},
    "lr 5e-4": {"learning_rate": 5e-4},
    "lr 5e-3": {"learning_rate": 5e-3},
    "lr 1.5e-2": {"learning_rate": 1.5e-2},
}


def prepare_knob(name: str, seed: int, device: torch.device, **overrides) -> Ready:
    """The bundled 4-bit model with one knob of KNOBS turned; overrides are other `Settings`, for a CPU's sake."""
    knobs = Settings(**{**overrides, **KNOBS[name]})
    base, tokenizer = load_model(quantization="nf4", device=device, compute_dtype=knobs.compute_dtype)
    targets = knobs.targets if isinstance(knobs.targets, str) else list(knobs.targets)
    model = add_adapter(base, rank=knobs.rank, alpha=2 * knobs.rank, targets=targets, seed=seed)
    names = ("learning_rate", "optimizer", "gradient_checkpointing", "compute_dtype")
    settings = {name: getattr(knobs, name) for name in names}
    batches = {"batch_size": knobs.batch_size, "accumulation": knobs.accumulation, "packing": knobs.packing}
    return Ready(model, tokenizer, settings, {**batches, "max_length": MAX_LENGTH, "seed": seed})


def train_knob(name: str, seed: int, device: torch.device, steps: int = STEPS, **overrides) -> dict:
    """Train the bundled 4-bit model with one knob turned, see `prepare_knob`, and judge it.

    A run that ends in non-finite numbers is a result too: its losses end before.

    Returns:
        knob, seed, losses (nats per token, one a step), after: {validation, prose: nats per token} (None if the
        training diverged), trainable (numbers), tokens (a step, median), peak_allocated (bytes while training, None on
        a CPU), tokens_per_second, seconds_per_step (medians).
    """
    ready = prepare_knob(name, seed, device, **overrides)
    records, peak = trained(ready, steps)
    model, tokenizer, dtype = ready.model, ready.tokenizer, ready.settings["compute_dtype"]
    finished = len(records) == steps
    return {
        "knob": name,
        "seed": seed,
        "losses": [record.loss for record in records],
        "after": per_token(Judge({}, held_out(tokenizer), tokenizer, dtype).losses(model)) if finished else None,
        "trainable": trainable_parameters(model),
        "tokens": statistics.median(record.tokens for record in records) if records else None,
        "peak_allocated": peak,
        **speed(records),
    }


def add_flags(parser: Parser) -> None:
    orders.add_flags(parser, seeds=3)


def run(arguments: argparse.Namespace) -> None:
    require_gpu(orders.NEEDS_A_GPU)
    record = orders.record_of("knobs", arguments.output)
    orders.time_alone(record, KNOBS, prepare_knob)
    orders.run_all(record, "knob", KNOBS, arguments.seeds, train_knob, jobs=arguments.jobs)
