import json
import math
import statistics

import pytest
import torch

from qlora_lab.finetuning import compare, lora_layers
from qlora_lab.finetuning.presets import PRESETS
from qlora_lab.finetuning.train import StepRecord


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
    load_model, load_samples = compare.load_model, compare.load_samples
    monkeypatch.setattr(compare, "load_model", lambda **named: load_model(tiny_folder, **named))
    monkeypatch.setattr(compare, "load_samples", lambda *of: load_samples(*of).select(range(100)))


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


@pytest.mark.parametrize(
    ("what", "key", "ways"), [("accuracy", "method", compare.METHODS), ("knobs", "knob", compare.KNOBS)]
)
def test_ways_are_timed_alone_and_recorded_run_by_run(monkeypatch, tmp_path, capsys, what, key, ways):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = [StepRecord(n, loss=1.0, tokens=70, seconds=10.0, learning_rate=1.0, gradient_norm=1.0) for n in range(5)]

    def run(name, seed, device, **settings):
        numbers = {"losses": [2.0, 1.0], "after": {"validation": 1.0}, "exact": {"test": "01"}}
        return {key: name, "seed": seed, **numbers, **compare.speed(steps), "peak_allocated": 10**9}

    monkeypatch.setattr(compare, f"prepare_{key}", lambda name, seed, device: (name, seed))
    monkeypatch.setattr(compare, f"train_{key}", run)
    monkeypatch.setattr(compare, "trained", lambda ready, steps_: (steps if steps_ == compare.TIMED_STEPS else [], 8))
    assert compare.main([what, "--seeds", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / f"{what}-some-gpu.json").read_text())
    assert [(r[key], r["seed"]) for r in record["runs"]] == [(way, seed) for seed in (0, 1) for way in ways]
    assert not any("tokens_per_second" in r for r in record["runs"])  # those may have shared the GPU
    timed = {"tokens_per_second": 7.0, "seconds_per_step": 10.0, "peak_allocated": 8}
    assert record["alone"] == dict.fromkeys(ways, timed)
    assert "validation 1.0000, test 1/2" in capsys.readouterr().out
    assert compare.main([what, "--jobs", "0"]) == 2
    assert "--jobs 0: at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", compare.KNOBS)
def test_every_knob_is_a_setting_and_trains(tiny_model, monkeypatch, name):
    """What needs a GPU is replaced by what a CPU has, one by one."""
    knobs = dict(compare.KNOBS[name])
    if knobs.get("compute_dtype") == torch.float16:
        knobs["compute_dtype"] = torch.bfloat16
    if "paged" in knobs.get("optimizer", ""):
        knobs["optimizer"] = knobs["optimizer"].replace("paged_adamw_32bit", "adamw_torch").replace("paged_", "")
    monkeypatch.setitem(compare.KNOBS, name, knobs)
    monkeypatch.setattr(compare, "held_out", lambda tokenizer: {})
    monkeypatch.setattr(compare, "text_losses", lambda *_: {"validation": 1.0})
    run = compare.train_knob(name, 0, torch.device("cpu"), steps=2, compute_dtype=torch.float32)
    assert len(run["losses"]) == 2 and run["after"] == {"validation": 1.0}
    if name.startswith("rank"):
        assert run["trainable"] % int(name.removeprefix("rank ")) == 0


def test_accumulation_and_batches_make_the_same_step(tiny_model, monkeypatch):
    monkeypatch.setattr(compare, "held_out", lambda tokenizer: {})
    monkeypatch.setattr(compare, "text_losses", lambda *_: {"validation": 1.0})
    runs = [
        compare.train_knob(name, 0, torch.device("cpu"), steps=2, compute_dtype=torch.float32)
        for name in ("as it is", "batch 4 x 2", "batch 1 x 8")
    ]
    for run in runs[1:]:
        assert run["losses"] == pytest.approx(runs[0]["losses"], rel=1e-4)


def test_a_diverged_run_is_a_result(tiny_model, monkeypatch):
    def diverge(*arguments, **settings):
        raise compare.TrainingDiverged("the loss is nan")
        yield

    monkeypatch.setattr(compare, "train_steps", diverge)
    run = compare.train_knob("as it is", 0, torch.device("cpu"), steps=2, compute_dtype=torch.float32)
    assert (run["losses"], run["after"], run["tokens_per_second"]) == ([], None, None)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_t_quantile_where_it_has_a_closed_form(level):
    assert compare.t_quantile(1, level) == pytest.approx(math.tan(level * math.pi / 2), rel=1e-7)
    assert compare.t_quantile(2, level) == pytest.approx(level * math.sqrt(2 / (1 - level**2)), rel=1e-7)
    normal = statistics.NormalDist().inv_cdf((1 + level) / 2)
    z, freedom = normal, 10_000  # the first term of the expansion in 1 / freedom
    assert compare.t_quantile(freedom, level) == pytest.approx(z + (z**3 + z) / (4 * freedom), rel=1e-6)


@pytest.mark.parametrize(
    ("freedom", "table"), [(3, "3.182"), (4, "2.776"), (7, "2.365"), (10, "2.228"), (30, "2.042"), (199, "1.972")]
)
def test_t_quantile_is_that_of_the_printed_tables(freedom, table):
    assert f"{compare.t_quantile(freedom):.3f}" == table


@pytest.mark.parametrize("count", [2, 3, 8])
def test_95_of_100_intervals_hold_the_true_mean(count):
    draw = torch.Generator().manual_seed(count)
    trials = (3 + 2 * torch.randn(4000, count, generator=draw, dtype=torch.float64)).tolist()
    held = sum(abs(mean - 3) <= half for mean, half in map(compare.paired_interval, trials))
    assert abs(held / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_paired_interval_by_hand():
    mean, half = compare.paired_interval([1.0, 2.0, 6.0])  # variance (4 + 1 + 9) / 2 = 7
    assert (mean, half) == (pytest.approx(3), pytest.approx(4.3026527 * math.sqrt(7 / 3), rel=1e-7))
    assert compare.paired_interval([2.5, 2.5]) == (2.5, 0)


@pytest.mark.parametrize("differences", [[], [1.0]])
def test_one_difference_has_no_interval(differences):
    with pytest.raises(ValueError, match="at least 2 are needed"):
        compare.paired_interval(differences)


@pytest.mark.parametrize("wrong", [(0, 0.95), (3, 1.0), (3, 95)])
def test_t_quantile_refuses(wrong):
    with pytest.raises(ValueError, match="expected at least 1"):
        compare.t_quantile(*wrong)
