"""Mixtures of experts in 4 bits on a card of 32 GB: what they hold, and what a QLoRA step needs.

Random weights of the sizes that their makers publish, built in NF4 expert by expert; LoRA of rank 16 on the attention,
or on the experts as well; checkpointing, paged AdamW. The allocator is held to 32 GB, less half a GB for CUDA.
"""

from __future__ import annotations

import argparse
import pathlib
import time
import warnings

import torch

from qlora_lab.adapters.peft_adapter import add_adapter, trainable_parameters
from qlora_lab.arguments import Parser, count
from qlora_lab.experiments.gpu import empty_cache, require_gpu
from qlora_lab.experiments.record import Record
from qlora_lab.experiments.step_speed import PACKAGES
from qlora_lab.memory import estimate, from_config
from qlora_lab.memory.measuring import forget_accelerate, random_batches
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.loop import train_steps
from qlora_lab.training.presets import Preset

CARD, CONTEXT, RANK, LENGTH = 32e9, 5e8, 16, 512  # bytes, bytes, rank, tokens a sample
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"attention": ATTENTION, "attention and experts": (*ATTENTION, "gate_up_proj", "down_proj")}
MIXTURES = {  # transformers' own defaults are those of Mixtral 8x7B
    "Mixtral-8x7B": ("mixtral", {}),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 24,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "vocab_size": 201_088,
        },
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151_936,
        },
    ),
}
RUNS = (("attention", 1), ("attention", 4), ("attention and experts", 1))  # and samples a step


def build(name: str, device: str = "cuda"):
    """The mixture, and what building it took: seconds, and bytes held and at most allocated."""
    from transformers import AutoConfig

    kind, features = MIXTURES[name]
    empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    model = build_random(AutoConfig.for_model(kind, **features), device=device, compute_dtype=torch.bfloat16)
    torch.cuda.synchronize()
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return model, {"seconds": time.perf_counter() - begun, "held": held, "peak_allocated": peak}


def step_of(model, targets: str, batch: int, steps: int):
    """The model without adapters again, and what these steps needed beside what was predicted, in bytes."""
    shape, where = from_config(model.config), list(TARGETS[targets])
    device = next(model.parameters()).device
    with torch.device(device):
        adapted = add_adapter(model, rank=RANK, alpha=2 * RANK, targets=where)
    expected = estimate(shape, "qlora", rank=RANK, targets=where, batch_size=batch, sequence_length=LENGTH)
    forget_accelerate()
    empty_cache()
    torch.cuda.reset_peak_memory_stats()
    preset = Preset("", optimizer="paged_adamw_32bit", gradient_checkpointing=True)
    settings = preset.settings(torch.bfloat16)
    batches = random_batches(shape.vocab_size, batch, LENGTH)
    records = list(train_steps(adapted, batches, steps=steps, learning_rate=1e-3, **settings))
    row = {
        "trainable": trainable_parameters(adapted),
        "predicted": expected.peak_allocated,
        "measured": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "losses": [record.loss for record in records],
        "seconds": [record.seconds for record in records],
    }
    return adapted.unload().train(False), row


def add_flags(parser: Parser) -> None:
    parser.add_argument("--only", nargs="+", choices=MIXTURES, default=list(MIXTURES), help="of these (default: all)")
    parser.add_argument("--steps", type=count, default=3, help="of each training (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, help="folder for a record, mixtures-<gpu>.json")
    parser.add_argument("--continue-from", type=pathlib.Path, help="a record: its runs are kept and not made again")


def run(arguments: argparse.Namespace) -> None:
    require_gpu("its memory is measured")
    warnings.filterwarnings("ignore")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (CARD - CONTEXT) / total))
    record = Record.begin(
        "mixtures",
        arguments.output,
        torch.cuda.get_device_name(),
        packages=PACKAGES,
        settings={"rank": RANK, "sequence_length": LENGTH, "steps": arguments.steps, "card": CARD},
        continue_from=arguments.continue_from,
    )
    for name in arguments.only:
        wanted = [key for key in RUNS if not record.rows("runs", model=name, targets=key[0], batch_size=key[1])]
        if not wanted:
            continue
        model, built = build(name)
        record.put("built", name, built)
        held, most = built["held"] / 1e9, built["peak_allocated"] / 1e9
        print(f"{name}: holds {held:.2f} GB, at most {most:.2f} while it was built")
        for targets, batch in wanted:
            model, row = step_of(model, targets, batch, arguments.steps)
            record.add("runs", {"model": name, "targets": targets, "batch_size": batch, **row})
            off = row["measured"] / row["predicted"] - 1
            print(
                f"   {targets}, {batch} x {LENGTH}: predicted {row['predicted'] / 1e9:.2f} GB, measured "
                f" {row['measured'] / 1e9:.2f} ({off:+.1%}), {row['seconds'][-1]:.2f} s a step",
                flush=True,
            )
        del model
