"""What a forward pass leaves in a GPU's memory for its backward pass, counted in bytes on small models.

Two models that differ by one layer, and two lengths of text, tell what a layer keeps for each token: every tensor that
`memory/activations.py` says is kept, and no other. The allocator is asked what was requested of it, so its rounding
does not matter.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import pathlib
from dataclasses import replace

import torch

from qlora_lab.errors import UserError
from qlora_lab.experiments.record import Record
from qlora_lab.facts import LINEARS
from qlora_lab.memory.measuring import forget_accelerate, random_batches
from qlora_lab.memory.shapes import Shape
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.activations import checkpoint_activations
from qlora_lab.training.batches import collate
from qlora_lab.training.loss import token_loss_sum
from qlora_lab.training.presets import Preset
from qlora_lab.training.processes import make_accelerator

SHAPE = Shape(256, 640, 2, 8, 4, 512)  # sizes that no two tensors of a layer have in common
RANK, LAYERS, LENGTHS, CHUNKS = 8, (2, 3), (256, 512), (None, 64)
PRECISIONS = (  # method, adapter_dtype, full_precision
    ("full", "float32", "float32"),
    ("full", "float32", "mixed"),
    ("lora", "float32", "float32"),
    ("lora", "bfloat16", "float32"),
    ("qlora", "float32", "float32"),
    ("qlora", "bfloat16", "float32"),
)
TARGETS = ("all-linear", ("q_proj", "v_proj"), ("gate_proj", "up_proj"), *((name,) for name in LINEARS))


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")


def run(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise UserError("no GPU here: what its attention kernels keep is another thing than what a CPU's do")
    device = torch.device("cuda", torch.cuda.current_device())
    packages = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    settings = {"shape": [256, 640, 2, 8, 4, 512], "rank": RANK}
    gpu = torch.cuda.get_device_name(device)
    record = Record.begin("kept", arguments.output, gpu, packages=packages, settings=settings)
    for case in cases():
        row = {**case, "kept": kept(**case, device=device)}
        record.add("runs", row)
        print(*row.values(), flush=True)
    print(record.path)


def cases():
    """The arguments of `kept`, without the device."""
    for method, adapter_dtype, full_precision in PRECISIONS:
        targets = TARGETS[:1] if method == "full" else TARGETS
        for target, checkpointing, chunk, layers, tokens in itertools.product(
            targets, (False, True), CHUNKS, LAYERS, LENGTHS
        ):
            yield {
                "method": method,
                "adapter_dtype": adapter_dtype,
                "full_precision": full_precision,
                "targets": target,
                "gradient_checkpointing": checkpointing,
                "loss_chunk": chunk,
                "layers": layers,
                "tokens": tokens,
            }


def kept(
    *,
    method: str,
    adapter_dtype: str,
    full_precision: str,
    targets: str | tuple[str, ...],
    gradient_checkpointing: bool,
    loss_chunk: int | None,
    layers: int,
    tokens: int,
    device: torch.device,
) -> int:
    """Bytes more than before the forward pass, when it has ended and its loss is there.

    The arguments are those of `memory.estimate`. The second of two steps is measured, since the first also makes what
    stays for the whole training (workspaces, and the leaf that gradient checkpointing needs).
    """
    full, bf16 = method == "full", torch.bfloat16
    mixed = full and full_precision == "mixed"
    dtype = torch.float32 if full and not mixed else bf16
    shape = replace(SHAPE, num_hidden_layers=layers)
    model = build_random(shape, "nf4" if method == "qlora" else None, device=device, compute_dtype=dtype)
    preset = Preset("", "bfloat16" if mixed else adapter_dtype, "adamw_torch", gradient_checkpointing)
    if full:
        model.requires_grad_(True)
    else:
        names = targets if isinstance(targets, str) else list(targets)
        model = preset.adapt(model, rank=RANK, alpha=2 * RANK, targets=names)
    forget_accelerate()
    accelerator = make_accelerator(preset.settings(bf16)["compute_dtype"], device)
    if gradient_checkpointing:
        checkpoint_activations(model)
    model.train()
    [rows] = next(iter(random_batches(shape.vocab_size, 1, tokens)))
    batch = collate(rows, 0)
    difference = 0
    for _ in range(2):
        gc.collect()
        before = requested_bytes(device)
        with accelerator.autocast():
            loss = token_loss_sum(model, batch, loss_chunk)
        difference = requested_bytes(device) - before
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        del loss
    return difference


def requested_bytes(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    return torch.cuda.memory_stats(device)["requested_bytes.all.current"]
