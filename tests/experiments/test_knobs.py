import bitsandbytes
import pytest
import torch

from qlora_lab.experiments import knobs, orders
from qlora_lab.training.step_records import StepRecord
from tests.experiments.conftest import Spy, adapter


def told(ready: orders.Ready) -> dict:
    """What a knob's run is told, and what its adapter became."""
    config = ready.model.peft_config["default"]
    return {
        **ready.settings,
        **ready.batches,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "targets": {name.split(".")[-4] for name in adapter(ready)},
        "base": {m.compute_dtype for m in ready.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)},
    }


USUAL = {
    "rank": 16, "alpha": 32, "learning_rate": 1.5e-3, "optimizer": "adamw_torch", "gradient_checkpointing": False,
    "targets": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "compute_dtype": torch.bfloat16, "base": {torch.bfloat16}, "batch_size": 8, "accumulation": 1, "packing": False,
    "max_length": 256, "seed": 6,
}  # fmt: skip
CHANGED = {
    "as it is": {},
    "checkpointing": {"gradient_checkpointing": True},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "paged_adamw_32bit": {"optimizer": "paged_adamw_32bit"},
    "paged_adamw_8bit": {"optimizer": "paged_adamw_8bit"},
    "batch 4 x 2": {"batch_size": 4, "accumulation": 2},
    "batch 1 x 8": {"batch_size": 1, "accumulation": 8},
    "batch 32": {"batch_size": 32},
    "packing": {"batch_size": 3, "packing": True},
    "float16": {"compute_dtype": torch.float16, "base": {torch.float16}},
    "float32": {"compute_dtype": torch.float32, "base": {torch.float32}},
    "rank 4": {"rank": 4, "alpha": 8},
    "rank 64": {"rank": 64, "alpha": 128},
    "q, v": {"targets": {"q_proj", "v_proj"}},
    "q, k, v, o": {"targets": {"q_proj", "k_proj", "v_proj", "o_proj"}},
    "lr 1.5e-4": {"learning_rate": 1.5e-4},
    "lr 5e-4": {"learning_rate": 5e-4},
    "lr 5e-3": {"learning_rate": 5e-3},
    "lr 1.5e-2": {"learning_rate": 1.5e-2},
}


@pytest.mark.parametrize("name", knobs.KNOBS)
def test_a_knob_turns_what_it_names_and_nothing_else(tiny_model, name):
    assert told(knobs.prepare_knob(name, 6, torch.device("cpu"))) == {**USUAL, **CHANGED[name]}


def test_the_seed_makes_a_knobs_adapter(tiny_model):
    first, again, other = (adapter(knobs.prepare_knob("rank 4", seed, torch.device("cpu"))) for seed in (1, 1, 2))
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert all(not torch.equal(p, other[name]) for name, p in first.items() if "lora_A" in name)


def test_a_knob_comes_before_what_is_changed_for_a_cpus_sake(tiny_model):
    ready = knobs.prepare_knob("rank 4", 6, torch.device("cpu"), rank=2, batch_size=2)
    assert told(ready) == {**USUAL, "rank": 4, "alpha": 8, "batch_size": 2}


@pytest.mark.parametrize("name", knobs.KNOBS)
def test_every_knob_is_a_setting_and_trains(tiny_model, monkeypatch, name):
    """What needs a GPU is replaced by what a CPU has, one by one."""
    turned = dict(knobs.KNOBS[name])
    if turned.get("compute_dtype") == torch.float16:
        turned["compute_dtype"] = torch.bfloat16
    if "paged" in turned.get("optimizer", ""):
        turned["optimizer"] = turned["optimizer"].replace("paged_adamw_32bit", "adamw_torch").replace("paged_", "")
    monkeypatch.setitem(knobs.KNOBS, name, turned)
    monkeypatch.setattr(knobs, "held_out", lambda tokenizer: {"validation": ["a text"]})
    monkeypatch.setattr(knobs, "Judge", Spy([]))
    run = knobs.train_knob(name, 0, torch.device("cpu"), steps=2, compute_dtype=torch.float32)
    assert len(run["losses"]) == 2 and run["after"] == {"validation": 2.0}
    if name.startswith("rank"):
        assert run["trainable"] % int(name.removeprefix("rank ")) == 0


def test_accumulation_and_batches_make_the_same_step(tiny_model, monkeypatch):
    monkeypatch.setattr(knobs, "held_out", lambda tokenizer: {})
    runs = [
        knobs.train_knob(name, 0, torch.device("cpu"), steps=2, compute_dtype=torch.float32)
        for name in ("as it is", "batch 4 x 2", "batch 1 x 8")
    ]
    for run in runs[1:]:
        assert run["losses"] == pytest.approx(runs[0]["losses"], rel=1e-4)


@pytest.mark.parametrize("before", [0, 2])
def test_a_diverged_run_is_a_result(tiny_model, monkeypatch, before):
    """What was reached is told; a model that is no longer numbers is not judged."""

    def diverge(*arguments, **settings):
        for n in range(1, before + 1):
            yield StepRecord(n, loss=3.0 - n, tokens=60 + n, seconds=10.0, learning_rate=1.0, gradient_norm=1.0)
        raise orders.TrainingDiverged("the loss is nan")

    monkeypatch.setattr(orders, "train_steps", diverge)
    monkeypatch.setattr(knobs, "Judge", lambda *_: pytest.fail("judged"))
    run = knobs.train_knob("rank 4", 1, torch.device("cpu"), steps=3, compute_dtype=torch.float32)
    assert (run["knob"], run["seed"], run["after"], run["peak_allocated"]) == ("rank 4", 1, None, None)
    assert run["trainable"] == 4 * 2 * (2 * 128 + 2 * 96 + 3 * 192)  # rank, layers; in + out of q o, k v, gate up down
    if before:
        assert (run["losses"], run["tokens"], run["seconds_per_step"]) == ([2.0, 1.0], 61.5, 10.0)
    else:
        assert (run["losses"], run["tokens"], run["tokens_per_second"]) == ([], None, None)
