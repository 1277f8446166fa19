"""How fast is a training step? Ours, what everybody uses, and what lies between.

On a LLaMA-7B with random weights (see `step_ways`, which names the ways), then on the bundled model with the course's
orders. Two more ways, where they are installed: "trl", PEFT + bitsandbytes through TRL's SFTTrainer, and Unsloth's,
through its SFTTrainer and in a plain loop (see `unsloth_speed`).

A step's time is a median of wall times over the steady steps, from its samples to its loss on the host, and tokens a
second are those of `step_records`: as everywhere in this project. Peak memory is what PyTorch's allocator handed out at
most during the steps, capture included; AdamW's states lie outside of it (1.28 GB at 7B), for everyone alike.

The floor is the time of the arithmetic alone, at the rate of a large matrix product in the same run: 4 operations a
weight and token without checkpointing (forward, and the gradient of the input; frozen weights need none), 6 with, if
the whole forward pass is repeated. (The fast step repeats neither a layer's last product nor the last layer: 9 % less.)

Hosts differ, so times of one record belong to one run: a record that is there is not gone on with unless
`--continue-from` says so, and then keeps its rate of a matrix product.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import warnings

import torch

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.arguments import Parser, count
from qlora_lab.experiments.gpu import empty_cache, milliseconds, require_gpu
from qlora_lab.experiments.record import Record
from qlora_lab.experiments.sft_trainer import trl_steps
from qlora_lab.experiments.step_profile import profile
from qlora_lab.experiments.step_ways import BETWEEN, LENGTH, RANK, SETTINGS, SHAPE, result, running
from qlora_lab.experiments.unsloth_process import ROWS, UNSLOTH, unsloth_runs
from qlora_lab.memory.shapes import SHAPES
from qlora_lab.models.loading import load_model
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import tokenize
from qlora_lab.training.data import load_samples
from qlora_lab.training.loop import train_steps
from qlora_lab.training.step_records import steady

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "accelerate", "trl", "unsloth")
RATE = "matrix product, operations per second"


def bundled(who: str, steps: int) -> dict:
    """The bundled model, rank 16, 16 orders a step."""
    empty_cache()
    model, tokenizer = load_model(quantization="nf4", device="cuda")
    orders, _ = tokenize(load_samples("orders"), tokenizer, 512)
    model = add_adapter(model, rank=16, alpha=32)
    torch.cuda.reset_peak_memory_stats()
    records = list(
        train_steps(
            model,
            Batches(orders, 16),
            steps=steps,
            learning_rate=1e-3,
            compute_dtype=torch.bfloat16,
            fast=who == "fast",
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return result(records) | {"tokens": statistics.mean(record.tokens for record in steady(records))}


def matrix_product_rate(n: int = 8192) -> float:
    """Operations a second of a large product of random bf16 matrices."""
    a = torch.randn(n, n, device="cuda").bfloat16()
    return 2 * n**3 / milliseconds(lambda: a @ a, warmup=100, rep=1000) * 1e3


def floor(tokens: int, checkpointing: bool, rate: float) -> float:
    """Milliseconds of the arithmetic alone."""
    shape = SHAPES[SHAPE]
    layer = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
    weights = shape.num_hidden_layers * layer + shape.vocab_size * shape.hidden_size
    return 1e3 * (6 if checkpointing else 4) * weights * tokens / rate


def ways_of(batch: int, checkpointing: bool) -> tuple[str, ...]:
    """All but Unsloth's, whose turn comes last: it has a process of its own."""
    between = BETWEEN if (batch, checkpointing) in ((1, True), (4, False)) else ()
    return ("standard", *between, "trl", "fast", *["offloading"] * checkpointing)


WAYS = tuple(dict.fromkeys(way for setting in SETTINGS for way in ways_of(*setting)))
PARTS = (*WAYS, *UNSLOTH, "bundled", "profiles")


def add_flags(parser: Parser) -> None:
    parser.add_argument("--steps", type=count, default=20, help="of each training (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, help="folder for a record, step-<gpu>.json")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"of these: {', '.join(PARTS)}; unsloth is all of its"
    )
    parser.add_argument("--continue-from", type=pathlib.Path, help="a record: its runs are kept and not made again")


def run(arguments: argparse.Namespace) -> None:
    require_gpu("training steps are timed on one")
    warnings.filterwarnings("ignore")
    record = Record.begin(
        "step",
        arguments.output,
        torch.cuda.get_device_name(),
        packages=PACKAGES,
        settings={"shape": SHAPE, "rank": RANK, "sequence_length": LENGTH, "steps": arguments.steps},
        continue_from=arguments.continue_from,
    )
    installed = record.content["versions"]
    print(f"{record.content['device']}; {', '.join(f'{name} {version}' for name, version in installed.items())}")
    for name in {"trl", "unsloth"} - set(installed):
        print(f"{name} is not installed: left out")
    if RATE not in record.content:
        record.note(**{RATE: matrix_product_rate()})
    print(f"a matrix product of 8192 x 8192 x 8192 in bf16: {record.content[RATE] / 1e12:.0f} TFLOP/s\n")

    def wanted(part: str) -> bool:
        return not arguments.only or part in arguments.only or part.partition(",")[0] in arguments.only

    print(f"{'LLaMA-7B':40}{'ms':>9}{'tokens/s':>10}{'of floor':>10}{'peak GB':>9}{'first loss':>12}{'last':>9}")
    time_ways(record, [way for way in WAYS if wanted(way) and (way != "trl" or way in installed)], arguments.steps)
    if wanted("bundled"):
        time_bundled(record)
    if wanted("profiles"):
        add_profiles(record)
    if "unsloth" in installed:
        rows = [row for row in ROWS if wanted(row[0]) and not record.rows("runs", **key_of(*row))]
        for run in unsloth_runs(rows, arguments.steps) if rows else ():
            add(record, run)


def key_of(who: str, batch: int, checkpointing: bool) -> dict:
    return {"who": who, "batch_size": batch, "gradient_checkpointing": checkpointing}


def time_ways(record: Record, ways: list[str], steps: int) -> None:
    """Each of these ways at each setting, into `runs`."""
    for batch, checkpointing in SETTINGS:
        for who in ways_of(batch, checkpointing):
            key = key_of(who, batch, checkpointing)
            if who not in ways or record.rows("runs", **key):
                continue
            if who == "trl":
                records = trl_steps(batch, checkpointing, steps)
            else:
                records = list(running(who, batch, checkpointing, steps))
            add(record, key | result(records))


def add(record: Record, run: dict) -> None:
    """A run at 7B, with its share of the floor."""
    batch, checkpointing = run["batch_size"], run["gradient_checkpointing"]
    run["share_of_floor"] = floor(batch * LENGTH, checkpointing, record.content[RATE]) / run["milliseconds"]
    record.add("runs", run)
    show(f"{run['who']}, batch {batch}{', checkpointing' if checkpointing else ''}", run)


def time_bundled(record: Record) -> None:
    print("\nthe bundled model, 16 orders a step")
    for who in ("standard", "fast"):
        if who not in record.named("bundled"):
            record.put("bundled", who, bundled(who, 60))
        run = record.named("bundled")[who]
        show(f"{who}, {run['tokens']:.0f} tokens", run)


def add_profiles(record: Record) -> None:
    for batch, checkpointing in SETTINGS:
        for who in ("standard", "fast"):
            key = key_of(who, batch, checkpointing)
            if not record.rows("profiles", **key):
                record.add("profiles", key | profile(who, batch, checkpointing))


def show(name: str, run: dict) -> None:
    share = f"{run['share_of_floor']:.0%}" if "share_of_floor" in run else ""
    print(
        f"{name:40}{run['milliseconds']:9.1f}{run['tokens_per_second']:10.0f}{share:>10}"
        f"{run['peak_allocated'] / 1e9:9.2f}{run['losses'][0]:12.4f}{run['losses'][-1]:9.4f}",
        flush=True,
    )
