"""What the course promises of a model, held for one architecture after another, each tiny and with random weights.

It trains, in 4 bits and in 16; what was trained is loaded again by PEFT, and merged by us, saved, loaded and answers
alike; samples that share a row do not see one another, or packing is refused; the loss in chunks is the loss, or
chunks are refused; checkpointing changes nothing. `make sweep` asks all of them, every other run those in EVERY_RUN.
"""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from peft import PeftModel

from qlora_lab.errors import UserError
from qlora_lab.finetuning import (
    Batches,
    TokenizedSample,
    add_adapter,
    collate,
    dequantize_linears,
    load_lora,
    load_model,
    merge,
    train,
    unload,
)
from qlora_lab.models.trying import Tried, require_trainable, try_out
from qlora_lab.training.loss import token_loss_sum

IDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
DEEP = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
MHA = {**DEEP, "intermediate_size": 128, "max_position_embeddings": 128}
GQA = {**MHA, "num_key_value_heads": 2}
WIDE = {**GQA, "head_dim": 16}
SLIDING = {"sliding_window": 16, "query_pre_attn_scalar": 16}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PATCHES = {"num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def gemma3_vision():
    text = transformers.Gemma3TextConfig(**WIDE, **SLIDING)
    vision = transformers.SiglipVisionConfig(hidden_size=64, intermediate_size=128, **PATCHES)
    images = {"mm_tokens_per_image": 4, "boi_token_index": 94, "eoi_token_index": 95, "image_token_index": 96}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, **images, pad_token_id=2)


MODELS = {
    "llama": lambda: transformers.LlamaConfig(**GQA, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**GQA, sliding_window=16),
    "qwen2": lambda: transformers.Qwen2Config(**GQA),
    "qwen3": lambda: transformers.Qwen3Config(**WIDE),
    "gemma2": lambda: transformers.Gemma2Config(**WIDE, **SLIDING),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**WIDE, **SLIDING),
    "gemma3_vision": gemma3_vision,
    "phi3": lambda: transformers.Phi3Config(**GQA, original_max_position_embeddings=128),
    "gpt2": lambda: transformers.GPT2Config(n_positions=128, n_embd=64, n_layer=2, n_head=4, **IDS),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**MHA),
    "falcon": lambda: transformers.FalconConfig(**DEEP),
    "opt": lambda: transformers.OPTConfig(**DEEP, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=128),
    "bloom": lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, **IDS),
    "mixtral": lambda: transformers.MixtralConfig(**GQA, **LOCAL_EXPERTS),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**WIDE, **EXPERTS),
    "gpt_oss": lambda: transformers.GptOssConfig(**WIDE, **LOCAL_EXPERTS, **ROPE, sliding_window=16),
    "cohere": lambda: transformers.CohereConfig(**GQA, logit_scale=0.0625),
    "granite": lambda: transformers.GraniteConfig(**GQA, logits_scaling=4.0),
    "olmo2": lambda: transformers.Olmo2Config(**GQA),
    "smollm3": lambda: transformers.SmolLM3Config(**GQA),
    "mamba": lambda: transformers.MambaConfig(
        hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=4, **IDS
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **WIDE, **LOCAL_EXPERTS, intermediate_size_mlp=128, interleave_moe_layer_step=1
    ),
    "bert": lambda: transformers.BertConfig(**MHA),
    "t5": lambda: transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=2, eos_token_id=2
    ),
}
EVERY_RUN = "llama qwen3 gemma2 gemma3_vision gpt2 mixtral opt falcon granite mamba llama4 bert t5".split()
# What is known of them today. Where transformers or PEFT learn more, this test says so.
NOT_TRAINED = {
    "mamba": "cannot be adapted as it is",
    "llama4": "cannot be trained",
    "bert": "see those that come after them",
    "t5": "no causal language model",
}
NOT_PACKED = {"opt", "bloom", "gpt_oss", "falcon"}
NOT_CHUNKED = {"gemma2", "cohere", "granite"}
NOTHING_IN_4_BITS = {"falcon"}

each_model = pytest.mark.parametrize(
    "name", [name if name in EVERY_RUN else pytest.param(name, marks=pytest.mark.sweep) for name in MODELS]
)


def samples(count: int = 6) -> list[TokenizedSample]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 20, (count,), generator=draw).tolist()
    return [TokenizedSample(tuple(torch.randint(3, 90, (n,), generator=draw).tolist()), 2) for n in lengths]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tokenizer):
    """A function (name) -> folder with that model. Its weights are larger than usual: what it reads matters."""
    folders = {}

    def make(name: str):
        if name not in folders:
            config = MODELS[name]()
            for part in (config, config.get_text_config()):
                part.initializer_range = 0.1
            torch.manual_seed(0)
            folders[name] = tmp_path_factory.mktemp(name)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
            tokenizer.save_pretrained(folders[name])
        return folders[name]

    return make


@each_model
def test_what_a_tiny_copy_says_before_anything_is_loaded(name):
    tried = try_out(MODELS[name](), max_length=129)
    if name in NOT_TRAINED:
        assert NOT_TRAINED[name] in tried.training
        with pytest.raises(UserError, match=NOT_TRAINED[name]):
            require_trainable(MODELS[name](), quantize=False)
    else:
        expected = (name in NOT_PACKED, name in NOT_CHUNKED, 128 if name in ("gpt2", "opt") else None)
        assert (bool(tried.packing), bool(tried.chunks), tried.longest) == expected
        assert tried.training == ""


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT, of patterns of its own
@pytest.mark.parametrize("quantization", [None, "nf4"], ids=["lora", "qlora"])
@each_model
def test_trained_reloaded_merged_saved_and_answering_alike(name, quantization, folder_of, tmp_path):
    if name in NOT_TRAINED:
        pytest.skip(f"refused: {NOT_TRAINED[name]}")
    if name in NOTHING_IN_4_BITS and quantization:
        with pytest.raises(UserError, match="would quantize nothing"):
            require_trainable(folder_of(name), quantize=True)
        return

    def base():
        return load_model(folder_of(name), quantization, device="cpu", compute_dtype=torch.float32)[0]

    losses = []
    for checkpointing in (False, True):
        model = add_adapter(base(), rank=2, alpha=64, seed=1)
        torch.manual_seed(0)  # some have dropout of their own
        records = train(
            model,
            Batches(samples(), 3),
            steps=2,
            learning_rate=0.05,
            warmup_steps=0,
            gradient_checkpointing=checkpointing,
            progress=False,
        )
        losses.append([record.loss for record in records])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and all(map(math.isfinite, losses[0]))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    assert all(p.abs().sum() > 0 for p in adapters.values()), "an adapter that never got a gradient"

    ids = torch.tensor([samples(1)[0].ids])
    expected = model.eval()(ids).logits
    assert not torch.allclose(base()(ids).logits, expected, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)

    dense = dequantize_linears(base()) if quantization else base()
    try:
        merged = unload(merge(load_lora(dense, tmp_path / "adapter")))
    except UserError as error:  # PEFT adapts bare parameters, too: then it is PEFT that merges
        assert "target_parameters" in str(error) or "not plain LoRA" in str(error)
        merged = PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    load_model(folder_of(name))[1].save_pretrained(tmp_path / "merged")
    saved, _ = load_model(tmp_path / "merged", device="cpu", compute_dtype=torch.float32)
    torch.testing.assert_close(saved(ids).logits, expected, rtol=1e-3, atol=1e-3)
    how = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 2}
    assert torch.equal(saved.generate(ids, **how), merged.generate(ids, **how))


@each_model
def test_packed_samples_are_as_if_alone_or_packing_is_refused(name, folder_of):
    """The loss of a row is the sum of its samples' losses. Where it is not, training in packed rows is refused."""
    if name in NOT_TRAINED:
        pytest.skip(f"refused: {NOT_TRAINED[name]}")
    model = add_adapter(load_model(folder_of(name), device="cpu", compute_dtype=torch.float32)[0], rank=2)
    with torch.no_grad():
        alone = sum(token_loss_sum(model, collate([[sample]], 2)).item() for sample in samples(3))
        packed = token_loss_sum(model, collate([samples(3)], 2)).item()
    batches = Batches(samples(), 2, packing=True, max_length=64)
    if name in NOT_PACKED:
        assert packed != pytest.approx(alone, rel=1e-4)
        with pytest.raises(UserError, match="samples that share a row see one another"):
            train(model, batches, steps=1, progress=False)
    else:
        assert packed == pytest.approx(alone, rel=1e-5)
        assert math.isfinite(train(model, batches, steps=1, progress=False)[0].loss)


@each_model
def test_the_loss_in_chunks_is_the_loss_or_chunks_are_refused(name, folder_of):
    if name in NOT_TRAINED:
        pytest.skip(f"refused: {NOT_TRAINED[name]}")
    model = add_adapter(load_model(folder_of(name), device="cpu", compute_dtype=torch.float32)[0], rank=2)
    batch = collate([[sample] for sample in samples(3)], 2)
    if name in NOT_CHUNKED:
        with pytest.raises(UserError, match="changes its logits after the head: use loss_chunk=None"):
            token_loss_sum(model, batch, 4)
    else:
        assert token_loss_sum(model, batch, 4).item() == pytest.approx(token_loss_sum(model, batch).item(), rel=1e-5)


def test_a_large_model_is_tried_as_quickly_as_a_small_one():
    """LLaMA-65B's config: 0.2 of 65 billion parameters are made."""
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64
    )
    assert try_out(config) == Tried()
