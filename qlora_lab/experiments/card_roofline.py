"""How fast could a step of `--fast` be at most on a card, by the card's data sheet?

Two times that no step can fall below, since on a GPU one follows the other: making the 4-bit weights dense, at the
card's bandwidth, and all matrix products, at its peak rate (or the time of reading their matrices, if that is longer).
Left out is all else: activations and logits that are read and written between the products, launches, and that no
product reaches the peak. So this is a floor, not a forecast.

Each matrix is made dense where it is used: in the forward pass, and in the backward pass; with checkpointing also
when the layer is computed again, but for `down`, which is not, and for the last layer, which is kept.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from qlora_lab.arguments import Parser, count, positive
from qlora_lab.facts import LINEARS, bits_per_parameter
from qlora_lab.memory.prediction import estimate
from qlora_lab.memory.shapes import SHAPES, Shape

GROUPS = (
    LINEARS[:3],
    LINEARS[3:4],
    LINEARS[4:6],
    LINEARS[6:],
)  # that read the same input: one product, see `linear.py`
QKV = ("q_proj", "k_proj", "v_proj")
MODELS = {  # each model's config.json
    "Qwen2.5-1.5B": Shape(1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True, biased=QKV),
    "Qwen2.5-3B": Shape(2048, 11008, 36, 16, 2, 151936, tie_word_embeddings=True, biased=QKV),
    "Qwen2.5-7B": SHAPES["qwen2.5-7b"],
}


@dataclass(frozen=True)
class Card:
    """rate: operations a second of fp16 matrix products. bandwidth: of its memory, bytes a second. memory: bytes."""

    rate: float
    bandwidth: float
    memory: float


T4 = Card(65e12, 320e9, 15.6e9)  # NVIDIA's data sheet; of its 16 GB a program sees 15.6


@dataclass(frozen=True)
class Floor:
    """Seconds that a step takes at least."""

    dequantizing: float
    multiplying: float

    @property
    def seconds(self) -> float:
        return self.dequantizing + self.multiplying


def floor(card: Card, shape: Shape, rank: int, samples: int, length: int, checkpointing: bool = True) -> Floor:
    """The floor of a step in which each token but a sample's first is learned. rank: of adapters on all linears."""
    tokens = samples * length
    dense = weights_made_dense(shape, checkpointing)
    head = shape.vocab_size * shape.hidden_size
    operations = product_operations(shape, rank, tokens, samples * (length - 1), checkpointing)
    operations += attention_operations(shape, samples, length, checkpointing)
    read = 2 * (dense + 2 * head)  # bytes: in 16 bits; the head for the logits, and for their gradient
    return Floor(
        dequantizing=dense * (bits_per_parameter() / 8 + 2) / card.bandwidth,
        multiplying=max(operations / card.rate, read / card.bandwidth),
    )


def sizes(shape: Shape) -> list[tuple[int, list[int]]]:
    """The input features of each group of a layer's linears, and the output features of its members."""
    linears = shape.linears()
    return [(linears[names[0]][0], [linears[name][1] for name in names]) for names in GROUPS]


def weights_made_dense(shape: Shape, checkpointing: bool) -> int:
    """4-bit weights that a step makes dense, counted each time that it does."""
    layer = sum(inputs * sum(outputs) for inputs, outputs in sizes(shape))
    down = shape.hidden_size * shape.intermediate_size
    again = (shape.num_hidden_layers - 1) * (layer - down) if checkpointing else 0
    return 2 * shape.num_hidden_layers * layer + again


def product_operations(shape: Shape, rank: int, tokens: int, targets: int, checkpointing: bool) -> int:
    """Multiplications and additions of all of a step's matrix products but attention's, adapters' borders included.

    rank: of an adapter on each linear. tokens, targets: rows of the layers' products and of the head's.
    """
    forward = backward = again = lowest = 0
    for i, (inputs, outputs) in enumerate(sizes(shape)):
        out, border = sum(outputs), -(-rank * len(outputs) // 8) * 8
        once = 2 * tokens * (border * inputs + (inputs + border) * out)
        forward += once
        again += once if i < 3 else 0
        through = 2 * tokens * (out + border) * inputs  # the gradient of the input
        adapters = 2 * tokens * (out * border + border * inputs + out * rank)  # of z, of A, of B
        backward += through + adapters + (2 * tokens * border * inputs if i == 3 else 0)  # z of `down` is not kept
        lowest += through if i == 0 else 0  # nothing is trained below
    layers = shape.num_hidden_layers
    head = 2 * 2 * targets * shape.vocab_size * shape.hidden_size
    return layers * (forward + backward) + (layers - 1) * again * checkpointing - lowest + head


def attention_operations(shape: Shape, samples: int, length: int, checkpointing: bool) -> int:
    """Operations of causal attention: two products forward and five backward, half of each masked."""
    width = shape.linears()["q_proj"][1]
    product = samples * length * length * width  # 2 operations for each half
    layers = shape.num_hidden_layers
    return product * (7 * layers + 2 * (layers - 1) * checkpointing)


def table(card: Card, rank: int, length: int) -> str:
    """A Markdown table: MODELS, with one sample a step and with four."""
    lines = [
        "| model, samples a step | made dense | multiplied | a step, at least | tokens a second, at most | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in MODELS.items():
        for samples in (1, 4):
            least = floor(card, shape, rank, samples, length)
            memory = estimate(shape, rank=rank, batch_size=samples, sequence_length=length).card_bytes
            speed = samples * length / least.seconds
            milliseconds = [f"{1e3 * s:,.0f} ms" for s in (least.dequantizing, least.multiplying, least.seconds)]
            fits = f"{memory / 1e9:.1f} GB" if memory <= card.memory else f"{memory / 1e9:.1f} GB: does not fit"
            lines.append(f"| {name}, {samples} | {' | '.join(milliseconds)} | {speed:,.0f} | {fits} |")
    return "\n".join(lines)


def add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--rate", type=positive, default=T4.rate / 1e12, help="fp16 TFLOP/s (default: a T4's %(default)g)"
    )
    parser.add_argument("--bandwidth", type=positive, default=T4.bandwidth / 1e9, help="GB/s (default: %(default)g)")
    parser.add_argument("--memory", type=positive, default=T4.memory / 1e9, help="GB (default: %(default)g)")
    parser.add_argument("--rank", type=count, default=16, help="of adapters on all linears (default: %(default)s)")
    parser.add_argument("--length", type=count, default=512, help="tokens of a sample (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    card = Card(1e12 * arguments.rate, 1e9 * arguments.bandwidth, 1e9 * arguments.memory)
    print(table(card, arguments.rank, arguments.length))
