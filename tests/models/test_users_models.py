"""Models as users bring them, to the command line: taken for what they are, or refused in a sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from qlora_lab import train_qlora
from qlora_lab.errors import UserError
from qlora_lab.evaluation import judge
from qlora_lab.finetuning import (
    add_adapter,
    add_lora,
    dequantize_linears,
    from_bitsandbytes,
    load_lora,
    load_model,
    lora_layers,
    merge,
    quantize_linears,
    save_lora,
    unload,
)
from qlora_lab.models.parts import beside_the_language, text_decoder
from qlora_lab.models.tiny import tiny_copy
from qlora_lab.models.trying import require_trainable, where_not_finite
from qlora_lab.training.activations import checkpoint_activations
from qlora_lab.training.loss import token_loss_sum
from tests.conftest import tiny_config
from tests.models.architectures import tiny

QUICK = "--steps 2 --batch-size 2 --rank 2 --eval-samples 1 --quiet --compute-dtype float32".split()
IDS = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**changes))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, **IDS))


def falcon():
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, **IDS)
    )


def mixtral():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, **IDS)
    )


def refused(capsys, tmp_path, *arguments) -> str:
    """The sentence with which a command is refused, before it is judged or leaves anything."""
    output = tmp_path / "run"
    capsys.readouterr()  # transformers shows how it saved the model
    assert train_qlora.main([*QUICK, "--output", str(output), *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not output.exists()
    return err


@pytest.fixture(autouse=True)
def judged_never(monkeypatch, request):
    if "refused" in request.node.name:
        monkeypatch.setattr(judge.Judge, "__call__", lambda *_: pytest.fail("too late: the model is judged"))


# ----------------------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_without_an_end_token_is_refused(capsys, tmp_path, tokenizer):
    folder = save(tmp_path / "model", llama(), tokenizer)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config = {name: value for name, value in config.items() if name not in ("eos_token", "pad_token")}
    path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert "of 49,152 tokens names no end token" in refused(capsys, tmp_path, "--model", folder)


def test_a_pad_token_without_an_embedding_is_refused(capsys, tmp_path, bundled):
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    message = refused(capsys, tmp_path, "--model", save(tmp_path / "model", llama(), tokenizer))
    assert "'[PAD]', number 49,152 of its 49,153 tokens, and the model has embeddings for 49,152" in message


def test_new_tokens_without_embeddings_are_refused_where_the_data_has_them(capsys, tmp_path, bundled, monkeypatch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(bundled)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<order>", "</order>"]})
    folder, lines = save(tmp_path / "model", llama(), tokenizer), tmp_path / "new.jsonl"
    lines.write_text(json.dumps({"prompt": "<order> a", "response": "b"}))
    message = refused(capsys, tmp_path, "--model", folder, "--data", lines)
    assert "'<order>', number 49,152 of the tokenizer's 49,154, and the model has embeddings for 49,152" in message
    assert "use the tokenizer that the model was trained with" in message
    lines.write_text(json.dumps({"prompt": "an order", "response": "b"}))  # one line: too few to judge by
    monkeypatch.undo()
    arguments = [*QUICK, "--model", str(folder), "--data", str(lines), "--output", str(tmp_path / "run")]
    assert train_qlora.main(arguments) == 0


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_that_gives_nan_is_refused_and_the_place_named(capsys, tmp_path, tokenizer, method):
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    message = refused(capsys, tmp_path, "--model", save(tmp_path / "model", model, tokenizer), "--method", method)
    assert (
        "gives a loss of nan, before any training" in message and "come out of model.layers.1.mlp.down_proj" in message
    )
    assert where_not_finite(llama(), torch.tensor([[3, 4]])) == ""


def test_a_first_step_without_a_finite_loss_is_the_bases_fault(capsys, tmp_path, tiny_folder, monkeypatch):
    plain = sys.modules["qlora_lab.training.steps.plain"]
    whole = plain.token_loss_sum
    monkeypatch.setattr(plain, "token_loss_sum", lambda *of: whole(*of) * torch.nan)
    arguments = [*QUICK, "--model", str(tiny_folder), "--output", str(tmp_path / "run"), "--eval-samples", "0"]
    assert train_qlora.main(arguments) == 2
    assert "nan at the first step, before any update: it is the base model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory, tiny_folder, tokenizer):
    """A checkpoint that was saved in 4 bits, with another compute dtype than ours."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = LlamaForCausalLM.from_pretrained(tiny_folder, quantization_config=config, device_map={"": "cpu"})
    return save(tmp_path_factory.mktemp("4 bits"), model, tokenizer)


def test_a_checkpoint_in_4_bits_is_refused_as_lora(capsys, tmp_path, in_4_bits):
    message = refused(capsys, tmp_path, "--model", in_4_bits, "--method", "lora")
    assert "is quantized already (bitsandbytes, 4 bits)" in message and "--method qlora" in message


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_checkpoint_in_4_bits_is_loaded_as_what_it_is(in_4_bits, tiny_folder, quantization):
    from bitsandbytes.nn import Linear4bit

    model, _ = load_model(in_4_bits, quantization, device="cpu", compute_dtype=torch.float32)
    expected, _ = load_model(tiny_folder, "nf4", device="cpu", compute_dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)  # the kernels without a backward pass
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_in_4_bits_is_trained_as_qlora(capsys, tmp_path, in_4_bits):
    assert train_qlora.main([*QUICK, "--model", str(in_4_bits), "--output", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "qlora"


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes"}])
def test_checkpoints_in_other_bits_are_refused(capsys, tmp_path, tiny_folder, settings):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    assert "is quantized already" in refused(capsys, tmp_path, "--model", folder)
    with pytest.raises(UserError, match=r"it is quantized already \("):
        load_model(folder)


def test_what_4_bits_leave_is_said():
    config = tiny("llama4_text")  # its experts are multiplied in a way of their own
    (note,) = require_trainable(config, quantize=True, targets=["q_proj"])
    assert re.search("of the weights of its layers stay in 16 bits .fused experts", note)
    assert require_trainable(tiny_config(), quantize=True) == ()  # embeddings are not meant to be quantized


def test_a_mixture_is_trained_with_its_experts_in_4_bits(capsys, tmp_path, tokenizer):
    folder, output = save(tmp_path / "model", mixtral(), tokenizer), tmp_path / "run"
    arguments = [*QUICK, "--model", str(folder), "--targets", "q_proj,gate_up_proj,down_proj", "--output", str(output)]
    assert train_qlora.main(arguments) == 0
    said = capsys.readouterr().err
    assert "16 bits" not in said
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    experts, attention = 4 * (64 + 2 * 128 + 128 + 64), 64 + 64
    assert report["trainable_parameters"] == 2 * 2 * (experts + attention)
    assert train_qlora.main([*arguments, "--steps", "3", "--resume"]) == 0
    config = json.loads((output / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(config["target_parameters"]) == ["down_proj", "gate_up_proj"]


def test_nothing_in_4_bits_is_refused(capsys, tmp_path, tokenizer):
    folder = save(tmp_path / "model", falcon(), tokenizer)
    message = refused(capsys, tmp_path, "--model", folder, "--method", "qlora")
    assert "bitsandbytes would quantize nothing in FalconForCausalLM" in message


# ---------------------------------------------------------------------------------------------------------------- GPT-2


def randomized(model):
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], ["c_attn", "mlp.c_proj"]])
def test_conv1d_is_adapted_and_merged_as_peft_does(tmp_path, targets):
    theirs = randomized(
        get_peft_model(gpt2(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=True))
    )
    theirs.eval().save_pretrained(tmp_path)
    ours, ids = load_lora(gpt2(), tmp_path).eval(), torch.arange(9)[None]
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (
        len(lora_layers(ours))
        == {"all-linear": 8, "c_attn": 2, "mlp.c_proj": 4}[targets if isinstance(targets, str) else targets[-1]]
    )
    merged = unload(merge(ours))
    reference = theirs.merge_and_unload()
    for (name, weight), right in zip(merged.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, right, rtol=1e-5, atol=1e-6, msg=name)


def test_conv1d_goes_to_peft(tmp_path):
    ours = randomized(add_lora(gpt2(), rank=4, targets="c_attn")).eval()
    assert {(layer.in_features, layer.out_features) for layer in lora_layers(ours).values()} == {(64, 192)}
    save_lora(ours, tmp_path)
    ids = torch.arange(9)[None]
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        theirs = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantized", ["ours", "bitsandbytes", "taken over"])
@pytest.mark.parametrize("adapter", ["ours", "PEFT's"])
def test_conv1d_in_4_bits_is_conv1d_again_when_dense(tmp_path, tokenizer, quantized, adapter):
    folder, ids = save(tmp_path / "base", gpt2(), tokenizer), torch.arange(9)[None]
    if quantized == "ours":
        base = quantize_linears(load_model(folder, device="cpu", compute_dtype=torch.float32)[0])
    else:
        base, _ = load_model(folder, "nf4", device="cpu", compute_dtype=torch.float32)
        base = from_bitsandbytes(base) if quantized == "taken over" else base
    if adapter == "ours":
        model = randomized(add_lora(base, rank=4)).eval()
        expected = model(ids).logits
        merged = unload(merge(dequantize_linears(model)))
    elif quantized == "bitsandbytes":
        model = randomized(add_adapter(base, rank=4)).eval()
        expected = model(ids).logits
        merged = dequantize_linears(model).merge_and_unload()
    else:
        pytest.skip("PEFT adapts no layers of ours")
    assert type(merged.transformer.h[0].attn.c_attn) is transformers.pytorch_utils.Conv1D
    merged.save_pretrained(tmp_path / "merged")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_conv1d_by_name_on_the_command_line(capsys, tmp_path, tokenizer):
    folder = save(tmp_path / "model", gpt2(), tokenizer)
    arguments = [*QUICK, "--model", str(folder), "--method", "lora", "--targets", "c_attn"]
    assert train_qlora.main([*arguments, "--output", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable_parameters"] == 2 * 2 * (64 + 192)
    load_lora(gpt2(), tmp_path / "run" / "adapter")


def test_longer_samples_than_a_model_has_positions_for_are_refused(capsys, tmp_path, tokenizer):
    folder = save(tmp_path / "model", gpt2(), tokenizer)
    message = refused(capsys, tmp_path, "--model", folder, "--max-length", "512")
    assert "--max-length 512 is more than this model can read: it has positions for 256 tokens" in message
    assert require_trainable(folder, quantize=False, max_length=256) == ()
    assert require_trainable(tiny_config(max_position_embeddings=64), quantize=False, max_length=256) == ()  # rotary


# ------------------------------------------------------------------------------------------------------- other families


def test_packing_where_samples_see_one_another_is_refused(capsys, tmp_path, tokenizer):
    folder = save(tmp_path / "model", falcon(), tokenizer)
    message = refused(capsys, tmp_path, "--model", folder, "--method", "lora", "--packing")
    assert "in a FalconForCausalLM, samples that share a row see one another" in message


def test_a_model_that_sees_what_comes_is_refused(capsys, tmp_path, tokenizer):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
    config = transformers.BertConfig(**sizes)
    folder = save(tmp_path / "model", transformers.BertLMHeadModel(config), tokenizer)
    assert "its tokens see those that come after" in refused(capsys, tmp_path, "--model", folder, "--method", "lora")
    decoder = transformers.BertConfig(**sizes, is_decoder=True)
    assert require_trainable(decoder, quantize=False) == ()


def test_a_router_that_peft_breaks_is_refused_and_may_be_left_out(capsys, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Llama4TextConfig(
        **sizes, num_key_value_heads=2, head_dim=16, num_local_experts=4, interleave_moe_layer_step=1, **IDS
    )
    with pytest.raises(UserError, match="Llama4Text cannot be trained: "):
        require_trainable(config, quantize=False)
    assert require_trainable(config, quantize=False, targets=["q_proj", "v_proj"]) == ()


def test_what_can_be_adapted_instead_is_said_and_can(capsys, tmp_path, tokenizer):
    """PEFT refuses one of Mamba's layers; the sentence names those that train, and they do."""
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=64, **IDS)
    folder = save(tmp_path / "model", transformers.MambaForCausalLM(config), tokenizer)
    message = refused(capsys, tmp_path, "--model", folder, "--method", "lora")
    assert "MambaForCausalLM cannot be adapted as it is" in message
    targets = re.search(r"--targets (\S+) can be trained", message).group(1)
    assert targets == "in_proj,x_proj"
    arguments = [*QUICK, "--model", str(folder), "--method", "lora", "--targets", targets]
    assert train_qlora.main([*arguments, "--output", str(tmp_path / "run")]) == 0


def test_layers_that_no_text_reaches_are_said():
    """BART's attention to an encoder, in its decoder alone."""
    (note,) = require_trainable(tiny("bart"), quantize=False)
    assert "no text reaches model.decoder.layers.*.encoder_attn." in note and "one of 4 kinds of adapted" in note
    assert require_trainable(tiny("bart"), quantize=False, targets=["fc1", "fc2"]) == ()


def test_a_head_that_is_called_decoder_is_not_taken_for_one():
    """ModernBERT's. All else would lie beside it, and hardly anything be adapted."""
    model = transformers.AutoModelForCausalLM.from_config(tiny("modernbert-decoder"))
    assert text_decoder(model) is model.model and beside_the_language(model) == ()
    adapted = {name for name, module in add_adapter(model, rank=2).named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) > 10


def test_a_leak_through_a_convolution_of_three_tokens_is_seen():
    """With weights of the usual size, LFM 2's moves the logits by less than a thousandth of their deviation."""
    with pytest.raises(UserError, match="Lfm2MoeForCausalLM, samples that share a row see one another"):
        require_trainable(tiny("lfm2_moe"), quantize=False, packing=True)


@pytest.mark.parametrize(
    ("name", "quantize", "said"),
    [
        ("laguna", False, "PEFT loses 6 of its tensors when it loads it .*shared_experts.* --targets q_proj,.* can be"),
        ("prophetnet", False, "a ProphetNet cannot be trained: `position_ids` are incorrect"),  # when it answers
        ("gemma3n_text", True, "in 4 bits, a Gemma3nText cannot be trained: .*; with --method lora it can"),
        ("longcat_flash", True, "in 4 bits, a LongcatFlash cannot be trained: mat1 and mat2 shapes"),
    ],
)
def test_what_would_end_in_a_traceback_or_lose_layers_is_refused(name, quantize, said):
    with pytest.raises(UserError, match=said):
        require_trainable(tiny(name), quantize=quantize)
    if quantize:
        require_trainable(tiny(name), quantize=False)


def test_checkpointing_that_a_model_does_not_have_is_refused(capsys, tmp_path, tokenizer):
    config = transformers.OpenAIGPTConfig(n_embd=64, n_layer=2, n_head=4, n_positions=512, **IDS)
    folder = save(tmp_path / "model", transformers.OpenAIGPTLMHeadModel(config), tokenizer)
    message = refused(capsys, tmp_path, "--model", folder, "--method", "lora", "--gradient-checkpointing")
    assert "the activations of a OpenAIGPT cannot be checkpointed" in message
    with pytest.raises(UserError, match="does not support activation .* Use gradient_checkpointing=False"):
        checkpoint_activations(transformers.OpenAIGPTLMHeadModel(config))


@pytest.mark.parametrize("name", ["trocr", "whisper"])
def test_the_loss_of_a_model_that_makes_all_logits_whatever_it_is_asked(name):
    model = transformers.AutoModelForCausalLM.from_config(tiny(name)).eval()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 9), generator=draw)
    labels = torch.full_like(ids, -100)
    labels[:, 6:] = ids[:, 6:]
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(9).expand(2, 9)}
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, 5:8].flatten(0, 1), ids[:, 6:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(token_loss_sum(model, batch), expected)


def test_a_weight_of_two_layers_is_not_merged():
    """It would change with either's correction, and a checkpoint holds it once."""
    shared = add_lora(transformers.AutoModelForCausalLM.from_config(tiny("zamba")), rank=2)
    with pytest.raises(UserError, match="model.layers.1.* shares its weight with another layer"):
        merge(shared)
    with pytest.raises(UserError, match="lm_head shares its weight with another layer"):
        merge(add_lora(llama(), rank=2, targets=["lm_head"]))
    merge(add_lora(llama(tie_word_embeddings=False), rank=2, targets=["lm_head"]))
    merge(add_lora(llama(), rank=2))


def test_what_cannot_be_cut_is_tried_whole():
    """Zamba's layers share weights by number: with the first few alone, transformers builds none."""
    assert tiny_copy(tiny("zamba")).config.num_hidden_layers == 5
    assert tiny_copy(tiny("llama", layers=9)).config.num_hidden_layers == 1
    assert tiny_copy(tiny("gemma3_text", layers=9)).config.num_hidden_layers == 2  # with a window, and without


def vision() -> transformers.Gemma3Config:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = transformers.Gemma3TextConfig(
        **sizes, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, vocab_size=97
    )
    eyes = transformers.SiglipVisionConfig(**sizes, num_hidden_layers=1, image_size=28, patch_size=14)
    return transformers.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4, pad_token_id=2)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_only_what_reads_text_is_adapted(targets):
    def model():
        return transformers.AutoModelForCausalLM.from_config(vision())

    assert "model.vision_tower" in beside_the_language(model())
    theirs, ours = add_adapter(model(), rank=2, targets=targets), add_lora(model(), rank=2, targets=targets)
    plain = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert plain == set(lora_layers(ours)) and len(plain) == (14 if targets == "all-linear" else 4)
    theirs.train()(input_ids=torch.arange(3, 9)[None]).logits.sum().backward()
    assert all(p.grad is not None for p in theirs.parameters() if p.requires_grad)
    by_name = next(n for n, m in model().named_modules() if "vision_tower" in n and n.endswith("q_proj"))
    assert list(lora_layers(add_lora(model(), rank=2, targets=by_name))) == [by_name]


@pytest.mark.parametrize("make", [tiny_config, lambda: gpt2().config])
def test_what_only_reads_text_has_nothing_beside(make):
    assert beside_the_language(transformers.AutoModelForCausalLM.from_config(make())) == ()


def test_what_is_done_to_logits_is_seen_and_not_looked_up():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert require_trainable(vision(), quantize=False, chunks=True) == ()
    gemma = {"head_dim": 16, "num_key_value_heads": 2, "vocab_size": 97, "query_pre_attn_scalar": 16}
    capped, free = (transformers.Gemma2Config(**sizes, **gemma, final_logit_softcapping=cap) for cap in (1e3, None))
    with pytest.raises(UserError, match=r"changes its logits after the head: its loss cannot be computed in chunks"):
        require_trainable(capped, quantize=False, chunks=True)
    assert require_trainable(free, quantize=False, chunks=True) == ()
    seeing = tiny("gemma4")  # its cap is not where the config has one for a model that only reads
    assert require_trainable(seeing, quantize=False, chunks=True) == ()
    seeing.text_config.final_logit_softcapping = 1.0
    with pytest.raises(UserError, match="changes its logits after the head"):
        require_trainable(seeing, quantize=False, chunks=True)
    factor = transformers.GraniteConfig(**sizes, num_key_value_heads=2, vocab_size=97, logits_scaling=1.0)
    assert require_trainable(factor, quantize=False, chunks=True) == ()  # a factor of 1 changes nothing


# --------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.whole) for name in ("cp1251", "cp1252"))]
)
def test_preflight_on_any_console(tiny_folder, encoding):
    command = [sys.executable, "-m", "qlora_lab.models", "preflight", str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and done.stderr == b""
    said = done.stdout.decode(encoding)
    assert "2 x q_proj" in said and "--packing: yes, samples do not see one another" in said


def test_a_run_goes_on_for_longer_than_it_was_meant_to(capsys, tmp_path, tiny_folder):
    arguments = [
        *QUICK,
        "--model",
        str(tiny_folder),
        "--output",
        str(tmp_path / "run"),
        "--json",
        "--eval-samples",
        "0",
    ]
    assert train_qlora.main(arguments) == 0
    first = json.loads(capsys.readouterr().out)["losses"]
    assert train_qlora.main([*arguments, "--resume", "--steps", "4"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["steps"], report["resumed_at"], report["losses"][:2]) == (4, 2, first)
    assert "is of a run of 2 steps, and this one has 4" in err
    assert train_qlora.main([*arguments, "--resume", "--steps", "3"]) == 2
    assert "has 4 steps behind it: give --steps 4 or more" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == "4"
