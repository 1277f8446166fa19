"""PiSSA with PEFT's adapters: PEFT's own beginning, and files that fit no other base than theirs."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from qlora_lab.adapters.files import INITIAL, convert_to_plain, load_lora, read_adapter, read_initial, save_initial
from qlora_lab.adapters.peft_adapter import add_adapter, begin_with_pissa, load_adapter
from qlora_lab.adapters.quantized_linear import dense_weight
from qlora_lab.errors import UserError
from qlora_lab.models.loading import load_model
from qlora_lab.models.random_weights import linear_4bit
from qlora_lab.models.sharded import CheckpointWeights
from qlora_lab.training.run_folder import save_adapter
from tests.conftest import tiny_config

IDS = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(vocab_size=97)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()


def never(name: str, shape: torch.Size) -> torch.Tensor:
    raise AssertionError(f"{name} is dense: nobody need ask for it")


def layers_of(adapted) -> dict:
    return {name: layer for name, layer in adapted.get_base_model().named_modules() if hasattr(layer, "base_layer")}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@torch.no_grad()
def trained(model):
    """The adapters as if they had been trained."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def in_4_bits(folder):
    model, _ = load_model(folder, "nf4", device="cpu", compute_dtype=torch.float32)
    return model


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize(("make", "targets"), [(llama, TARGETS), (gpt2, ["c_attn", "c_fc"])])
def test_beside_a_dense_base_it_begins_as_pefts(make, targets, kind):
    ours = add_adapter(make(), 4, 12, targets, kind=kind)
    initial = begin_with_pissa(ours, never)
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=targets,
        use_rslora=kind == "rslora",
        fan_in_fan_out=make is gpt2,
        init_lora_weights="pissa",
        task_type="CAUSAL_LM",
    )
    theirs = layers_of(get_peft_model(make(), config))
    assert layers_of(ours).keys() == theirs.keys() and len(initial) == 2 * len(theirs)
    for name, layer in layers_of(ours).items():
        for of in ("lora_A", "lora_B"):
            expected = getattr(theirs[name], of)["default"].weight
            torch.testing.assert_close(getattr(layer, of)["default"].weight, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(initial[f"{name}.{of}"], getattr(layer, of)["default"].weight)
        torch.testing.assert_close(layer.base_layer.weight, theirs[name].base_layer.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(ours), logits(make()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_beside_4_bits_the_rest_is_what_is_quantized(tiny_folder, kind):
    adapted = add_adapter(in_4_bits(tiny_folder), 4, 12, TARGETS, kind=kind)
    initial = begin_with_pissa(adapted, CheckpointWeights(str(tiny_folder)))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, init_lora_weights="pissa", task_type="CAUSAL_LM")
    theirs = layers_of(get_peft_model(load_model(tiny_folder, device="cpu", compute_dtype=torch.float32)[0], config))
    dense = load_file(tiny_folder / "model.safetensors")
    for name, layer in layers_of(adapted).items():
        A, B = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        torch.testing.assert_close(A, theirs[name].lora_A["default"].weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(B, theirs[name].lora_B["default"].weight, rtol=1e-3, atol=1e-5)
        rest = dense[f"{name}.weight"].float() - 3 * (initial[f"{name}.lora_B"] @ initial[f"{name}.lora_A"])
        expected = dense_weight(linear_4bit(rest, "nf4", True, torch.float32))
        assert torch.equal(dense_weight(layer.base_layer), expected), name
        assert layer.base_layer.weight.quant_state.nested and not layer.base_layer.weight.requires_grad
        if kind == "dora":
            lengths = (expected + 3 * B @ A).norm(dim=1)
            torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, lengths)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")  # PEFT converts with two adapters at a time
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_the_conversion_for_the_whole_base_is_pefts(tmp_path, kind):
    ours = add_adapter(llama(), 4, 12, TARGETS, kind=kind)
    ours.peft_config["default"].init_lora_weights = True
    initial = begin_with_pissa(ours, never)
    ours.save_pretrained(tmp_path / "began")
    ours.peft_config["default"].init_lora_weights = "pissa"
    trained(ours)
    ours.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "began"))
    ours.save_pretrained(tmp_path / "mine")
    config = json.loads((tmp_path / "mine/adapter_config.json").read_text())
    (tmp_path / "mine/adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    convert_to_plain(tmp_path / "mine", initial)
    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("mine", "theirs"))
    assert mine.keys() == theirs.keys()
    for name, matrix in theirs.items():
        torch.testing.assert_close(mine[name], matrix, msg=name)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("mine", "theirs")]
    assert configs[0]["r"] == configs[1]["r"] == 8
    assert configs[0]["lora_alpha"] == pytest.approx(configs[1]["lora_alpha"])


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_what_was_trained_beside_a_dense_base_fits_the_whole_one(tmp_path, kind):
    adapted = add_adapter(llama(), 4, 12, TARGETS, kind=kind)
    initial = begin_with_pissa(adapted, never)
    save_adapter(trained(adapted), tmp_path / "adapter", initial=initial)
    expected = logits(adapted)
    assert not torch.allclose(expected, logits(llama()), atol=1e-2)
    assert not (tmp_path / "adapter" / INITIAL).exists()
    read = PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(read), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(load_lora(llama(), tmp_path / "adapter")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_was_trained_beside_4_bits_comes_back_bit_for_bit_and_beside_nothing_else(tiny_folder, tmp_path, kind):
    adapted = add_adapter(in_4_bits(tiny_folder), 4, 12, TARGETS, kind=kind).eval()
    weights = CheckpointWeights(str(tiny_folder))
    initial = begin_with_pissa(adapted, weights)
    save_adapter(trained(adapted), tmp_path / "adapter", initial=initial)
    assert torch.equal(
        logits(load_adapter(in_4_bits(tiny_folder), tmp_path / "adapter", weights).eval()), logits(adapted)
    )
    with pytest.raises(TypeError, match="Please initialize PiSSA under float32"):
        PeftModel.from_pretrained(in_4_bits(tiny_folder), tmp_path / "adapter")
    for read in (load_lora, lambda model, place: read_adapter(place)):
        with pytest.raises(UserError, match=r"is PiSSA's, and belongs beside what it left of its 4-bit base"):
            read(in_4_bits(tiny_folder), tmp_path / "adapter")
    with pytest.raises(UserError, match="has an adapter of PiSSA: give load_adapter the checkpoint's weights"):
        load_adapter(in_4_bits(tiny_folder), tmp_path / "adapter")


def test_another_base_or_beginning_is_refused(tiny_folder, tmp_path):
    adapted = add_adapter(in_4_bits(tiny_folder), 4, 12, TARGETS)
    weights = CheckpointWeights(str(tiny_folder))
    initial = begin_with_pissa(adapted, weights)
    save_adapter(adapted, tmp_path / "adapter", initial=initial)
    other = in_4_bits(tiny_folder)
    nn.init.normal_(other.model.norm.weight)
    with pytest.raises(UserError, match=r"was trained beside another base, or initial.safetensors is another"):
        load_adapter(other, tmp_path / "adapter", weights)
    save_initial(tmp_path / "adapter", {name: matrix + 0.01 for name, matrix in initial.items()})
    with pytest.raises(UserError, match=r"was trained beside another base, or initial.safetensors is another"):
        load_adapter(in_4_bits(tiny_folder), tmp_path / "adapter", weights)
    (tmp_path / "adapter" / INITIAL).write_bytes(b"half of it")
    with pytest.raises(UserError, match="is damaged, and without it the adapter has no base"):
        read_initial(tmp_path / "adapter")
    (tmp_path / "adapter" / INITIAL).unlink()
    with pytest.raises(UserError, match=r"is not plain LoRA \(init_lora_weights\)"):
        read_adapter(tmp_path / "adapter", with_pissa=True)
