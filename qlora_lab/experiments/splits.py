"""Does a random split promise more than new customers will get? QLoRA on support tickets, split in two ways.

Needs a GPU; writes `splits-<gpu>.json`, anew after each run. Some customers write twice about the same thing. Tickets
are held out at random, so that a customer may be on both sides, or customer by customer. Each adapter is judged on what
was held out of its own file, which is what a run promises, and on tickets of customers who came later.
"""

from __future__ import annotations

import argparse

import torch

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.arguments import Parser
from qlora_lab.evaluation.judge import Judge
from qlora_lab.experiments import orders
from qlora_lab.experiments.gpu import require_gpu
from qlora_lab.experiments.orders import RANK
from qlora_lab.experiments.tickets import greeted_otherwise, tickets
from qlora_lab.models.loading import load_model
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import tokenize_chat
from qlora_lab.training.data import number_of
from qlora_lab.training.formats import Chat
from qlora_lab.training.holding_out import hold_out
from qlora_lab.training.loop import train_steps

WAYS = {"at random": None, "by customer": "customer"}
STEPS, BATCH_SIZE, LEARNING_RATE = 40, 4, 2e-3
MOST, LATER = 50, 100  # tickets held out at most, and of customers who came later


def train_split(name: str, seed: int, device: torch.device, steps: int = STEPS, later: int = LATER) -> dict:
    """Train the bundled 4-bit model on the tickets that this way leaves to train on, and judge it.

    Args:
        name: of WAYS. seed: of the file, the split, the adapter and the order.
        later: tickets of later customers to judge on; as many, at most, of those trained on.

    Returns:
        way (the name), seed, losses (nats per token, one a step),
        exact: one character for each answer, of tickets "held out", of "later" customers, and of those trained on
        ("seen"), with another greeting than any in the file
    """
    base, tokenizer = load_model(quantization="nf4", device=device)
    model = add_adapter(base, rank=RANK, alpha=2 * RANK, seed=seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    trained, judged = split(name, seed)
    batches = Batches([tokenize_chat(chat, tokenizer) for chat in trained], BATCH_SIZE, seed=seed)
    records = list(
        train_steps(
            model,
            batches,
            steps=steps,
            learning_rate=LEARNING_RATE,
            compute_dtype=dtype,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    conversations = {"held out": judged, "later": later_tickets(seed)[:later], "seen": greeted_anew(trained)[:later]}
    judgement = Judge(conversations, {}, tokenizer, dtype)(model)
    return {
        "way": name,
        "seed": seed,
        "losses": [record.loss for record in records],
        "exact": judgement.exact,
        **orders.speed(records),
    }


def split(name: str, seed: int) -> tuple[list[Chat], list[Chat]]:
    """The tickets to train on, and those that are held out."""
    rows = tickets(seed, messy=False)
    column = WAYS[name]
    values = [number_of(row, column, "a ticket") for row in rows] if column else None
    held_out = hold_out(len(rows), MOST, seed, values=values)
    chats = [chat_of(row) for row in rows]
    return [chats[i] for i in held_out.trained], [chats[i] for i in held_out.judged]


def later_tickets(seed: int) -> list[Chat]:
    """Of customers who wrote after those of this seed's file: once each, with orders of their own."""
    first = {}
    for later in (seed + 10_000, seed + 20_000):
        for row in tickets(later, messy=False):
            first.setdefault((later, row["customer"]), chat_of(row))
    return list(first.values())


def greeted_anew(chats: list[Chat]) -> list[Chat]:
    """The same tickets with another greeting, each once."""
    asked = {greeted_otherwise(question["content"]): answer for question, answer in chats}
    return [[{"role": "user", "content": question}, answer] for question, answer in asked.items()]


def chat_of(row: dict[str, str]) -> Chat:
    return [{"role": "user", "content": row["message"]}, {"role": "assistant", "content": row["reply"]}]


def add_flags(parser: Parser) -> None:
    orders.add_flags(parser, seeds=10)


def run(arguments: argparse.Namespace) -> None:
    require_gpu(orders.NEEDS_A_GPU)
    settings = {"steps": STEPS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "later": LATER}
    record = orders.record_of("splits", arguments.output, **settings)
    orders.run_all(record, "way", WAYS, arguments.seeds, train_split, jobs=arguments.jobs, tell=summary)


def summary(run: dict) -> str:
    exact = ", ".join(f"{kind} {bits.count('1')}/{len(bits)}" for kind, bits in run["exact"].items())
    return f"{run['way']:<12} seed {run['seed']}: {exact}"
