"""Which tensors a model and its training hold, and how many bytes each has."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_lab.facts import OPTIMIZERS, four_bit_bytes
from qlora_lab.memory.shapes import MixtureShape, Shape, require_counts, require_known

METHODS = ("full", "lora", "qlora")
_MIN_8BIT = 4_096  # bitsandbytes' `min_8bit_size`: states of smaller tensors are fp32
_MIN_PAGED = 100_000  # elements: bitsandbytes' `get_state_buffer` does not page smaller ones


def chosen_linears(shape: Shape, targets: str | Sequence[str]) -> dict[str, tuple[int, int]]:
    """The linears that are adapted, with (in_features, out_features). Of a mixture: without the experts' parameters."""
    linears = shape.linears()
    known = [*linears, *shape.experts()]
    names = linears if targets == "all-linear" else (targets,) if isinstance(targets, str) else tuple(targets)
    if not names:
        raise ValueError(f"no target: choose 'all-linear' or from {', '.join(known)}")
    for name in names:
        require_known("target", name, known, first="all-linear")
    return {name: linears[name] for name in names if name in linears}


def chosen_experts(shape: Shape, targets: str | Sequence[str]) -> dict[str, int]:
    """The experts' parameters that are adapted, by name; and by how much the rank of each is multiplied."""
    if targets == "all-linear":
        adapts = isinstance(shape, MixtureShape) and shape.adapts_experts
        return {"gate_up_proj": 2, "down_proj": 1} if adapts else {}
    names = (targets,) if isinstance(targets, str) else targets
    return {name: 1 for name in shape.experts() if name in names}


def trainable_parameters(shape: Shape, rank: int, targets: str | Sequence[str] = "all-linear") -> int:
    """PEFT's count: A is (rank, in_features) and B (out_features, rank) for every target in every layer.

    Raises:
        ValueError: a rank below 1, an unknown target.
    """
    return sum(trained_tensors(shape, "qlora", rank, targets))


def trained_tensors(
    shape: Shape, method: str, rank: int = 64, targets: str | Sequence[str] = "all-linear"
) -> list[int]:
    """Elements of every tensor that training changes: A and B of each target, or all the model's parameters."""
    linears, layers = shape.linears(), shape.num_hidden_layers
    if method != "full":
        require_counts(rank=rank)
        of_layer = [rank * side for sizes in chosen_linears(shape, targets).values() for side in sizes]
        if isinstance(shape, MixtureShape):
            of_experts = chosen_experts(shape, targets)
            for name, times in of_experts.items():
                of_layer += [shape.num_experts * times * rank * side for side in shape.experts()[name]]
            if targets == "all-linear" and of_experts:
                of_layer += [rank * side for side in (shape.hidden_size, shape.num_experts)]  # the router
        return layers * of_layer
    layer = [i * o for i, o in linears.values()] + [linears[name][1] for name in shape.biased]
    matrices = [shape.vocab_size * shape.hidden_size] * (1 if shape.tie_word_embeddings else 2)
    return layers * layer + matrices + (2 * layers + 1) * [shape.hidden_size]


def model_parts(
    shape: Shape, method: str = "qlora", double_quant: bool = True, full_precision: str = "float32"
) -> dict[str, int]:
    """Bytes of the loaded model by part, before anything is added to train it: 4-bit linears, or 16 or 32 bits."""
    require_known("method", method, METHODS)
    quantized = method == "qlora"
    each = 4 if method == "full" and full_precision == "float32" else 2
    constants = sum(four_bit_bytes(i * o, double_quant)[1] for i, o in shape.linears().values())
    if isinstance(shape, MixtureShape):
        constants += sum(four_bit_bytes(i * o, double_quant, shape.num_experts)[1] for i, o in shape.experts().values())
    return {
        "base weights": shape.linear_parameters() // 2 if quantized else each * shape.linear_parameters(),
        "quantization constants": shape.num_hidden_layers * constants if quantized else 0,
        "embeddings and head": each * shape.embedding_parameters(),
        "norms": each * shape.norm_parameters(),
        "biases": each * shape.bias_parameters(),
        "routers": each * shape.router_parameters(),
    }


def kbit_preparation_bytes(shape: Shape) -> int:
    """What `peft.prepare_model_for_kbit_training` adds to a 4-bit model in bf16: every 16-bit parameter becomes fp32.

    Those are the embeddings, the output head, the norms, the biases and the routers. `finetuning.add_adapter` does
    without it.
    """
    small = shape.norm_parameters() + shape.bias_parameters() + shape.router_parameters()
    return 2 * (shape.embedding_parameters() + small)


def dequantization_bytes(shape: Shape, double_quant: bool = True) -> int:
    """bitsandbytes dequantizes one whole weight to bf16 for each product, forward and backward; here of the largest.

    Of a mixture's experts, it is one expert's, by a kernel that needs no scales in fp32.
    """
    elements = max(i * o for i, o in shape.linears().values())
    scales = 2 * 4 * elements // 64 if double_quant else 0  # in fp32 again, before and after their mean is added
    return max([2 * elements + scales, *(2 * i * o for i, o in shape.experts().values())])


def optimizer_state_bytes(tensors: list[int], optimizer: str, parameter_bytes: int = 4) -> tuple[int, int]:
    """(bytes in torch's allocator, bytes in managed memory) of AdamW's two states.

    Args:
        tensors: elements of each trained tensor.
        optimizer: transformers' name.
        parameter_bytes: of a trained number; torch's own states have its dtype, bitsandbytes' are fp32 or 8 bits.
    """
    require_known("optimizer", optimizer, OPTIMIZERS)
    held = managed = 0
    for elements in tensors:
        if optimizer == "adamw_torch":
            states, scales = 2 * parameter_bytes * elements, 0
        elif optimizer.endswith("8bit") and elements >= _MIN_8BIT:
            states, scales = 2 * elements, 2 * 4 * -(-elements // 256)  # an fp32 scale for each block of 256
        else:
            states, scales = 2 * 4 * elements, 0
        paged = optimizer.startswith("paged") and elements >= _MIN_PAGED
        held, managed = held + scales + (0 if paged else states), managed + (states if paged else 0)
    return held, managed
