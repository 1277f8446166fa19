import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from qlora_lab.experiments import accuracy, knobs, orders
from qlora_lab.experiments.__main__ import main
from qlora_lab.training.batches import Batches
from qlora_lab.training.chat import tokenize_chat
from qlora_lab.training.data import load_prose, load_samples
from qlora_lab.training.step_records import StepRecord


def test_what_is_held_out_is_held_out(tokenizer):
    """Texts of the judgement are validation's orders and the course's prose, word for word, and none of training's."""
    texts = orders.held_out(tokenizer)
    chats = {split: load_samples("orders", split)["messages"] for split in ("train", "validation")}
    ids = {split: [tokenize_chat(chat, tokenizer).ids for chat in chats[split]] for split in chats}
    assert [sample.ids for sample in texts["validation"]] == ids["validation"]
    assert not {sample.ids for sample in texts["validation"]} & set(ids["train"])
    assert [tokenizer.decode(sample.ids) for sample in texts["prose"]] == load_prose()
    assert [len(orders.held_out(tokenizer, judged)["validation"]) for judged in (3, 0, 999)] == [3, 200, 200]


def test_training_is_on_the_training_samples(tiny_model, tokenizer, monkeypatch):
    """The seed's batches of them, at the usual rate unless a way has its own."""
    told = []
    monkeypatch.setattr(
        orders, "train_steps", lambda model, batches, **settings: told.append((batches, settings)) or iter(())
    )
    ready = accuracy.prepare_method("lora-fp32", 5, torch.device("cpu"))
    orders.trained(ready, 4)
    ((batches, settings),) = told
    train = [tokenize_chat(chat, tokenizer) for chat in load_samples("orders", "train").select(range(100))["messages"]]
    assert batches == Batches(train, batch_size=8, seed=5)
    usual = {"learning_rate": 1.5e-3, "pad_token_id": 2, "compute_dtype": torch.float32, "optimizer": "adamw_torch"}
    assert settings == {"steps": 4, **usual}
    orders.trained(orders.Ready(ready.model, ready.tokenizer, {"learning_rate": 0.5}, {}), 4)
    assert told[-1][1]["learning_rate"] == 0.5


@pytest.mark.parametrize("jobs", [1, 3])
def test_jobs_are_processes_of_their_own(monkeypatch, jobs):
    """In whatever order they finish; one job needs none."""
    pools = []

    class Pool(contextlib.nullcontext):
        def __init__(self, processes):
            super().__init__(self)
            pools.append(processes)

        def imap_unordered(self, function, wanted):
            return map(function, reversed(wanted))

    def train(name, seed, device):
        return f"{name} {seed} {device}"

    monkeypatch.setattr(
        orders.multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=Pool) if method == "spawn" else None
    )
    runs = list(orders.many_runs([(train, "nf4", 0), (train, "fp4", 1)], jobs))
    assert sorted(runs) == ["fp4 1 cuda", "nf4 0 cuda"]
    assert pools == ([] if jobs == 1 else [3])


@pytest.mark.parametrize(
    ("what", "key", "module", "ways"),
    [("accuracy", "method", accuracy, accuracy.METHODS), ("knobs", "knob", knobs, knobs.KNOBS)],
)
def test_ways_are_timed_alone_and_recorded_run_by_run(some_gpu, monkeypatch, tmp_path, capsys, what, key, module, ways):
    steps = [StepRecord(n, loss=1.0, tokens=70, seconds=10.0, learning_rate=1.0, gradient_norm=1.0) for n in range(5)]
    trainings = []

    def run(name, seed, device, **settings):
        trainings.append((name, seed))
        numbers = {"losses": [2.0, 1.0], "after": {"validation": 1.0}, "exact": {"test": "01"}}
        return {key: name, "seed": seed, **numbers, **orders.speed(steps), "peak_allocated": 10**9}

    monkeypatch.setattr(module, f"prepare_{key}", lambda name, seed, device: (name, seed))
    monkeypatch.setattr(module, f"train_{key}", run)
    timed_ways = []
    monkeypatch.setattr(
        orders, "trained", lambda ready, n: timed_ways.append(ready) or (steps if n == orders.TIMED_STEPS else [], 8)
    )
    assert main([what, "--seeds", "1", "--output", str(tmp_path)]) == 0
    assert main([what, "--seeds", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / f"{what}-some-gpu.json").read_text())
    wanted = [(way, seed) for seed in (0, 1) for way in ways]
    assert [(r[key], r["seed"]) for r in record["runs"]] == wanted == trainings  # none of them twice
    assert not any("tokens_per_second" in r for r in record["runs"])  # those may have shared the GPU
    timed = {"tokens_per_second": 7.0, "seconds_per_step": 10.0, "peak_allocated": 8}
    assert record["alone"] == dict.fromkeys(ways, timed)
    assert timed_ways == [(way, 0) for way in ways]  # once, too
    assert "validation 1.0000, test 1/2" in capsys.readouterr().out


def test_runs_that_finish_in_any_order_are_recorded_in_one(some_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(orders, "many_runs", lambda wanted, jobs: (train(*of, None) for train, *of in wanted[::-1]))
    record = orders.record_of("accuracy", tmp_path)
    orders.run_all(record, "method", "ab", 2, lambda name, seed, _: {"method": name, "seed": seed}, tell=str)
    assert [(row["method"], row["seed"]) for row in record.rows("runs")] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("accuracy", (8, 1)),
        ("knobs", (3, 1)),
        ("presets", (3, 1)),
        ("accuracy --seeds 2 --jobs 4", (2, 4)),
        ("presets --seeds 5", (5, 1)),
    ],
)
def test_how_much_is_run(some_gpu, monkeypatch, tmp_path, arguments, told):
    runs = []
    monkeypatch.setattr(orders, "time_alone", lambda *_: None)
    monkeypatch.setattr(
        orders, "run_all", lambda record, key, ways, seeds, train, jobs=1, **_: runs.append((seeds, jobs))
    )
    assert main([*arguments.split(), "--output", str(tmp_path)]) == 0
    assert runs == [told]


def test_other_settings_are_not_mixed(some_gpu, monkeypatch, tmp_path, capsys):
    orders.record_of("knobs", tmp_path).put("alone", "rank 4", 1)
    monkeypatch.setattr(orders, "STEPS", 7)
    assert main(["knobs", "--output", str(tmp_path)]) == 2
    assert "its steps was 30, now it is 7" in capsys.readouterr().err
