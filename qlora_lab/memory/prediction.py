"""How much GPU memory does a training step take? Arithmetic on plain numbers: no torch, no GPU, no model.

A step passes several moments that can be its peak, and the estimate is the largest of them:

    forward    in the last layer while its largest product is computed, or when the logits have become a loss
    loss       the backward pass begins: the gradients of the loss and of the logits stand beside the log-softmax
    backward   in the last layer, with everything remembered, or in the first, with almost all gradients made
    update     gradients and optimizer states, and what the optimizer itself needs

Sizes are bytes. GB is 10^9, GiB is 2^30. Activations are those of transformers' LLaMA layers with SDPA (flash)
attention, PEFT's LoRA and bitsandbytes' `Linear4bit`. Each line below says which tensor it counts; its source is the
list of tensors that were alive at the peak of real steps, by the line of code that had asked for each ("explained" in
`data/records/memory-*.json`). No number is fitted. What is left over is printed by
`python -m qlora_lab.experiments memory --compare`; where torch's allocator was told to let its segments grow
(`expandable_segments`), it is below 0.1 %, elsewhere the allocator rounds blocks up by as much as 1 MiB each.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qlora_lab.facts import OPTIMIZERS
from qlora_lab.memory.activations import end_activation_bytes, layer_activation_bytes
from qlora_lab.memory.shapes import Shape, require_counts, require_known
from qlora_lab.memory.tensors import (
    METHODS,
    chosen_linears,
    dequantization_bytes,
    model_parts,
    optimizer_state_bytes,
    trained_tensors,
)

CUBLAS_WORKSPACE = 32 * 2**20  # of an H100, for each thread that multiplies; torch's allocator holds it
CUDA_CONTEXT = 500_000_000  # what the driver takes before the first tensor; about 0.5 GB on recent cards

# What each of `finetuning.PRESETS` sets; written twice, since this file imports nothing of ours. A test compares them.
PRESETS = {
    "standard": {},
    "in-backward": {"update_in_backward": True},
    "bf16-adapters": {"adapter_dtype": "bfloat16"},
    "lean": {
        "adapter_dtype": "bfloat16",
        "loss_chunk": 128,
        "update_in_backward": True,
        "embeddings_on_cpu": True,
    },
}


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes by part at the step's peak.

    parts: what lies in torch's allocator; sums to `peak_allocated`.
    outside: what the card holds besides (CUDA context, paged optimizer states).
    moment: which of the moments is the peak.
    """

    parts: dict[str, int]
    outside: dict[str, int]
    moment: str

    @property
    def peak_allocated(self) -> int:
        """What `torch.cuda.max_memory_allocated()` should read over the step."""
        return sum(self.parts.values())

    @property
    def total(self) -> int:
        """With what lies outside torch's allocator."""
        return self.peak_allocated + sum(self.outside.values())

    def table(self) -> str:
        """One line a part, largest first, in GB (10^9 bytes)."""
        lines = [f"{name:<24}{size / 1e9:9.3f} GB" for name, size in sorted(self.parts.items(), key=lambda p: -p[1])]
        lines += [f"{'peak allocated':<24}{self.peak_allocated / 1e9:9.3f} GB ({self.moment})"]
        lines += [f"{'+ ' + name:<24}{size / 1e9:9.3f} GB" for name, size in self.outside.items() if size]
        return "\n".join([*lines, f"{'total':<24}{self.total / 1e9:9.3f} GB"])


def estimate(
    shape,
    method: str = "qlora",
    *,
    rank: int = 64,
    targets="all-linear",
    batch_size: int = 1,
    sequence_length: int = 512,
    gradient_checkpointing: bool = True,
    optimizer: str = "paged_adamw_32bit",
    adapter_dtype: str = "float32",
    quant_type: str = "nf4",
    double_quant: bool = True,
    full_precision: str = "float32",
    loss_chunk: int | None = None,
    update_in_backward: bool = False,
    embeddings_on_cpu: bool = False,
    preset: str | None = None,
) -> MemoryBreakdown:
    """Predict the memory of one training step on a GPU.

    Args:
        shape: `SHAPES["llama-7b"]`, or anything with the attributes and methods of `Shape`.
        method: "full" (every parameter is trained), "lora" (16-bit base) or "qlora" (4-bit base).
        rank, targets: of the adapters; targets is "all-linear", or one or a list of names from `LINEARS`.
        batch_size, sequence_length: samples in one forward pass, and tokens in each.
        gradient_checkpointing: keep each layer's input only, and compute the layer again in the backward pass.
        optimizer: transformers' name.
        adapter_dtype: "float32" (PEFT's default, under bf16 autocast) or "bfloat16" (without autocast); gradients
            follow it.
        quant_type: "nf4" or "fp4": the same size.
        double_quant: 4.127 instead of 4.5 bits a quantized parameter.
        full_precision: of "full". "float32": fp32 weights and gradients, bf16 autocast. "mixed": bf16 weights and
            gradients, and fp32 master weights, updated one tensor after the other. Both take
            16 bytes a parameter, AdamW's fp32 states included.
        loss_chunk, update_in_backward, embeddings_on_cpu: as in `finetuning.Preset` and `finetuning.train_steps`.
        preset: one of `PRESETS`, which sets adapter_dtype and the three above.

    Returns:
        parts by name: "base weights" (of the linears), "quantization constants", "embeddings and head", "norms",
        "biases", "master weights", "adapters", "gradients", "optimizer states", "bf16 copies" (autocast's),
        "activations", "logits and loss", "dequantized weight" (one, while it is used), "update" (what the optimizer
        needs for itself), "cuBLAS workspace"; only those that are not 0 at the peak.

    Raises:
        ValueError: an unknown method, optimizer, dtype, target or preset; a rank, length or batch below 1.
    """
    recipe = {
        "adapter_dtype": adapter_dtype,
        "loss_chunk": loss_chunk,
        "update_in_backward": update_in_backward,
        "embeddings_on_cpu": embeddings_on_cpu,
    }
    if preset is not None:
        require_known("preset", preset, PRESETS)
        recipe.update(PRESETS[preset])
    step = TrainingStep(
        shape,
        method,
        rank=rank,
        targets=targets,
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        quant_type=quant_type,
        double_quant=double_quant,
        full_precision=full_precision,
        **recipe,
    )
    held, managed = held_throughout(step)
    moment, at_peak = max(moments(step), key=lambda candidate: sum(candidate[1].values()))
    parts = {name: size for name, size in {**held, **at_peak}.items() if size}
    return MemoryBreakdown(parts, {"CUDA context": CUDA_CONTEXT, "paged optimizer states": managed}, moment)


@dataclass(frozen=True)
class TrainingStep:
    """What a prediction is made from: the arguments of `estimate`, checked."""

    shape: Shape
    method: str
    rank: int
    targets: str | tuple[str, ...]
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

    def __post_init__(self):
        require_known("method", self.method, METHODS)
        require_known("adapter_dtype", self.adapter_dtype, ("float32", "bfloat16"))
        require_known("quant_type", self.quant_type, ("nf4", "fp4"))
        require_known("full_precision", self.full_precision, ("float32", "mixed"))
        require_known("optimizer", self.optimizer, OPTIMIZERS)
        require_counts(rank=self.rank, batch_size=self.batch_size, sequence_length=self.sequence_length)
        if self.loss_chunk is not None:
            require_counts(loss_chunk=self.loss_chunk)

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


def held_throughout(step: TrainingStep) -> tuple[dict[str, int], int]:
    """Bytes that are there at every moment, by part; and bytes of optimizer states in managed memory."""
    held = model_parts(step.shape, step.method, step.double_quant, step.full_precision)
    if step.embeddings_on_cpu and not step.shape.tie_word_embeddings:
        held["embeddings and head"] //= 2
    held["master weights"] = 4 * step.trained if step.masters else 0
    held["adapters"] = 0 if step.full else step.trained_bytes * step.trained
    # torch's AdamW keeps its states in the parameters' dtype, in fp32 for master weights
    state_bytes = 4 if step.full else step.trained_bytes
    held["optimizer states"], managed = optimizer_state_bytes(step.tensors, step.optimizer, state_bytes)
    held["cuBLAS workspace"] = 2 * CUBLAS_WORKSPACE  # of the forward pass's thread and of the backward pass's
    return held, managed


def bf16_copies(step: TrainingStep) -> int:
    """Autocast casts each fp32 matrix once, and keeps the copy until the backward pass has used it."""
    if not step.autocast:
        return 0
    in_layers = step.shape.linear_parameters() + step.shape.bias_parameters() if step.full else step.trained
    return 2 * (in_layers + step.trained_head)


def kept_of_layers(step: TrainingStep) -> int:
    """Bytes that all layers together keep for the backward pass."""
    layers = step.shape.num_hidden_layers
    if step.gradient_checkpointing:
        return layers * step.layer_input
    first_norm = 0 if step.full else step.tokens * (4 * step.shape.hidden_size + 4)  # nothing before it is trained
    return layers * step.layer - first_norm


def kept_of_forward(step: TrainingStep) -> int:
    """Bytes that are kept when the logits are there, without the logits."""
    kept = kept_of_layers(step) + step.tokens * end_activation_bytes(step.shape, step.full, step.autocast)
    if step.loss_chunk is not None:  # the last hidden states, from which each chunk's logits are computed again
        kept += step.tokens * 2 * step.shape.hidden_size
    return kept


def moments(step: TrainingStep) -> list[tuple[str, dict[str, int]]]:
    """The moments that may be the peak, with the bytes by part that are there beside `held_throughout`'s."""
    return [
        ("forward", in_the_last_layer(step)),
        ("forward", when_logits_are_a_loss(step)),
        ("loss", when_the_loss_goes_back(step)),
        ("backward", back_in_the_last_layer(step)),
        ("backward", back_in_the_first_layer(step)),
        ("update", when_parameters_are_updated(step)),
    ]


def in_the_last_layer(step: TrainingStep) -> dict[str, int]:
    shape = step.shape
    x = step.tokens * 2 * (shape.hidden_size + shape.intermediate_size)  # of gate and up, and of down
    again = x if step.gradient_checkpointing else 0
    return {
        "activations": kept_of_layers(step) + step.leaf + _around_the_mlp(step) + again,
        "bf16 copies": bf16_copies(step) - (2 * step.trained_head if step.autocast else 0),
        "dequantized weight": _dequantized(step),
    }


def when_logits_are_a_loss(step: TrainingStep) -> dict[str, int]:
    return {
        "activations": kept_of_forward(step) + step.leaf,
        "bf16 copies": bf16_copies(step),
        "logits and loss": (2 + 4 + 4) * _logits(step),  # the head's in bf16, the same in fp32, their log-softmax
    }


def when_the_loss_goes_back(step: TrainingStep) -> dict[str, int]:
    copies = bf16_copies(step)
    if step.gradient_checkpointing:  # of layers, they come back with them
        copies = 2 * step.trained_head if step.autocast else 0
    return {
        "activations": kept_of_forward(step),
        "bf16 copies": copies,
        "logits and loss": (4 + 4 + 4) * _logits(step),  # log-softmax, its gradient, the logits' gradient
    }


def back_in_the_last_layer(step: TrainingStep) -> dict[str, int]:
    again = step.layer + _around_the_mlp(step) if step.gradient_checkpointing else 0
    return {
        "activations": kept_of_layers(step) + _output_gradient(step) + again,
        "bf16 copies": _copies_of_a_layer(step) if step.gradient_checkpointing else bf16_copies(step),
        "dequantized weight": _dequantized(step),
        "gradients": _one_gradient(step) if step.update_in_backward else 0,
    }


def back_in_the_first_layer(step: TrainingStep) -> dict[str, int]:
    """All gradients are made but this layer's own, and full fine-tuning's embeddings'."""
    shape = step.shape
    embeddings = shape.vocab_size * shape.hidden_size if step.full and not shape.tie_word_embeddings else 0
    made = step.trained_bytes * (step.trained - step.trained_in_a_layer - embeddings)
    return {
        "activations": step.layer_input + step.layer + _around_the_mlp(step) + _output_gradient(step),
        "bf16 copies": _copies_of_a_layer(step),
        "dequantized weight": _dequantized(step),
        "gradients": _one_gradient(step) if step.update_in_backward else made,
    }


def when_parameters_are_updated(step: TrainingStep) -> dict[str, int]:
    if step.update_in_backward:
        return {"activations": step.leaf}
    # torch's AdamW computes the denominators of all parameters at once; bitsandbytes' needs nothing. Master weights are
    # updated one tensor after the other.
    largest = 4 * max(step.tensors)
    denominators = largest if step.masters else step.trained_bytes * step.trained
    needed = (largest if step.masters else 0) + (denominators if step.optimizer == "adamw_torch" else 0)
    return {"activations": step.leaf, "gradients": step.trained_bytes * step.trained, "update": needed}


def _logits(step: TrainingStep) -> int:
    """Numbers: one row less than tokens for each sample, since the last token has no next one."""
    vocabulary = step.shape.vocab_size
    logits = step.batch_size * (step.sequence_length - 1) * vocabulary
    return logits if step.loss_chunk is None else min(logits, step.loss_chunk * vocabulary)


def _around_the_mlp(step: TrainingStep) -> int:
    """In a layer's last linear (down), beside what the layer keeps: the stream around the MLP, the linear's result."""
    around = 2 * step.layer_input
    if step.method == "lora" and step.autocast and "down_proj" in chosen_linears(step.shape, step.targets):
        around += step.tokens * (2 + 4) * step.shape.intermediate_size  # x before PEFT's cast, and in fp32
    return around


def _output_gradient(step: TrainingStep) -> int:
    """In the backward pass: the gradient of the layer's output, and the same times alpha / rank."""
    return 2 * step.layer_input


def _copies_of_a_layer(step: TrainingStep) -> int:
    return 2 * step.trained_in_a_layer if step.autocast else 0


def _dequantized(step: TrainingStep) -> int:
    return dequantization_bytes(step.shape, step.double_quant) if step.method == "qlora" else 0


def _one_gradient(step: TrainingStep) -> int:
    """The largest gradient, where there is only one at a time; with master weights it is there in fp32, too."""
    return (step.trained_bytes + (4 if step.masters else 0)) * max(step.tensors)
