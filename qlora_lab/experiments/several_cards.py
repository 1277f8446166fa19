"""One model on several GPUs: what spreading the data, the weights or the layers costs, and what it saves.

    python -m qlora_lab.experiments cards --ways one pipelined
    python -m torch.distributed.run --nproc_per_node 2 -m qlora_lab.experiments cards --ways data sharded

one        a single process, the whole model on its GPU
pipelined  a single process, the layers spread over all GPUs (`device_map`): one GPU works, the others wait
data       a process for each GPU, each with the whole model and its share of the samples
sharded    the same, but each keeps a share of every layer, and gathers a layer just before it computes
rehearsed  a single process that plays one of `--rehearse N` sharded ones: where the others' shares would arrive it puts
           copies of its own. Its memory is that of one of N GPUs; its losses mean nothing, and its time lacks the wires

Shapes with random weights, samples of random tokens, QLoRA on all linear layers, AdamW's states in fp32 on the GPU. A
row of the record is one training: bytes are those of torch's allocator on the GPU that needs most (NCCL's buffers lie
outside of it), and tokens a second are those of `step_records`, of all GPUs together.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time
from typing import Any

import torch

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.arguments import Parser, count, positive
from qlora_lab.errors import UserError
from qlora_lab.experiments.gpu import empty_cache, require_gpu
from qlora_lab.experiments.record import Record
from qlora_lab.memory.measuring import random_batches
from qlora_lab.memory.shapes import SHAPES
from qlora_lab.models.random_weights import build_random, llama_config
from qlora_lab.models.sharded import RandomWeights, empty_model, fill_and_shard
from qlora_lab.training.loop import train_steps
from qlora_lab.training.processes import make_accelerator
from qlora_lab.training.step_records import seconds_per_step, tokens_per_second

WAYS = ("one", "pipelined", "data", "sharded", "rehearsed")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def add_flags(parser: Parser) -> None:
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["one"], help="default: one")
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--batch-size", type=count, nargs="+", default=[4], help="samples on each GPU")
    parser.add_argument("--length", type=count, default=512, help="tokens of a sample")
    parser.add_argument("--rank", type=count, default=64)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--steps", type=count, default=12)
    parser.add_argument("--rehearse", type=count, default=2, metavar="N", help="processes of which to play one")
    parser.add_argument("--cap", type=positive, metavar="GB", help="let torch's allocator take no more than this")
    parser.add_argument("--output", type=pathlib.Path, help="folder for a record, cards-<gpu>.json")
    parser.add_argument("--continue-from", type=pathlib.Path, help="a record: its runs are kept")


def run(arguments: argparse.Namespace) -> None:
    from accelerate import PartialState

    require_gpu("several are to share a model")
    state = PartialState()
    torch.cuda.set_device(state.local_process_index)
    if arguments.cap:
        share = arguments.cap * 1e9 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    main = state.is_main_process
    record = Record.begin(
        "cards",
        arguments.output if main else None,
        torch.cuda.get_device_name(),
        packages=PACKAGES,
        continue_from=arguments.continue_from,
    )
    for way in arguments.ways:
        for batch_size in arguments.batch_size:
            row = measure(way, arguments, batch_size, state.num_processes)
            if main:
                record.add("runs", row)
                print({name: value for name, value in row.items() if name != "losses"}, row["losses"][-1], flush=True)


def measure(way: str, arguments: argparse.Namespace, batch_size: int, processes: int) -> dict:
    """One training. Raises UserError where the processes do not fit the way."""
    if (processes > 1) != (way == "data") and way != "sharded":
        raise UserError(f"{way} does not go with {processes} processes: see what the module says")
    cards = {"pipelined": torch.cuda.device_count(), "rehearsed": arguments.rehearse}.get(way, processes)
    device = torch.device("cuda", torch.cuda.current_device())
    empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = built(way, arguments, device)
    torch.cuda.synchronize()
    loading, seconds = memory(way), time.perf_counter() - start
    accelerator = make_accelerator(torch.bfloat16, device)
    train = functools.partial(
        train_steps,
        model,
        random_batches(model.config.vocab_size, batch_size * processes, arguments.length),
        steps=arguments.steps,
        learning_rate=1e-4,
        compute_dtype=torch.bfloat16,
        gradient_checkpointing=not arguments.no_checkpointing,
        accelerator=accelerator,
    )
    torch.cuda.reset_peak_memory_stats()
    records = list(train())
    training = memory(way)
    del model
    gathered: Any = accelerator.gather(torch.tensor([[*loading, *training]], device=device))
    largest = gathered.amax(0).tolist()
    return {
        "way": way,
        "shape": arguments.shape,
        "cards": cards,
        "batch_size": batch_size,
        "length": arguments.length,
        "rank": arguments.rank,
        "gradient_checkpointing": not arguments.no_checkpointing,
        **({"cap_gb": arguments.cap} if arguments.cap else {}),
        "milliseconds": 1e3 * (seconds_per_step(records) or 0.0),
        "tokens_per_second": tokens_per_second(records),
        "loaded": largest[0],
        "loading_peak": largest[1],
        "loading_seconds": seconds,
        "peak_allocated": largest[3],
        "losses": [record.loss for record in records],
    }


def built(way: str, arguments: argparse.Namespace, device: torch.device):
    """The model with adapters, spread as the way wants it."""
    shape, adapter = SHAPES[arguments.shape], {"rank": arguments.rank, "alpha": 2 * arguments.rank}
    if way not in ("sharded", "rehearsed"):
        model = build_random(shape, device=device, compute_dtype=torch.bfloat16)
        return add_adapter(layers_spread(model) if way == "pipelined" else model, **adapter)
    model, unfilled = empty_model(llama_config(shape, torch.bfloat16), True, device, torch.bfloat16)
    model = add_adapter(model, **adapter)
    if way == "rehearsed":
        play_one_of(arguments.rehearse)
    fill_and_shard(model, unfilled, RandomWeights(device), device)
    if way == "rehearsed":
        copy_instead_of_gathering(model)
    return model


def play_one_of(processes: int) -> None:
    """Make this process the first of so many, of which there are no others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())


def copy_instead_of_gathering(model) -> None:
    """Let the model's shards gather copies of themselves, and keep the first part of what they would sum up."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    class Gather(DefaultAllGather):
        def __call__(self, output_tensor, input_tensor, group, async_op=False):
            for place in output_tensor.view(group.size(), -1)[1:]:  # the first is the input's own
                place.copy_(input_tensor)

    class Reduce(DefaultReduceScatter):
        def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
            output_tensor.view(-1).copy_(input_tensor.view(-1)[: output_tensor.numel()])

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(Gather())
            module.set_custom_reduce_scatter(Reduce())


def layers_spread(model):
    """Half of the layers go to the second of two GPUs, a third to each of three ...; the rest stays on the first."""
    from accelerate import dispatch_model

    layers, cards = model.config.num_hidden_layers, torch.cuda.device_count()
    where = {f"model.layers.{i}": i * cards // layers for i in range(layers)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
    return dispatch_model(model, {**where, **ends}, main_device=torch.device(0))


def memory(way: str) -> tuple[int, int]:
    """Bytes of tensors now, and at most so far: on this process's GPU, or on the fullest of all if it has them all."""
    cards = range(torch.cuda.device_count()) if way == "pipelined" else [torch.cuda.current_device()]
    now = max(torch.cuda.memory_allocated(card) for card in cards)
    return now, max(torch.cuda.max_memory_allocated(card) for card in cards)
