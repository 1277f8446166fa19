"""A training step, as far as its memory is concerned: what is trained, in which precision, and on how many tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_lab.facts import OPTIMIZERS
from qlora_lab.memory.activations import layer_activation_bytes
from qlora_lab.memory.shapes import MixtureShape, Shape, require_counts, require_known
from qlora_lab.memory.tensors import METHODS, trained_tensors


@dataclass(frozen=True)
class TrainingStep:
    """What a prediction is made from: the arguments of `estimate`, checked."""

    shape: Shape
    method: str
    rank: int
    targets: str | Sequence[str]
    batch_size: int
    sequence_length: int
    gradient_checkpointing: bool
    optimizer: str
    adapter_dtype: str
    quant_type: str
    double_quant: bool
    full_precision: str
    loss_chunk: int | None
    update_in_backward: bool
    embeddings_on_cpu: bool
    processes: int = 1
    sharding: str = "data"
    dense_base: bool = False

    def __post_init__(self):
        require_known("method", self.method, METHODS)
        require_known("adapter_dtype", self.adapter_dtype, ("float32", "bfloat16"))
        require_known("quant_type", self.quant_type, ("nf4", "fp4"))
        require_known("full_precision", self.full_precision, ("float32", "mixed"))
        require_known("optimizer", self.optimizer, OPTIMIZERS)
        require_counts(rank=self.rank, batch_size=self.batch_size, sequence_length=self.sequence_length)
        require_known("sharding", self.sharding, ("data", "full"))
        require_counts(processes=self.processes)
        if isinstance(self.shape, MixtureShape) and (self.method != "qlora" or self.sharding == "full"):
            raise ValueError("of a mixture of experts, only qlora can be estimated, and not sharded")
        if self.loss_chunk is not None:
            require_counts(loss_chunk=self.loss_chunk)
        if self.sharding == "full" and (self.full or self.update_in_backward or self.optimizer.endswith("8bit")):
            raise ValueError(
                "sharding='full' goes with lora and qlora, 32-bit optimizer states and updates after the backward pass"
            )
        if self.sharding == "full" and self.dense_base:
            raise ValueError("dense_base holds whole weights, and with sharding='full' no process has them")
        if self.sharding == "full" and self.rank % self.processes:
            raise ValueError(
                f"rank={self.rank} cannot be shared evenly by {self.processes} processes: choose a multiple of them"
            )

    @property
    def full(self) -> bool:
        return self.method == "full"

    @property
    def autocast(self) -> bool:
        """The trained parameters are fp32, and bf16 autocast casts them and what they meet."""
        return (self.full_precision if self.full else self.adapter_dtype) == "float32"

    @property
    def masters(self) -> bool:
        return self.full and not self.autocast

    @functools.cached_property
    def tensors(self) -> list[int]:
        """Elements of each trained tensor."""
        return trained_tensors(self.shape, self.method, self.rank, self.targets)

    @functools.cached_property
    def trained(self) -> int:
        return sum(self.tensors)

    @property
    def trained_bytes(self) -> int:
        """Of a trained number, and of its gradient."""
        return 4 if self.autocast else 2

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def layer_input(self) -> int:
        """Bytes of what goes from layer to layer: fp32 where every parameter is fp32."""
        return self.tokens * (4 if self.full and self.autocast else 2) * self.shape.hidden_size

    @property
    def layer(self) -> int:
        """Bytes that one layer keeps for its backward pass."""
        return self.tokens * layer_activation_bytes(self.shape, self.method, self.rank, self.targets, self.autocast)

    @property
    def leaf(self) -> int:
        """Checkpointing makes the embeddings' output a leaf that needs a gradient (`enable_input_require_grads`).

        Both stay until the next step's loss takes the place of this one's.
        """
        return 2 * self.layer_input if self.gradient_checkpointing and not self.full else 0

    @property
    def trained_head(self) -> int:
        """Numbers of the output head, if it is trained."""
        return self.shape.vocab_size * self.shape.hidden_size if self.full else 0

    @property
    def trained_in_a_layer(self) -> int:
        # full: the last norm is no layer's either
        outside = self.shape.embedding_parameters() + self.shape.hidden_size if self.full else 0
        return (self.trained - outside) // self.shape.num_hidden_layers
