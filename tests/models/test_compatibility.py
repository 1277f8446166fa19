"""What the preflight says of a config is what transformers, bitsandbytes and PEFT then do to the model."""

import dataclasses
import gc
import json
import math
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import BitsAndBytesConfig

from qlora_lab.errors import UserError
from qlora_lab.facts import four_bit_bytes
from qlora_lab.finetuning import Preflight
from qlora_lab.models import __main__ as command
from qlora_lab.models.__main__ import main
from qlora_lab.models.compatibility import EXPERTS, Weight, preflight

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ODD = {
    "hidden_size": 39,
    "intermediate_size": 51,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 14,
}  # 39 × 51 weights: odd


def moe(**changes):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    return transformers.Qwen2MoeConfig(**SMALL, **HEADS, **experts, shared_expert_intermediate_size=64, **changes)


MODELS = {  # class and config
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**SMALL, **HEADS)),
    "llama, tied": ("LlamaForCausalLM", transformers.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True)),
    "llama, odd": ("LlamaForCausalLM", transformers.LlamaConfig(**{**SMALL, **HEADS, **ODD})),
    "llama, biases": ("LlamaForCausalLM", transformers.LlamaConfig(**SMALL, **HEADS, attention_bias=True)),
    "llama, no head": ("LlamaModel", transformers.LlamaConfig(**SMALL, **HEADS)),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4)),
    "qwen2-moe": ("Qwen2MoeForCausalLM", moe()),
    "mixtral": ("MixtralForCausalLM", transformers.MixtralConfig(**SMALL, **HEADS, num_local_experts=4)),
    "ernie": (
        "Ernie4_5_MoeForCausalLM",
        transformers.Ernie4_5_MoeConfig(
            **SMALL, **HEADS, moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_num_shared_experts=1
        ),
    ),
    "deepseek": (  # a buffer stays in fp32
        "DeepseekV3ForCausalLM",
        transformers.DeepseekV3Config(
            **{**SMALL, **HEADS, "num_key_value_heads": 4},
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=1,
        ),
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        transformers.GptOssConfig(**SMALL, **HEADS, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    ),
    "bert": ("BertForMaskedLM", transformers.BertConfig(**SMALL, num_attention_heads=4)),
    "bert, classes": ("BertForSequenceClassification", transformers.BertConfig(**SMALL, num_attention_heads=4)),
    "t5": (
        "T5ForConditionalGeneration",
        transformers.T5Config(vocab_size=96, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4),
    ),
}


# in bf16, and two that keep more in fp32 where fp16 is asked for
CASES = [(name, torch.bfloat16) for name in MODELS] + [("t5", torch.float16), ("gpt-oss", torch.float16)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {str(case[1]).removeprefix('torch.')}")
def said_and_done(request, tmp_path_factory):
    """A Preflight, and the same small random model saved in 16 bits and loaded in 4."""
    name, dtype = request.param
    class_name, config = MODELS[name]
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    model_class(config).to(torch.bfloat16).save_pretrained(folder)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    real = model_class.from_pretrained(folder, quantization_config=settings, dtype=dtype, device_map={"": "cpu"})
    dense = model_class.from_pretrained(folder, dtype=dtype)
    real.dense_bytes = sum(tensor.nbytes for tensor in [*dense.parameters(), *dense.buffers()])
    del dense
    yield preflight(folder, dtype), real
    del real
    gc.collect()


def quantized_modules(model) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "quant_state")}


def tensors(model):
    """Every tensor that a loaded model keeps."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def test_same_modules_as_bitsandbytes_replaces(said_and_done):
    said, real = said_and_done
    assert {weight.name.removesuffix(".weight") for weight in said.weights if weight.quantized} == quantized_modules(
        real
    )
    assert said.model == type(real).__name__


def test_same_parameters_with_the_same_shapes(said_and_done):
    said, real = said_and_done
    shapes = {name: tuple(getattr(p, "quant_state", p).shape) for name, p in real.named_parameters()}
    assert {weight.name: weight.shape for weight in said.weights} == shapes


def test_bytes_are_those_of_the_tensors(said_and_done):
    said, real = said_and_done
    kept = list(tensors(real))
    assert said.nbytes == sum(tensor.nbytes for tensor in kept)
    assert said.dense_bytes == real.dense_bytes
    assert said.buffer_bytes == sum(buffer.nbytes for buffer in real.buffers())
    memories = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert len(memories) == len(kept)  # nothing is counted twice that bitsandbytes shares
    left = sum(p.nbytes for p in real.parameters() if getattr(p, "quant_state", None) is None)
    assert sum(weight.nbytes for weight in said.left) == left


def test_targets_are_those_that_peft_wraps(said_and_done):
    said, real = said_and_done
    with warnings.catch_warnings():  # PEFT on Mixtral: its own rank_pattern matches nothing
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(real, LoraConfig(r=2, target_modules="all-linear"))
    found = {name: module for name, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer)}
    assert len(said.targets) == len(found)
    for target, (name, module) in zip(said.targets, found.items(), strict=True):
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert target == (f"{plain}.{module.parameter_name}" if hasattr(module, "parameter_name") else plain)
    wrapped.unload()


def reasons(said: Preflight) -> dict[str, str]:
    return {weight.name: weight.reason for weight in said.weights}


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", "linear layer"),
        ("llama", "model.embed_tokens.weight", "embedding: only looked up"),
        ("llama", "lm_head.weight", "output head: kept for precision"),
        ("llama", "model.norm.weight", "vector: norm or bias"),
        ("llama, tied", "model.embed_tokens.weight", "tied embedding and head: one tensor"),
        ("llama, biases", "model.layers.0.self_attn.q_proj.bias", "vector: norm or bias"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", "linear layer (Conv1D, transposed)"),
        ("gpt2", "transformer.wpe.weight", "embedding: only looked up"),
        ("mixtral", "model.layers.0.mlp.experts.gate_up_proj", EXPERTS),
        ("mixtral", "model.layers.0.mlp.gate.weight", "bare 2-D parameter: no nn.Linear"),
        ("qwen2-moe", "model.layers.0.mlp.experts.down_proj", EXPERTS),
        ("qwen2-moe", "model.layers.0.mlp.shared_expert.up_proj.weight", "linear layer"),
        ("t5", "encoder.block.0.layer.1.DenseReluDense.wo.weight", "kept by its class: wo"),
        ("bert, classes", "classifier.weight", "linear layer"),
    ],
)
def test_reasons(model, name, reason):
    class_name, config = MODELS[model]
    config.architectures = [class_name]
    assert reasons(preflight(config))[name] == reason


def test_reasons_in_a_model_of_pictures():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=8, architectures=["SiglipVisionModel"])
    said = {name.removeprefix("vision_model."): reason for name, reason in reasons(preflight(config)).items()}
    assert said["head.attention.out_proj.weight"].startswith("NonDynamicallyQuantizableLinear: only nn.Linear itself")
    assert said["head.attention.in_proj_weight"] == "bare 2-D parameter: no nn.Linear"
    assert said["embeddings.patch_embedding.weight"] == "convolution: no nn.Linear"


def test_llama_7b_needs_the_bytes_of_the_arithmetic():
    """LlamaConfig's defaults are LLaMA-7B's. Nothing is allocated: 6.7 billion parameters in a second."""
    said = preflight(transformers.LlamaConfig())
    assert said.parameters == 6_738_415_616 and said.dense_bytes == pytest.approx(2 * said.parameters, rel=1e-6)
    linears = [weight for weight in said.weights if weight.quantized]
    assert len(linears) == len(said.targets) == 224
    bits = 8 * sum(weight.nbytes for weight in linears) / sum(weight.numel for weight in linears)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 8 * 1092 * 224 / 6_476_005_376, rel=1e-12)
    assert said.nbytes == pytest.approx(3.866e9, rel=1e-3)
    assert said.verdict == "fits: 3.87 GB instead of 13.5 GB, 14% of it in 16 bits"


def test_verdicts():
    small = preflight(transformers.LlamaConfig(**{**SMALL, **HEADS, "vocab_size": 300}))
    assert small.verdict.startswith("works, but 59% of") and "stay in 16 bits (embedding): " in small.verdict
    experts = preflight(MODELS["mixtral"][1])
    assert experts.verdict.startswith("hardly pays: ") and "stay in 16 bits (fused experts): " in experts.verdict
    none = dataclasses.replace(small, targets=(), peft_error="no match")
    assert none.verdict == "cannot be adapted as it is: PEFT's all-linear finds no target (no match)"


def by_hand(*weights: Weight, buffer_bytes: int = 0) -> Preflight:
    return Preflight("M", weights, ("a",), "", buffer_bytes, 2 * sum(weight.numel for weight in weights), ())


@pytest.mark.parametrize(
    ("in_4_bits", "said"),
    [
        (99, "hardly pays: 50% of the parameters stay in 16 bits (wide): 250 MB instead of 398 MB"),
        (101, "works, but 80% of the bytes stay in 16 bits (wide): 250 MB instead of 402 MB"),
        (399, "works, but 50% of the bytes stay in 16 bits (wide): 400 MB instead of 998 MB"),
        (401, "fits: 400 MB instead of 1 GB, 50% of it in 16 bits"),
    ],
)
def test_verdicts_change_at_one_half(in_4_bits, said):
    """100 million parameters in 16 bits beside some in 4, 0.5 bytes each; the widest of the reasons is named."""
    million = 10**6
    left = (
        Weight("w", (60, million), False, "wide: of one weight", 120 * million),
        Weight("a", (20, million), False, "narrow: of two", 40 * million),
        Weight("b", (20, million), False, "narrow: of two", 40 * million),
    )
    assert (
        by_hand(*left, Weight("q", (in_4_bits, million), True, "linear layer", in_4_bits * million // 2)).verdict
        == said
    )


def test_buffers_count_as_left():
    weights = Weight("q", (8, 10), True, "linear layer", 40), Weight("n", (20,), False, "vector", 40)
    said = by_hand(*weights, buffer_bytes=20)
    assert (said.nbytes, said.share_of_bytes_left, said.share_of_parameters_left) == (100, 0.6, 0.2)
    assert re.search(r"buffers \(rotary, masks\) +0.0\n", str(said))
    assert "buffers" not in str(dataclasses.replace(said, buffer_bytes=0))


def test_whether_all_linear_adapts_fused_experts_depends_on_the_architecture():
    """PEFT (from 0.20) translates it into target_parameters for Mixtral, and not for Qwen2-MoE."""
    mixtral, qwen = preflight(MODELS["mixtral"][1]), preflight(MODELS["qwen2-moe"][1])
    expert = "model.layers.1.mlp.experts.gate_up_proj"
    assert expert in mixtral.targets and "model.layers.1.mlp.gate.weight" in mixtral.targets
    assert mixtral.notes == () and re.search("2 × .*gate_up_proj", str(mixtral))
    assert expert not in qwen.targets and "target_parameters" in qwen.notes[0]


def test_notes():
    odd = preflight(MODELS["llama, odd"][1])
    assert "(inputs: 39, 42, 51): quantized all the same" in odd.notes[0]
    assert not any("AVX512" in note for note in odd.notes)
    wide = preflight(transformers.LlamaConfig(**SMALL | {"intermediate_size": 80}))
    assert "On a CPU with AVX512 bitsandbytes reads wrong scales there (inputs: 80)" in wide.notes[1]
    config = MODELS["bert, classes"][1]
    config.architectures = ["BertForSequenceClassification"]
    assert preflight(config).notes == (
        "classifier.weight is a new, random head, and it is quantized: keep it with llm_int8_skip_modules.",
    )
    assert preflight(MODELS["llama"][1]).notes == ()


def test_table_adds_up():
    said = preflight(MODELS["qwen2-moe"][1])
    lines = str(said).splitlines()
    rows = [line for line in lines if line.startswith(("4 bits", "left"))]
    assert sum(int(line.split()[-3].replace(",", "")) for line in rows) == said.parameters
    assert lines[0] == f"Qwen2MoeForCausalLM: {said.parameters:,} parameters"
    assert lines[-len(said.notes) - 1 :] == [*said.notes, said.verdict] and said.notes
    assert any("2 × q_proj, " in line for line in lines)


# ------------------------------------------------------------------------------- dimensions that no block divides


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 64), (7, 13), (3, 39), (1, 1), (64, 50)])
def test_any_dimension_is_quantized(outputs, inputs):
    """Blocks run over the flattened weight: they may cross rows, the last one may be short, an odd count is padded."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    original = linear.weight.data.clone()
    linear = linear.to("cpu")
    assert list(linear.weight.shape) == [math.ceil(inputs * outputs / 2), 1]
    restored = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert restored.shape == original.shape
    assert torch.linalg.vector_norm(restored - original) < 0.15 * torch.linalg.vector_norm(original)
    x = torch.randn(2, inputs, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, restored.sum(0).expand(2, -1))
    with torch.no_grad():
        torch.testing.assert_close(linear(x), x @ restored.T)


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 64 * 256, 64 * 256 + 1, 576 * 1536])
def test_bytes_of_a_weight(numel):
    import bitsandbytes as bnb

    codes, state = bnb.functional.quantize_4bit(torch.ones(1, numel), compress_statistics=True, quant_type="nf4")
    kept = (codes, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert sum(four_bit_bytes(numel)) == sum(tensor.nbytes for tensor in kept)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: 7, "takes a transformers config, a folder or a model's name, and this is a int"),
        (transformers.GenerationConfig, "and this is a GenerationConfig"),
        (transformers.PretrainedConfig, "has no model for this config, which is a P"),
        (lambda: transformers.PretrainedConfig(architectures=["NoSuchLM"]), "which names NoSuchLM"),
        (lambda: "smollm2-135m", "unknown model 'smollm2-135m': did you mean 'smollm2-135m-instruct'"),
        (lambda: "./nowhere/at-all", "no such folder: ./nowhere/at-all"),
        (lambda: transformers.BertConfig(hidden_size=-64), "cannot build a model of this BertConfig: "),
        (
            lambda: transformers.LlamaConfig(**SMALL, quantization_config={"quant_method": "gptq", "bits": 4}),
            r"quantized already \(gptq\)",
        ),
        (
            lambda: transformers.ResNetConfig(architectures=["ResNetModel"]),
            r"quantize nothing in ResNetModel: of its .* parameters are 100% convolution, 0% vector$",
        ),
    ],
)
def test_one_sentence_for_what_cannot_be(given, message):
    with pytest.raises(UserError, match=message) as raised:
        preflight(given())
    assert "\n" not in str(raised.value)


def test_a_config_cannot_have_anything_else_called(monkeypatch):
    monkeypatch.setattr(transformers, "pipeline", lambda config: pytest.fail("called"))
    assert preflight(transformers.LlamaConfig(**SMALL, **HEADS, architectures=["pipeline"])).model == "LlamaForCausalLM"


def folder_with(tmp_path, config: dict):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("config", [{"model_type": "never-heard-of"}, {"hidden_size": 64}])
def test_folder_with_an_unknown_config(tmp_path, config, capsys):
    assert main(["preflight", str(folder_with(tmp_path, config))]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: cannot read the config of") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "has_bf16", "dtype"),
    [("cuda", False, torch.float16), ("cuda", True, torch.bfloat16), ("cpu", False, torch.bfloat16)],
)
def test_a_t4_would_load_it_in_float16(monkeypatch, tmp_path, capsys, device, has_bf16, dtype):
    """transformers keeps more in float32 with float16 than with bfloat16."""
    asked = []

    def look(config, dtype, experts):
        asked.append(dtype)
        raise UserError("seen")

    monkeypatch.setattr(command, "preflight", look)
    monkeypatch.setattr(command, "pick_device", lambda: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert main(["preflight", str(folder_with(tmp_path, {"model_type": "llama"}))]) == 2
    assert asked == [dtype] and capsys.readouterr().err == "error: seen\n"


def test_the_callers_config_and_random_numbers_are_left_alone():
    config = transformers.LlamaConfig(**SMALL, **HEADS)
    before = config.to_dict()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    preflight(config)
    assert torch.equal(torch.rand(1), expected)
    assert config.to_dict() == before
    assert torch.get_default_dtype() == torch.float32


def test_command_line(bundled):
    command = [sys.executable, "-m", "qlora_lab.models", "preflight"]
    done = subprocess.run([*command, str(bundled)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("LlamaForCausalLM: 134,515,008 parameters")
    assert "works, but 51% of the bytes stay in 16 bits (tied embedding and head)" in done.stdout
    failed = subprocess.run([*command, "no-such-model"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: unknown model 'no-such-model'") and failed.stderr.count("\n") == 1
