"""The experts of mixtures in 4 bits: beside the dense model of the rounded weights, bitsandbytes and PEFT."""

from __future__ import annotations

import copy
import functools
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from qlora_lab.adapters.peft_adapter import add_adapter, load_adapter, trainable_parameters
from qlora_lab.errors import UserError
from qlora_lab.finetuning import build_random, dequantize_linears, load_model, preflight
from qlora_lab.memory.activations import layer_activations
from qlora_lab.memory.shapes import from_config
from qlora_lab.models.compatibility import EXPERTS_IN_4_BITS
from qlora_lab.models.experts import FourBitExperts, four_bit_experts, quantize_experts
from qlora_lab.models.experts_loading import including_experts
from qlora_lab.models.loading import bnb_config
from qlora_lab.models.trying import require_trainable

SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1},
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, intermediate_size=128, num_local_experts=4),
    "qwen3": Qwen3MoeConfig(
        **SIZES, intermediate_size=128, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=16
    ),
    "olmoe": OlmoeConfig(**SIZES, intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    "gpt-oss": GptOssConfig(
        **SIZES, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, head_dim=16
    ),  # its matrices are transposed and have biases
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
ON_EXPERTS = ["q_proj", "gate_up_proj", "down_proj"]
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
ROUNDING = 1e-5  # of float32, over two layers, relative to the largest number


@functools.cache
def dense(family: str):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIGS[family], experts_implementation="eager").float().eval()


def in_4_bits(family: str):
    return quantize_experts(copy.deepcopy(dense(family)))


def rounded(family: str):
    """The dense model with the weights that `in_4_bits` stands for."""
    return dequantize_linears(in_4_bits(family))


def computed(model) -> dict[str, torch.Tensor]:
    """Logits, and the gradients of the embeddings' output and of what is trained."""
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".lora_" in name}
    return {"logits": logits.detach(), "embeddings": embeddings.grad, **gradients}


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert values.abs().max() > 0, name
        torch.testing.assert_close(found[name], values, rtol=0, atol=ROUNDING * values.abs().max().item(), msg=name)


def with_corrections(model, targets):
    """Adapters whose B is not zero."""
    adapted = add_adapter(model, rank=4, targets=targets, seed=1)
    draw = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=draw)
    return adapted.train()


# ---------------------------------------------------------------------------------------------------------- arithmetic


@FAMILIES
def test_experts_compute_as_the_dense_model_of_the_rounded_weights(family):
    model, oracle = in_4_bits(family), rounded(family)
    assert len(four_bit_experts(model)) == 2 and not four_bit_experts(oracle)
    expected = computed(oracle)
    require_same(computed(model), expected)
    assert (expected["logits"] - dense(family)(IDS).logits).abs().max() > 0.01  # they were rounded
    model.gradient_checkpointing_enable({"use_reentrant": False})
    require_same(computed(model.train()), expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_each_expert_is_quantized_as_bitsandbytes_does(quantization, double_quant):
    model = quantize_experts(copy.deepcopy(dense("mixtral")), quantization, double_quant)
    weights = dense("mixtral").model.layers[0].mlp.experts.gate_up_proj
    for number, weight in enumerate(weights):
        found = model.model.layers[0].mlp.experts.expert("gate_up_proj", number).dequantize()
        codes, state = quantize_4bit(
            weight.detach(), blocksize=64, compress_statistics=double_quant, quant_type=quantization
        )
        expected = dequantize_4bit(codes, state)
        # its 8-bit scales may be one level off (quantization/double_quant.py)
        torch.testing.assert_close(found, expected, rtol=0.02 if double_quant else 0, atol=0)


def test_nothing_dense_is_kept_for_the_backward_pass():
    model, kept = in_4_bits("mixtral"), []

    def keep(tensor):
        kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    experts = model.model.layers[0].mlp.experts
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(x, torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)).sum()
    assert kept and max(kept) <= 5 * 2 * 128  # what gate and up make of an expert's five tokens


@pytest.mark.parametrize("targets", [["q_proj"], ON_EXPERTS], ids=["attention", "experts"])
@FAMILIES
def test_what_is_kept_for_the_backward_pass_is_predicted(family, targets):
    """Bytes a token of router and experts, by the difference of two lengths: copies of A and B are there once."""
    model = add_adapter(build_random(CONFIGS[family], device="cpu", compute_dtype=torch.bfloat16), 4, targets=targets)
    mixture = model.base_model.model.model.layers[0].mlp
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def kept(tokens: int) -> int:
        x, found = torch.randn(1, tokens, 64, dtype=torch.bfloat16).requires_grad_(), {}

        def keep(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu"):
            made = mixture(x)
        del made
        others = {*weights, x.untyped_storage().data_ptr()}
        return sum(nbytes for pointer, nbytes in found.items() if pointer not in others)

    of_layer = layer_activations(from_config(CONFIGS[family]), "qlora", 4, targets)
    parts = ["router", *(name for name in of_layer if "expert" in name), "gate, up and activations"]
    assert (kept(60) - kept(20)) / 40 == pytest.approx(sum(of_layer[name] for name in parts), rel=0.01)


def test_only_experts_that_are_used_are_dequantized(monkeypatch):
    experts, used = in_4_bits("olmoe").model.layers[0].mlp.experts, []
    one = FourBitExperts.expert
    monkeypatch.setattr(
        FourBitExperts, "expert", lambda self, name, number: used.append(number) or one(self, name, number)
    )
    made = experts(torch.randn(3, 64), torch.tensor([[2, 0], [2, 4], [0, 2]]), torch.ones(3, 2))  # 4: no expert
    assert used == [0, 0, 2, 2] and made.isfinite().all()


def test_moving_to_another_dtype_leaves_the_scales():
    model = in_4_bits("gpt-oss")
    experts = model.model.layers[0].mlp.experts
    before = {name: part.clone() for name, part in experts.state_dict().items()}
    model.to(torch.bfloat16)
    for name, part in experts.state_dict().items():
        if name.endswith("_bias"):
            assert part.dtype == torch.bfloat16
        else:
            assert torch.equal(part, before[name]), name
    model.load_state_dict(in_4_bits("gpt-oss").state_dict())


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize(
    ("family", "targets"),
    [*((family, ON_EXPERTS) for family in CONFIGS), ("mixtral", "all-linear"), ("gpt-oss", ["down_proj"])],
)
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")  # PEFT's of a pattern of its own
def test_adapters_learn_and_are_saved_as_pefts(tmp_path, family, targets):
    model = with_corrections(in_4_bits(family), targets)
    model.save_pretrained(tmp_path)
    oracle = PeftModel.from_pretrained(rounded(family), tmp_path, is_trainable=True).train()
    expected = computed(oracle)
    assert any(".experts." in name for name in expected)
    require_same(computed(model), expected)
    require_same(computed(load_adapter(in_4_bits(family), tmp_path).train()), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    require_same(computed(model), expected)
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, rounded(family)(IDS).logits, rtol=0, atol=1e-5)


def test_an_adapter_on_attention_leaves_the_experts_alone():
    model = with_corrections(in_4_bits("qwen3"), ["q_proj", "v_proj"])
    assert trainable_parameters(model) == 2 * 4 * ((64 + 64) + (64 + 32))
    assert computed(model).keys() == {"logits", "embeddings"} | {
        name for name, _ in model.named_parameters() if ".self_attn." in name and ".lora_" in name
    }


def test_adapters_are_merged_once_the_experts_are_dense():
    model = with_corrections(in_4_bits("gpt-oss"), ON_EXPERTS)
    expected = model.eval()(IDS).logits
    with pytest.raises(UserError, match=r"dequantize_linears\(model\) makes them dense"):
        copy.deepcopy(model).merge_and_unload()
    merged = dequantize_linears(model).merge_and_unload()
    assert not four_bit_experts(merged)
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=0, atol=1e-5)


def test_what_experts_cannot_have_is_refused():
    with pytest.raises(UserError, match="does not work with lora_dropout"):
        add_adapter(in_4_bits("olmoe"), targets=ON_EXPERTS, dropout=0.1)
    with pytest.raises(UserError, match="no linear layer named 'gate_up'"):
        add_adapter(in_4_bits("olmoe"), targets=["q_proj", "gate_up"])
    with pytest.raises(UserError, match="has no adapter for this OlmoeForCausalLM"):
        load_adapter(in_4_bits("olmoe"), "nowhere")


# ------------------------------------------------------------------------------------------------- loading and building


@FAMILIES
def test_a_checkpoint_is_loaded_with_its_experts_in_4_bits(family, tmp_path, tokenizer):
    config = copy.deepcopy(CONFIGS[family])
    config.vocab_size = len(tokenizer)
    saved = AutoModelForCausalLM.from_config(config).float().eval()
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, "nf4", device="cpu", compute_dtype=torch.float32)
    found, expected = four_bit_experts(model), four_bit_experts(quantize_experts(saved))
    assert found.keys() == expected.keys()
    for name, experts in expected.items():
        loaded = found[name].state_dict()
        assert all(torch.equal(loaded[part], values) for part, values in experts.state_dict().items())
    assert model.quantization_method == "bitsandbytes" and model.is_loaded_in_4bit
    assert model.config.quantization_config.quant_method == "bitsandbytes"
    stacked = [c for c in model._weight_conversions if hasattr(c, "force_cpu")]
    assert all(converter.force_cpu for converter in stacked)
    assert len(stacked) == (0 if family == "gpt-oss" else 2)  # of which the experts are stored one by one
    with pytest.raises(ValueError, match="not serializable"):  # rather than a folder that nothing reads
        model.save_pretrained(tmp_path / "again")
    expected = model(IDS).logits
    model.dequantize()  # as lesson 12 does before it merges
    assert not four_bit_experts(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)


def test_a_model_without_experts_is_saved_in_4_bits_as_before(tmp_path, tiny_folder):
    model, _ = load_model(tiny_folder, "nf4", device="cpu", compute_dtype=torch.float32)
    model.save_pretrained(tmp_path)
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    shutil.copy(tiny_folder / "tokenizer_config.json", tmp_path)
    again, _ = load_model(tmp_path, device="cpu", compute_dtype=torch.float32)
    assert again.is_loaded_in_4bit and torch.equal(again(IDS).logits, model(IDS).logits)


@FAMILIES
def test_random_mixtures_take_the_bytes_that_preflight_says(family):
    model = build_random(CONFIGS[family], device="cpu", compute_dtype=torch.bfloat16)
    looked = preflight(CONFIGS[family], experts=True)
    for name, experts in four_bit_experts(model).items():
        held = dict.fromkeys(experts.fused, 0)
        for part, tensor in experts.state_dict().items():
            held[next(fused for fused in experts.fused if part.startswith(fused))] += (
                0 if part.endswith("_bias") else tensor.nbytes
            )
        assert held == {
            w.name.rpartition(".")[2]: w.nbytes
            for w in looked.weights
            if w.reason == EXPERTS_IN_4_BITS and w.name.startswith(f"{name}.")
        }
    assert sum(isinstance(module, FourBitExperts) for module in model.modules()) == 2
    assert model(IDS).logits.isfinite().all()
    whole = build_random(CONFIGS[family], None, device="cpu", compute_dtype=torch.bfloat16)
    assert sum(parameter.nbytes for parameter in whole.parameters()) == looked.dense_bytes - looked.buffer_bytes


def test_preflight_and_the_trial_know_of_experts():
    looked = preflight(CONFIGS["mixtral"], experts=True)
    assert looked.verdict.startswith("fits: ") and looked.missed == preflight(CONFIGS["olmoe"], experts=True).missed
    assert "All-linear adapts the experts" in str(looked) and "linear layers of fused experts" in str(looked)
    assert "All-linear does not adapt the experts" in str(preflight(CONFIGS["gpt-oss"], experts=True))
    assert "hardly pays" in preflight(CONFIGS["mixtral"]).verdict  # as transformers loads it
    for family, config in CONFIGS.items():
        assert require_trainable(config, quantize=True, targets=ON_EXPERTS) == (), family
    (note,) = require_trainable(CONFIGS["mixtral"], quantize=True, sharded=True)
    assert "of the weights of its layers stay in 16 bits (fused experts" in note


# --------------------------------------------------------------------------------------------------------------- a GPU


@pytest.mark.gpu
@FAMILIES
def test_on_a_gpu_experts_compute_as_the_dense_model_does(family):
    model, oracle = in_4_bits(family), rounded(family)
    expected, found = computed(oracle), computed_on_gpu(model.to("cuda"))
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-3 * values.abs().max().item(), msg=name)


def computed_on_gpu(model):
    embeddings = model.get_input_embeddings()(IDS.cuda()).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.shape[-1], device="cuda")).sum().backward()
    return {"logits": logits.detach().cpu(), "embeddings": embeddings.grad.cpu()}


@pytest.mark.gpu
def test_loading_needs_little_more_than_the_finished_model(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4, "num_attention_heads": 16}
    config = MixtralConfig(**sizes, num_key_value_heads=4, vocab_size=1000, dtype=torch.bfloat16)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    settings = including_experts(bnb_config("nf4", True, torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map={"": 0}, quantization_config=settings
    )
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert len(four_bit_experts(model)) == 4
    one_expert = 2 * 2 * 3584 * 1024  # bytes of its gate and up in 16 bits; a layer's are 8 times as many
    assert peak - held < 3 * one_expert, (held, peak)
