"""The runs of `methods`: a method learns a task at several learning rates, and the best of them is judged."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from qlora_lab.adapters.peft_adapter import trainable_parameters
from qlora_lab.evaluation.answers import is_exact
from qlora_lab.experiments.gpu import empty_cache
from qlora_lab.experiments.methods_known import METHODS, Method, compute_dtype, stacked
from qlora_lab.experiments.orders import MAX_LENGTH
from qlora_lab.experiments.stacked import answers_of, keep_runs, losses_of, merge_into_nf4, train_stack
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import tokenize, tokenize_text
from qlora_lab.training.data import load_prose, load_samples
from qlora_lab.training.templates import reference_text

TASKS = {"orders": 20, "diary": 60}  # steps of 8 samples
BATCH_SIZE, JUDGED = 8, 100  # samples a step; of each split that is judged
CHOOSING = 100  # validation samples that choose the rate; the others are reported
SPARE_TOKENS = 8


class Run(NamedTuple):
    """A run of a stack. samples: how many it learns from, drawn by its seed; None: all."""

    rate: float
    seed: int
    samples: int | None = None


@functools.cache
def data_of(task: str, tokenizer) -> dict:
    """Tokenized samples to train and to validate on, conversations to answer, paragraphs of English."""
    held_out = tokenize(load_samples(task, "validation"), tokenizer, MAX_LENGTH)[0]
    return {
        "train": tokenize(load_samples(task, "train"), tokenizer, MAX_LENGTH)[0],
        "choosing": held_out[:CHOOSING],
        "validation": held_out[CHOOSING:],
        "prose": [tokenize_text(text, tokenizer) for text in load_prose()],
        **{split: list(load_samples(task, split)["messages"]) for split in ("test", "shifted")},
    }


def compare(
    name: str,
    seeds: int,
    device: torch.device,
    *,
    steps: int | None = None,
    rates: Sequence[float] | None = None,
    judged: int = JUDGED,
    batch_size: int = BATCH_SIZE,
    texts: int | None = None,
) -> dict:
    """Train a method on a task at each of its learning rates, choose one of them, and judge that.

    The rate is the one with the lowest loss, averaged over the seeds, on validation samples that are used for nothing
    else.

    Args:
        name: "method, task", of METHODS and TASKS. seeds: how many runs there are at each rate.
        steps: other than the task's. rates: other than the method's.
        judged: samples of each split; 0 judges no answers.
        texts: so many samples of each text have their loss measured; None: all.

    Returns:
        rates: [{method, task, rate, seed, trained (the mean loss of the last ten steps), validation}]
        runs, of the chosen rate: [{method, task, seed, rate, after: {validation, prose}, exact: {test, shifted: a
            character for each answer}, merged: {after, exact} (of QLoRA's, merged into NF4)}]
        stacks: [{method, task, seconds, peak_allocated, trainable, prose_before}]
        Losses are in nats per token, None where one is not finite.
    """
    who, task = name.rsplit(", ", 1)
    method, rates, begun = METHODS[who], rates or METHODS[who].rates, time.perf_counter()
    about: dict = {"method": who, "task": task}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    kept: Any = None
    rows, tokenizer, before = [], None, {}
    for at_once in [[rate] for rate in rates] if method.full else [rates]:  # whole models take much memory
        runs = [Run(rate, seed) for rate in at_once for seed in range(seeds)]
        model, tokenizer, found = train_runs(
            method, task, steps or TASKS[task], runs, device, batch_size, before, texts=texts
        )
        rows += [{**about, **row} for row in found]
        if (rate := best_rate(rows)) in at_once:
            keep_runs(model, [n for n, run in enumerate(runs) if run.rate == rate])
            kept = model
        del model
        empty_cache()
    rate = best_rate(rows)
    judge = functools.partial(judged_runs, kept, tokenizer, task, seeds, device, judged, texts)
    if method.merge_aware:  # what it was trained to be
        merge_into_nf4(kept)
    beside, merged = judge(), [{} for _ in range(seeds)]
    if method == METHODS["QLoRA"]:
        merge_into_nf4(kept)
        merged = [{"merged": one} for one in judge()]
    chosen = [{**about, "seed": seed, "rate": rate, **beside[seed], **merged[seed]} for seed in range(seeds)]
    about["seconds"] = time.perf_counter() - begun
    about["peak_allocated"] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"rates": rows, "runs": chosen, "stacks": [{**about, **before}]}


def train_runs(
    method: Method,
    task: str,
    steps: int,
    runs: Sequence[Run],
    device: torch.device,
    batch_size: int,
    before: dict | None = None,
    accumulation: int = 1,
    texts: int | None = None,
) -> tuple[Any, Any, list[dict]]:
    """A trained stack, its tokenizer, and of each run {rate, seed, trained, validation}.

    before: gets the number of trained parameters, and the loss on prose before training.
    """
    seeds = [run.seed for run in runs]
    model, tokenizer = stacked(method, seeds, device)
    if before is not None and not before:
        before["trainable"] = trainable_parameters(model) // len(runs)
        losses = losses_by_text(model, tokenizer, task, len(runs), device, texts, ("prose",))
        before["prose_before"] = losses["prose"][0]
    samples = data_of(task, tokenizer)["train"]
    losses = train_stack(
        model,
        [Batches(_some(samples, run.samples, run.seed), batch_size, accumulation, seed=run.seed) for run in runs],
        [run.rate for run in runs],
        steps,
        pad_token_id=tokenizer.pad_token_id,
        dtype=compute_dtype(device),
        lora_plus=method.lora_plus,
    )
    validation = losses_by_text(model, tokenizer, task, len(runs), device, texts, ("choosing",))["choosing"]
    return (
        model,
        tokenizer,
        [
            {"rate": run.rate, "seed": run.seed, "trained": finite(statistics.fmean(each[-10:])), "validation": loss}
            for run, each, loss in zip(runs, losses, validation, strict=True)
        ],
    )


def _some(rows: list, samples: int | None, seed: int) -> list:
    """So many of the rows, drawn by seed; None: all."""
    if samples is None:
        return rows
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]
    return [rows[i] for i in drawn.tolist()]


def best_rate(sweeps: list[dict]) -> float:
    """The rate whose mean validation loss is the lowest. A run that diverged rules its rate out."""
    found: dict[float, list[float]] = {}
    for row in sweeps:
        loss = row["validation"]
        found.setdefault(row["rate"], []).append(math.inf if loss is None else loss)
    return min(found, key=lambda rate: statistics.fmean(found[rate]))


def losses_by_text(
    model,
    tokenizer,
    task: str,
    runs: int,
    device: torch.device,
    most: int | None = None,
    texts: Sequence[str] = ("validation", "prose"),
) -> dict[str, list]:
    """For each text, the loss of each run on all of its samples, or on so many of them."""
    data, options = data_of(task, tokenizer), {"pad_token_id": tokenizer.pad_token_id, "dtype": compute_dtype(device)}
    return {text: losses_of(model, data[text][:most], runs, **options) for text in texts}


def judged_runs(
    model, tokenizer, task: str, runs: int, device: torch.device, judged: int, texts: int | None = None
) -> list[dict]:
    """For each run: after: {validation, prose}, exact: {test, shifted}."""
    data = data_of(task, tokenizer)
    losses = losses_by_text(model, tokenizer, task, runs, device, texts)
    chats = {split: data[split][:judged] for split in ("test", "shifted")} if judged else {}
    references = {split: [reference_text(chat, tokenizer) for chat in chats[split]] for split in chats}
    answered = [text for split in references.values() for text in split]
    longest = max((len(tokenizer(text)["input_ids"]) for text in answered), default=0)
    asked = [chat[:-1] for split in chats for chat in chats[split]]
    answers = [[] for _ in range(runs)]
    if asked:
        limit, dtype = longest + SPARE_TOKENS, compute_dtype(device)
        answers = answers_of(model, tokenizer, asked, runs, max_new_tokens=limit, dtype=dtype)
    found = []
    for run in range(runs):
        rest, exact = iter(answers[run]), {}
        for split, expected in references.items():
            exact[split] = "".join("1" if is_exact(next(rest), text) else "0" for text in expected)
        found.append({"after": {text: values[run] for text, values in losses.items()}, "exact": exact})
    return found


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
