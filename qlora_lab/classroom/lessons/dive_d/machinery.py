"""What folded cells of dive_d_training_tricks read and compute: two records, small models, and one short run."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_lab.memory import SHAPES, estimate, optimizer_state_bytes, trained_tensors
from qlora_lab.places import RECORDS

if TYPE_CHECKING:
    import torch

    from qlora_lab.training.chat import TokenizedSample

GB = 1e9  # 10^9 bytes
GROUPS = [
    ["as it is"],
    ["checkpointing", "batch 4 x 2", "batch 1 x 8", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"],
    ["float16", "float32"],
    ["lr 1.5e-4", "lr 5e-4", "lr 5e-3", "lr 1.5e-2"],
    ["batch 32", "rank 4", "rank 64", "q, v", "q, k, v, o"],
]
RATES = ["as it is", *GROUPS[3]]  # five settings that do the same work
SAMPLES = 16  # of the step that section 3 splits
ROOM = 0.9  # the share of a card that a prediction may fill
WAYS = {"without checkpointing": False, "with checkpointing": True}


def read_record(name: str) -> dict:
    """`data/records/NAME-nvidia-h100-80gb-hbm3.json`."""
    path = RECORDS / f"{name}-nvidia-h100-80gb-hbm3.json"
    return json.loads(path.read_text(encoding="utf-8"))


# --- One knob at a time -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Knobs:
    """What was recorded of each knob, by its name.

    orders, prose: held-out losses (nats per token), one a seed. peak: GB of torch's tensors, one a seed. losses: of
    each step, a list a seed. speed: tokens a second, measured once. trained: how many numbers the adapter has.
    """

    about: str
    orders: dict[str, list[float]]
    prose: dict[str, list[float]]
    peak: dict[str, list[float]]
    losses: dict[str, list[list[float]]]
    speed: dict[str, float]
    trained: dict[str, int]


def read_knobs() -> Knobs:
    """The record of `python -m qlora_lab.experiments knobs`: seeds 0, 1 and 2 of each knob in GROUPS."""
    record = read_record("knobs")
    runs = {knob: [run for run in record["runs"] if run["knob"] == knob] for group in GROUPS for knob in group}
    return Knobs(
        about=f"{record['device']}, {record['date']}",
        orders={knob: [run["after"]["validation"] for run in each] for knob, each in runs.items()},
        prose={knob: [run["after"]["prose"] for run in each] for knob, each in runs.items()},
        peak={knob: [run["peak_allocated"] / GB for run in each] for knob, each in runs.items()},
        losses={knob: [run["losses"] for run in each] for knob, each in runs.items()},
        speed={knob: record["alone"][knob]["tokens_per_second"] for knob in runs},
        trained={knob: each[0]["trainable"] for knob, each in runs.items()},
    )


def untrained_prose() -> float:
    """Loss of the 4-bit model on plain English before any training, in nats per token (the record of lesson 11)."""
    runs = read_record("accuracy")["runs"]
    return next(run["before"]["prose"] for run in runs if run["method"] == "nf4-double")


# --- Optimizer states -------------------------------------------------------------------------------------------------


def evenly(values: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 up, rounded to 256 evenly spaced levels from 0 to the largest of them."""
    step = values.max() / 255
    return (values / step).round() * step


def dynamic(values: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 up, rounded to the nearest level of the code of bitsandbytes' 8-bit AdamW for averages of squares.

    So does its kernel on a GPU. (On a CPU bitsandbytes looks levels up in a table that is too coarse near zero.)
    """
    from bitsandbytes.functional import create_dynamic_map

    levels, scale = create_dynamic_map(signed=False), values.max()
    return levels[(values[:, None] / scale - levels).abs().argmin(dim=1)] * scale


def states(shape: str, method: str, rank: int) -> tuple[float, float, float]:
    """GB of AdamW's states: in fp32; what of them is paged, if they are; in 8 bits."""
    tensors = trained_tensors(SHAPES[shape], method, rank, "all-linear")
    plain, paged, eight = (
        optimizer_state_bytes(tensors, name) for name in ("adamw_torch", "paged_adamw_32bit", "adamw_8bit")
    )
    return plain[0] / GB, paged[1] / GB, eight[0] / GB


# --- Checkpointing ----------------------------------------------------------------------------------------------------


@functools.cache
def memory_record() -> dict:
    return read_record("memory")


def run_of(batch: int, checkpointing: bool, length: int = 512, rank: int = 64, size: str = "7b") -> dict | None:
    """The recorded QLoRA run of a LLaMA with these settings, or None."""
    wanted = {"shape": f"llama-{size}", "method": "qlora", "targets": "all-linear", "adapter_dtype": "float32"}
    wanted |= {"batch_size": batch, "sequence_length": length, "gradient_checkpointing": checkpointing}
    wanted |= {"rank": rank, "optimizer": "paged_adamw_32bit"}
    runs = (run for run in memory_record()["runs"] if wanted.items() <= run.items() and "measured" in run)
    return next(runs, None)


def recorded(batches: list[int], key: str, unit: float) -> dict[str, list[float]]:
    """What was measured at 7B without and with checkpointing, for each batch."""
    values: dict[str, list[float]] = {}
    for name, on in WAYS.items():
        runs = [run_of(batch, on) for batch in batches]
        values[name] = [run["measured"][key] / unit for run in runs if run]
    return values


@dataclass(frozen=True)
class Split:
    """A step of 16 samples on the H100. gigabytes: peak of torch's tensors. least, most: seconds."""

    gigabytes: float
    least: float
    most: float


def splits_of_a_step() -> tuple[Split, Split]:
    """Four passes of four samples without checkpointing, and one of 16 with it.

    A pass was timed together with its update. Four passes have one update: between four of these times, and four less
    three updates.
    """
    four, one = run_of(4, False), run_of(16, True)
    assert four is not None and one is not None
    passes, update = four["measured"], four["phases"]["steady step: update"]["seconds"]
    most, whole = 4 * passes["step_seconds"], one["measured"]
    return (
        Split(passes["peak_allocated"] / GB, most - 3 * update, most),
        Split(whole["peak_allocated"] / GB, whole["step_seconds"], whole["step_seconds"]),
    )


def needs_of(model: str, rank: int = 64, length: int = 512) -> Callable[[int, bool], float]:
    """A function of the samples in a pass and of checkpointing: predicted GB on the card, context and states included.

    model: a key of SHAPES. length: tokens a sample.
    """

    def needs(samples: int, checkpointing: bool) -> float:
        knobs = {"batch_size": samples, "gradient_checkpointing": checkpointing}
        return estimate(SHAPES[model], rank=rank, sequence_length=length, **knobs).total / GB

    return needs


def measured_on_the_card(batch: int, checkpointing: bool, length: int, rank: int, size: str) -> float | None:
    """GB from the record: reserved memory, paged states and context; None if there was no such run."""
    run = run_of(batch, checkpointing, length, rank, size)
    if run is None:
        return None
    measured = run["measured"]
    outside = measured["managed_bytes"] + memory_record()["outside_allocator_at_start"]
    return (measured["peak_reserved"] + outside) / GB


def tiny(lora: bool = True):
    """A random LLaMA of four layers, with adapters unless all of it is trained."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlora_lab.finetuning import add_adapter

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    return add_adapter(model, rank=4, alpha=8) if lora else model


def counted(lora: bool) -> tuple[int, int, bool]:
    """Operations of a forward and backward pass of the tiny model, without and with checkpointing.

    And whether the gradients of both are equal in all bits. By default torch stops recomputing a layer as soon as it
    has what it needs, which leaves out the layer's last product; here it is told not to.
    """
    import torch
    from torch.utils.checkpoint import set_checkpoint_early_stop
    from torch.utils.flop_counter import FlopCounterMode

    from qlora_lab.training.activations import checkpoint_activations

    ids = torch.arange(3, 131).view(2, 64)
    operations, gradients = [], []
    for on in (False, True):
        model = tiny(lora)
        checkpoint_activations(model, on)
        with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
            model.train()(input_ids=ids, labels=ids).loss.backward()
        operations.append(counter.get_total_flops())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return operations[0], operations[1], torch.equal(*gradients)


# --- Accumulation -----------------------------------------------------------------------------------------------------


def answers(targets: list[int], prompt: int = 10) -> list[TokenizedSample]:
    """Random samples: a prompt, and an answer of so many tokens."""
    import torch

    from qlora_lab.finetuning import TokenizedSample

    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 200, (prompt + n,), generator=draw).tolist() for n in targets]
    return [TokenizedSample(tuple(ids), prompt) for ids in drawn]


def gradients_of(model, micro_batches: list[list[TokenizedSample]], weights: list[float]) -> torch.Tensor:
    """The adapters' gradient: a backward pass of each micro-batch's mean loss, times its weight; flat."""
    import torch

    from qlora_lab.finetuning import collate
    from qlora_lab.training.loss import token_loss_sum

    model.zero_grad()
    for samples, weight in zip(micro_batches, weights, strict=True):
        targets = sum(sample.target_count for sample in samples)
        (weight * token_loss_sum(model, collate([[sample] for sample in samples], 0)) / targets).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def off(came: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of what was expected."""
    return ((came - expected).norm() / expected.norm()).item()


@functools.cache
def orders() -> tuple[list[TokenizedSample], int]:
    """512 orders of lesson 01, and the id that short rows are filled up with."""
    from transformers import AutoTokenizer

    from qlora_lab.finetuning import fetch, load_samples, tokenize

    tokenizer = AutoTokenizer.from_pretrained(fetch(), trust_remote_code=False)
    samples, _ = tokenize(load_samples("orders", "train").select(range(512)), tokenizer, 256)
    return samples, tokenizer.pad_token_id


def chat() -> list[TokenizedSample]:
    """512 samples of invented lengths, 16 to 512 tokens, as chats have them: many short, few long ones."""
    import torch

    from qlora_lab.finetuning import TokenizedSample

    draw = torch.Generator().manual_seed(0)
    drawn = [math.exp(4.8 + 0.8 * torch.randn((), generator=draw).item()) for _ in range(512)]
    return [TokenizedSample((7,) * n, n // 2) for n in (min(512, max(16, round(length))) for length in drawn)]


def padding(samples: list[TokenizedSample], width: int, way: str) -> float:
    """Share of 16 steps' tensors that is padding. width: tokens of a packed row.

    way: "as they come", eight at a time; "similar lengths together", as `Batches` does; or "packed", four rows at a
    time with as many samples in each as fit, one after the other.
    """
    from qlora_lab.finetuning import Batches

    if way == "as they come":
        steps = [[[len(s.ids)] for s in samples[i : i + 8]] for i in range(0, 128, 8)]
    else:
        packing = way == "packed"
        taken = itertools.islice(Batches(samples, 4 if packing else 8, packing=packing, max_length=width), 16)
        steps = [[[len(s.ids) for s in row] for row in micro_batches[0]] for micro_batches in taken]
    used = sum(length for rows in steps for row in rows for length in row)
    return 1 - used / sum(len(rows) * max(map(sum, rows)) for rows in steps)


def neighbour() -> tuple[float, float]:
    """How far off the second sample's logits are in a packed row: positions that begin anew, and that run on."""
    import torch

    from qlora_lab.finetuning import collate

    model, (first, second) = tiny().eval(), answers([12, 9])
    row = collate([[first, second]], pad_token_id=0)

    def logits(ids, positions):
        with torch.no_grad():
            given = {"input_ids": torch.as_tensor(ids)[None], "position_ids": torch.as_tensor(positions)[None]}
            return model(**given).logits[0]

    alone = logits(second.ids, range(len(second.ids)))
    places = row["position_ids"][0], range(len(first.ids) + len(second.ids))
    anew, on = (logits(row["input_ids"][0], positions)[len(first.ids) :] for positions in places)
    return off(anew, alone), off(on, alone)
