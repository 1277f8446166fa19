"""What a decoder is made of, as far as the step needs to know: one description fits every family that it can train.

A family's layer is LLaMA's with a few things more or less: a bias, a norm of q and k, norms behind the attention and
the MLP, another activation, a window. Each of them is a field here. `reading.py` fills them in from a model of
transformers; `layer.py` computes what they say, and knows of no family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from qlora_lab.quantization import QuantizedTensor
from qlora_lab.training.steps.fast.limits import NoFastStep


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: A, (rank, in), and B, (out, rank), float32.

    scaling: what B A is multiplied by. dropout: share of A's input that is set to zero.
    """

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    dropout: float

    @property
    def rank(self) -> int:
        return len(self.A)


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear layer: its weight, (out, in), dense or in 4 bits, its bias, (out,), and its adapter, if any."""

    weight: torch.Tensor | QuantizedTensor
    bias: torch.Tensor | None
    adapter: Adapter | None


@dataclass(frozen=True)
class SharedInput:
    """Linear layers that share their input. Those that have an adapter have the same rank, scaling and dropout.

    Raises:
        NoFastStep: the adapters' ranks, scalings or dropouts differ.
    """

    parts: tuple[AdaptedLinear, ...]

    def __post_init__(self):
        if len({(adapter.rank, adapter.scaling, adapter.dropout) for adapter in self.adapters}) > 1:
            raise NoFastStep("layers that read the same input have adapters of several ranks, scalings or dropouts")

    @property
    def adapters(self) -> list[Adapter]:
        return [part.adapter for part in self.parts if part.adapter]

    @property
    def sizes(self) -> list[int]:
        """Output features of each part."""
        return [part.weight.shape[0] for part in self.parts]


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm: x / sqrt(mean(x²) + epsilon) * weight. (Gemma stores w and multiplies by 1 + w: that is `weight`.)"""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True, eq=False)
class Attention:
    """Causal attention.

    head_norms: of q and of k, before they are rotated; a weight of head_dim numbers norms each head by itself, a longer
    one all heads together. angles: the kind of the rotary angles, a key of `Decoder.angles`; None: q and k are not
    rotated. window: a token reads this many, itself included; None: all before it. scale: factor of the scores; None:
    1 / sqrt(head_dim). score_cap: c, for scores of c * tanh(score / c); None: no cap.
    """

    heads: int
    kv_heads: int
    head_dim: int
    head_norms: tuple[Norm, Norm] | None = None
    angles: str | None = ""
    window: int | None = None
    scale: float | None = None
    score_cap: float | None = None


@dataclass(frozen=True, eq=False)
class LayerDescription:
    """A decoder layer, in the order in which a token passes it. A norm that is None is not there.

        x2 = x + multiplier * after_attention(o(attention(qkv(before_attention(x)))))
        y = x2 + multiplier * after_mlp(down(activation(gate) * up)),   gate, up = gate_up(before_mlp(x2))

    qkv and gate_up have one part if the model stores them as one matrix. activation: "silu" or "gelu_tanh".
    """

    before_attention: Norm | None
    qkv: SharedInput
    attention: Attention
    o: SharedInput
    after_attention: Norm | None
    before_mlp: Norm | None
    gate_up: SharedInput
    activation: str
    down: SharedInput
    after_mlp: Norm | None
    multiplier: float = 1.0

    @property
    def groups(self) -> tuple[SharedInput, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, eq=False)
class Decoder:
    """A language model.

    embeddings: (V, H). embedding_scale: their factor. norm: the last one; what the logits are divided by is in its
    weight. head: (V, H). logit_cap: c, for logits of c * tanh(logit / c); None: no cap.
    angles: from rows of hidden states (for dtype and device) and int64 positions, (1, T), to cosine and sine,
    (1, T, head_dim) each; one for each kind of layer.
    """

    embeddings: torch.Tensor
    embedding_scale: float
    layers: tuple[LayerDescription, ...]
    angles: dict[str, Callable]
    norm: Norm
    head: torch.Tensor
    logit_cap: float | None
