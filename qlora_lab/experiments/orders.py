"""The bundled model learns the course's orders, in several ways and at several seeds: accuracy, knobs and presets.

All ways have the same adapter to begin with and the same order of the samples for each seed, so that they can be
compared seed by seed.

With `--jobs` several runs share the GPU: a model this small keeps it waiting for the next kernel most of the time.
Seconds and tokens/s would mean nothing then. So they are measured apart, in a short run of each way with the GPU to
itself. A record that is there already is gone on with: its runs are not made again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pathlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qlora_lab.arguments import Parser, count
from qlora_lab.evaluation.losses import Loss
from qlora_lab.experiments.record import Record, file_of
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import tokenize, tokenize_chat, tokenize_text
from qlora_lab.training.data import load_prose, load_samples
from qlora_lab.training.loop import TrainingDiverged, train_steps
from qlora_lab.training.step_records import StepRecord, seconds_per_step, tokens_per_second

STEPS, BATCH_SIZE, RANK, LEARNING_RATE, MAX_LENGTH = 30, 8, 16, 1.5e-3, 256
TIMED_STEPS = 12
SPEED = ("tokens_per_second", "seconds_per_step")
NEEDS_A_GPU = "bf16, 4-bit kernels and paged optimizers are compared on one"


@dataclass(frozen=True)
class Ready:
    """A model with its adapter, and the arguments of `train_steps` and of `Batches`."""

    model: Any
    tokenizer: Any
    settings: dict
    batches: dict


def trained(ready: Ready, steps: int) -> tuple[list[StepRecord], int | None]:
    """Train on the orders, to the end or until it diverges; the records, and the peak of allocated bytes on a GPU."""
    model, tokenizer = ready.model, ready.tokenizer
    device = model.get_output_embeddings().weight.device
    samples, _ = tokenize(load_samples("orders", "train"), tokenizer, MAX_LENGTH)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    settings = {"learning_rate": LEARNING_RATE, "pad_token_id": tokenizer.pad_token_id, **ready.settings}
    records = []
    with contextlib.suppress(TrainingDiverged):
        for record in train_steps(model, Batches(samples, **ready.batches), steps=steps, **settings):
            records.append(record)
    return records, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def held_out(tokenizer, judged: int = 200) -> dict:
    """Tokenized samples that nobody trains on: orders like those in training, and plain English."""
    orders = load_samples("orders", "validation")
    chats = orders.select(range(min(judged, len(orders)) or len(orders)))["messages"]
    return {
        "validation": [tokenize_chat(chat, tokenizer) for chat in chats],
        "prose": [tokenize_text(text, tokenizer) for text in load_prose()],
    }


def per_token(losses: dict[str, Loss]) -> dict[str, float]:
    return {name: loss.per_token for name, loss in losses.items()}


def speed(records: list[StepRecord]) -> dict[str, float | None]:
    return {"tokens_per_second": tokens_per_second(records), "seconds_per_step": seconds_per_step(records)}


# ---------------------------------------------------------------------------------------------------------------- many


def add_flags(parser: Parser, seeds: int, jobs: bool = True) -> None:
    """seeds: the default. jobs: whether runs may share the GPU."""
    parser.add_argument("--seeds", type=count, default=seeds, help="runs of each way (default: %(default)s)")
    if jobs:
        parser.add_argument("--jobs", type=count, default=1, help="runs that share the GPU (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")


def usual_settings() -> dict:
    """What a record of the three says of its runs."""
    return {
        "model": "smollm2-135m-instruct",
        "steps": STEPS,
        "batch_size": BATCH_SIZE,
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
    }


def record_of(what: str, output: pathlib.Path, **settings) -> Record:
    """The record that is there, to go on with, or a new one. settings: more than all three have."""
    device = torch.cuda.get_device_name()
    path = file_of(what, output, device)
    record = Record.begin(
        what,
        output,
        device,
        packages=("torch", "transformers", "peft", "bitsandbytes"),
        settings=usual_settings() | settings,
        continue_from=path if path.exists() else None,
    )
    if record.rows("runs"):
        print(f"{path} has {len(record.rows('runs'))} runs, which are not made again", flush=True)
    return record


def time_alone(record: Record, ways: Iterable[str], prepare: Callable[[str, int, torch.device], Ready]) -> None:
    """A short run of each way with the GPU to itself, into `alone`."""
    for name in ways:
        if name in record.named("alone"):
            continue
        records, peak = trained(prepare(name, 0, torch.device("cuda")), TIMED_STEPS)
        record.put("alone", name, {**speed(records), "peak_allocated": peak})
        print(
            f"{name:<18} {speed(records)['tokens_per_second'] or 0:6.0f} tokens/s, {(peak or 0) / 1e9:.2f} GB",
            flush=True,
        )


def run_all(
    record: Record,
    key: str,
    ways: Iterable[str],
    seeds: int,
    train: Callable[[str, int, torch.device], dict],
    *,
    jobs: int = 1,
    tell: Callable[[dict], str] | None = None,
) -> None:
    """Each way at each seed, into `runs`; those that are there are not made again.

    Args:
        key: under which a run names its way.
        train: (way, seed, device) -> the run.
        tell: a line about a run; the default is `summary`.
    """
    all_runs = [(name, seed) for seed in range(seeds) for name in ways]
    wanted = [(train, name, seed) for name, seed in all_runs if not record.rows("runs", **{key: name, "seed": seed})]
    position = {run: n for n, run in enumerate(all_runs)}
    for run in many_runs(wanted, jobs):
        row = {name: value for name, value in run.items() if name not in SPEED}
        record.add("runs", row, order=lambda row: position.get((row[key], row["seed"]), len(position)))
        print((tell or summary)(run), flush=True)
    print(record.path)


def many_runs(wanted: list[tuple], jobs: int) -> Iterable[dict]:
    """The result of each (function, name, seed) on the GPU, as they finish, in so many processes."""
    if jobs == 1:
        yield from map(_run, wanted)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_run, wanted)


def _run(wanted: tuple) -> dict:
    train, name, seed = wanted
    return train(name, seed, torch.device("cuda"))


def summary(run: dict) -> str:
    loss = "diverged" if run["after"] is None else f"{run['after']['validation']:.4f}"
    exact = "".join(f", {split} {bits.count('1')}/{len(bits)}" for split, bits in run.get("exact", {}).items())
    return f"{run.get('method') or run['knob']:<18} seed {run['seed']}: validation {loss}{exact}"
