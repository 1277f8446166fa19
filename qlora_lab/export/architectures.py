"""Model shapes that llama.cpp knows, and how they differ from transformers' there.

| transformers   | llama.cpp | rows of q and k | norms | more                                                       |
|----------------|-----------|-----------------|-------|------------------------------------------------------------|
| llama, mistral | llama     | interleaved     | w     | LLaMA 3's rope factors are a tensor                        |
| qwen2, qwen3   | same      | as they are     | w     |                                                            |
| gemma2         | gemma2    | as they are     | 1 + w | soft caps, every other layer sees a window                 |
| gemma3_text    | gemma3    | as they are     | 1 + w | every sixth layer sees all, with a rope base of its own    |

Rope rotates pairs of a head's dimensions. transformers pairs dimension i with i + d/2; llama.cpp, for LLaMA's shapes,
neighbours, as Meta's own code does. So q's and k's rows are put in that order; the same order in both leaves q·k alone.
(Source: llama.cpp, conversion/llama.py and gemma.py; src/models/gemma2.cpp and gemma3.cpp for what is built in there.)
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_lab.errors import UserError

ARCHITECTURES = {
    **{"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"},
    **{"gemma2": "GEMMA2", "gemma3_text": "GEMMA3"},
}


def require_supported(config) -> None:
    """Raise UserError unless llama.cpp computes what transformers does for this config, as far as this export knows."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"models of type {kind} are not exported to GGUF: {', '.join(ARCHITECTURES)} are; --as merged exports any"
        )
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if act not in (("gelu_pytorch_tanh",) if kind.startswith("gemma") else ("silu",)):
        raise UserError(f"this {kind} has the activation {act}, and llama.cpp's has another one built in")
    for rope in _ropes(config):
        if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
            raise UserError(
                f"this {kind} scales its rope by {rope['rope_type']!r}: default, linear and llama3 are exported"
            )
    layers = config.num_hidden_layers
    if kind.startswith("gemma"):
        heads = config.hidden_size // config.num_attention_heads
        scale = heads if (kind, layers) in (("gemma2", 46), ("gemma3_text", 62)) else config.head_dim
        if config.query_pre_attn_scalar != scale:
            raise UserError(
                f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp has {scale} built in for "
                f"{layers} layers of {kind}"
            )
        if getattr(config, "use_bidirectional_attention", None):
            raise UserError(f"this {kind} looks both ways, and llama.cpp's does not")
        if kind == "gemma3_text" and (config.attn_logit_softcapping or config.final_logit_softcapping):
            raise UserError("this gemma3 has soft caps, and llama.cpp's has none")
    period = {"gemma2": 2, "gemma3_text": 6}.get(kind)
    types = getattr(config, "layer_types", None) or ["full_attention"] * layers
    windowed = ["sliding_attention" if period and (i + 1) % period else "full_attention" for i in range(layers)]
    if kind not in ("llama", "mistral") and types != windowed:
        raise UserError(f"this {kind} has windows of attention in other layers than llama.cpp's: it is not exported")


def add_shape(writer, config) -> None:
    """Write the shape's numbers to a `gguf.GGUFWriter`."""
    import gguf

    context = config.max_position_embeddings
    if config.model_type == "mistral" and getattr(config, "sliding_window", None):
        context = min(context, config.sliding_window)  # llama.cpp's LLaMA has no window: up to here they agree
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    size = head_dim(config)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    rope = _ropes(config)[0]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        if config.model_type == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        else:
            writer.add_rope_freq_base_swa(_ropes(config)[1]["rope_theta"])


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _ropes(config) -> list[dict[str, Any]]:
    """Rope settings; of Gemma 3 those of the layers that see all, then those of the layers with a window."""
    rope = config.rope_parameters
    if "full_attention" in rope:
        return [rope["full_attention"], rope["sliding_attention"]]
    return [rope]


def rope_factors(config) -> torch.Tensor | None:
    """What LLaMA 3 divides its rope frequencies by: float32, Tensor[head_dim / 2]. None for the others."""
    if _ropes(config)[0].get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return plain / scaled


def name_map(config):
    """`gguf`'s table from transformers' names to llama.cpp's."""
    import gguf

    arch = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def their_name(config, names, name: str) -> str:
    """llama.cpp's name of a tensor. Raises UserError for one that its architecture lacks."""
    theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if theirs is None:
        raise UserError(f"llama.cpp's {ARCHITECTURES[config.model_type].lower()} has no tensor for {name}")
    return theirs


def as_theirs(config, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as llama.cpp wants it; for q and k also a LoRA's B, whose rows are those of the weight."""
    if ARCHITECTURES[config.model_type] == "LLAMA":
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f".{part}." in name:
                return interleave(tensor, heads)
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return tensor.float() + 1
    return tensor


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head's rows 0, 1, ... d-1 in the order 0, d/2, 1, d/2 + 1, ...: Tensor[heads * d, ...] of the same shape."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
