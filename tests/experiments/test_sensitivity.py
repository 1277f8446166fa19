"""Layers one at a time in 4 bits, or kept: what is measured, with a tiny model and a few words."""

import json

import pytest
import torch

from qlora_lab.experiments import sensitivity
from qlora_lab.experiments.__main__ import main
from qlora_lab.models.loading import load_model
from qlora_lab.quantization import double_quantize, quantize
from qlora_lab.training.chat import TokenizedSample

TEXTS = {name: [TokenizedSample(tuple(range(start, start + 12)), 1)] for start, name in enumerate(("prose, even", "x"))}


@pytest.fixture(scope="module")
def layers(tiny_folder):
    model, tokenizer = load_model(tiny_folder, device="cpu", compute_dtype=torch.float32)
    return sensitivity.Layers(model, TEXTS, tokenizer.pad_token_id)


def test_a_layer_in_4_bits_is_bitsandbytes_and_the_others_are_untouched(layers):
    before = dict(layers.rounded[sensitivity.SIXTEEN])
    name = "model.layers.1.mlp.down_proj"
    layers.losses({name: sensitivity.FOUR}, rest=sensitivity.SIXTEEN)
    weights = {each: layer.weight for each, layer in layers.layers.items()}
    torch.testing.assert_close(weights[name], double_quantize(quantize(before[name])).dequantize(), rtol=0, atol=0)
    assert all(torch.equal(weights[each], before[each]) for each in weights if each != name)
    assert layers.bits[sensitivity.FOUR] == pytest.approx(4.126953125)


def test_one_at_a_time_is_each_by_itself(layers):
    found = dict(layers.one_at_a_time(sensitivity.FOUR, rest=sensitivity.SIXTEEN))
    assert len(found) == 14
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert found[name] == layers.losses({name: sensitivity.FOUR}, rest=sensitivity.SIXTEEN)
    assert len({losses["x"] for losses in found.values()}) == 14
    assert layers.losses(sensitivity.SIXTEEN) != layers.losses(sensitivity.FOUR)


def test_plans_spend_what_they_may_and_no_more(layers):
    gains = {"kept": {name: float(at) for at, name in enumerate(layers.layers)}}
    total, found = sum(layers.numel.values()), {}
    for way, form, names in sensitivity.plans(layers, gains, 6.0):
        found[way, form] = names
        spent = layers.bits["NF4"] + sum(layers.extra(form)[name] for name in names) / total
        left = (6.0 - spent) * total
        assert 0 <= left < min(layers.extra(form)[name] for name in layers.layers if name not in names)
    assert len(found) == 2 * (1 + sensitivity.RANDOM_PLANS + 2)
    assert "model.layers.0.self_attn.k_proj" not in found["measured (kept)", "16 bits"]
    assert found["the first layers", "16 bits"][0] == "model.layers.0.self_attn.q_proj"
    assert found["the last layers", "16 bits"][0] == "model.layers.1.mlp.down_proj"
    assert found["at random, 0", "16 bits"] != found["at random, 1", "16 bits"]


def test_the_record_holds_what_a_plan_needs(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "texts", lambda tokenizer, orders: TEXTS)
    monkeypatch.setattr(sensitivity, "BITS", (5.0,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["sensitivity", "--model", str(tiny_folder), "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("sensitivity-cpu-*.json")
    record = json.loads(file.read_text(encoding="utf-8"))
    assert record["tokens"] == {"prose, even": 11, "x": 11}
    assert list(record["kept"]) == list(record["alone"]) == list(record["parameters"])
    everything = record["losses"]["all in 4 bits"]
    (first,) = [row for row in record["plans"] if row["way"] == "uniform"][:1]
    assert first["precision"] == "NF4" and first["losses"] == everything and first["bits"] == pytest.approx(4.126953125)
    (bof4,) = [r for r in record["plans"] if (r["precision"], r.get("block_size")) == ("BOF4-S (squared)", 32)]
    assert bof4["bits"] == pytest.approx(4 + (8 + 32 / 256) / 32)
    measured = next(row for row in record["plans"] if row["way"] == "measured (kept)")
    assert measured["bits"] <= 5.0 and measured["losses"] != everything
