import contextlib
import json
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from qlora_lab.evaluation.judge import Judgement
from qlora_lab.experiments import compare
from qlora_lab.finetuning import Batches, Loss, load_prose, load_samples, lora_layers
from qlora_lab.training.chat import tokenize_chat
from qlora_lab.training.presets import PRESETS
from qlora_lab.training.step_records import StepRecord


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
    monkeypatch.setattr(compare, "Judge", Spy([]))
    losses = [
        compare.train_method("nf4", seed, torch.device("cpu"), steps=2, judged=1, **QUICK)["losses"]
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def adapter(ready: compare.Ready) -> dict[str, torch.Tensor]:
    """What is trained, by name, whoever has wrapped the model."""
    return {name: p.detach() for name, p in ready.model.named_parameters() if p.requires_grad}


def test_every_method_starts_from_the_same_adapter(tiny_model):
    """In all that is trained, for a seed; and then on the same samples, in the same order."""
    first, *others = [compare.prepare_method(name, 3, torch.device("cpu"), **QUICK) for name in compare.METHODS]
    assert len(adapter(first)) == 2 * 2 * 7  # A and B of seven linears in two layers
    assert {len(p) for name, p in adapter(first).items() if "lora_A" in name} == {16}
    assert all(p.any() == ("lora_A" in name) for name, p in adapter(first).items())  # B is zero
    assert {layer.alpha for layer in lora_layers(first.model).values()} == {32}
    assert {ready.model.get_output_embeddings().weight.dtype for ready in (first, *others)} == {torch.float32}
    for other in others:
        assert adapter(other).keys() == adapter(first).keys()
        assert all(torch.equal(p, adapter(first)[name]) for name, p in adapter(other).items())
        assert (other.batches, other.settings) == (first.batches, first.settings)
    assert first.batches == {"batch_size": 2, "seed": 3}
    another = compare.prepare_method("lora-fp32", 4, torch.device("cpu"), **QUICK)
    assert all(not torch.equal(p, adapter(first)[name]) for name, p in adapter(another).items() if "lora_A" in name)


def test_methods_differ_in_their_bases_alone(tiny_model):
    """In the error of their weights: none, bf16's, and that of four bits, least for NF4."""
    errors, (fp32, *bases) = {}, [compare.load_base(m, torch.device("cpu"))[0] for m in compare.METHODS.values()]
    exact = fp32.model.layers[0].mlp.up_proj
    inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    for name, base in zip(list(compare.METHODS)[1:], bases, strict=True):
        weight = base.model.layers[0].mlp.up_proj
        assert base.dtype == torch.bfloat16
        difference = weight(inputs.bfloat16()).float() - exact(inputs)
        errors[name] = float((difference.norm() / exact(inputs).norm()).detach())
    assert exact.weight.dtype == torch.float32
    assert errors["lora-bf16"] < 0.01 < 0.05 < errors["nf4"] < errors["int4"] < errors["fp4"] < 0.2
    assert 0 < abs(errors["nf4-double"] - errors["nf4"]) < 0.01


def test_what_is_held_out_is_held_out(tokenizer):
    """Texts of the judgement are validation's orders and the course's prose, word for word, and none of training's."""
    texts = compare.held_out(tokenizer)
    chats = {split: load_samples("orders", split)["messages"] for split in ("train", "validation")}
    ids = {split: [tokenize_chat(chat, tokenizer).ids for chat in chats[split]] for split in chats}
    assert [sample.ids for sample in texts["validation"]] == ids["validation"]
    assert not {sample.ids for sample in texts["validation"]} & set(ids["train"])
    assert [tokenizer.decode(sample.ids) for sample in texts["prose"]] == load_prose()
    assert [len(compare.held_out(tokenizer, judged)["validation"]) for judged in (3, 0, 999)] == [3, 200, 200]


class Spy:
    """In the place of `Judge`: remembers what it was to put to a model, and what happened in which order."""

    def __init__(self, happened: list, exact: str = "10"):
        self.happened, self.exact = happened, exact

    def __call__(self, conversations, texts, tokenizer, dtype):
        self.conversations, self.texts, self.dtype = conversations, texts, dtype
        return SimpleJudge(self)


class SimpleJudge:
    def __init__(self, spy):
        self.spy = spy

    def losses(self, model) -> dict:
        self.spy.happened.append("losses")
        return {name: Loss(2.0 * len(texts), len(texts)) for name, texts in self.spy.texts.items()}

    def __call__(self, model) -> Judgement:
        return Judgement(dict.fromkeys(self.spy.conversations, self.spy.exact), self.losses(model))


def test_a_method_is_judged_where_it_was_not_trained(tiny_model, monkeypatch):
    """Losses before and after on the held-out texts, answers on `test` and `shifted`, training on `train`."""
    happened, samples = [], compare.load_samples
    monkeypatch.setattr(compare, "load_prose", lambda: ["Rivers are slow in summer."])
    monkeypatch.setattr(compare, "trained", lambda ready, steps: happened.append("training") or ([], None))
    monkeypatch.setattr(compare, "Judge", spy := Spy(happened))
    run = compare.train_method("lora-fp32", 0, torch.device("cpu"), judged=2)
    assert happened == ["losses", "training", "losses"]
    asked = {split: list(chats) for split, chats in spy.conversations.items()}
    assert asked == {split: list(samples("orders", split)["messages"])[:2] for split in ("test", "shifted")}
    assert {name: len(texts) for name, texts in spy.texts.items()} == {"validation": 2, "prose": 1}
    assert spy.dtype == torch.float32
    assert run["exact"] == {"test": "10", "shifted": "10"}
    assert run["before"] == run["after"] == {"validation": 2.0, "prose": 2.0}


def test_training_is_on_the_training_samples(tiny_model, tokenizer, monkeypatch):
    """The seed's batches of them, at the usual rate unless a way has its own."""
    told = []
    monkeypatch.setattr(
        compare, "train_steps", lambda model, batches, **settings: told.append((batches, settings)) or iter(())
    )
    ready = compare.prepare_method("lora-fp32", 5, torch.device("cpu"))
    compare.trained(ready, 4)
    ((batches, settings),) = told
    train = [tokenize_chat(chat, tokenizer) for chat in load_samples("orders", "train").select(range(100))["messages"]]
    assert batches == Batches(train, batch_size=8, seed=5)
    usual = {"learning_rate": 1.5e-3, "pad_token_id": 2, "compute_dtype": torch.float32, "optimizer": "adamw_torch"}
    assert settings == {"steps": 4, **usual}
    compare.trained(compare.Ready(ready.model, ready.tokenizer, {"learning_rate": 0.5}, {}), 4)
    assert told[-1][1]["learning_rate"] == 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_adapted_trained_and_judged_as_its_recipe_says(tiny_model, monkeypatch, name):
    told, samples = {}, compare.load_samples
    adapt = type(PRESETS[name]).adapt
    monkeypatch.setattr(
        type(PRESETS[name]), "adapt", lambda preset, *of, **how: adapt(preset, *of, **told.update(how) or how)
    )

    def trained(ready, steps):
        told.update(ready=ready, steps=steps)
        return [
            StepRecord(n, loss=3.0 - n, tokens=70, seconds=10.0, learning_rate=1.0, gradient_norm=1.0) for n in (1, 2)
        ], 8

    monkeypatch.setattr(compare, "trained", trained)
    monkeypatch.setattr(compare, "held_out", lambda tokenizer: {"validation": ["a text"]})
    monkeypatch.setattr(compare, "Judge", spy := Spy([], exact="0111"))
    run = compare.train_preset(name, 3, torch.device("cpu"), steps=2, judged=4)
    assert (told["rank"], told["alpha"], told["seed"], told["steps"]) == (16, 32, 3, 2)
    assert told["ready"].settings == PRESETS[name].settings(torch.bfloat16)
    assert told["ready"].batches == {"batch_size": 8, "seed": 3}
    assert {p.dtype for p in adapter(told["ready"]).values()} == {getattr(torch, PRESETS[name].adapter_dtype)}
    assert list(spy.conversations["test"]) == list(samples("orders", "test")["messages"])[:4]
    learned = {"losses": [2.0, 1.0], "validation_loss": 2.0, "exact_match": 0.75}
    assert run == {"preset": name, "seed": 3, **learned, "peak_allocated": 8, "seconds": 20.0}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("accuracy", ("accuracy", 8, 1)),
        ("knobs", ("knobs", 3, 1)),
        ("presets", ("presets", 3)),
        ("accuracy --seeds 2 --jobs 4", ("accuracy", 2, 4)),
        ("presets --seeds 5", ("presets", 5)),
    ],
)
def test_how_much_is_run(monkeypatch, tmp_path, arguments, told):
    runs = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        compare, "compare", lambda what, seeds, output, jobs: runs.append((what, seeds, jobs)) or output
    )
    monkeypatch.setattr(compare, "compare_presets", lambda seeds, output: runs.append(("presets", seeds)) or output)
    assert compare.main([*arguments.split(), "--output", str(tmp_path)]) == 0
    assert runs == [told]


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
        compare.multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=Pool) if method == "spawn" else None
    )
    runs = list(compare.many_runs([(train, "nf4", 0), (train, "fp4", 1)], jobs))
    assert sorted(runs) == ["fp4 1 cuda", "nf4 0 cuda"]
    assert pools == ([] if jobs == 1 else [3])


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


def told(ready: compare.Ready) -> dict:
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


@pytest.mark.parametrize("name", compare.KNOBS)
def test_a_knob_turns_what_it_names_and_nothing_else(tiny_model, name):
    assert told(compare.prepare_knob(name, 6, torch.device("cpu"))) == {**USUAL, **CHANGED[name]}


def test_the_seed_makes_a_knobs_adapter(tiny_model):
    first, again, other = (adapter(compare.prepare_knob("rank 4", seed, torch.device("cpu"))) for seed in (1, 1, 2))
    assert all(torch.equal(p, again[name]) for name, p in first.items())
    assert all(not torch.equal(p, other[name]) for name, p in first.items() if "lora_A" in name)


def test_a_knob_comes_before_what_is_changed_for_a_cpus_sake(tiny_model):
    ready = compare.prepare_knob("rank 4", 6, torch.device("cpu"), rank=2, batch_size=2)
    assert told(ready) == {**USUAL, "rank": 4, "alpha": 8, "batch_size": 2}


@pytest.mark.parametrize("name", compare.KNOBS)
def test_every_knob_is_a_setting_and_trains(tiny_model, monkeypatch, name):
    """What needs a GPU is replaced by what a CPU has, one by one."""
    knobs = dict(compare.KNOBS[name])
    if knobs.get("compute_dtype") == torch.float16:
        knobs["compute_dtype"] = torch.bfloat16
    if "paged" in knobs.get("optimizer", ""):
        knobs["optimizer"] = knobs["optimizer"].replace("paged_adamw_32bit", "adamw_torch").replace("paged_", "")
    monkeypatch.setitem(compare.KNOBS, name, knobs)
    monkeypatch.setattr(compare, "held_out", lambda tokenizer: {"validation": ["a text"]})
    monkeypatch.setattr(compare, "Judge", Spy([]))
    run = compare.train_knob(name, 0, torch.device("cpu"), steps=2, compute_dtype=torch.float32)
    assert len(run["losses"]) == 2 and run["after"] == {"validation": 2.0}
    if name.startswith("rank"):
        assert run["trainable"] % int(name.removeprefix("rank ")) == 0


def test_accumulation_and_batches_make_the_same_step(tiny_model, monkeypatch):
    monkeypatch.setattr(compare, "held_out", lambda tokenizer: {})
    runs = [
        compare.train_knob(name, 0, torch.device("cpu"), steps=2, compute_dtype=torch.float32)
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
        raise compare.TrainingDiverged("the loss is nan")

    monkeypatch.setattr(compare, "train_steps", diverge)
    monkeypatch.setattr(compare, "Judge", lambda *_: pytest.fail("judged"))
    run = compare.train_knob("rank 4", 1, torch.device("cpu"), steps=3, compute_dtype=torch.float32)
    assert (run["knob"], run["seed"], run["after"], run["peak_allocated"]) == ("rank 4", 1, None, None)
    assert run["trainable"] == 4 * 2 * (2 * 128 + 2 * 96 + 3 * 192)  # rank, layers; in + out of q o, k v, gate up down
    if before:
        assert (run["losses"], run["tokens"], run["seconds_per_step"]) == ([2.0, 1.0], 61.5, 10.0)
    else:
        assert (run["losses"], run["tokens"], run["tokens_per_second"]) == ([], None, None)
