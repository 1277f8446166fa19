import pytest
import torch

from qlora_lab.adapters.lora import lora_layers
from qlora_lab.experiments import accuracy, orders
from qlora_lab.training.data import load_samples
from tests.experiments.conftest import QUICK, Spy, adapter


@pytest.mark.parametrize("name", accuracy.METHODS)
def test_every_method_trains_and_is_judged(tiny_model, monkeypatch, name):
    monkeypatch.setattr(orders, "load_prose", lambda: ["Rivers are slow in summer."])
    run = accuracy.train_method(name, 1, torch.device("cpu"), steps=3, judged=2, **QUICK)
    assert (run["method"], run["seed"], run["peak_allocated"], len(run["losses"])) == (name, 1, None, 3)
    assert {split: len(bits) for split, bits in run["exact"].items()} == {"test": 2, "shifted": 2}
    assert run["after"]["validation"] < run["before"]["validation"]
    assert run["tokens_per_second"] > 0


def test_the_seed_decides(tiny_model, monkeypatch):
    monkeypatch.setattr(orders, "load_prose", lambda: ["Rivers are slow in summer."])
    monkeypatch.setattr(accuracy, "Judge", Spy([]))
    losses = [
        accuracy.train_method("nf4", seed, torch.device("cpu"), steps=2, judged=1, **QUICK)["losses"]
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_every_method_starts_from_the_same_adapter(tiny_model):
    """In all that is trained, for a seed; and then on the same samples, in the same order."""
    first, *others = [accuracy.prepare_method(name, 3, torch.device("cpu"), **QUICK) for name in accuracy.METHODS]
    assert len(adapter(first)) == 2 * 2 * 7  # A and B of seven linears in two layers
    assert {len(p) for name, p in adapter(first).items() if "lora_A" in name} == {16}
    assert all(p.any() == ("lora_A" in name) for name, p in adapter(first).items())  # B is zero
    assert {layer.alpha for layer in lora_layers(first.model).values()} == {32}
    assert {ready.model.get_output_embeddings().weight.dtype for ready in (first, *others)} == {torch.float32}
    for other in others:
        assert adapter(other).keys() == adapter(first).keys()
        assert all(torch.equal(p, adapter(first)[name]) for name, p in adapter(other).items())
        assert (other.batches, other.settings) == (first.batches, first.settings)
    assert first.batches == {"batch_size": 2, "seed": 3}
    another = accuracy.prepare_method("lora-fp32", 4, torch.device("cpu"), **QUICK)
    assert all(not torch.equal(p, adapter(first)[name]) for name, p in adapter(another).items() if "lora_A" in name)


def test_methods_differ_in_their_bases_alone(tiny_model):
    """In the error of their weights: none, bf16's, and that of four bits, least for NF4."""
    errors, (fp32, *bases) = {}, [accuracy.load_base(m, torch.device("cpu"))[0] for m in accuracy.METHODS.values()]
    exact = fp32.model.layers[0].mlp.up_proj
    inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    for name, base in zip(list(accuracy.METHODS)[1:], bases, strict=True):
        weight = base.model.layers[0].mlp.up_proj
        assert base.dtype == torch.bfloat16
        difference = weight(inputs.bfloat16()).float() - exact(inputs)
        errors[name] = float((difference.norm() / exact(inputs).norm()).detach())
    assert exact.weight.dtype == torch.float32
    assert errors["lora-bf16"] < 0.01 < 0.05 < errors["nf4"] < errors["int4"] < errors["fp4"] < 0.2
    assert 0 < abs(errors["nf4-double"] - errors["nf4"]) < 0.01


def test_a_method_is_judged_where_it_was_not_trained(tiny_model, monkeypatch):
    """Losses before and after on the held-out texts, answers on `test` and `shifted`, training on `train`."""
    happened = []
    monkeypatch.setattr(orders, "load_prose", lambda: ["Rivers are slow in summer."])
    monkeypatch.setattr(accuracy, "trained", lambda ready, steps: happened.append("training") or ([], None))
    monkeypatch.setattr(accuracy, "Judge", spy := Spy(happened))
    run = accuracy.train_method("lora-fp32", 0, torch.device("cpu"), judged=2)
    assert happened == ["losses", "training", "losses"]
    asked = {split: list(chats) for split, chats in spy.conversations.items()}
    assert asked == {split: list(load_samples("orders", split)["messages"])[:2] for split in ("test", "shifted")}
    assert {name: len(texts) for name, texts in spy.texts.items()} == {"validation": 2, "prose": 1}
    assert spy.dtype == torch.float32
    assert run["exact"] == {"test": "10", "shifted": "10"}
    assert run["before"] == run["after"] == {"validation": 2.0, "prose": 2.0}
