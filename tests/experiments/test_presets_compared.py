import json
import pathlib

import pytest
import torch

from qlora_lab.experiments import orders, presets_compared
from qlora_lab.experiments.__main__ import main
from qlora_lab.experiments.record import Record
from qlora_lab.training.data import load_samples
from qlora_lab.training.presets import PRESETS
from qlora_lab.training.step_records import StepRecord
from tests.experiments.conftest import Spy, adapter

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_adapted_trained_and_judged_as_its_recipe_says(tiny_model, monkeypatch, name):
    told = {}
    adapt = type(PRESETS[name]).adapt
    monkeypatch.setattr(
        type(PRESETS[name]), "adapt", lambda preset, *of, **how: adapt(preset, *of, **told.update(how) or how)
    )

    def trained(ready, steps):
        told.update(ready=ready, steps=steps)
        return [
            StepRecord(n, loss=3.0 - n, tokens=70, seconds=10.0, learning_rate=1.0, gradient_norm=1.0) for n in (1, 2)
        ], 8

    monkeypatch.setattr(presets_compared, "trained", trained)
    monkeypatch.setattr(presets_compared, "held_out", lambda tokenizer: {"validation": ["a text"]})
    monkeypatch.setattr(presets_compared, "Judge", spy := Spy([], exact="0111"))
    run = presets_compared.train_preset(name, 3, torch.device("cpu"), steps=2, judged=4)
    assert (told["rank"], told["alpha"], told["seed"], told["steps"]) == (16, 32, 3, 2)
    assert told["ready"].settings == PRESETS[name].settings(torch.bfloat16)
    assert told["ready"].batches == {"batch_size": 8, "seed": 3}
    assert {p.dtype for p in adapter(told["ready"]).values()} == {getattr(torch, PRESETS[name].adapter_dtype)}
    assert list(spy.conversations["test"]) == list(load_samples("orders", "test")["messages"])[:4]
    learned = {"losses": [2.0, 1.0], "validation_loss": 2.0, "exact_match": 0.75}
    assert run == {"preset": name, "seed": 3, **learned, "peak_allocated": 8, "seconds": 20.0}


def test_every_preset_is_run_at_every_seed_and_nothing_is_lost(some_gpu, monkeypatch, tmp_path, capsys):
    """Not even by a machine that goes away: the same command goes on where it stopped."""
    runs = []

    def run(name, seed, device):
        if len(runs) == 5:
            raise RuntimeError("the machine went away")
        runs.append((name, seed))
        numbers = {"validation_loss": 1.0, "exact_match": 0.5, "peak_allocated": 10**9, "seconds": 2.0}
        return {"preset": name, "seed": seed, "losses": [2.0, 1.0], **numbers}

    monkeypatch.setattr(presets_compared, "train_preset", run)
    command = ["presets", "--seeds", "2", "--output", str(tmp_path)]
    with pytest.raises(RuntimeError):
        main(command)
    record = json.loads((tmp_path / "presets-some-gpu.json").read_text())
    wanted = [(name, seed) for seed in (0, 1) for name in PRESETS]
    assert [(run["preset"], run["seed"]) for run in record["runs"]] == wanted[:5]
    assert record["device"] == "Some GPU"
    assert set(record["versions"]) == {"torch", "transformers", "peft", "bitsandbytes"}
    assert record["settings"]["judged"] == 100
    capsys.readouterr()

    runs.clear()
    assert main(command) == 0
    assert runs == wanted[5:]
    record = json.loads((tmp_path / "presets-some-gpu.json").read_text())
    assert [(run["preset"], run["seed"]) for run in record["runs"]] == wanted
    assert "has 5 runs, which are not made again" in capsys.readouterr().out


def test_the_recorded_presets_can_be_gone_on_with():
    """Those of the H100 were made with today's settings."""
    recorded = Record.read(ROOT / "data" / "records" / "presets-nvidia-h100-80gb-hbm3.json").content["settings"]
    assert orders.usual_settings() | presets_compared.SETTINGS == recorded
