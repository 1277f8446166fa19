"""Why are weights so bad that were rounded to NF4 and then to Q4_0? A model's loss, and where such errors lie.

Writes `rounded-twice-cpu-<machine>.json`:

    levels   of NF4, and shares: of the linear layers' weights that lie on each
    rows     way (see WAYS); loss, of reference answers, in nats per token, and tokens, how many these are. If Q4_0
             rounds: error, by level of NF4, the mean of what rounding adds to a weight, in steps between Q4_0's
             levels, and absolute, the mean of that without its sign. Where both are as large, all weights of a level
             go to the same side.

No adapter takes part. Layers are computed in float32, on a CPU: minutes for the bundled model. A record that is there
is gone on with.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from qlora_lab.adapters.quantized_linear import nf4_double
from qlora_lab.adapters.targets import find_targets, get_linear
from qlora_lab.arguments import Parser, count
from qlora_lab.evaluation.losses import text_loss
from qlora_lab.experiments.record import Record, file_of
from qlora_lab.models.bundled import DEFAULT_MODEL
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import NF4, QuantizedTensor, UniformTensor, quantize_q4_0
from qlora_lab.training.chat import TokenizedSample, tokenize_chat
from qlora_lab.training.data import load_samples

BETWEEN = (13, 10)  # levels of NF4 that lie nearly in the middle between two of Q4_0: docs/export.md
NUDGE = 0.002


@dataclass(frozen=True)
class Way:
    """What a layer gets in the place of its weight.

    Attributes:
        of: (the checkpoint's weight, that in NF4) -> a weight in float32, of the same shape.
        q4_0: whether that is rounded to Q4_0.
        shuffled: whether the errors of Q4_0, in steps, are then dealt out anew among the layer's weights.
    """

    of: Callable[[torch.Tensor, QuantizedTensor], torch.Tensor]
    q4_0: bool = True
    shuffled: bool = False


def own(weight: torch.Tensor, _: QuantizedTensor) -> torch.Tensor:
    return weight


def nf4(_: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    return q.dequantize()


def nudged(level: int, by: float) -> Callable[[torch.Tensor, QuantizedTensor], torch.Tensor]:
    """NF4 in which all weights on one level are multiplied by 1 + by."""

    def of(_: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
        codebook = q.codebook.clone()
        codebook[level] *= 1 + by
        return dataclasses.replace(q, codebook=codebook).dequantize()

    return of


WAYS = {
    "not quantized": Way(own, q4_0=False),
    "NF4": Way(nf4, q4_0=False),
    "Q4_0": Way(own),
    "Q4_0 from NF4": Way(nf4),
    "Q4_0 from NF4, errors shuffled": Way(nf4, shuffled=True),
    "Q4_0 from NF4 in bf16": Way(lambda _, q: q.dequantize().bfloat16().float()),
    **{
        f"Q4_0 from NF4, {NF4[level]:.4f} {by:+.1%}": Way(nudged(level, by))
        for level in BETWEEN
        for by in (-NUDGE, NUDGE)
    },
}


def steps_of(q: UniformTensor) -> torch.Tensor:
    """The step between two levels, for each weight: float32, in the tensor's shape."""
    return q.scale.abs().repeat_interleave(q.block_size).view(q.shape)


def error_in_steps(q: UniformTensor, x: torch.Tensor) -> torch.Tensor:
    """What rounding x to q adds to each weight, in steps; 0 in blocks of zeros."""
    steps = steps_of(q)
    return torch.where(steps > 0, (q.dequantize() - x) / steps, 0.0)


def sums_by_level(x: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    """The sum of x over the weights on each level of q: float64, Tensor[16]."""
    return torch.bincount(q.indices().flatten(), x.double().flatten(), minlength=q.levels)


class Layers:
    """A model's linear layers, put in one way after the other.

    Attributes:
        layers, own, q: the layers, their weights as the checkpoint has them, and these in NF4.
        on_level: how many weights lie on each level of NF4: float64, Tensor[16].
    """

    def __init__(self, model: nn.Module):
        self.layers = [get_linear(model, name) for name in find_targets(model)]
        self.own = [layer.weight.detach().clone() for layer in self.layers]
        self.q = [nf4_double(weight) for weight in self.own]
        self.on_level = sum((sums_by_level(torch.ones(q.shape), q) for q in self.q), torch.zeros(len(NF4)).double())

    @torch.no_grad()
    def put(self, way: Way) -> dict[str, list[float]]:
        """Put all layers in a way; returns the mean errors by level if Q4_0 rounds, see the head of this file."""
        error, absolute = torch.zeros(2, len(NF4), dtype=torch.float64)
        draw = torch.Generator().manual_seed(0)
        for layer, weight, q in zip(self.layers, self.own, self.q, strict=True):
            x = way.of(weight, q)
            if way.q4_0:
                rounded = quantize_q4_0(x)
                errors = error_in_steps(rounded, x)
                if way.shuffled:
                    errors = errors.flatten()[torch.randperm(errors.numel(), generator=draw)].view(x.shape)
                error += sums_by_level(errors, q)
                absolute += sums_by_level(errors.abs(), q)
                x = x + errors * steps_of(rounded) if way.shuffled else rounded.dequantize()
            layer.weight.copy_(x)
        if not way.q4_0:
            return {}
        return {"error": (error / self.on_level).tolist(), "absolute": (absolute / self.on_level).tolist()}


def measure(model: nn.Module, samples: list[TokenizedSample], pad_token_id: int, record: Record) -> None:
    """Everything that the record does not hold yet; the model is in the last way then."""
    layers = Layers(model)
    record.note(levels=NF4.tolist(), shares=(layers.on_level / layers.on_level.sum()).tolist())
    for name, way in WAYS.items():
        if record.rows("rows", way=name):
            continue
        errors = layers.put(way)
        loss = text_loss(model, samples, pad_token_id=pad_token_id)
        record.add("rows", {"way": name, "loss": loss.per_token, "tokens": loss.tokens} | errors)
        print(f"{name:<32}{loss.per_token:8.4f} nats per token", flush=True)


def add_flags(parser: Parser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a bundled one, a folder, or owner/name on the hub")
    parser.add_argument("--orders", type=count, default=10, help="answers to measure on (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")


def run(arguments: argparse.Namespace) -> None:
    device = f"cpu {platform.machine()}"
    path = file_of("rounded-twice", arguments.output, device)
    record = Record.begin(
        "rounded-twice",
        arguments.output,
        device,
        packages=("torch", "transformers"),
        settings={"model": arguments.model, "orders": arguments.orders, "dtype": "float32", "nudge": NUDGE},
        continue_from=path if path.exists() else None,
    )
    model, tokenizer = load_model(arguments.model, device="cpu", compute_dtype=torch.float32)
    chats = load_samples("orders", "test")["messages"][: arguments.orders]
    measure(model, [tokenize_chat(chat, tokenizer) for chat in chats], tokenizer.pad_token_id, record)
