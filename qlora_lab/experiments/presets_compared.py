"""Does a recipe buy memory with bad training? The bundled 4-bit model learns the same with every preset.

Needs a GPU; writes `presets-<gpu>.json`, anew after each run. See `orders` for what the runs have in common.
"""

from __future__ import annotations

import argparse

import torch

from qlora_lab.arguments import Parser
from qlora_lab.evaluation.judge import Judge
from qlora_lab.experiments import orders
from qlora_lab.experiments.gpu import require_gpu
from qlora_lab.experiments.orders import BATCH_SIZE, RANK, STEPS, Ready, held_out, trained
from qlora_lab.models.loading import load_model
from qlora_lab.training.data import load_samples
from qlora_lab.training.presets import PRESETS

JUDGED = 100  # samples of `test`
SETTINGS = {"model": "smollm2-135m-instruct, NF4, double quantization", "judged": JUDGED}  # and the usual ones


def train_preset(name: str, seed: int, device: torch.device, steps: int = STEPS, judged: int = JUDGED) -> dict:
    """Train the bundled 4-bit model with a preset; the seed is that of the adapter and of the samples' order.

    Returns:
        preset, seed, losses (nats per token, one a step), validation_loss (the same on held-out orders), exact_match on
        `test` (share), peak_allocated (bytes, over the training), seconds.
    """
    preset = PRESETS[name]
    base, tokenizer = load_model(quantization="nf4", device=device, compute_dtype=torch.bfloat16)
    model = preset.adapt(base, rank=RANK, alpha=2 * RANK, seed=seed)
    settings = preset.settings(torch.bfloat16)
    records, peak = trained(Ready(model, tokenizer, settings, {"batch_size": BATCH_SIZE, "seed": seed}), steps)
    chats = {"test": load_samples("orders", "test").select(range(judged))["messages"]}
    after = Judge(chats, held_out(tokenizer), tokenizer, settings["compute_dtype"])(model)
    return {
        "preset": name,
        "seed": seed,
        "losses": [record.loss for record in records],
        "validation_loss": after.losses["validation"].per_token,
        "exact_match": after.as_dict()["exact_match"]["test"],
        "peak_allocated": peak,
        "seconds": sum(record.seconds for record in records),
    }


def add_flags(parser: Parser) -> None:
    orders.add_flags(parser, seeds=3, jobs=False)


def run(arguments: argparse.Namespace) -> None:
    require_gpu(orders.NEEDS_A_GPU)
    record = orders.record_of("presets", arguments.output, **SETTINGS)
    orders.run_all(record, "preset", PRESETS, arguments.seeds, train_preset, tell=line)


def line(run: dict) -> str:
    return (
        f"{run['preset']:<14} seed {run['seed']}: training {run['losses'][-1]:.4f}, "
        f"validation {run['validation_loss']:.4f}, exact {run['exact_match']:.0%}, "
        f"{run['peak_allocated'] / 1e9:.2f} GB, {run['seconds']:.0f} s"
    )
