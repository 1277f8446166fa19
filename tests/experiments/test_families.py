"""What the fast step's losses and speeds are measured on. The measurements themselves need a GPU."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_lab.experiments import families
from qlora_lab.experiments.__main__ import main
from qlora_lab.experiments.families import FEATURES, SHAPES, config, deviation, small_model, weights_in_products
from qlora_lab.experiments.record import Record
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.steps.fast.families import FAMILIES, family_of

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
}


def test_every_family_of_the_fast_step_is_tried():
    assert {kind for kind, _ in FEATURES.values()} == set(FAMILIES)
    assert {kind for kind, _ in SHAPES.values()} <= set(FAMILIES)


@pytest.mark.parametrize("name", SHAPES)
def test_the_fast_step_knows_the_published_configs(name):
    kind, features = SHAPES[name]
    with torch.device("meta"):
        family_of(AutoModelForCausalLM.from_config(config(kind, **{**features, "num_hidden_layers": 1})))


@pytest.mark.parametrize("name", ["llama 3", "gemma3"])
def test_the_reference_has_the_same_numbers_in_float32(name):
    sixteen = small_model(name, "cpu", torch.bfloat16, TINY)
    exact = small_model(name, "cpu", torch.float32, TINY)
    theirs = dict(sixteen.named_parameters())
    assert {p.dtype for p in exact.parameters()} <= {torch.float32, torch.uint8}
    norms = [p for p in exact.parameters() if p.dim() == 1 and p.numel() == 64]
    assert norms and not any(torch.equal(p, p[:1].expand(64)) for p in norms), "norms that differ"
    for key, p in exact.named_parameters():
        assert torch.equal(p, theirs[key].to(p.dtype)), key
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        logits = exact(ids).logits
    assert logits.dtype == torch.float32 and torch.allclose(logits, sixteen(ids).logits.float(), atol=0.1)


def test_weights_in_products_are_the_layers_and_the_head():
    """By hand: q and o of 64 x 64, k and v of 64 x 32, three of 64 x 96, in two layers; a head of 97 x 64."""
    kind, _ = FEATURES["llama"]
    model = build_random(config(kind, **TINY), device="cpu", compute_dtype=torch.float32)
    assert weights_in_products(model, 97) == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 97 * 64


def test_a_deviation_is_the_largest():
    assert deviation([1.0, 2.2, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(0.25)


def test_each_way_is_timed_once_and_trl_after_those_that_want_the_model_whole(monkeypatch):
    made = []
    monkeypatch.setattr(families, "SHAPES", {"small": ("llama", TINY)})
    monkeypatch.setattr(families, "build_random", lambda *_, **how: "base")
    monkeypatch.setattr(families, "add_adapter", lambda base, rank, alpha: f"{base} with rank {rank}")
    monkeypatch.setattr(families, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(families, "standard_sft_steps", lambda model, *of: made.append(("trl", model)))
    monkeypatch.setattr(families, "train_steps", lambda model, *of, fast, **how: made.append((fast, model)) or ())
    figures = {"milliseconds": 2.0, "tokens_per_second": 256.0, "peak_allocated": 1}
    monkeypatch.setattr(families, "result", lambda records: figures)

    def unsloth(rows, steps, shape, rank):
        made.append(("unsloth", rank))
        return ({"who": who, "batch_size": n, "gradient_checkpointing": on} | figures for who, n, on in rows)

    monkeypatch.setattr(families, "unsloth_runs", unsloth)
    record = Record(None, {families.RATE: 1e12})
    families.compare_speeds(record, 4, ("unsloth, plain loop", "trl", "fast"), (16,))
    model = "base with rank 16"
    assert made == [(True, model)] * 4 + [("trl", model)] * 4 + [("unsloth", 16)]
    rows = record.rows("speeds", model="small", rank=16)
    assert [row["who"] for row in rows] == ["fast"] * 4 + ["trl"] * 4 + ["unsloth, plain loop"] * 4
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 97 * 64
    assert rows[2]["share_of_floor"] == pytest.approx(1e3 * 4 * weights * 4 * 512 / 1e12 / 2.0)
    made.clear()
    families.compare_speeds(record, 4, ("fast", "trl", "unsloth, plain loop"), (16,))
    assert made == []


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["families"]) == 2
    assert "GPU" in capsys.readouterr().err
