import json

import pytest
import torch

from qlora_lab.finetuning import compare
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
