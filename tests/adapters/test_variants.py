"""rsLoRA, DoRA, PiSSA and LoftQ held against PEFT, and against what each of them promises."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from qlora_lab.adapters.dora import DoraLinear
from qlora_lab.adapters.files import base_fingerprint, read_adapter, scale_of
from qlora_lab.adapters.initialization import fit_to_error, initialize_loftq, initialize_pissa, low_rank
from qlora_lab.errors import UserError
from qlora_lab.finetuning import (
    LoraLinear,
    add_lora,
    from_bitsandbytes,
    load_lora,
    load_model,
    lora_layers,
    lora_parameters,
    merge,
    nf4_double,
    quantize_linears,
    save_lora,
    trainable_parameters,
    unmerge,
)
from qlora_lab.quantization import quantize
from tests.conftest import tiny_config

IDS = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
KINDS = {
    "rslora": ({"rank_stabilized": True}, {"use_rslora": True}),
    "dora": ({"kind": DoraLinear}, {"use_dora": True}),
    "both": ({"kind": DoraLinear, "rank_stabilized": True}, {"use_dora": True, "use_rslora": True}),
}


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(vocab_size=97, **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):  # transformers starts them at 0, where a lost one is not missed
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return model


def gpt2(**_) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2)).eval()


def stirred(model):
    """An adapter that does something: B starts at zero, and DoRA's magnitudes at the lengths that change nothing."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
        elif "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return model


def as_ours(name: str) -> str:
    """PEFT's name of a parameter, as ours."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".base.").replace(".default", "")
    return (
        name.replace(".lora_magnitude_vector.weight", ".lora_magnitude")
        .replace(".lora_A.weight", ".lora_A")
        .replace(".lora_B.weight", ".lora_B")
    )


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def gradients(model) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {as_ours(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def pair(kind: str, make=llama, targets=TARGETS, dropout: float = 0.0):
    """Ours and PEFT's on the same model, with the same numbers in the adapters."""
    ours_has, theirs_has = KINDS[kind]
    ours = stirred(add_lora(make(attention_bias=True, mlp_bias=True), 4, 12, targets, dropout, **ours_has))
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM", **theirs_has
    )
    config.fan_in_fan_out = make is gpt2
    theirs = get_peft_model(make(attention_bias=True, mlp_bias=True), config).eval()
    numbers = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(numbers[as_ours(name)])
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_no_output(kind):
    model, plain = add_lora(llama(attention_bias=True), 4, **KINDS[kind][0]), llama(attention_bias=True)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("make", "targets"), [(llama, TARGETS), (gpt2, ["c_attn", "c_fc"])])
def test_outputs_and_gradients_are_pefts(kind, make, targets):
    ours, theirs = pair(kind, make, targets)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(make(attention_bias=True, mlp_bias=True)), atol=1e-2)
    expected = gradients(theirs)
    found = gradients(ours)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["dora", "both"])
def test_with_dropout_the_same_numbers_are_dropped_as_in_peft(kind):
    ours, theirs = (model.train() for model in pair(kind, dropout=0.3))
    results = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        results.append(logits(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch.manual_seed(6)
    assert not torch.allclose(logits(ours), results[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("make", "targets"), [(llama, TARGETS), (gpt2, ["c_attn", "c_fc"])])
def test_merged_it_computes_the_same_and_comes_back(kind, make, targets):
    model, _ = pair(kind, make, targets)
    apart = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), apart, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model), apart)


@pytest.mark.parametrize("kind", KINDS)
def test_files_go_both_ways(kind, tmp_path):
    ours, theirs = pair(kind)
    save_lora(ours, tmp_path / "ours")
    read = PeftModel.from_pretrained(llama(attention_bias=True, mlp_bias=True), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(read), logits(ours), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_lora(llama(attention_bias=True, mlp_bias=True), tmp_path / "theirs")
    torch.testing.assert_close(logits(read), logits(ours), rtol=1e-4, atol=1e-5)
    assert {type(layer) for layer in lora_layers(read).values()} == {KINDS[kind][0].get("kind", LoraLinear)}
    config, *_ = read_adapter(tmp_path / "theirs", with_dora=True)
    assert scale_of(config) == pytest.approx(12 / (2 if "use_rslora" in KINDS[kind][1] else 4))


def test_files_of_dora_are_refused_where_nobody_knows_what_to_do_with_them(tmp_path):
    save_lora(add_lora(llama(), 4, kind=DoraLinear), tmp_path)
    with pytest.raises(UserError, match=r"is not plain LoRA \(use_dora\)"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match="the adapter needs DoraLinears, and the model has other LoRA layers"):
        load_lora(add_lora(llama(), 4), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_recognized_whatever_is_beside_it(kind):
    for model in pair(kind):
        assert base_fingerprint(model) == base_fingerprint(llama(attention_bias=True, mlp_bias=True))


def test_the_counts_are_pefts():
    ours, theirs = pair("dora")
    assert lora_parameters(ours) == trainable_parameters(ours) == trainable_parameters(theirs)


def test_the_rows_get_the_lengths_that_dora_says():
    layer = DoraLinear(nn.Linear(6, 4), rank=2, alpha=3)
    nn.init.normal_(layer.lora_B)
    layer.lora_magnitude.data = torch.tensor([1.0, 2.0, 3.0, 4.0])
    V = layer.base.weight + 1.5 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.lengths(), V.detach().norm(dim=1))
    merged = layer.base.weight + layer.delta()
    torch.testing.assert_close(merged.norm(dim=1), layer.lora_magnitude)
    torch.testing.assert_close(nn.functional.normalize(merged), nn.functional.normalize(V))


def test_dora_on_4_bits_is_dora_on_the_rounded_weights(bundled):
    base, _ = load_model(bundled, quantization="nf4", device="cpu", compute_dtype=torch.float32)
    targets = ["layers.0.self_attn.q_proj", "layers.29.mlp.down_proj"]
    theirs = stirred(add_lora(base, 4, 12, targets, kind=DoraLinear))
    expected = logits(theirs)
    for name, layer in lora_layers(theirs).items():
        assert layer.lengths().shape == (len(layer.lora_magnitude),), name
    ours = from_bitsandbytes(theirs)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-3, atol=1e-3)


def test_pissa_is_pefts_and_changes_no_output():
    ours = initialize_pissa(add_lora(llama(), 4, 12, TARGETS))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, init_lora_weights="pissa", task_type="CAUSAL_LM")
    theirs = dict(get_peft_model(llama(), config).named_parameters())
    found = dict(ours.named_parameters())
    compared = [name for name in theirs if "lora_" in name or "base_layer" in name]
    assert len(compared) == 3 * len(lora_layers(ours))
    for name in compared:
        torch.testing.assert_close(found[as_ours(name)], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(logits(ours), logits(llama()), rtol=1e-4, atol=1e-5)


def test_with_dora_they_begin_at_the_same_place():
    for begin in (initialize_pissa, lambda model: initialize_loftq(model, nf4_double)):
        plain, dora = (begin(add_lora(llama(), 4, 12, TARGETS, kind=kind)) for kind in (LoraLinear, DoraLinear))
        torch.testing.assert_close(logits(plain), logits(dora), rtol=1e-4, atol=1e-4)


def test_pissa_takes_the_largest_singular_values_and_freezes_the_rest():
    layer = add_lora(llama(), 4, 4, "q_proj").model.layers[0].self_attn
    values = torch.linalg.svdvals(layer.q_proj.base.weight)
    initialize_pissa(layer)
    torch.testing.assert_close(torch.linalg.svdvals(layer.q_proj.delta())[:4], values[:4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(layer.q_proj.base.weight)[:-4], values[4:], rtol=1e-4, atol=1e-5)


def test_qpissa_quantizes_what_is_left():
    model = initialize_pissa(add_lora(llama(), 4, 12, TARGETS), nf4_double)
    dense = initialize_pissa(add_lora(llama(), 4, 12, TARGETS))
    for name, layer in lora_layers(model).items():
        rest = lora_layers(dense)[name].base.weight
        assert torch.equal(layer.base.weight.dequantize(), nf4_double(rest).dequantize()), name
        assert torch.equal(layer.lora_A, lora_layers(dense)[name].lora_A)


def errors(model) -> torch.Tensor:
    """|W - (Q + scale * B A)| of each LoRA layer."""
    dense = dict(llama().named_modules())
    return torch.stack(
        [
            (dense[name].weight - layer.base.weight.dequantize() - layer.delta()).norm()
            for name, layer in lora_layers(model).items()
        ]
    )


def test_loftq_comes_closer_to_the_dense_weight_with_each_iteration():
    zero = errors(quantized := add_lora(quantize_linears(llama(), TARGETS), 8, targets=TARGETS))
    once, five = (errors(initialize_loftq(add_lora(llama(), 8, targets=TARGETS), nf4_double, n)) for n in (1, 5))
    assert (once < 0.95 * zero).all()
    assert five.sum() < once.sum()
    best = [
        (layer_error := dict(llama().named_modules())[name].weight - layer.base.weight.dequantize()).norm().square()
        - torch.linalg.svdvals(layer_error)[:8].square().sum()
        for name, layer in lora_layers(quantized).items()
    ]
    torch.testing.assert_close(once, torch.stack(best).sqrt(), rtol=1e-4, atol=1e-4)  # Eckart and Young


def test_one_iteration_keeps_the_usual_base():
    ours = initialize_loftq(add_lora(llama(), 8, targets=TARGETS), nf4_double)
    afterwards = add_lora(quantize_linears(llama(), TARGETS), 8, targets=TARGETS)
    dense = dict(llama().named_modules())
    fit_to_error(afterwards, lambda name: dense[name].weight)
    for name, layer in lora_layers(ours).items():
        assert torch.equal(layer.base.weight.codes, lora_layers(afterwards)[name].base.weight.codes)
        torch.testing.assert_close(layer.delta(), lora_layers(afterwards)[name].delta())


@pytest.mark.gpu
def test_loftq_is_pefts():
    from peft.utils.loftq_utils import loftq_init

    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(3)).cuda()
    dequantized, A, B = loftq_init(weight, num_bits=4, reduced_rank=8, num_iter=3)
    model = nn.Sequential(nn.Linear(64, 96, bias=False)).cuda()
    model[0].weight.data.copy_(weight)
    initialize_loftq(add_lora(model, 8, 8, ["0"]), quantize, 3)
    torch.testing.assert_close(model[0].base.weight.dequantize(), dequantized, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model[0].delta(), B @ A, rtol=1e-3, atol=1e-3)


def test_the_approximation_is_as_good_as_its_rank_allows():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    B, A = low_rank(weight, 5)
    assert (B.shape, A.shape) == ((20, 5), (5, 30))
    assert (weight - B @ A).norm() == pytest.approx(
        math.sqrt(torch.linalg.svdvals(weight)[5:].square().sum()), rel=1e-4
    )
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))


def test_what_has_no_dense_weight_is_refused():
    quantized = add_lora(quantize_linears(llama(), "q_proj"), 4, targets="q_proj")
    with pytest.raises(UserError, match=r"q_proj is quantized already: PiSSA and LoftQ begin with the dense weight"):
        initialize_pissa(quantized)
    with pytest.raises(UserError, match=r"q_proj is merged already"):
        initialize_loftq(merge(add_lora(llama(), 4, targets="q_proj")), nf4_double)
    with pytest.raises(UserError, match="iterations=0: LoftQ needs at least 1"):
        initialize_loftq(add_lora(llama(), 4), nf4_double, 0)
    with pytest.raises(UserError, match="is not quantized: there is no error that LoftQ could correct"):
        fit_to_error(add_lora(llama(), 4), lambda name: torch.zeros(()))
