import json

import pytest
import torch

from qlora_lab.finetuning import compare, lora_layers
from qlora_lab.finetuning.presets import PRESETS


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compare.main(["presets"]) == 2
    assert "error: no GPU here" in capsys.readouterr().err


def test_every_preset_is_run_at_every_seed_and_nothing_is_lost(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    runs = []

    def run(name, seed, device):
        if len(runs) == 5:
            raise RuntimeError("the machine went away")
        runs.append((name, seed))
        numbers = {"validation_loss": 1.0, "exact_match": 0.5, "peak_allocated": 10**9, "seconds": 2.0}
        return {"preset": name, "seed": seed, "losses": [2.0, 1.0], **numbers}

    monkeypatch.setattr(compare, "train_preset", run)
    with pytest.raises(RuntimeError):
        compare.compare_presets(2, tmp_path)
    record = json.loads((tmp_path / "presets-some-gpu.json").read_text())
    assert [(run["preset"], run["seed"]) for run in record["runs"]] == [(name, 0) for name in PRESETS] + [
        ("standard", 1)
    ]
    assert record["device"] == "Some GPU" and set(record["versions"]) == {
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
    }


@pytest.fixture
def tiny_model(monkeypatch, tiny_folder):
    load = compare.load_model
    monkeypatch.setattr(compare, "load_model", lambda **named: load(tiny_folder, **named))


QUICK = {"batch_size": 2, "compute_dtype": torch.float32}


@pytest.mark.parametrize("name", compare.METHODS)
def test_every_method_trains_and_is_judged(tiny_model, monkeypatch, name):
    monkeypatch.setattr(compare, "load_prose", lambda: ["Rivers are slow in summer."])
    run = compare.train_method(name, 1, torch.device("cpu"), steps=3, judged=2, **QUICK)
    assert (run["method"], run["seed"], run["peak_allocated"], len(run["losses"])) == (name, 1, None, 3)
    assert {split: len(bits) for split, bits in run["exact"].items()} == {"test": 2, "shifted": 2}
    assert run["after"]["validation"] < run["before"]["validation"]
    assert run["tokens_per_second"] > 0


def test_the_seed_decides(tiny_model, monkeypatch):
    monkeypatch.setattr(compare, "load_prose", lambda: ["Rivers are slow in summer."])
    monkeypatch.setattr(compare, "generate", lambda model, tokenizer, chats, *_, **__: [""] * len(chats))
    losses = [
        compare.train_method("nf4", seed, torch.device("cpu"), steps=2, judged=1, **QUICK)["losses"]
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_every_method_starts_from_the_same_adapter(tiny_model):
    adapters = []
    for method in compare.METHODS.values():
        model, _ = compare.load_base(method, torch.device("cpu"), torch.float32)
        adapters.append([layer.lora_A for layer in lora_layers(compare.add_lora(model, rank=4, seed=3)).values()])
    for matrices in adapters:
        assert all(torch.equal(a, b) for a, b in zip(matrices, adapters[0], strict=True))


def test_accuracy_is_recorded_run_by_run_and_speed_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    calls = []

    def run(name, seed, device, **settings):
        calls.append((name, seed, settings))
        numbers = {"losses": [2.0, 1.0], "after": {"validation": 1.0}, "exact": {"test": "01"}}
        speed = {"tokens_per_second": 7.0, "seconds_per_step": 0.1, "peak_allocated": 10**9}
        return {"method": name, "seed": seed, **numbers, **speed}

    monkeypatch.setattr(compare, "train_method", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compare.main(["accuracy", "--seeds", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "accuracy-some-gpu.json").read_text())
    assert [(r["method"], r["seed"]) for r in record["runs"]] == [(m, s) for s in (0, 1) for m in compare.METHODS]
    assert not any("tokens_per_second" in r for r in record["runs"])  # those may have shared the GPU
    assert record["alone"]["nf4"] == {"tokens_per_second": 7.0, "seconds_per_step": 0.1, "peak_allocated": 10**9}
    assert calls[-1] == ("int4", 0, {"steps": compare.TIMED_STEPS, "judged": 0})
    assert "test 1/2" in capsys.readouterr().out
    assert compare.main(["accuracy", "--jobs", "0"]) == 2
    assert "--jobs 0: at least 1" in capsys.readouterr().err
