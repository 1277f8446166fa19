import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qlora_lab.experiments import memory_steps
from qlora_lab.experiments.memory_settings import Setting
from qlora_lab.experiments.memory_steps import MasterWeights, card_of, measure
from qlora_lab.memory.meter import Meter, Phase
from qlora_lab.memory.shapes import Shape
from qlora_lab.training.presets import PRESETS
from tests.conftest import watch_train_steps

MOMENTS = ("forward", "backward", "update")


@pytest.fixture
def trained(monkeypatch) -> list[dict]:
    """What `train_steps` was given, each time."""
    return watch_train_steps(monkeypatch, "qlora_lab.experiments.memory_steps")


RUNS = [("full", None), *((method, preset) for method in ("qlora", "lora") for preset in (None, *PRESETS))]


@pytest.mark.parametrize(("method", "preset"), RUNS)
def test_a_run_is_measured_phase_by_phase(method, preset, trained):
    recipe = replace(PRESETS[preset], optimizer="adamw_torch") if preset else None
    knobs = {"gradient_checkpointing": False, "rank": 4, "targets": ("q_proj", "v_proj"), "optimizer": "adamw_torch"}
    setting = Setting("tiny", method, 2, 16, **knobs, adapter_dtype="bfloat16" if method == "lora" else "float32")
    result = measure(setting, torch.device("cpu"), recipe, shape=Shape(64, 192, 2, 4, 2, 97))
    moments = [f"{step}: {moment}" for step in ("first step", "steady step") for moment in MOMENTS]
    assert list(result["phases"]) == ["load", "adapter", *moments]
    of_steps = [result["phases"][moment] for moment in moments]
    measured = result["measured"]
    assert measured["peak_allocated"] == max(phase["peak_allocated"] for phase in of_steps)
    assert measured["tokens_per_second"] == pytest.approx(2 * 16 / measured["step_seconds"])
    assert len(measured["losses"]) == 3
    json.dumps(result)

    [settings] = trained
    assert settings["bits"] == (4 if method == "qlora" else 16)
    assert settings["ids"] == (2, 16) and settings["steps"] == 3
    if method != "full":
        assert settings["rank"] == {4} and settings["targets"] == {"q_proj", "v_proj"}
    fp32 = (recipe.adapter_dtype if recipe else setting.adapter_dtype) == "float32"
    assert settings["adapter_dtype"] == {torch.float32 if fp32 else torch.bfloat16}
    assert settings["compute_dtype"] == (torch.bfloat16 if fp32 else torch.float32)  # fp32 under autocast, or bf16
    assert settings["gradient_checkpointing"] == (preset is not None)
    assert settings["loss_chunk"] == (128 if preset == "lean" else None)
    assert settings["update_in_backward"] == (preset in ("in-backward", "lean"))


def test_the_peak_is_that_of_the_steps_and_not_of_loading(monkeypatch):
    peaks = {"load": (900, 950), "adapter": (800, 850), "first step: forward": (500, 600)}
    peaks |= {"first step: update": (300, 640), "steady step: backward": (700, 700)}

    class Pretended(Meter):
        def mark(self, name, wait=True):
            self.phases[name] = Phase(0, *peaks.get(name, (100, 100)), 1.0)

    monkeypatch.setattr(memory_steps, "Meter", Pretended)
    setting = Setting("tiny", "lora", 1, 4, rank=4, optimizer="adamw_torch")
    measured = measure(setting, torch.device("cpu"), shape=Shape(64, 192, 2, 4, 2, 97))["measured"]
    assert (measured["peak_allocated"], measured["peak_reserved"]) == (700, 700)


def test_a_card_leaves_what_the_context_does_not_take(monkeypatch):
    """By hand: 12 GB less a context of 0.5 GB, of a GPU of 80 GB."""
    device, fractions = torch.device("cuda", 0), []
    properties = SimpleNamespace(total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: fractions.append(given))
    with pytest.raises(ZeroDivisionError), card_of(12, device):
        assert fractions == [(11.5 / 80, device)]
        raise ZeroDivisionError
    assert fractions[1:] == [(1.0, device)]  # whatever happens


def test_full_fine_tuning_in_mixed_precision_is_measured():
    setting = Setting("tiny", "full", 2, 16, optimizer="adamw_torch", full_precision="mixed")
    losses = measure(setting, torch.device("cpu"), shape=Shape(64, 192, 2, 4, 2, 97), steps=6)["measured"]["losses"]
    plain = replace(setting, full_precision="float32")
    beside = measure(plain, torch.device("cpu"), shape=Shape(64, 192, 2, 4, 2, 97), steps=6)["measured"]["losses"]
    assert losses == pytest.approx(beside, rel=0.01) and losses != beside


def test_master_weights_collect_what_bf16_alone_would_round_away():
    """The same gradients to AdamW in fp32, and in bf16 with and without master weights: 100 steps of 0.00001."""
    start, generator = torch.full((2, 3), 0.02, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    with_masters, alone, exact = (
        torch.nn.Parameter(start.to(dtype, copy=True)) for dtype in 2 * [start.dtype] + [torch.float32]
    )
    optimizers = [torch.optim.AdamW([p], lr=1e-5, weight_decay=0.0) for p in (with_masters, alone, exact)]
    optimizers[0] = MasterWeights(optimizers[0])
    for _ in range(100):
        gradient = (1 + 0.1 * torch.randn(2, 3, generator=generator)).bfloat16()
        for parameter, optimizer in zip((with_masters, alone, exact), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(alone, start)
    assert torch.equal(with_masters, exact.bfloat16())
    assert (exact < 0.0191).all() and with_masters.grad is None


def test_running_out_of_memory_is_a_result(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore")

    monkeypatch.setattr(memory_steps, "train_steps", full)
    setting = Setting("tiny", rank=4, optimizer="adamw_torch")
    result = measure(setting, torch.device("cpu"), shape=Shape(64, 192, 2, 4, 2, 97))
    assert result["out_of_memory"]["after"] == "adapter"
    assert result["out_of_memory"]["message"].endswith("20.00 MiB.")
    assert "measured" not in result
