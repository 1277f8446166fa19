"""The moments of a training step that may be its peak, and what lies in the GPU's memory then.

forward    in the last layer while its largest product is computed, or when the logits have become a loss
loss       the backward pass begins: the gradients of the loss and of the logits stand beside the log-softmax
backward   in the last layer, with everything remembered, or in the first, with almost all gradients made
update     gradients and optimizer states, and what the optimizer itself needs
"""

from __future__ import annotations

from qlora_lab.memory.activations import end_activation_bytes, first_readers, layer_activations
from qlora_lab.memory.shapes import MixtureShape
from qlora_lab.memory.tensors import chosen_linears, dequantization_bytes, model_parts, optimizer_state_bytes
from qlora_lab.memory.training_step import TrainingStep

CUBLAS_WORKSPACE = 32 * 2**20  # of an H100, for each thread that multiplies; torch's allocator holds it


def held_throughout(step: TrainingStep) -> tuple[dict[str, int], int]:
    """Bytes that are there at every moment, by part; and bytes of optimizer states in managed memory."""
    held = model_parts(step.shape, step.method, step.double_quant, step.full_precision)
    if step.embeddings_on_cpu and not step.shape.tie_word_embeddings:
        held["embeddings and head"] //= 2
    linears = step.shape.num_hidden_layers * sum(i * o for i, o in step.shape.linears().values())  # without experts
    held["dense weights"] = 2 * linears if step.dense_base and step.method == "qlora" else 0
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
    first = layer_activations(step.shape, step.method, step.rank, step.targets, step.autocast, first=True)
    return (layers - 1) * step.layer + step.tokens * sum(first.values())


def kept_of_forward(step: TrainingStep) -> int:
    """Bytes that are kept when the logits are there, without the logits."""
    kept = kept_of_layers(step) + step.tokens * end_activation_bytes(step.shape, step.full, step.autocast)
    if step.loss_chunk is not None and not step.masters:
        # the last hidden states, from which each chunk's logits are computed again (a 16-bit trained head keeps them
        # anyway)
        kept += step.tokens * 2 * step.shape.hidden_size
    return kept


def kept_copies(step: TrainingStep) -> int:
    """Bytes of `bf16_copies` that are left when the forward pass has ended."""
    if not step.autocast:
        return 0
    head = 0 if step.loss_chunk is not None else 2 * step.trained_head  # a chunk's logits are computed again
    if step.gradient_checkpointing:
        return head  # the layers' come back with the layers
    copies = bf16_copies(step) - 2 * step.trained_head + head
    if not step.full:  # in the first layer A is not needed: nobody wants the gradient of its input
        linears = chosen_linears(step.shape, step.targets)
        copies -= 0 if not linears else sum(2 * step.rank * linears[name][0] for name in first_readers(linears))
    return copies


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
        "logits and loss": (2 + 4 + 4) * logits_of(step),  # the head's in bf16, the same in fp32, their log-softmax
    }


def when_the_loss_goes_back(step: TrainingStep) -> dict[str, int]:
    return {
        "activations": kept_of_forward(step),
        "bf16 copies": kept_copies(step),
        "logits and loss": (4 + 4 + 4) * logits_of(step),  # log-softmax, its gradient, the logits' gradient
    }


def back_in_the_last_layer(step: TrainingStep) -> dict[str, int]:
    again = step.layer + _around_the_mlp(step) if step.gradient_checkpointing else 0
    return {
        "activations": kept_of_layers(step) + _output_gradient(step) + again,
        "bf16 copies": _copies_of_a_layer(step) if step.gradient_checkpointing else kept_copies(step),
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


def logits_of(step: TrainingStep) -> int:
    """Numbers: one row less than tokens for each sample, since the last token has no next one."""
    vocabulary = step.shape.vocab_size
    logits = step.batch_size * (step.sequence_length - 1) * vocabulary
    return logits if step.loss_chunk is None else min(logits, step.loss_chunk * vocabulary)


def _around_the_mlp(step: TrainingStep) -> int:
    """In a layer's last linear (down), beside what the layer keeps: the stream around the MLP, the linear's result."""
    around = 2 * step.layer_input
    if isinstance(step.shape, MixtureShape):  # each token's rows, one for each of its experts, and what they become
        around += 2 * step.layer_input * step.shape.experts_per_token
    if step.method == "lora" and step.autocast and "down_proj" in chosen_linears(step.shape, step.targets):
        around += step.tokens * (2 + 4) * step.shape.intermediate_size  # x before PEFT's cast, and in fp32
    return around


def _output_gradient(step: TrainingStep) -> int:
    """In the backward pass: the gradient of the layer's output, and the same times alpha / rank."""
    return 2 * step.layer_input


def _copies_of_a_layer(step: TrainingStep) -> int:
    return 2 * step.trained_in_a_layer if step.autocast else 0


def _dequantized(step: TrainingStep) -> int:
    anew = step.method == "qlora" and (not step.dense_base or step.shape.experts())
    return dequantization_bytes(step.shape, step.double_quant) if anew else 0


def _one_gradient(step: TrainingStep) -> int:
    """The largest gradient, where there is only one at a time; with master weights it is there in fp32, too."""
    return (step.trained_bytes + (4 if step.masters else 0)) * max(step.tensors)
