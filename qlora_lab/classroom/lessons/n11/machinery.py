"""What folded cells of 11_accuracy_comparison do: a short training, and the recorded ones."""

from __future__ import annotations

import copy
import functools
import json
from typing import TYPE_CHECKING

from qlora_lab.experiments.accuracy import METHODS, load_base
from qlora_lab.finetuning import Batches, add_lora, dequantize_linears, load_samples, text_loss, tokenize, train_steps
from qlora_lab.places import RECORDS

if TYPE_CHECKING:
    from torch import nn

    from qlora_lab.training.chat import TokenizedSample


@functools.cache
def prepare(method: str) -> tuple[nn.Module, int, list[TokenizedSample], list[TokenizedSample]]:
    """A base in float32 on the CPU, the id it pads with, 100 short orders to train on, and 6 that are held out.

    A 4-bit base is made dense once: the same numbers, and a CPU is quicker with them.
    """
    import torch

    base, tokenizer = load_base(METHODS[method], torch.device("cpu"), torch.float32)
    if METHODS[method].quantization:
        base = dequantize_linears(base)
    samples, _ = tokenize(load_samples("orders", "train").select(range(300)), tokenizer, max_length=256)
    held_out, _ = tokenize(load_samples("orders", "validation").select(range(6)), tokenizer, max_length=256)
    return base, tokenizer.pad_token_id, sorted(samples, key=lambda sample: len(sample.ids))[:100], held_out


def race(method: str, seed: int) -> float:
    """Train an adapter of rank 16 for 4 steps of 2 short orders; its loss on held-out orders, in nats per token.

    method: a key of METHODS. seed: decides how the adapter begins, and in which order the samples come.
    """
    import torch

    base, padding, samples, held_out = prepare(method)
    model = add_lora(copy.deepcopy(base), rank=16, alpha=32, seed=seed)
    settings = {"learning_rate": 2e-3, "compute_dtype": torch.float32, "pad_token_id": padding}
    for _ in train_steps(model, Batches(samples, batch_size=2, seed=seed), steps=4, **settings):
        pass
    return text_loss(model, held_out, pad_token_id=padding).per_token


def read_record() -> dict:
    """What `python -m qlora_lab.experiments accuracy` wrote on a GPU: six methods, eight seeds each."""
    path = RECORDS / "accuracy-nvidia-h100-80gb-hbm3.json"
    return json.loads(path.read_text(encoding="utf-8"))
