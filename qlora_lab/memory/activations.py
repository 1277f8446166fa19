"""What autograd keeps of a forward pass for the backward pass: bytes a token, tensor by tensor.

Of transformers' LLaMA layers with SDPA (flash) attention, PEFT's LoRA and bitsandbytes' `Linear4bit`.
"""

from __future__ import annotations

from qlora_lab.memory.tensors import chosen_linears


def layer_activation_bytes(shape, method: str, rank: int = 64, targets="all-linear", autocast: bool = True) -> int:
    """Bytes a token that one layer keeps for its backward pass.

    Args:
        autocast: the trained parameters are fp32, and autocast casts them and what they meet to bf16.
    """
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    linears, chosen = shape.linears(), chosen_linears(shape, "all-linear" if method == "full" else targets)
    query, key_value = linears["q_proj"][1], linears["k_proj"][1]
    copied = autocast and method != "qlora"  # see below
    # RMSNorm computes in fp32: its input, a root for each token; and the normalized input where its weight is trained
    norms = 2 * (4 * hidden + 4 + (0 if method != "full" else 4 * hidden if autocast else 2 * hidden))
    # the inputs x of the trained linears, in bf16
    if copied and method == "lora":  # PEFT's dense layer casts x to fp32 and autocast casts it back: a copy for each
        inputs = sum(2 * i for i, _ in chosen.values())
    elif copied:  # the residual stream is fp32: a copy for each linear behind a norm; the others' x are bf16 already
        inputs = 5 * 2 * hidden + 2 * mlp
    else:  # q, k and v share theirs, and gate and up; o's is the attention's output, which attention keeps
        groups = {("q_proj", "k_proj", "v_proj"): hidden, ("gate_proj", "up_proj"): hidden, ("down_proj",): mlp}
        inputs = sum(2 * size for group, size in groups.items() if set(group) & set(chosen))
    low_rank = 0 if method == "full" else 2 * rank * len(chosen)  # A x, in bf16
    attention = 2 * (query + 2 * key_value + query) + 4 * shape.num_attention_heads  # q, k, v, output; logsumexp
    products = 3 * 2 * mlp  # gate, silu(gate), up
    return norms + inputs + low_rank + attention + products


def end_activation_bytes(shape, full: bool, autocast: bool) -> int:
    """Bytes a token that are kept outside the layers: the last norm's, the head's input, rotary cosines and sines."""
    stream = 4 if full and autocast else 2
    head_dim = shape.linears()["q_proj"][1] // shape.num_attention_heads
    last_norm = 4 * shape.hidden_size + 4  # its input in fp32
    if full:  # normalized input, and the trained head's x
        last_norm += (stream + 2) * shape.hidden_size
    return last_norm + 2 * stream * head_dim
