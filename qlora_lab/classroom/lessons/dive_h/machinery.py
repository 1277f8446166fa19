"""Machinery of dive_h_merging: two small adapters, four merges, and what of an adapter is in a merged model."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lab.adapters.merge_aware import merge_requantized
from qlora_lab.adapters.quantized_linear import dense_weight
from qlora_lab.experiments.record import Record
from qlora_lab.finetuning import (
    Batches,
    add_lora,
    dequantize_linears,
    load_lora,
    load_model,
    load_samples,
    lora_layers,
    merge,
    save_lora,
    text_loss,
    tokenize,
    train_steps,
    unload,
)
from qlora_lab.models.hardware import pick_compute_dtype, pick_device
from qlora_lab.places import RECORDS
from qlora_lab.quantization import quantize_q4_0

Conversation = list[dict[str, str]]


@functools.cache
def orders(split: str) -> list[Conversation]:
    """The conversations of a split of the orders, as JSON is asked for and answered."""
    return load_samples("orders", split)["messages"]


def as_label(chat: Conversation) -> Conversation:
    """The same order, answered with a label for the parcel: `15 x purple bottle > Budapest`."""
    order = json.loads(chat[-1]["content"])
    label = f"{order['quantity']} x {order['colour']} {order['item']} > {order['city']}"
    return [*chat[:-1], {"role": "assistant", "content": label}]


def train_adapter(
    chats: list[Conversation], folder: Path, steps: int, seed: int = 0
) -> tuple[nn.Module, Any, list[float]]:
    """Train an adapter of rank 16 beside the 4-bit base, 2 conversations a step, and write its files into a folder.

    seed: of the random numbers in A, and of the samples' order.

    Returns the model with the adapter in it, the tokenizer, and the loss of each step (nats per token).
    """
    model, tokenizer = load_model(quantization="nf4")
    samples, _ = tokenize({"messages": chats}, tokenizer, max_length=256)
    add_lora(model, rank=16, alpha=32, seed=seed)
    settings: dict[str, Any] = {
        "learning_rate": 3e-3,
        "compute_dtype": pick_compute_dtype(pick_device()),
        "pad_token_id": tokenizer.pad_token_id,
    }
    records = train_steps(model, Batches(samples, batch_size=2, seed=seed), steps=steps, **settings)
    losses = [record.loss for record in records]
    save_lora(model, folder)
    return model, tokenizer, losses


def validation_loss(model: nn.Module, tokenizer) -> float:
    """Loss on eight orders of the split `validation`, nats per token."""
    samples, _ = tokenize({"messages": orders("validation")[:8]}, tokenizer, max_length=256)
    dtype = pick_compute_dtype(pick_device())
    return text_loss(model, samples, pad_token_id=tokenizer.pad_token_id, dtype=dtype).per_token


@torch.no_grad()
def weights_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By layer with an adapter: what its 4 bits stand for, and what the adapter adds; float32, (out, in)."""
    layers = lora_layers(model)
    rounded = {name: dense_weight(layer.base).float() for name, layer in layers.items()}
    return rounded, {name: layer.delta() for name, layer in layers.items()}


def merged_into(way: str, adapter: Path) -> nn.Module:
    """An ordinary model with the adapter merged in: "dequantized", "requantized" (by PEFT), "pristine" or "Q4_0".

    "Q4_0" adds it to what the 4 bits of NF4 stand for, and rounds the sum to Q4_0.
    """
    base, _ = load_model(quantization=None if way == "pristine" else "nf4")
    if way == "requantized":
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "may get different generations due to rounding errors"
            base = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        return dequantize_linears(base)  # the same numbers, and a CPU computes faster with dense ones
    if way == "Q4_0":
        return dequantize_linears(merge_requantized(load_lora(base, adapter), "q4_0"))
    if way == "dequantized":
        base = dequantize_linears(base)
    return unload(merge(load_lora(base, adapter)))


def bases_alone(layers: Iterable[str], tokenizer) -> dict[str, float]:
    """`validation_loss` of bases without an adapter: of the checkpoint, in NF4, and that rounded to Q4_0.

    layers: the names of those that are rounded.
    """
    losses = {"checkpoint": validation_loss(load_model()[0], tokenizer)}
    base = dequantize_linears(load_model(quantization="nf4")[0])
    losses["NF4"] = validation_loss(base, tokenizer)
    for name in layers:
        weight = base.get_submodule(name).get_parameter("weight")
        weight.data = quantize_q4_0(weight.data.float()).dequantize().to(weight.dtype)
    return losses | {"NF4, then Q4_0": validation_loss(base, tokenizer)}


@torch.no_grad()
def left_in(
    model: nn.Module, rounded: Mapping[str, torch.Tensor], deltas: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """What of an adapter is in a merged model, over all its layers together.

    Args:
        rounded, deltas: of `weights_of`: what each weight was during the training, and what the adapter added.

    Returns:
        How many times the adapter is in the change of the weights, and the norm of the rest as a multiple of the
        adapter's.
    """
    along = changed = whole = 0.0
    for name, delta in deltas.items():
        change = model.get_submodule(name).get_parameter("weight").float() - rounded[name]
        along += (change * delta).sum().item()
        changed += change.square().sum().item()
        whole += delta.square().sum().item()
    kept = along / whole
    return kept, max(0.0, changed / whole - kept**2) ** 0.5


@torch.no_grad()
def chance_of_first(model: nn.Module, tokenizer, chat: Conversation, token: str) -> float:
    """The probability, 0 to 1, that an answer to the conversation's last question begins with this token."""
    ids = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    scores = model(**ids.to(model.device)).logits[0, -1].float()
    return scores.softmax(dim=0)[tokenizer(token, add_special_tokens=False)["input_ids"][0]].item()


@functools.cache
def merge_aware_record() -> Record:
    """What `python -m qlora_lab.experiments merge-aware` wrote on a GPU."""
    return Record.read(RECORDS / "merge-aware-nvidia-h200.json")


def prose_after(way: str, where: str) -> list[float]:
    """Of the record, for each seed: the loss on plain English, nats per token. Arguments as for `exact_after`."""
    return [run[where]["after"]["prose"] for run in merge_aware_record().rows("runs", way=way)]


def exact_after(way: str, where: str) -> list[int]:
    """Of the record, for each seed: how many of 100 orders are exactly right.

    way: how it was trained, such as "plain, 30 steps". where: "beside", or after a merge into "nf4" or "q4_0".
    """
    return [run[where]["exact"]["test"].count("1") for run in merge_aware_record().rows("runs", way=way)]
