"""What autograd keeps of a forward pass for the backward pass: bytes a token, tensor by tensor.

Of transformers' LLaMA layers with SDPA (flash) attention, PEFT's LoRA and bitsandbytes' `Linear4bit`. Small models were
measured on a GPU with each method and each target: `data/records/kept-*.json`, which the tests compare byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_lab.memory.shapes import MixtureShape, Shape
from qlora_lab.memory.tensors import chosen_experts, chosen_linears

# linears that read the same tensor, in the order in which a layer computes them
READERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def layer_activation_bytes(
    shape: Shape, method: str, rank: int = 64, targets: str | Sequence[str] = "all-linear", autocast: bool = True
) -> int:
    """Bytes a token that one layer keeps for its backward pass.

    Args:
        autocast: the trained parameters are fp32, and autocast casts them and what they meet to bf16.
    """
    return sum(layer_activations(shape, method, rank, targets, autocast).values())


def layer_activations(
    shape: Shape,
    method: str,
    rank: int = 64,
    targets: str | Sequence[str] = "all-linear",
    autocast: bool = True,
    first: bool = False,
) -> dict[str, int]:
    """Bytes a token that one layer keeps, by what they are.

    Args:
        first: the layer at the bottom. Nothing below its first adapter is trained, so autograd keeps nothing of it.
    """
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    linears = shape.linears()
    chosen = chosen_linears(shape, "all-linear" if method == "full" else targets)
    query, key_value = linears["q_proj"][1], linears["k_proj"][1]
    # RMSNorm computes in fp32: its input, a root for each token; and the normalized input where its weight is trained
    norm = 4 * hidden + 4 + (0 if method != "full" else 4 * hidden if autocast else 2 * hidden)
    kept = {
        "norm before attention": norm,
        "q, k, v": 2 * (query + 2 * key_value),
        "logsumexp": 4 * shape.num_attention_heads,
        "attention's output": 2 * query,
        "norm before the MLP": norm,
        **({} if isinstance(shape, MixtureShape) else {"gate": 2 * mlp, "silu(gate)": 2 * mlp, "up": 2 * mlp}),
        "inputs of linears": _inputs(shape, method, chosen, autocast),
        "A x": 0 if method == "full" else 2 * rank * len(chosen),  # in bf16
    }
    if isinstance(shape, MixtureShape):
        kept.update(_of_experts(shape, rank, targets))
    if first and method != "full" and chosen:
        for name in _below_the_first_adapter(chosen, copied=autocast and method == "lora"):
            kept.pop(name, None)  # a mixture has no gate of its own
    return kept


def _of_experts(shape: MixtureShape, rank: int, targets: str | Sequence[str]) -> dict[str, int]:
    """What a `FourBitExperts` and its router keep, bytes a token: most of it once for each expert that it goes to."""
    hidden, mlp, adapted = shape.hidden_size, shape.intermediate_size, chosen_experts(shape, targets)
    # gate and up as they come, and silu(gate). gpt-oss clamps both, and multiplies four numbers where others do two
    gated = 2 * mlp * (6 if shape.expert_biases else 3)
    inputs = 2 * (hidden * ("gate_up_proj" in adapted) + mlp * ("down_proj" in adapted))
    return {
        # a softmax in fp32 (gpt-oss': of the chosen alone); numbers and weights of the experts
        "router": (0 if shape.expert_biases else 4 * shape.num_experts) + (8 + 4) * shape.experts_per_token,
        "order of the experts": 3 * 8 * shape.experts_per_token,
        "gate, up and activations": shape.experts_per_token * gated,
        "experts' output": shape.experts_per_token * 2 * hidden,
        "inputs of experts": shape.experts_per_token * inputs,
        "A x of experts": shape.experts_per_token * 2 * rank * sum(adapted.values()),
    }


def _inputs(shape: Shape, method: str, chosen: dict[str, tuple[int, int]], autocast: bool) -> int:
    """The inputs x of the trained linears, in bf16."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    if autocast and method == "lora":  # PEFT's dense layer casts x to fp32 and autocast casts it back: a copy for each
        return sum(2 * i for i, _ in chosen.values())
    if autocast and method == "full":  # the stream is fp32: a copy for each linear behind a norm; other x are bf16
        return 5 * 2 * hidden + 2 * mlp
    # q, k and v share theirs, and gate and up; o's is the attention's output, which attention keeps
    of_groups = zip(READERS, (hidden, 0, hidden, mlp), strict=True)
    return sum(2 * size for group, size in of_groups if set(group) & set(chosen))


def _below_the_first_adapter(chosen, copied: bool) -> list[str]:
    """Of `layer_activations`, what only the gradient of something untrained would need.

    copied: adapters keep copies of their x, so nobody else needs to.
    """
    below = ["norm before attention"]
    if set(READERS[0]) & set(chosen):
        return below
    below += ["q, k, v", "logsumexp"]
    if "o_proj" in chosen:
        return below + ["attention's output"] * copied
    below += ["attention's output", "norm before the MLP"]
    if "gate_proj" in chosen:  # silu(gate) * up: each is kept for the other's gradient, and gate for silu's
        return below + ([] if "up_proj" in chosen else ["silu(gate)"])
    return below + (["gate", "up"] if "up_proj" in chosen else ["gate", "silu(gate)", "up"])


def first_readers(targets: dict[str, tuple[int, int]]) -> list[str]:
    """The targets that read the first tensor that any of them reads, in a layer."""
    return next([name for name in group if name in targets] for group in READERS if set(group) & set(targets))


def end_activation_bytes(shape: Shape, full: bool, autocast: bool) -> int:
    """Bytes a token that are kept outside the layers: the last norm's, the head's input, rotary cosines and sines."""
    stream = 4 if full and autocast else 2
    head_dim = shape.linears()["q_proj"][1] // shape.num_attention_heads
    last_norm = 4 * shape.hidden_size + 4  # its input in fp32
    if full:  # normalized input, and the trained head's x
        last_norm += (stream + 2) * shape.hidden_size
    return last_norm + 2 * stream * head_dim
