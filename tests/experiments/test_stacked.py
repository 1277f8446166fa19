"""A stack of runs against the same runs, one after the other, with the usual training step."""

import copy

import pytest
import torch

from qlora_lab.adapters.merge_aware import merge_requantized
from qlora_lab.adapters.merging import unload
from qlora_lab.adapters.quantized_linear import nf4_double
from qlora_lab.evaluation.answers import generate
from qlora_lab.evaluation.losses import text_loss
from qlora_lab.experiments import methods_known
from qlora_lab.experiments.methods_known import METHODS, prepare, stacked
from qlora_lab.experiments.stacked import (
    StackedLora,
    answers_of,
    keep_runs,
    losses_of,
    merge_into_nf4,
    through_nf4,
    train_stack,
)
from qlora_lab.models.loading import load_model
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import tokenize
from qlora_lab.training.data import load_samples
from qlora_lab.training.loop import train_steps

CPU, RATES, SEEDS, STEPS = torch.device("cpu"), (1e-3, 3e-3, 1e-3), (0, 1, 1), 4
KINDS = [  # what a stack computes otherwise
    "QLoRA",
    "full fine-tuning",
    "DoRA",
    "rsLoRA",
    "LoRA+",
    "PiSSA",
    "merge-aware",
]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tiny_folder):
    methods_known._loaded.cache_clear()
    monkeypatch.setattr(methods_known, "load_model", lambda **named: load_model(tiny_folder, **named))
    yield
    methods_known._loaded.cache_clear()


@pytest.fixture
def samples(tokenizer):
    return tokenize(load_samples("diary", "train").select(range(40)), tokenizer, 256)[0]


def alone(name: str, seed: int, rate: float, batches: Batches, pad_token_id: int):
    method = METHODS[name]
    model, _ = prepare(method, seed, CPU)
    settings = {"lora_plus": method.lora_plus, "merge_aware": "nf4" if method.merge_aware else None}
    records = train_steps(model, batches, steps=STEPS, learning_rate=rate, pad_token_id=pad_token_id, **settings)
    return model, [record.loss for record in records]


@pytest.mark.parametrize("name", KINDS)
def test_each_run_of_a_stack_is_the_run_that_it_would_be_alone(name, samples, tokenizer):
    batches = [Batches(samples, 2, accumulation=2, seed=seed) for seed in SEEDS]
    pad = tokenizer.pad_token_id
    model, _ = stacked(METHODS[name], SEEDS, CPU)
    losses = train_stack(
        model, batches, RATES, STEPS, pad_token_id=pad, dtype=torch.float32, lora_plus=METHODS[name].lora_plus
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for run, (seed, rate) in enumerate(zip(SEEDS, RATES, strict=True)):
        lone, expected = alone(name, seed, rate, batches[run], pad)
        assert losses[run] == pytest.approx(expected, rel=1e-4)
        for key, parameter in lone.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(trained[key][run], parameter, rtol=1e-3, atol=2e-4)
    assert len({round(loss[-1], 5) for loss in losses}) == 3, "seeds and rates make a difference"


def test_a_stack_is_judged_as_each_run_alone(samples, tokenizer):
    batches, pad = [Batches(samples, 2, seed=seed) for seed in SEEDS], tokenizer.pad_token_id
    model, _ = stacked(METHODS["QLoRA"], SEEDS, CPU)
    train_stack(model, batches, [3e-2] * 3, STEPS, pad_token_id=pad, dtype=torch.float32)
    questions = [chat[:-1] for chat in load_samples("diary", "test")["messages"][:3]]
    found = {
        beside: (
            losses_of(model, samples[:5], 3, pad_token_id=pad, dtype=torch.float32, rows_at_once=7),
            answers_of(model, tokenizer, questions, 3, max_new_tokens=6, dtype=torch.float32, batch_size=2),
        )
        for beside in (True, False)
        if beside or merge_into_nf4(model) is None
    }
    for run, seed in enumerate(SEEDS):
        lone, _ = prepare(METHODS["QLoRA"], seed, CPU)
        with torch.no_grad():
            own = dict(model.named_parameters())
            for key, parameter in lone.named_parameters():
                if "lora_" in key:
                    parameter.copy_(own[key][run])
        for beside, (losses, answers) in found.items():
            judged = lone if beside else merge_requantized(copy.deepcopy(lone), "nf4")
            assert losses[run] == pytest.approx(text_loss(judged, samples[:5]).per_token, rel=1e-5)
            assert answers[run] == generate(judged, tokenizer, questions, 6)
    assert found[True] != found[False]


def test_runs_that_are_kept(samples, tokenizer):
    pad, batches = tokenizer.pad_token_id, [Batches(samples, 1, seed=seed) for seed in SEEDS]
    for name in ("QLoRA", "full fine-tuning"):
        model, _ = stacked(METHODS[name], SEEDS, CPU)
        train_stack(model, batches, RATES, 2, pad_token_id=pad, dtype=torch.float32)
        losses = losses_of(model, samples[:3], 3, pad_token_id=pad, dtype=torch.float32)
        keep_runs(model, [2, 0])
        kept = losses_of(model, samples[:3], 2, pad_token_id=pad, dtype=torch.float32)
        assert kept == pytest.approx([losses[2], losses[0]], rel=1e-5)
        assert losses[0] != pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 64), (2, 320, 192)])
def test_a_stack_through_nf4_is_each_matrix_through_nf4(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    matrices[0, :2] = 0
    expected = torch.stack([nf4_double(matrix).dequantize() for matrix in matrices])
    torch.testing.assert_close(through_nf4(matrices), expected, rtol=1e-6, atol=1e-7)


def test_a_run_that_diverges_leaves_the_others_alone(samples, tokenizer):
    batches, pad = [Batches(samples, 2, seed=0) for _ in range(2)], tokenizer.pad_token_id
    losses = {}
    for rate in (1e-3, 1e30):
        model, _ = stacked(METHODS["QLoRA"], (0, 0), CPU)
        found = train_stack(model, batches, [1e-3, rate], STEPS, pad_token_id=pad, dtype=torch.float32)
        losses[rate] = found[0], losses_of(model, samples[:4], 2, pad_token_id=pad, dtype=torch.float32)
    assert losses[1e30][0] == losses[1e-3][0]
    assert losses[1e30][1] == [losses[1e-3][1][0], None]


def test_only_one_copy_of_the_base_is_held():
    model, _ = stacked(METHODS["QLoRA"], (0, 1), CPU)
    layers = [module for module in model.modules() if isinstance(module, StackedLora)]
    assert layers and all(len(layer.lora_A) == 2 for layer in layers)
    with pytest.raises(Exception, match="no LoRA layers"):
        unload(model)
