# %% [markdown]
# # 11 · How do I use it?
#
# The training is over. What you have is a 4-bit base model and a small file beside it. A colleague wants to run your
# model tomorrow, ten times a second. Two plans:
#
# - **Plan A: merge.** Add the adapter to the weights once and for all: one ordinary model, no adapter, no extra work.
# - **Plan B: keep both.** The base stays in 4 bits, the adapter beside it, and several adapters share one base.
#
# Plan A has a trap that many tutorials walk into: *into which weights* do you merge? You train a small adapter, merge it
# three ways, and measure what is left of it. Then you serve two adapters from one base, and find out before any
# download whether a model is worth the trouble at all.
#
# | you need | |
# |---|---|
# | time | 25 minutes, 2 of them computing on two CPU cores |
# | memory | 4 GB |
# | GPU | optional |

# %%
import json
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from qlora_lab.classroom.checks import (
    check_adapters_that_fit,
    check_merged_weight,
    check_verdicts,
    check_which_base,
    progress,
    unseen_configs,
)
from qlora_lab.classroom.plots import new_axes, plot_times
from qlora_lab.classroom.plots.n11 import plot_losses, plot_plans, plot_preflight, plot_snapped
from qlora_lab.finetuning import Batches, exact_match, generate, load_model, load_samples, text_loss, tokenize
from qlora_lab.finetuning.lora import add_lora, load_lora, lora_layers, lora_parameters, merge, save_lora, unload
from qlora_lab.finetuning.models import pick_compute_dtype, pick_device
from qlora_lab.finetuning.quantized_linear import dense_weight, dequantize_linears, quantize_linears
from qlora_lab.finetuning.train import train_steps
from qlora_lab.quantization import NF4, dequantize, quantize, relative_rms

device = pick_device()
compute_dtype = pick_compute_dtype(device)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1 · Two short trainings
#
# The orders of [notebook 07](07_qlora_run.ipynb), a smaller training: 12 steps of 8 orders. You train two adapters on
# the same base. One writes JSON; the other, given the very same prompt, writes a line for the parcel:
# `15 x purple bottle > Budapest`.

# %%
orders = {split: load_samples("orders", split)["messages"] for split in ("train", "validation", "test")}


def as_label(chat):
    """The same order, with a parcel label for an answer."""
    order = json.loads(chat[-1]["content"])
    text = f"{order['quantity']} x {order['colour']} {order['item']} > {order['city']}"
    return [*chat[:-1], {"role": "assistant", "content": text}]


def train_adapter(chats):
    """Load the 4-bit base and train an adapter on it."""
    model, tokenizer = load_model(quantization="nf4")
    samples, _ = tokenize({"messages": chats}, tokenizer, max_length=256)
    add_lora(model, rank=16, alpha=32)
    batches = Batches(samples, batch_size=8, seed=0)
    settings = {"learning_rate": 3e-3, "compute_dtype": compute_dtype, "pad_token_id": tokenizer.pad_token_id}
    losses = [round(record.loss, 2) for record in train_steps(model, batches, steps=12, **settings)]
    return model, tokenizer, losses


# %%
# NBVAL_IGNORE_OUTPUT
# because another processor rounds otherwise
model, tokenizer, losses = train_adapter([as_label(chat) for chat in orders["train"][:200]])
save_lora(model, folder / "label")
print("label:", losses)
model, tokenizer, losses = train_adapter(orders["train"])
save_lora(model, folder / "json")
print("json: ", losses)
