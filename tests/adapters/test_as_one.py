"""A frozen layer and PEFT's adapter as one operation: PEFT's numbers, and a model that is left as it was."""

import copy

import psutil
import pytest
import torch

from qlora_lab.adapters import as_one as module
from qlora_lab.adapters.as_one import AdaptedProduct, as_one, dense_bytes, room_for_dense
from qlora_lab.finetuning import Batches, TokenizedSample, add_adapter, generate, load_model, train_steps

ROWS = [TokenizedSample(tuple(range(3 + n, 15 + 2 * n)), 4) for n in range(4)]


@pytest.fixture(
    scope="module", params=[("nf4", torch.float32), ("nf4", torch.bfloat16), (None, torch.float32)], ids=str
)
def base(request, tiny_folder):
    quantization, dtype = request.param
    return load_model(tiny_folder, quantization, device="cpu", compute_dtype=dtype)


def adapted(base, **options):
    """A copy with adapters that do something."""
    model = add_adapter(copy.deepcopy(base[0]), rank=4, **options)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1
    return model


def outcome(model):
    """Logits and gradients of a batch."""
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    ids = torch.tensor([sample.ids[:12] for sample in ROWS])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(ids).logits.float()
    logits.log_softmax(-1)[..., 5].sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def largest_error(came, expected) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(came, expected, strict=True))


def test_in_bf16_it_is_as_near_to_the_truth_as_roundings_allow():
    """One layer beside float64: y and all three gradients; each product is rounded to bf16, by 2⁻⁹ at most."""
    torch.manual_seed(0)
    x, W, A, B, dy = (torch.randn(*s).bfloat16() for s in ((120, 64), (96, 64), (4, 64), (96, 4), (120, 96)))

    def graded(product, *values):
        x, A, B = (value.clone().requires_grad_() for value in values)
        y = product(x, A, B)
        y.backward(dy.to(y.dtype))
        return y.detach().double(), x.grad.double(), A.grad.double(), B.grad.double()

    truth = graded(lambda x, A, B: x @ W.double().T + 2 * (x @ A.T) @ B.T, x.double(), A.double(), B.double())
    came = graded(lambda x, A, B: AdaptedProduct.apply(x, lambda: W, None, A, B, 2.0), x, A.float(), B.float())
    assert all(((a - b).norm() / b.norm()).item() < 1.5 * 2**-8 for a, b in zip(came, truth, strict=True))


@pytest.mark.parametrize("hold", [True, False, None])
def test_logits_and_gradients_are_pefts(base, hold, monkeypatch):
    """float32 sums differ by their order. What bf16 differs by, roundings through two layers, is judged below."""
    model, calls = adapted(base), []
    expected = outcome(model)
    apply = AdaptedProduct.apply
    monkeypatch.setattr(AdaptedProduct, "apply", lambda *given: (calls.append(1), apply(*given))[1])
    with as_one(model, hold):
        came = outcome(model)
    assert len(calls) == 14  # seven linear layers in each of two
    assert largest_error(came, expected) < (1e-5 if base[0].dtype == torch.float32 else 0.1)
    assert all(torch.equal(a, b) for a, b in zip(outcome(model), expected, strict=True)), "not left as it was"
    assert len(calls) == 14


def test_held_or_not_the_bits_are_the_same(base):
    model = adapted(base)
    outcomes = []
    for hold in (True, False):
        with as_one(model, hold):
            outcomes.append(outcome(model))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("options", [{"kind": "dora"}, {"dropout": 0.5}], ids=str)
def test_what_is_no_plain_lora_is_left_to_peft(base, options, monkeypatch):
    model = adapted(base, **options)
    torch.manual_seed(3)
    expected = outcome(model)
    monkeypatch.setattr(AdaptedProduct, "apply", None)
    torch.manual_seed(3)
    with as_one(model, False):
        came = outcome(model)
    assert all(torch.equal(a, b) for a, b in zip(came, expected, strict=True))


def test_what_it_returns_can_be_changed_in_place(base):
    """As Gemma 3n does with a projection, which autograd refuses for a Function's output that is a view."""
    model = adapted(base)
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    x = torch.randn(2, 3, layer.in_features, dtype=base[0].dtype)

    def gradient(double):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=base[0].dtype == torch.bfloat16):
            double(layer(x)).sum().backward()
        return layer.lora_B["default"].weight.grad.clone()

    with as_one(model):
        assert torch.equal(gradient(lambda y: y.mul_(2)), gradient(lambda y: y * 2))


def test_adapters_that_are_off_count_for_nothing(base):
    model = adapted(base)
    with as_one(model), model.disable_adapter():
        off = model(torch.tensor([ROWS[0].ids])).logits
    without = base[0](torch.tensor([ROWS[0].ids])).logits
    torch.testing.assert_close(off, without, rtol=0, atol=1e-5 if base[0].dtype == torch.float32 else 0.05)


def test_a_step_leaves_the_layers_as_they_were(base):
    model = adapted(base)
    steps = train_steps(model, Batches(ROWS, 4), steps=2, warmup_steps=0)
    next(steps)
    assert any("forward" in vars(layer) for layer in model.modules())
    steps.close()
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_dense_weights_are_counted_and_held_where_there_is_room(base, monkeypatch):
    model = base[0]
    linears = sum(m.in_features * m.out_features for n, m in model.named_modules() if n.endswith("_proj"))
    expected = linears * model.dtype.itemsize if getattr(model, "is_loaded_in_4bit", False) else 0
    assert dense_bytes(model) == dense_bytes(adapted(base)) == expected
    for available, room in ((4 * expected, expected > 0), (4 * expected - 1, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda a=available: type("Memory", (), {"available": a}))
        assert room_for_dense(model) is room


def test_answers_of_held_weights_are_the_same(base, tokenizer, monkeypatch):
    """And each weight is dequantized once, not for every token."""
    chats = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two words"}]]
    counted, dense_weight = [], module.dense_weight
    monkeypatch.setattr(module, "dense_weight", lambda layer: (counted.append(layer), dense_weight(layer))[1])
    answers = generate(base[0], tokenizer, chats, max_new_tokens=8)
    assert len(counted) == len(set(map(id, counted))) == (14 if dense_bytes(base[0]) else 0)
    monkeypatch.setattr(module, "room_for_dense", lambda model: False)
    assert generate(base[0], tokenizer, chats, max_new_tokens=8) == answers
