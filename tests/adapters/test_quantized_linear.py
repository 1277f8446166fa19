"""The 4-bit layer held against a dense one with the same rounded weight, and against bitsandbytes and PEFT."""

import copy
import json

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora_lab.adapters.quantized_linear import frozen_weight
from qlora_lab.errors import UserError
from qlora_lab.finetuning import (
    Batches,
    QuantizedLinear,
    add_adapter,
    add_lora,
    collate,
    dequantize_linears,
    from_bitsandbytes,
    load_lora,
    load_model,
    load_samples,
    lora_layers,
    merge,
    nf4_double,
    quantize_linears,
    save_lora,
    tokenize,
    train,
    unload,
)
from qlora_lab.quantization import FP4, quantize, quantize_absmax, quantize_affine
from qlora_lab.training.loss import token_loss_sum
from tests.conftest import tiny_config

QUANTIZERS = {
    "nf4": quantize,
    "nf4, double": nf4_double,
    "fp4": lambda weight: quantize(weight, FP4),
    "int4, block 32": lambda weight: quantize_affine(weight, 4, 32),
    "int2, per tensor": lambda weight: quantize_absmax(weight, 2),
}


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return with_biases(LlamaForCausalLM(tiny_config(vocab_size=97, **changes)).eval())


def with_biases(model):
    """transformers starts biases at 0, where a lost one is not missed."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


BIASES = {"attention_bias": True, "mlp_bias": True}
IDS = torch.arange(10)[None]


@pytest.fixture(scope="module")
def biased_folder(tmp_path_factory, tokenizer):
    """Like `tiny_folder`, with a bias in every linear layer but the head."""
    folder = tmp_path_factory.mktemp("biased")
    torch.manual_seed(0)
    with_biases(LlamaForCausalLM(tiny_config(**BIASES))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def randomize(model):
    """B starts at zero, and adapters at nothing."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    return model


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_a_dense_layer_with_the_rounded_weight(quantizer, dtype):
    torch.manual_seed(0)
    dense = nn.Linear(96, 40).to(dtype)
    layer = QuantizedLinear(quantizer(dense.weight.detach()), dense.bias)
    dense.weight.data = layer.weight.dequantize()
    x = torch.randn(3, 7, 96, dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense(other)
    assert torch.equal(y, expected)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient)
    assert y.dtype == x.grad.dtype == dtype
    assert torch.equal(x.grad, other.grad)


def test_gradient_agrees_with_finite_differences():
    q = quantize(torch.randn(16, 32))
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: QuantizedLinear(q)(x), x)


def test_what_it_returns_can_be_changed_in_place():
    """As Gemma 3n does with a projection, which autograd refuses for a Function's output that is a view."""
    layer, x = QuantizedLinear(quantize(torch.randn(8, 64)), torch.ones(8)), torch.randn(2, 3, 64, requires_grad=True)
    layer(x).mul_(2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * layer.weight.dequantize().sum(0).expand(2, 3, 64))


def test_nothing_dense_is_kept_for_the_backward_pass():
    layer = QuantizedLinear(nf4_double(torch.randn(64, 64)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(torch.randn(2, 64, requires_grad=True))
    assert not kept
    assert not [tensor for tensor in vars(y.grad_fn).values() if isinstance(tensor, torch.Tensor)]
    assert y.grad_fn.q is layer.weight
    assert layer.weight.nbytes < 64 * 64  # codes, scales and tables


def test_autocast_decides_the_dtype():
    layer = QuantizedLinear(quantize(torch.randn(8, 64)), torch.randn(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16
    assert layer(torch.randn(2, 64)).dtype == torch.float32


def test_casting_a_model_leaves_codes_and_scales_alone():
    layer = QuantizedLinear(nf4_double(torch.randn(8, 64)), torch.randn(8))
    before = layer.weight.dequantize()
    layer.to(torch.float16).bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight.dequantize(), before)
    assert QuantizedLinear(quantize_affine(torch.randn(8, 64), 4)).to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("quantizer", [quantize, nf4_double])
def test_a_quantized_model_is_saved_and_loaded(quantizer):
    model = quantize_linears(llama(), quantizer=quantizer)
    state = model.state_dict()
    other = quantize_linears(llama(initializer_range=0.1), quantizer=quantizer)
    other.load_state_dict(state)
    ids = torch.arange(10)[None]
    assert torch.equal(other(ids).logits, model(ids).logits)
    with pytest.raises(UserError, match="UniformTensor cannot be saved"):
        quantize_linears(llama(), quantizer=lambda weight: quantize_affine(weight, 3, 64)).state_dict()


def test_a_state_that_does_not_fit_is_told_as_nn_linear_tells_it():
    """What load_state_dict says, and what becomes of the layer, held against nn.Linear."""
    layer, dense = QuantizedLinear(nf4_double(torch.randn(8, 64)), torch.randn(8)), nn.Linear(64, 8)
    before = layer.weight.dequantize()
    other = QuantizedLinear(nf4_double(torch.randn(4, 128))).state_dict()  # as many codes and scales
    other["bias"] = torch.randn(8)
    expected = (
        r"size mismatch for {}: copying a param with shape torch.Size\(\[4, 128\]\) from checkpoint, the shape in"
    )
    with pytest.raises(RuntimeError, match=expected.format("weight")):
        dense.load_state_dict({"weight": torch.zeros(4, 128), "bias": torch.zeros(8)})
    with pytest.raises(RuntimeError, match=expected.format("weight")):
        layer.load_state_dict(other)
    with pytest.raises(RuntimeError, match=expected.format("0.weight")):
        nn.Sequential(layer).load_state_dict({f"0.{name}": part for name, part in other.items()}, strict=False)
    assert torch.equal(layer.weight.dequantize(), before) and layer.weight.shape == (8, 64)

    good = QuantizedLinear(nf4_double(torch.randn(8, 64)), torch.randn(8)).state_dict()
    parts = {name for name in good if name.startswith("weight.")}
    nothing = layer.load_state_dict({}, strict=False)
    assert sorted(nothing.missing_keys) == sorted(parts | {"bias"}) and not nothing.unexpected_keys
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*\"weight.absmax.offset\""):
        layer.load_state_dict({name: part for name, part in good.items() if name != "weight.absmax.offset"})
    assert torch.equal(layer.weight.dequantize(), before)
    extra = layer.load_state_dict({**good, "weight.more": torch.ones(1), "x": torch.ones(1)}, strict=False)
    assert sorted(extra.unexpected_keys) == ["weight.more", "x"] and not extra.missing_keys
    assert not torch.equal(layer.weight.dequantize(), before)  # what fits is loaded all the same
    with pytest.raises(RuntimeError, match=r"weight: absmax is torch.float32 of shape \(3,\)"):
        single = QuantizedLinear(quantize(torch.randn(8, 64)))
        single.load_state_dict({**single.state_dict(), "weight.absmax": torch.ones(3)})
    with pytest.raises(UserError, match="UniformTensor cannot be saved"):
        QuantizedLinear(quantize_affine(torch.randn(8, 64), 4)).load_state_dict(single.state_dict())


def test_loading_keeps_the_device_and_takes_a_copy():
    layer = QuantizedLinear(quantize(torch.randn(8, 64)))
    state = QuantizedLinear(quantize(torch.randn(8, 64))).state_dict()
    names = list(state)
    layer.load_state_dict(state)
    loaded = layer.weight.dequantize()
    assert list(state) == names
    for part in state.values():
        part.zero_()
    assert torch.equal(layer.weight.dequantize(), loaded) and loaded.any()
    other = QuantizedLinear(quantize(torch.randn(8, 64))).to("meta")
    other.load_state_dict(layer.state_dict())  # as nn.Linear: a layer without memory stays so ...
    assert other.weight.device.type == "meta"
    other.load_state_dict(layer.state_dict(), assign=True)  # ... unless it is told to take what comes
    assert torch.equal(other.weight.dequantize(), loaded)


# ------------------------------------------------------------------------------------------------------------ in models


def test_all_linears_but_the_head_are_replaced_and_the_embeddings_stay_tied():
    model = quantize_linears(llama())
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if "Linear" in type(m).__name__}
    assert kinds.pop("lm_head") == "Linear"
    assert len(kinds) == 14
    assert set(kinds.values()) == {"QuantizedLinear"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.requires_grad for p in model.parameters())


def test_only_the_named_layers_are_replaced():
    model = quantize_linears(llama(), targets=["down_proj", "layers.0.mlp.up_proj"])
    replaced = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert replaced == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_dequantized_model_computes_the_same():
    model = quantize_linears(llama(**BIASES))
    expected = model(IDS).logits
    dense = dequantize_linears(copy.deepcopy(model))
    assert not any(isinstance(module, QuantizedLinear) for module in dense.modules())
    assert {type(m).__name__ for n, m in dense.named_modules() if n.endswith("_proj")} == {"Linear"}
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in dense.parameters())


def test_biases_stay():
    """What quantization changes is what rounding the weights alone changes."""
    model, rounded = llama(**BIASES), llama(**BIASES)
    model.model.layers[1].train()
    modes = {name: module.training for name, module in model.named_modules()}
    model = quantize_linears(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(p.requires_grad for p in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            rounded.get_submodule(name).weight.data = module.weight.dequantize()
    assert torch.equal(model(IDS).logits, rounded(IDS).logits)
    assert sum(name.endswith(".bias") for name in model.state_dict()) == 14


@pytest.mark.parametrize("take", [from_bitsandbytes, dequantize_linears])
def test_biases_of_bitsandbytes_layers_stay(biased_folder, take):
    model, _ = load_model(biased_folder, "nf4", device="cpu", compute_dtype=torch.float32)
    model.model.layers[1].train()
    modes = {name: module.training for name, module in model.named_modules()}
    expected = model(IDS).logits
    taken = take(model)
    torch.testing.assert_close(taken(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert {name: module.training for name, module in taken.named_modules()} == modes


def test_dequantized_to_a_dtype_and_a_mode_as_before():
    model = quantize_linears(llama(**BIASES))
    model.model.layers[1].train()
    modes = {name: module.training for name, module in model.named_modules()}
    dense = dequantize_linears(model, torch.bfloat16)
    assert {name: module.training for name, module in dense.named_modules()} == modes
    layer = dense.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert (layer.in_features, layer.out_features) == (64, 128)
    quantized = quantize_linears(llama(), quantizer=lambda weight: quantize(weight.to(torch.bfloat16)))
    assert dequantize_linears(quantized).model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_an_adapter_is_merged_into_the_dequantized_base_and_not_into_the_quantized_one():
    model = add_lora(quantize_linears(llama()), rank=4)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.1)
    ids = torch.arange(10)[None]
    expected = model(ids).logits
    with pytest.raises(UserError, match=r"QuantizedLinear holds no weight .* dequantize_linears"):
        merge(model)
    merged = unload(merge(dequantize_linears(model)))
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_bitsandbytes_layers_are_dequantized_too(tiny_folder):
    model, _ = load_model(tiny_folder, "nf4", device="cpu", compute_dtype=torch.float32)
    with pytest.raises(UserError, match="Linear4bit holds no weight"):
        merge(add_lora(copy.deepcopy(model), rank=4))
    adapted = add_lora(model, rank=4)
    ids = torch.arange(10)[None]
    expected = adapted(ids).logits
    dequantize_linears(adapted)
    assert not [m for m in adapted.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(lora_layers(adapted)) == 14
    torch.testing.assert_close(unload(merge(adapted))(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["ours", "PEFT's"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_is_saved_and_loads_as_it_answered(tmp_path, tokenizer, adapter, tied):
    """As the course teaches it: 4-bit model, adapter, dequantize, merge, unload, save (peft#2321)."""
    torch.manual_seed(0)
    with_biases(LlamaForCausalLM(tiny_config(tie_word_embeddings=tied, **BIASES))).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, tokenizer = load_model(tmp_path / "base", "nf4", device="cpu", compute_dtype=torch.float32)
    if adapter == "ours":
        save_lora(randomize(add_lora(copy.deepcopy(model), rank=4)), tmp_path / "adapter")
        adapted = load_lora(model, tmp_path / "adapter")
        expected = adapted(IDS).logits
        merged = unload(merge(dequantize_linears(adapted)))
    else:
        adapted = randomize(add_adapter(model, rank=4))
        expected = adapted(IDS).logits
        merged = dequantize_linears(adapted).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again, _ = load_model(tmp_path / "merged", device="cpu", compute_dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    for loaded in (again, plain):
        assert torch.equal(loaded(IDS).logits, merged(IDS).logits)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    answers = [model.generate(IDS, max_new_tokens=8, do_sample=False) for model in (merged, again)]
    assert torch.equal(*answers)
    load_model(tmp_path / "merged", "nf4", device="cpu")  # and what was merged can be quantized again


@pytest.mark.parametrize("take", [from_bitsandbytes, dequantize_linears])
def test_a_model_without_layers_of_bitsandbytes_is_not_marked_as_one(tiny_folder, take):
    """What says so makes transformers refuse `.half()`, PEFT look for Linear4bit, and config.json tell a lie."""
    dense, _ = load_model(tiny_folder, device="cpu", compute_dtype=torch.float32)
    model, _ = load_model(tiny_folder, "nf4", device="cpu", compute_dtype=torch.float32)
    model = take(model)
    marks = ("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit")
    assert not [mark for mark in marks if getattr(model, mark, None)]
    assert model.config.to_dict() == dense.config.to_dict() and not getattr(model.config, "_is_quantized", False)
    assert model.half().dtype == torch.float16


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="lm_head is tied to the input embeddings"):
        quantize_linears(llama(), targets=["lm_head"])
    model = quantize_linears(llama())
    with pytest.raises(UserError, match="q_proj is a QuantizedLinear: only dense"):
        quantize_linears(model)
    with pytest.raises(UserError, match="no linear layer named 'up'"):
        quantize_linears(llama(), targets="up")
    with pytest.raises(UserError, match="nothing to dequantize"):
        dequantize_linears(llama())
    with pytest.raises(UserError, match=r"shape \(2, 2, 64\)"):
        QuantizedLinear(quantize(torch.randn(2, 2, 64)))
    with pytest.raises(UserError, match=r"shape \(3,\): a weight of 2 rows"):
        QuantizedLinear(quantize(torch.randn(2, 64)), torch.zeros(3))


# ------------------------------------------------------------------------------------------- the stack everybody uses


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_layers_are_taken_over_byte_by_byte(tiny_folder, quantization, double_quant):
    model, _ = load_model(tiny_folder, quantization, double_quant, "cpu", torch.float32)
    expected = dequantize_linears(copy.deepcopy(model))
    as_it_lies = frozen_weight(model.model.layers[1].mlp.up_proj)
    assert torch.equal(as_it_lies.dequantize(), expected.model.layers[1].mlp.up_proj.weight)
    assert as_it_lies.codes.data_ptr() == model.model.layers[1].mlp.up_proj.weight.data_ptr()  # nothing is copied
    ours = from_bitsandbytes(model)
    assert sum(isinstance(module, QuantizedLinear) for module in ours.modules()) == 14
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.weight.dequantize(), expected.get_submodule(name).weight)
    with pytest.raises(UserError, match="no 4-bit layer of bitsandbytes"):
        from_bitsandbytes(ours)


@pytest.mark.parametrize("base", ["ours", "theirs, double"])
def test_twenty_steps_beside_bitsandbytes_and_peft(tiny_folder, tmp_path, base):
    """The same adapter, the same data: step losses within 1e-4, first gradients within rounding."""
    double_quant = base == "theirs, double"
    theirs, tokenizer = load_model(tiny_folder, "nf4", double_quant, "cpu", torch.float32)
    theirs = add_adapter(theirs, rank=8, alpha=16)
    theirs.save_pretrained(tmp_path)
    if double_quant:
        ours = from_bitsandbytes(load_model(tiny_folder, "nf4", True, "cpu", torch.float32)[0])
    else:
        ours = quantize_linears(
            load_model(tiny_folder, device="cpu", compute_dtype=torch.float32)[0], quantizer=quantize
        )
    ours = load_lora(ours, tmp_path)
    samples, _ = tokenize(load_samples("orders", "train").select(range(60)), tokenizer, 256)
    batch = collate([[sample] for sample in samples[:2]], tokenizer.pad_token_id)
    gradients = []
    for model in (ours, theirs):
        token_loss_sum(model, batch).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(gradients[0]) == len(gradients[1]) == 28
    for mine, expected in zip(*gradients, strict=True):
        assert (mine - expected).norm() <= 1e-5 * expected.norm()
    batches = Batches(samples, 2, seed=0)
    losses = [
        [record.loss for record in train(model, batches, steps=20, learning_rate=1e-2, progress=False)]
        for model in (ours, theirs)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.8 * losses[0][0]
