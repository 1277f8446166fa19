"""A step that several processes take together, each on a GPU: what each of them holds, and what goes over the wire.

data   each has the whole model and its own samples; the trained parameters' gradients are added up.
full   each keeps a share of every layer (FSDP2, `models/sharded.py`). A layer is gathered just before it computes, and
       the copy that arrives lies beside the layer's parameters for a while: twice a whole layer at each moment.

Not shared out: the scales of the 4-bit blocks, and embeddings that are the output head too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qlora_lab.memory.moments import (
    back_in_the_first_layer,
    back_in_the_last_layer,
    bf16_copies,
    held_throughout,
    in_the_last_layer,
    kept_of_forward,
    logits_of,
    moments,
    when_logits_are_a_loss,
    when_parameters_are_updated,
    when_the_loss_goes_back,
)
from qlora_lab.memory.tensors import model_parts, optimizer_state_bytes
from qlora_lab.memory.training_step import TrainingStep

SHARED_OUT = ("base weights", "norms", "biases", "adapters")


def held_by_one(step: TrainingStep, processes: int) -> tuple[dict[str, int], int]:
    """`moments.held_throughout` for one of so many processes that share the model."""
    held, _ = held_throughout(step)
    for name in SHARED_OUT if step.shape.tie_word_embeddings else (*SHARED_OUT, "embeddings and head"):
        held[name] = -(-held[name] // processes)
    parts = [-(-elements // processes) for elements in step.tensors]
    held["optimizer states"], managed = optimizer_state_bytes(parts, step.optimizer, step.trained_bytes)
    return held, managed


def moments_of_one(step: TrainingStep, processes: int) -> list[tuple[str, dict[str, int]]]:
    """`moments.moments` for one of so many processes that share the model, with what is gathered then."""
    arriving = 1 if processes > 1 else 0  # what arrives is copied; a process that is alone copies its own
    layer, head = (1 + arriving) * layer_bytes(step), head_bytes(step)
    gradients = step.trained_bytes * step.trained_in_a_layer
    first, last = back_in_the_first_layer(step), back_in_the_last_layer(step)
    made = first["gradients"] // processes + 2 * gradients  # a layer's own, and the one before on its way
    updated = when_parameters_are_updated(step)
    in_head = {
        "activations": kept_of_forward(step) + step.leaf,
        "bf16 copies": bf16_copies(step),
        "logits and loss": 2 * logits_of(step),
    }
    return [
        ("forward", {**in_the_last_layer(step), "gathered": layer}),
        ("forward", {**in_head, "gathered": (1 + arriving) * head}),
        ("forward", {**when_logits_are_a_loss(step), "gathered": head}),
        ("loss", {**when_the_loss_goes_back(step), "gathered": head}),
        ("backward", {**last, "gathered": layer, "gradients": gradients}),
        ("backward", {**first, "gathered": layer, "gradients": made}),  # in the second: the first is not awaited
        ("update", {**updated, **{name: updated[name] // processes for name in ("gradients", "update")}}),
    ]


def moments_beside_others(step: TrainingStep) -> list[tuple[str, dict[str, int]]]:
    """`moments.moments` for a process that has the whole model, and exchanges gradients with others."""
    gradients = step.trained_bytes * step.trained
    exchange = {"activations": step.leaf, "gradients": gradients, "exchange": 2 * gradients}  # in one vector; its sum
    return [*moments(step), ("exchange", exchange)]


def layer_bytes(step: TrainingStep) -> int:
    """Bytes of a layer's parameters, its adapters included, when it is whole; without the scales."""
    model = model_parts(of_one_layer(step).shape, step.method)
    parts = model["base weights"] + model["norms"] + model["biases"] - 2 * step.shape.hidden_size  # the last norm
    return parts + step.trained_bytes * step.trained_in_a_layer


def of_one_layer(step: TrainingStep) -> TrainingStep:
    """The step with a model of one layer."""
    return replace(step, shape=replace(step.shape, num_hidden_layers=1))


def head_bytes(step: TrainingStep) -> int:
    """Bytes of the output head when it is gathered: none if it is the embeddings, which all have."""
    return 0 if step.shape.tie_word_embeddings else 2 * step.shape.vocab_size * step.shape.hidden_size


def traffic(
    shape,
    method: str = "qlora",
    *,
    processes: int,
    sharding: str,
    rank: int = 64,
    targets: str | Sequence[str] = "all-linear",
    adapter_dtype: str = "float32",
    accumulation: int = 1,
) -> dict[str, int]:
    """Bytes that each GPU receives in an optimizer step.

    In a ring, an all-gather of n bytes and a reduce-scatter of n bytes bring each of N processes (N - 1) / N n bytes,
    and an all-reduce is one of each.

    Args:
        shape, method, rank, targets, adapter_dtype: as in `estimate`.
        processes, sharding: "data" or "full", see this module.
        accumulation: micro-batches in a step. Sharded layers are gathered twice in each, for the forward and the
            backward pass, and their gradients are reduced in each; data parallel gradients are reduced once.

    Returns:
        "weights" and "gradients", in bytes

    Raises:
        ValueError: as `estimate`.
    """
    step = TrainingStep(
        shape,
        method,
        rank=rank,
        targets=targets,
        batch_size=1,
        sequence_length=1,
        gradient_checkpointing=True,
        optimizer="adamw_torch",
        adapter_dtype=adapter_dtype,
        quant_type="nf4",
        double_quant=True,
        full_precision="float32",
        loss_chunk=None,
        update_in_backward=False,
        embeddings_on_cpu=False,
        processes=processes,
        sharding=sharding,
    )
    gradients = step.trained_bytes * step.trained
    if sharding == "data":
        return {"weights": 0, "gradients": 2 * gradients * (processes - 1) // processes}
    # once: the embeddings, and the last norm and the head, which stay for the backward pass
    ends = 2 * head_bytes(step) + 2 * shape.hidden_size
    weights = accumulation * (2 * shape.num_hidden_layers * layer_bytes(step) + ends)
    return {
        "weights": weights * (processes - 1) // processes,
        "gradients": accumulation * gradients * (processes - 1) // processes,
    }
