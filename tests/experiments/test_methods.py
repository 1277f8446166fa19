import json
import math
import re

import pytest
import torch

from qlora_lab.adapters.lora import lora_layers, lora_parameters
from qlora_lab.adapters.quantized_linear import is_quantized
from qlora_lab.experiments import methods, methods_known, methods_runs, orders
from qlora_lab.experiments.__main__ import main
from qlora_lab.experiments.methods_grid import GRID, grid_point
from qlora_lab.experiments.methods_known import METHODS, prepare
from qlora_lab.experiments.methods_runs import TASKS, best_rate, compare
from qlora_lab.experiments.record import Record
from qlora_lab.models.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch, tiny_folder):
    methods_known._loaded.cache_clear()
    monkeypatch.setattr(methods_known, "load_model", lambda **named: load_model(tiny_folder, **named))
    yield
    methods_known._loaded.cache_clear()


def row(rate, validation):
    return {"rate": rate, "validation": validation}


def test_the_rate_with_the_lowest_validation_loss_is_chosen():
    assert best_rate([row(1, 0.5), row(2, 0.1), row(1, 0.5), row(2, 0.7), row(3, 0.2), row(3, None)]) == 2
    assert best_rate([row(1, 0.3), row(2, 0.5), row(1, 0.3), row(2, 0.4)]) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_it_says(tiny, name):
    method = METHODS[name]
    model, _ = prepare(method, 0, CPU)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if method.full:
        assert len(trained) == len(list(model.parameters()))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return
    quantized = [module for module in model.modules() if is_quantized(module)]
    assert len(quantized) == (0 if method.base == "16 bits" else 14), "adapted or not"
    assert len(lora_layers(model)) == 2 * (7 if method.targets == "all-linear" else len(method.targets))
    assert all("lora_" in name for name in trained)
    if method.init == "zero":
        assert all(not layer.lora_B.any() for layer in lora_layers(model).values())
    else:
        assert all(layer.lora_B.any() for layer in lora_layers(model).values())


def test_as_many_numbers_are_trained_where_the_rank_says_so():
    """At the bundled model's widths: 30 layers of 576, 192 for keys and values, 1536."""
    widths = {"q_proj": 1152, "k_proj": 768, "v_proj": 768, "o_proj": 1152}
    widths |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2112)
    numbers = {
        name: method.rank * sum(widths[t] for t in (widths if method.targets == "all-linear" else method.targets))
        for name, method in METHODS.items()
    }
    for name, count in numbers.items():
        expected = {"rank 64": 4, "rank 4": 0.25}.get(name, 1)
        assert count / numbers["QLoRA"] == pytest.approx(expected, rel=0.02)


def test_a_comparison_tries_all_rates_and_judges_the_best(tiny, monkeypatch):
    used = []
    judge = methods_runs.judged_runs
    monkeypatch.setattr(methods_runs, "judged_runs", lambda *of: used.append(of[0]) or judge(*of))
    found = compare("QLoRA, diary", 2, CPU, steps=3, rates=(1e-4, 3e-3), judged=2, batch_size=2)
    assert [(r["rate"], r["seed"]) for r in found["rates"]] == [(r, s) for r in (1e-4, 3e-3) for s in (0, 1)]
    assert [(run["method"], run["task"], run["seed"]) for run in found["runs"]] == [
        ("QLoRA", "diary", s) for s in (0, 1)
    ]
    for run in found["runs"]:
        assert run["rate"] == best_rate(found["rates"])
        assert {split: len(bits) for split, bits in run["exact"].items()} == {"test": 2, "shifted": 2}
        assert run["merged"]["after"]["validation"] != run["after"]["validation"]
    (stack,) = found["stacks"]
    model, _ = prepare(METHODS["QLoRA"], 0, CPU)
    assert stack["trainable"] == lora_parameters(model)
    assert math.isfinite(stack["prose_before"]) and stack["seconds"] > 0
    assert "rate" in methods.summary(found["runs"])


def test_whole_models_are_trained_a_rate_at_a_time_and_the_best_is_kept(tiny, monkeypatch):
    """The second rate is the best: what is judged began as its seeds' run, not as the first or the last."""
    stacks, judged, train = [], [], methods_runs.train_runs
    losses = {1e-4: 0.5, 3e-4: 0.2, 1e-3: 0.9}

    def spy(method, task, steps, runs, *of, **named):
        model, tokenizer, rows = train(method, task, steps, runs, *of, **named)
        stacks.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return model, tokenizer, [{**row, "validation": losses[row["rate"]]} for row in rows]

    monkeypatch.setattr(methods_runs, "train_runs", spy)
    after = {"after": {"validation": 1.0}}
    monkeypatch.setattr(methods_runs, "judged_runs", lambda model, *_: judged.append(model) or [after, after])
    found = compare("full fine-tuning, diary", 2, CPU, steps=2, judged=1, batch_size=1)
    assert [len(stack["model.norm.weight"]) for stack in stacks] == [2, 2, 2]
    assert {run["rate"] for run in found["runs"]} == {3e-4}
    for name, p in judged[0].named_parameters():
        assert torch.equal(p, stacks[1][name if name in stacks[1] else "model.embed_tokens.weight"])


def test_the_judge_of_a_merge_aware_run_sees_the_merge(tiny, monkeypatch):
    judged = []
    monkeypatch.setattr(
        methods_runs, "judged_runs", lambda model, *_: judged.append(model) or [{"after": {"validation": 1.0}}]
    )
    compare("merge-aware, diary", 1, CPU, steps=1, rates=(1e-3,), judged=1, batch_size=1)
    assert all(m.merged is not None for m in judged[0].modules() if hasattr(m, "merge_aware"))


@pytest.mark.parametrize(
    ("point", "amounts", "accumulation"),
    [(("rank 16", (50, 200), 64, 2), (50, 200), 4), (("full", (2000,), 4, 2), (2000,), 1)],
)
def test_a_point_of_the_grid(tiny, monkeypatch, point, amounts, accumulation):
    asked, batches = [], methods_runs.Batches
    monkeypatch.setattr(methods_runs, "Batches", lambda *of, **named: asked.append(of) or batches(*of, **named))
    monkeypatch.setitem(GRID, "some", point)
    found = grid_point("some", "diary", CPU)["grid"]
    rates = METHODS["full fine-tuning" if point[0] == "full" else "QLoRA"].rates
    expected = [(rate, seed, amount) for rate in rates for seed in (0, 1) for amount in amounts]
    assert [(row["rate"], row["seed"], row["samples"]) for row in found] == expected
    assert all(math.isfinite(row["validation"]) for row in found)
    assert [(len(of[0]), *of[1:]) for of in asked] == [
        (amount, min(point[2], 16), accumulation) for _, _, amount in expected
    ]
    drawn = {seed: set(of[0]) for of, (_, seed, amount) in zip(asked, expected, strict=True) if amount == amounts[0]}
    assert (drawn[0] == drawn[1]) == (amounts == (2000,)), "each seed draws its own"


def test_all_points_of_batch_sizes_see_as_many_samples():
    assert {batch * steps for name, (_, _, batch, steps) in GRID.items() if "batch" in name} == {512}


@pytest.fixture
def quick(monkeypatch, some_gpu):
    """`run` with results at once, on no device."""
    made = []

    def many_runs(wanted, jobs):
        yield from (make(name, argument, CPU) for make, name, argument in wanted)

    def comparison(name, seeds, device):
        made.append(name)
        who, task = name.rsplit(", ", 1)
        run = {
            "method": who,
            "task": task,
            "seed": 0,
            "rate": 1.0,
            "after": {"validation": 0.5},
            "exact": {"test": "10"},
        }
        return {"runs": [run], "rates": [], "stacks": []}

    monkeypatch.setattr(orders, "many_runs", many_runs)
    monkeypatch.setattr(methods, "empty_cache", lambda: None)  # it looks for garbage, half a second each time
    monkeypatch.setattr(methods, "compare", comparison)
    monkeypatch.setattr(
        methods, "grid_point", lambda name, task, device: made.append(name) or {"grid": [{"point": name}]}
    )
    monkeypatch.setattr(orders, "time_alone", lambda record, ways, prepare: made.append("alone"))
    return made


def test_what_is_most_wanted_comes_first_and_nothing_twice(quick, tmp_path, capsys):
    folder = ["--output", str(tmp_path)]
    assert main(["methods", *folder, "--parts", "methods"]) == 0
    assert quick == [f"{who}, {task}" for who in METHODS for task in TASKS]
    assert "test 50.0%" in capsys.readouterr().out
    quick.clear()
    assert main(["methods", *folder]) == 0
    assert quick == [*GRID, "alone"]
    (path,) = tmp_path.glob("methods-*.json")
    record = Record.read(path)
    assert len(record.rows("runs")) == len(METHODS) * len(TASKS)
    assert record.named("methods")["LoRA+"]["lora_plus"] == 16
    assert "NaN" not in path.read_text() and json.loads(path.read_text())


def test_without_time_nothing_begins(quick, tmp_path, capsys):
    assert main(["methods", "--output", str(tmp_path), "--budget", "0"]) == 0
    assert quick == []
    assert re.search("nothing was begun", capsys.readouterr().out)


@pytest.mark.parametrize("name", methods.ALONE)
def test_a_method_alone_takes_the_usual_step(tiny, monkeypatch, name):
    load = orders.load_samples
    monkeypatch.setattr(orders, "load_samples", lambda *of: load(*of).select(range(20)))
    records, _ = orders.trained(methods.prepare_alone(name, 0, CPU), 1)
    assert len(records) == 1 and math.isfinite(records[0].loss)
    assert not methods_known._loaded.cache_info().currsize, "its memory would be measured, too"


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["methods"]) == 2
    assert "no GPU here" in capsys.readouterr().err
