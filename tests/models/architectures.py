"""Every architecture for which transformers has a causal language model, tiny, and with random weights.

A config is made by transformers' own class for it, with the sizes below instead of its own. Where a class needs more
than that, CHANGES has it; what cannot be made is in NOT_MADE, with the reason.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What configs call their sizes, and what they are here. Widths are multiples of 64, for blocks of 4-bit weights.
SIZES = {
    97: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size ngram_vocab_size_base",
    64: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim attention_hidden_size "
    "input_embedding_size output_embedding_size lru_width dim_model_base kv_lora_rank q_lora_rank o_lora_rank "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size hidden_size_per_layer_input "
    "laurel_rank router_hidden_size adapter_rank index_topk mamba_dt_rank time_step_rank hc_lowrank ple_embed_dim "
    "pronunciation_embed_dim shape_embed_dim prompt_mid_dim projection_dim gated_norm_rank d_rel "
    "swa_q_lora_rank swa_kv_lora_rank",
    128: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim feed_forward_size ffn_hidden_size dim_ff dff "
    "d_inner intermediate_size_mlp dense_intermediate_size mamba_d_ssm max_position_embeddings n_positions n_ctx "
    "max_seq_len context_length original_max_position_embeddings max_target_positions max_source_positions "
    "model_max_length",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_value_heads "
    "linear_num_heads index_n_heads num_experts n_routed_experts num_local_experts moe_num_experts mm_tokens_per_image",
    2: "num_hidden_layers num_layers n_layer n_layers decoder_layers num_decoder_layers num_blocks "
    "encoder_layers num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num num_query_groups "
    "eos_token_id pad_token_id",
    1: "bos_token_id n_group topk_group num_expert_group n_shared_experts "
    "num_shared_experts moe_num_shared_experts first_k_dense_replace n_groups depth "
    "adapter_reduction_factor num_nextn_predict_layers",
    0: "num_kv_shared_layers",
    16: "head_dim attention_head_dim kv_channels d_head dim_head attention_head_size v_head_dim qk_rope_head_dim "
    "qk_nope_head_dim swa_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "mamba_d_head mamba_head_dim mamba_chunk_size chunk_size query_pre_attn_scalar global_head_dim "
    "sliding_window sliding_window_size attention_window_size local_attention window_size attention_chunk_size",
    8: "rotary_dim state_size ssm_state_size mamba_d_state mamba_n_heads mamba_num_heads",
    28: "image_size",
    14: "patch_size",
}
SIZE = {name: size for size, names in SIZES.items() for name in names.split()}
LATENT = {"num_key_value_heads": 4}  # attention through a low rank has a key for each head
SHARED = {"attention_head_dim": 32, "attention_hidden_size": 128}  # its attention reads the embeddings, too
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots3_note": LATENT,
    "dots3_note_text": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": 64, "indexer_compress_ratio": 4},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["linear_attention"],
        **SHARED,
    },
    "zamba2": SHARED,
    "zaya": {"num_experts_per_tok": 1},
}
NOT_MADE = {
    "blt": "reads bytes through a model of its own",
    "dots3_note": "wants the widths of its parts to agree",
    "emu3": "is saved as its part that reads text, which transformers does not load as a causal language model",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "drafts for another model, whose cache it reads",
    "gemma4_unified_assistant": "drafts for another model, whose cache it reads",
    "mllama": "is saved as its part that reads text, which transformers does not load as a causal language model",
    "musicgen": "makes sounds",
    "musicgen_melody": "makes sounds",
    "reformer": "has positions along axes whose product is the sample's length",
}


def tiny(model_type: str, layers: int = 2) -> PretrainedConfig:
    """The config of a tiny model of this type. layers: as many at least; more where there are more kinds of them."""
    return _shrunk(CONFIG_MAPPING[model_type], layers, **CHANGES.get(model_type, {}))


def _shrunk(config_class, least: int, **changes) -> PretrainedConfig:
    default = config_class()
    own = vars(default)
    sizes = {name: SIZE[name] for name, value in own.items() if name in SIZE}
    sizes.update(
        (name, _shrunk(type(part), least, **CHANGES.get(part.model_type, {})))
        for name, part in own.items()
        if isinstance(part, PretrainedConfig)
    )
    sizes.update((name, 0.0) for name, value in own.items() if "drop" in name and isinstance(value, float))
    if "kv_lora_rank" in own:
        sizes.update(LATENT)
    if "is_decoder" in own:
        sizes["is_decoder"] = True  # or BERT and its like read forwards and backwards
    if "num_hidden_layers" in sizes and "num_hidden_layers" not in changes:
        kinds = {
            name: list(dict.fromkeys(value))
            for name, value in own.items()
            if isinstance(value, list) and len(value) == own["num_hidden_layers"] and isinstance(value[0], str)
        }
        kinds.update((name, value) for name, value in changes.items() if name in kinds or name == "layer_types")
        layers = max(least, *map(len, kinds.values()), 0)
        sizes["num_hidden_layers"] = layers
        changes.update((name, [each[n % len(each)] for n in range(layers)]) for name, each in kinds.items())
    return config_class(**{**sizes, **changes})


TYPES = sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_MADE)
