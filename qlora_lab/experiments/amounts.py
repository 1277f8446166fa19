"""How many examples does a task need, and what does the model forget? QLoRA on 50, 200, 500 or 2,000 orders.

Needs a GPU; writes `amounts-<gpu>.json`, anew after each run. All train for the same number of steps, so 50 orders are
seen many times and 2,000 not even once; every ten steps the loss on held-out orders says whether that still helps. With
replay, one sample of eight is a paragraph of general English; the loss on other such paragraphs says what is forgotten.
See `orders` for what the runs have in common.
"""

from __future__ import annotations

import argparse

import torch

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.arguments import Parser
from qlora_lab.evaluation.judge import Judge
from qlora_lab.experiments import orders
from qlora_lab.experiments.gpu import require_gpu
from qlora_lab.experiments.orders import BATCH_SIZE, LEARNING_RATE, MAX_LENGTH, RANK, per_token
from qlora_lab.models.loading import load_model
from qlora_lab.training.batches import Batches, with_replay
from qlora_lab.training.chat import TokenizedSample, tokenize, tokenize_text
from qlora_lab.training.data import load_prose, load_samples
from qlora_lab.training.loop import train_steps
from qlora_lab.training.validation import Validation

WAYS = {  # orders to train on, and whether general English is mixed in
    "50": (50, False),
    "200": (200, False),
    "500": (500, False),
    "2000": (2000, False),
    "500 + replay": (500, True),
    "2000 + replay": (2000, True),
}
STEPS, EVERY, JUDGED = 120, 10, 100
ONE_IN = 8  # samples with replay, one is general English


def train_amount(name: str, seed: int, device: torch.device, steps: int = STEPS, judged: int = JUDGED) -> dict:
    """Train the bundled 4-bit model on so many orders, and judge it.

    Args:
        name: of WAYS. seed: of the adapter, of which orders they are, and of their order.
        judged: orders of each split to judge on.

    Returns:
        amount (the name), seed, losses (nats per token, one a step), curve: [step, validation loss] while training,
        after: {validation, prose: nats per token}, exact: {test, shifted: one character for each answer}
    """
    base, tokenizer = load_model(quantization="nf4", device=device)
    model = add_adapter(base, rank=RANK, alpha=2 * RANK, seed=seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    judge = judge_of(tokenizer, judged, dtype)
    validation = Validation(lambda trained: judge.losses(trained)["validation"].per_token, EVERY)
    records = list(
        train_steps(
            model,
            Batches(samples_of(name, seed, tokenizer), BATCH_SIZE, max_length=MAX_LENGTH, seed=seed),
            steps=steps,
            learning_rate=LEARNING_RATE,
            compute_dtype=dtype,
            pad_token_id=tokenizer.pad_token_id,
            validation=validation,
        )
    )
    judgement = judge(model)
    return {
        "amount": name,
        "seed": seed,
        "losses": [record.loss for record in records],
        "curve": [[record.step, record.validation_loss] for record in records if record.validation_loss is not None],
        "after": per_token(judgement.losses),
        "exact": judgement.exact,
        **orders.speed(records),
    }


def samples_of(name: str, seed: int, tokenizer) -> list[TokenizedSample]:
    """What a way trains on. Half of the course's paragraphs are there for replay; the others are judged on."""
    count, replay = WAYS[name]
    rows = load_samples("orders", "train").shuffle(seed=seed).select(range(count))
    samples, _ = tokenize(rows, tokenizer, MAX_LENGTH)
    if not replay:
        return samples
    paragraphs = [tokenize_text(text, tokenizer) for text in load_prose()[::2]]
    return with_replay(samples, paragraphs, 1 / ONE_IN)


def judge_of(tokenizer, judged: int, dtype: torch.dtype) -> Judge:
    conversations = {split: list(load_samples("orders", split)["messages"])[:judged] for split in ("test", "shifted")}
    held_out = load_samples("orders", "validation").select(range(judged))
    validation, _ = tokenize(held_out, tokenizer, MAX_LENGTH)
    prose = [tokenize_text(text, tokenizer) for text in load_prose()[1::2]]
    return Judge(conversations, {"validation": validation, "prose": prose}, tokenizer, dtype)


def add_flags(parser: Parser) -> None:
    orders.add_flags(parser, seeds=3)


def run(arguments: argparse.Namespace) -> None:
    require_gpu(orders.NEEDS_A_GPU)
    record = orders.record_of("amounts", arguments.output, steps=STEPS, judged=JUDGED)
    orders.run_all(record, "amount", WAYS, arguments.seeds, train_amount, jobs=arguments.jobs, tell=summary)


def summary(run: dict) -> str:
    exact = ", ".join(f"{split} {bits.count('1')}/{len(bits)}" for split, bits in run["exact"].items())
    best = min(run["curve"], key=lambda point: point[1])
    after = ", ".join(f"{name} {loss:.4f}" for name, loss in run["after"].items())
    return f"{run['amount']:<14} seed {run['seed']}: {after}; best {best[1]:.4f} at step {best[0]}; {exact}"
