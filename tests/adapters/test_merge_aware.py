"""Merge-aware training, held against the merge itself and against autograd's straight-through."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from qlora_lab.adapters.dora import DoraLinear
from qlora_lab.adapters.lora import LoraLinear, add_lora, lora_layers
from qlora_lab.adapters.merge_aware import MergeAwareLinear, merge_aware, merge_requantized, requantized
from qlora_lab.adapters.merging import merge, unload
from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.adapters.quantized_linear import (
    QuantizedLinear,
    dequantize_linears,
    is_quantized,
    nf4_double,
    quantize_linears,
)
from qlora_lab.errors import UserError
from qlora_lab.facts import MERGE_TARGETS
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import quantize_q4_0
from qlora_lab.training.batches import Batches, collate
from qlora_lab.training.chat import TokenizedSample
from qlora_lab.training.loop import train_steps
from qlora_lab.training.loss import token_loss_sum
from tests.conftest import tiny_config

IDS = torch.arange(10)[None]


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(vocab_size=97, attention_bias=True, mlp_bias=True, **changes)).eval()


def adapted(base, dtype: torch.dtype = torch.float32):
    """With an adapter that changes something, and biases that are not 0."""
    model = add_lora(base, rank=4, alpha=8, dtype=dtype, rank_stabilized=True)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            parameter.data = (0.05 * torch.randn(parameter.shape, generator=draw)).to(parameter.dtype)
    return model


BASES = {
    "dense": llama,
    "ours": lambda: quantize_linears(llama()),
    "ours, bf16": lambda: quantize_linears(llama().bfloat16()),
}


@pytest.fixture(params=[*BASES, "bitsandbytes"])
def model(request, tiny_folder):
    if request.param == "bitsandbytes":
        return adapted(load_model(tiny_folder, "nf4", device="cpu", compute_dtype=torch.float32)[0])
    return adapted(BASES[request.param]())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("target", MERGE_TARGETS)
def test_the_forward_pass_is_the_merged_models_bit_for_bit(model, target):
    """The reference is plan A, as lessons make it: dense layers, merge, the other quantization's QuantizedLinear."""
    plain = logits(model)
    with merge_aware(model, target):
        aware = logits(model)
    assert torch.equal(logits(model), plain)
    names = list(lora_layers(model))
    reference = copy.deepcopy(model)
    if any(is_quantized(layer.base) for layer in lora_layers(model).values()):
        dequantize_linears(reference)
    if target == "q4_0":
        for layer in lora_layers(reference).values():
            layer.base.float()  # the merged weight is not rounded in between
    unload(merge(reference))
    quantize_linears(reference, names, nf4_double if target == "nf4" else quantize_q4_0)
    assert torch.equal(aware, logits(reference))
    assert not torch.equal(aware, plain)
    merge_requantized(model, target)
    assert not lora_layers(model) and torch.equal(aware, logits(model))
    assert all(isinstance(model.get_submodule(name), QuantizedLinear) for name in names)


@pytest.mark.parametrize("target", MERGE_TARGETS)
def test_gradients_are_those_of_the_straight_through(target):
    """Autograd with W + (round(W) - W).detach() for the weight: sums of some hundred products of numbers near 1, taken
    in another order. In float32 they agree to 1e-5, and plain LoRA's gradient for x is off by a tenth."""
    draw = torch.Generator().manual_seed(2)
    base = nn.Linear(64, 48)
    base.weight.data = torch.randn(48, 64, generator=draw)
    layer = LoraLinear(base, 4, 8, generator=draw)
    layer.lora_B.data = 0.3 * torch.randn(48, 4, generator=draw)
    x = torch.randn(3, 5, 64, generator=draw, requires_grad=True)
    weights = torch.randn(3, 5, 48, generator=draw)  # of the outputs, in the loss
    parameters = (x, layer.lora_A, layer.lora_B)
    ours = torch.autograd.grad((MergeAwareLinear(layer, target)(x) * weights).sum(), parameters)
    merged = base.weight.detach() + 2 * layer.lora_B @ layer.lora_A
    rounded = requantized(layer, target).dequantize()
    straight = merged + (rounded - merged).detach()
    expected = torch.autograd.grad((nn.functional.linear(x, straight, base.bias) * weights).sum(), parameters)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    plain = torch.autograd.grad((layer(x) * weights).sum(), parameters)
    assert (ours[0] - plain[0]).abs().max() > 0.1


def test_a_frozen_input_gets_no_gradient_and_autocast_computes_in_bf16():
    layer = MergeAwareLinear(lora_layers(adapted(llama()))["model.layers.0.mlp.up_proj"], "nf4")
    x, kept = torch.ones(2, layer.in_features), []
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
            y = layer(x)
        assert torch.equal(y, QuantizedLinear(requantized(layer, "nf4"), layer.base.bias)(x))
    assert y.dtype == torch.bfloat16 and {t.dtype for t in kept if t.shape == x.shape} == {torch.bfloat16}
    y.float().sum().backward()
    assert x.grad is None and layer.lora_B.grad.dtype == torch.float32 and layer.lora_B.grad.abs().sum() > 0


def test_names_and_parameters_stay_even_after_an_error():
    model = adapted(llama())
    before, layers = dict(model.named_parameters()), lora_layers(model)
    with pytest.raises(KeyError), merge_aware(model, "nf4"):
        assert {type(layer) for layer in lora_layers(model).values()} == {MergeAwareLinear}
        inside = dict(model.named_parameters())
        assert inside.keys() == before.keys() and all(inside[name] is before[name] for name in before)
        raise KeyError
    assert lora_layers(model) == layers


def with_dropout(model):
    return add_lora(model, rank=2, dropout=0.5)


REFUSED = [
    (adapted, "int4", "merge_aware is 'int4': choose from nf4, q4_0"),
    (lambda model: model, "nf4", "has no LoRA layers"),
    (add_adapter, "nf4", "this adapter is PEFT's: use add_lora"),
    (with_dropout, "nf4", r"q_proj has dropout=0.5, and a merged weight has none"),
    (lambda model: merge(adapted(model)), "nf4", "merged already"),
    (adapted, "q4_0", "down_proj has rows of 136 numbers, and Q4_0's blocks have 32"),
]


@pytest.mark.parametrize(("adapt", "target", "said"), REFUSED)
def test_what_cannot_be_merged_is_refused(adapt, target, said):
    model = adapt(llama(intermediate_size=136 if target == "q4_0" else 128))
    with pytest.raises(UserError, match=said), merge_aware(model, target):
        pass
    with pytest.raises(UserError, match=said):
        merge_requantized(model, target)


# ------------------------------------------------------------------------------------------------------------ training


def samples(count: int) -> list[TokenizedSample]:
    draw = torch.Generator().manual_seed(3)
    return [TokenizedSample(tuple(torch.randint(3, 97, (12,), generator=draw).tolist()), 4) for _ in range(count)]


def trained(target: str | None, **settings):
    model = add_lora(quantize_linears(llama()), rank=4, alpha=8)
    settings = {"steps": 100, "learning_rate": 1e-2, **settings}
    records = list(train_steps(model, Batches(samples(8), 8, seed=0), merge_aware=target, **settings))
    return model, records


def loss(model) -> float:
    with torch.no_grad():
        return token_loss_sum(model, collate([[sample] for sample in samples(8)], 0)).item() / 64


def test_a_step_sees_the_merged_model_and_leaves_plain_layers():
    model = add_lora(quantize_linears(llama()), rank=4, alpha=8)
    merged = merge_requantized(copy.deepcopy(model), "q4_0")
    _, records = trained("q4_0", steps=1)
    assert records[0].loss == pytest.approx(loss(merged), rel=1e-6)
    _, plain = trained(None, steps=1)
    assert abs(records[0].loss - plain[0].loss) > 1e-4
    model, _ = trained("q4_0", steps=1)
    assert {type(layer) for layer in lora_layers(model).values()} == {LoraLinear}


def test_checkpointing_changes_nothing():
    _, one = trained("nf4", steps=3)
    _, other = trained("nf4", steps=3, gradient_checkpointing=True)
    assert [record.loss for record in one] == pytest.approx([record.loss for record in other], rel=1e-5)


@pytest.mark.parametrize("target", MERGE_TARGETS)
def test_a_merge_keeps_more_of_what_was_learned_under_it(target):
    """Losses, in nats per token: 6.1 at first, 0.016 with the adapter beside the base, 0.13 and 0.11 after plain
    training and the merge, 0.026 and 0.025 after merge-aware training and the merge."""
    (plain, _), (aware, _) = trained(None), trained(target)
    beside = loss(plain)
    lost = loss(merge_requantized(plain, target)) - beside
    lost_aware = loss(merge_requantized(aware, target)) - beside
    assert beside < 0.03 < 0.07 < lost and lost_aware < lost / 3


def test_dora_is_left_to_others():
    with (
        pytest.raises(UserError, match="is a DoraLinear: merge_aware knows LoRA and rsLoRA"),
        merge_aware(add_lora(llama(), kind=DoraLinear), "nf4"),
    ):
        pass
