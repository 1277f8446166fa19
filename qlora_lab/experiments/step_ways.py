"""The ways to take a training step whose speeds are compared, all but those that go through TRL or Unsloth.

The model is a LLaMA-7B with random weights in NF4 with double quantization, adapters of rank 64 on all linear layers,
512 tokens a sample, paged AdamW in 32 bits.

    standard     PEFT + bitsandbytes under bf16 autocast, fp32 adapters: `train_steps` as it is
    graph        the standard forward and backward pass, captured in one CUDA graph
    bf16         the standard step with bf16 adapters: nothing to cast
    unrecorded   the fast step without its CUDA graph: fewer kernels, launched by Python
    fast         `train_steps(fast=True)`
    offloading   the same with `activation_offloading=True`: layers' inputs wait in the host's memory
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator

import torch

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.experiments.gpu import empty_cache
from qlora_lab.memory.shapes import SHAPES
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import TokenizedSample
from qlora_lab.training.loop import train_steps
from qlora_lab.training.optimizers import make_optimizer, set_learning_rate
from qlora_lab.training.presets import PRESETS
from qlora_lab.training.schedules import rate
from qlora_lab.training.step_records import StepRecord, seconds_per_step, tokens_per_second
from qlora_lab.training.steps.choice import make_fast_step
from qlora_lab.training.steps.fast.host_memory import capture_stream

SETTINGS = ((1, True), (4, True), (4, False), (16, True))  # samples a step, checkpointing
LENGTH, RANK, SHAPE = 512, 64, "llama-7b"
BETWEEN = ("bf16", "graph", "unrecorded")
COMMON = {"learning_rate": 1e-4, "optimizer": "paged_adamw_32bit", "compute_dtype": torch.bfloat16}


def samples(count: int, length: int, vocabulary: int) -> list[TokenizedSample]:
    """Random tokens, all but the first of them targets; the same ones each time."""
    draw = torch.Generator().manual_seed(0)
    return [
        TokenizedSample(tuple(torch.randint(3, vocabulary, (length,), generator=draw).tolist()), 1)
        for _ in range(count)
    ]


def samples_of_steps(batch: int, vocabulary: int | None = None) -> list[TokenizedSample]:
    """Four steps' samples, which all ways train on over and over. vocabulary: that of SHAPE unless given."""
    return samples(4 * batch, LENGTH, vocabulary or SHAPES[SHAPE].vocab_size)


def make(who: str):
    """A 7B model as this way of training wants it, and its arguments for `train_steps`."""
    empty_cache()
    model = build_random(SHAPES[SHAPE], device="cuda", compute_dtype=torch.bfloat16)
    if who == "bf16":
        preset = PRESETS["bf16-adapters"]
        model, settings = preset.adapt(model, rank=RANK, alpha=RANK), preset.settings()
        return model, {**COMMON, "compute_dtype": settings["compute_dtype"]}
    model = add_adapter(model, rank=RANK, alpha=RANK)
    return model, {
        **COMMON,
        "fast": who in ("fast", "unrecorded", "offloading"),
        "activation_offloading": who == "offloading",
        **({"make_step": functools.partial(make_fast_step, capture=False)} if who == "unrecorded" else {}),
    }


def running(who: str, batch: int, checkpointing: bool, steps: int) -> Generator[StepRecord, None, None]:
    """A training that is about to take its first step."""
    model, settings = make(who)
    torch.cuda.reset_peak_memory_stats()
    if who == "graph":
        return graphed_steps(model, batch, checkpointing, steps)
    batches = Batches(samples_of_steps(batch), batch)
    return train_steps(model, batches, steps=steps, gradient_checkpointing=checkpointing, **settings)


def graphed_steps(model, batch: int, checkpointing: bool, steps: int) -> Generator[StepRecord, None, None]:
    """Transformers' and PEFT's forward and backward pass under autocast, recorded once; AdamW as usual."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()
    ids = torch.zeros(batch, LENGTH, dtype=torch.int64, device="cuda")
    positions = torch.arange(LENGTH, device="cuda").expand(batch, LENGTH)

    def forward_backward():
        for p in parameters:
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    stream = capture_stream(ids.device)
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward_backward()
    torch.cuda.synchronize()
    for p in parameters:
        p.grad = None
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = forward_backward()

    def replay(rows: torch.Tensor) -> torch.Tensor:
        ids.copy_(rows)
        graph.replay()
        return loss

    yield from plain_loop(replay, parameters, samples_of_steps(batch), batch, steps)


def plain_loop(
    forward_backward: Callable[[torch.Tensor], torch.Tensor],
    parameters: list[torch.nn.Parameter],
    data: list[TokenizedSample],
    batch: int,
    steps: int,
) -> Generator[StepRecord, None, None]:
    """The least that a training needs: gradients, clipping, AdamW.

    forward_backward: takes a step's ids, on the host; leaves gradients, returns the loss.
    data: the samples of four steps, over and over.
    """
    adamw = make_optimizer(COMMON["optimizer"], parameters, COMMON["learning_rate"], 0.0)
    for step in range(steps):
        start = time.perf_counter()
        rows = data[step % 4 * batch :][:batch]
        learning_rate = COMMON["learning_rate"] * rate(step + 1, steps, 3, "cosine")
        set_learning_rate(adamw, learning_rate)
        loss = forward_backward(torch.tensor([row.ids for row in rows]))
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        value = loss.item()
        seconds = time.perf_counter() - start
        yield StepRecord(step + 1, value, learning_rate, norm.item(), batch * LENGTH, seconds)


def result(records: list[StepRecord]) -> dict:
    """What a record tells of a training that has just ended."""
    return {
        "milliseconds": 1e3 * (seconds_per_step(records) or math.nan),
        "tokens_per_second": tokens_per_second(records),
        "peak_allocated": torch.cuda.max_memory_allocated(),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "losses": [record.loss for record in records],
    }
