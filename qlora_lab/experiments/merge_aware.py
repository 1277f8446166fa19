"""Does an adapter survive a merge into 4 bits? Trained as usual, and merge-aware, into NF4 and into llama.cpp's Q4_0.

Needs a GPU; writes `merge-aware-<gpu>.json`, anew after each run. Plain QLoRA is judged with its adapter beside the
base and after a merge into each of the two; what was trained for one of them is judged after a merge into that. Each
way is trained for 30 steps, as long as the course's job, and for 120. See `orders` for what the runs have in common.
"""

from __future__ import annotations

import argparse
import copy

import torch

from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.merge_aware import merge_requantized
from qlora_lab.adapters.quantized_linear import dequantize_linears
from qlora_lab.arguments import Parser
from qlora_lab.evaluation.judge import Judge
from qlora_lab.experiments import orders
from qlora_lab.experiments.amounts import judge_of
from qlora_lab.experiments.gpu import require_gpu
from qlora_lab.experiments.orders import BATCH_SIZE, LEARNING_RATE, MAX_LENGTH, RANK, per_token
from qlora_lab.facts import MERGE_TARGETS
from qlora_lab.models.loading import load_model
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import tokenize
from qlora_lab.training.data import load_samples
from qlora_lab.training.loop import train_steps

WAYS = {  # what the training has in view, and its steps
    f"{target or 'plain'}, {steps} steps": (target, steps) for steps in (30, 120) for target in (None, *MERGE_TARGETS)
}
JUDGED = 100


def train_way(name: str, seed: int, device: torch.device, steps: int | None = None, judged: int = JUDGED) -> dict:
    """Train the bundled 4-bit model on the orders, merge and judge it.

    Args:
        name: of WAYS. seed: of the adapter and of the samples' order.
        steps: other than the way's.
        judged: orders of each split to judge on.

    Returns:
        way (the name), seed, losses (nats per token, one a step), and a judgement for each of `beside` (plain training
        only), `nf4` and `q4_0` that the way is judged in: {"exact": {test, shifted: one character for each answer},
        "after": {validation, prose: nats per token}}
    """
    target, usual = WAYS[name]
    base, tokenizer = load_model(quantization="nf4", device=device)
    model = add_lora(base, rank=RANK, alpha=2 * RANK, seed=seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    samples, _ = tokenize(load_samples("orders", "train"), tokenizer, MAX_LENGTH)
    records = list(
        train_steps(
            model,
            Batches(samples, BATCH_SIZE, max_length=MAX_LENGTH, seed=seed),
            steps=steps or usual,
            learning_rate=LEARNING_RATE,
            compute_dtype=dtype,
            pad_token_id=tokenizer.pad_token_id,
            merge_aware=target,
        )
    )
    judge = judge_of(tokenizer, judged, dtype)
    judgements = {} if target else {"beside": judged_by(judge, model)}
    for kind in (target,) if target else MERGE_TARGETS:
        judgements[kind] = judged_by(judge, dequantize_linears(merge_requantized(copy.deepcopy(model), kind)))
    losses = [record.loss for record in records]
    return {"way": name, "seed": seed, "losses": losses, **judgements, **orders.speed(records)}


def judged_by(judge: Judge, model) -> dict:
    judgement = judge(model)
    return {"exact": judgement.exact, "after": per_token(judgement.losses)}


def add_flags(parser: Parser) -> None:
    orders.add_flags(parser, seeds=3)


def run(arguments: argparse.Namespace) -> None:
    require_gpu(orders.NEEDS_A_GPU)
    record = orders.record_of("merge-aware", arguments.output, judged=JUDGED)
    orders.run_all(record, "way", WAYS, arguments.seeds, train_way, jobs=arguments.jobs, tell=summary)


def summary(run: dict) -> str:
    told = []
    for kind in ("beside", *MERGE_TARGETS):
        if kind in run:
            exact = ", ".join(f"{split} {bits.count('1')}/{len(bits)}" for split, bits in run[kind]["exact"].items())
            told.append(f"{kind}: validation {run[kind]['after']['validation']:.4f}, {exact}")
    return f"{run['way']:<16} seed {run['seed']}: {'; '.join(told)}"
