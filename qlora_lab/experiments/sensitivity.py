"""Which layers suffer from 4 bits? Each linear layer alone in 4 bits, each alone kept in 16, and plans from that.

Writes `sensitivity-<device>.json`:

    losses      of the model as it is, and with all linear layers in 4 bits
    alone       by layer: the losses when it alone is in 4 bits
    kept        by layer: the losses when it alone is kept in 16 bits, and all others are in 4
    plans       how well several ways spend the same bits: a row for each way and number of bits

4 bits are NF4 in blocks of 64, scales doubly quantized: 4.127 bits per parameter, of the linear layers alone. Losses
are nats per token. Layers are chosen by what they do on one half of the course's prose (`CHOSEN_ON`); the other half,
and answers to orders, which are another kind of text, were not looked at for that.

The bundled model's 210 layers take some minutes on an H200, and hours on a CPU.
"""

from __future__ import annotations

import argparse
import pathlib
import platform
import random
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from qlora_lab.adapters.targets import find_targets, get_linear
from qlora_lab.arguments import Parser, count
from qlora_lab.evaluation.losses import text_loss
from qlora_lab.experiments.codebooks import FORMATS, Format, by_levels
from qlora_lab.experiments.record import Record
from qlora_lab.models.budget import best_for_their_bytes
from qlora_lab.models.bundled import DEFAULT_MODEL
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import integer_levels, normal_float
from qlora_lab.training.chat import tokenize_chat, tokenize_text
from qlora_lab.training.data import load_prose, load_samples

CHOSEN_ON = "prose, even"
FOUR, EIGHT, SIXTEEN = "NF4", "INT8", "16 bits"
BITS = (4.25, 4.5, 5.0, 6.0, 8.0)  # per parameter of the linear layers: what plans may spend
RANDOM_PLANS = 5
MORE: dict[str, Format] = {
    "INT8": by_levels(lambda _: integer_levels(8)),
    "NF5": by_levels(lambda _: normal_float(5)),
    "NF6": by_levels(lambda _: normal_float(6)),
}
UNIFORM = (  # format, block size, scales: the same for all layers
    ("NF4", 64, "8 bits"),
    ("NF4", 32, "8 bits"),
    ("NF4", 16, "8 bits"),
    ("NF4", 64, "float32"),
    ("NF4", 32, "float32"),
    ("BOF4-S (squared)", 64, "8 bits"),
    ("BOF4-S (squared)", 32, "8 bits"),
    ("BOF4-S (squared)", 16, "8 bits"),
    ("Q4_0", 32, "its own"),
    ("NVFP4", 16, "its own"),
    ("NF5", 64, "8 bits"),
    ("NF6", 64, "8 bits"),
    ("INT8", 64, "8 bits"),
)


class Layers:
    """A model's linear layers, each in one of several precisions.

    Args:
        model: a causal language model with dense layers, in float32.
        texts: by name, tokenized samples.
    """

    def __init__(self, model: nn.Module, texts: dict[str, list], pad_token_id: int, batch_size: int = 64):
        self.model, self.texts = model, texts
        self.pad_token_id, self.batch_size = pad_token_id, batch_size
        self.layers = {name: get_linear(model, name) for name in find_targets(model)}
        self.numel = {name: layer.weight.numel() for name, layer in self.layers.items()}
        self.rounded: dict[str, dict[str, torch.Tensor]] = {}
        self.bits: dict[str, float] = {SIXTEEN: 16.0}
        self.rounded[SIXTEEN] = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        for form in (FOUR, EIGHT):
            self.bits[form] = self.add(form, ({**FORMATS, **MORE})[form], 64, "8 bits")

    @torch.no_grad()
    def add(self, name: str, form: Format, block_size: int, scales: str) -> float:
        """Round all weights to a format; returns its bits per parameter."""
        pairs = {layer: form.of(x, block_size, scales) for layer, x in self.rounded[SIXTEEN].items()}
        self.rounded[name] = {layer: rest for layer, (rest, _) in pairs.items()}
        return sum(bits * self.numel[layer] for layer, (_, bits) in pairs.items()) / sum(self.numel.values())

    def put(self, name: str, form: str) -> None:
        """One layer into a precision."""
        with torch.no_grad():
            self.layers[name].weight.copy_(self.rounded[form][name])

    def losses(self, forms: Mapping[str, str] | str, rest: str = FOUR) -> dict[str, float]:
        """By text, nats per token, with these layers in these precisions (or all in one) and the others in `rest`."""
        chosen = dict.fromkeys(self.layers, forms) if isinstance(forms, str) else forms
        for name in self.layers:
            self.put(name, chosen.get(name, rest))
        return self.now()

    def now(self) -> dict[str, float]:
        """The losses with the layers as they are."""
        return {
            name: text_loss(self.model, samples, self.batch_size, self.pad_token_id).per_token
            for name, samples in self.texts.items()
        }

    def one_at_a_time(self, form: str, rest: str) -> Iterator[tuple[str, dict[str, float]]]:
        """Each layer in turn in a precision, all others in `rest`: its name and the losses."""
        for name in self.layers:
            self.put(name, rest)
        for name in self.layers:
            self.put(name, form)
            yield name, self.now()
            self.put(name, rest)

    def extra(self, form: str) -> dict[str, float]:
        """Bits that each layer takes in a precision beyond those that it takes in 4 bits."""
        return {name: (self.bits[form] - self.bits[FOUR]) * numel for name, numel in self.numel.items()}


def texts(tokenizer, orders: int = 50) -> dict[str, list]:
    """What losses are measured on: both halves of the prose, and answers to held-out orders."""
    prose = [tokenize_text(text, tokenizer) for text in load_prose()]
    chats = load_samples("orders", "test")["messages"][:orders]
    return {
        CHOSEN_ON: prose[::2],
        "prose, odd": prose[1::2],
        "orders": [tokenize_chat(chat, tokenizer) for chat in chats],
    }


def plans(layers: Layers, gains: dict[str, dict[str, float]], bits: float) -> Iterator[tuple[str, str, tuple]]:
    """Ways to spend so many bits per parameter: what it is called, the precision, and the layers that get it.

    gains: by how they were found, those of each layer.
    """
    room = (bits - layers.bits[FOUR]) * sum(layers.numel.values())
    for form in (SIXTEEN, EIGHT):
        extra = layers.extra(form)
        for how, of in gains.items():
            yield f"measured ({how})", form, best_for_their_bytes(extra, of, room)
        names = list(extra)
        for seed in range(RANDOM_PLANS):
            order = {name: 1 + random.Random(f"{seed} {name}").random() for name in names}
            worth = {name: order[name] * extra[name] for name in names}
            yield f"at random, {seed}", form, best_for_their_bytes(extra, worth, room)
        first = {name: (len(names) - at) * extra[name] for at, name in enumerate(names)}
        yield "the first layers", form, best_for_their_bytes(extra, first, room)
        last = {name: (1 + at) * extra[name] for at, name in enumerate(names)}
        yield "the last layers", form, best_for_their_bytes(extra, last, room)


def measure(layers: Layers, record: Record) -> None:
    """Everything that the record holds."""
    as_it_is, in_4_bits = layers.losses(SIXTEEN), layers.losses(FOUR)
    record.note(losses={"as it is": as_it_is, "all in 4 bits": in_4_bits, "all in 8 bits": layers.losses(EIGHT)})
    print(f"as it is {as_it_is}\nall in 4 bits {in_4_bits}", flush=True)
    alone = dict(layers.one_at_a_time(FOUR, rest=SIXTEEN))
    kept = dict(layers.one_at_a_time(SIXTEEN, rest=FOUR))
    record.note(alone=alone, kept=kept, parameters=layers.numel)
    gains = {
        "kept": {name: in_4_bits[CHOSEN_ON] - kept[name][CHOSEN_ON] for name in kept},
        "alone": {name: alone[name][CHOSEN_ON] - as_it_is[CHOSEN_ON] for name in alone},
    }
    total = sum(layers.numel.values())
    for bits in BITS:
        for way, form, names in plans(layers, gains, bits):
            spent = layers.bits[FOUR] + sum(layers.extra(form)[name] for name in names) / total
            row = {"way": way, "precision": form, "allowed": bits, "bits": spent, "layers": len(names)}
            record.add("plans", row | {"losses": layers.losses(dict.fromkeys(names, form))})
            print(row, flush=True)
    for name, block_size, scales in UNIFORM:
        spent = layers.add("uniform", {**FORMATS, **MORE}[name], block_size, scales)
        row = {"way": "uniform", "precision": name, "block_size": block_size, "scales": scales, "bits": spent}
        record.add("plans", row | {"losses": layers.losses("uniform")})
        print(row, flush=True)


def add_flags(parser: Parser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a bundled one, a folder, or owner/name on the hub")
    parser.add_argument("--orders", type=count, default=50, help="answers to measure on (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("data/records"), help="folder")


def run(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = Record.begin(
        "sensitivity",
        arguments.output,
        torch.cuda.get_device_name() if device.type == "cuda" else f"cpu {platform.machine()}",
        packages=("torch", "transformers"),
        settings={"model": arguments.model, "chosen on": CHOSEN_ON, "dtype": "float32"},
    )
    model, tokenizer = load_model(arguments.model, device=device, compute_dtype=torch.float32)
    given = texts(tokenizer, arguments.orders)
    record.note(tokens={name: sum(sample.target_count for sample in samples) for name, samples in given.items()})
    measure(Layers(model, given, tokenizer.pad_token_id), record)
