"""The speeds' arithmetic, and the loops on a CPU with a tiny model: what is timed needs a GPU."""

import importlib
import json
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qlora_lab.adapters.peft_adapter import add_adapter
from qlora_lab.experiments import record, sft_trainer, step_speed, step_ways, unsloth_process
from qlora_lab.experiments.__main__ import main
from qlora_lab.experiments.step_profile import kind_of
from qlora_lab.memory.shapes import SHAPES, Shape
from qlora_lab.models.random_weights import build_random
from qlora_lab.training.step_records import StepRecord

TINY = Shape(64, 192, 2, 4, 2, 97)
SETTINGS = [(1, True), (4, True), (4, False), (16, True)]


def steps(*seconds: float, tokens: int = 100) -> list[StepRecord]:
    return [StepRecord(n, 9.0 - n, 1e-4, 1.0, tokens, s) for n, s in enumerate(seconds, 1)]


@pytest.fixture
def on_a_cpu(monkeypatch):
    """A tiny shape in the place of 7B's, an optimizer without paging, and no GPU to wait for."""
    monkeypatch.setitem(SHAPES, step_ways.SHAPE, TINY)
    monkeypatch.setitem(step_ways.COMMON, "optimizer", "adamw_torch")
    monkeypatch.setattr(step_ways, "LENGTH", 12)
    monkeypatch.setattr(sft_trainer, "LENGTH", 12)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)


def tiny():
    model = build_random(TINY, None, device="cpu", compute_dtype=torch.float32)
    return add_adapter(model, rank=4, alpha=4)


def test_a_row_has_the_one_definition_of_speed():
    """By hand: the first two steps are warm-up, whatever they took."""
    found = step_ways.result(steps(90.0, 50.0, 1.0, 4.0, 2.0))
    assert found["tokens_per_second"] == 50.0 and found["milliseconds"] == 2000.0
    assert found["losses"] == [8.0, 7.0, 6.0, 5.0, 4.0]
    assert set(found) == {"milliseconds", "tokens_per_second", "peak_allocated", "peak_reserved", "losses"}


def test_the_floor_is_the_arithmetic_alone(monkeypatch):
    """By hand: 4 linears of 64 x 64 and 3 of 64 x 192 in each of two layers, the head; 6 operations, or 4."""
    monkeypatch.setitem(SHAPES, step_ways.SHAPE, TINY)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 192) + 97 * 64
    assert step_speed.floor(10, True, 1e6) == pytest.approx(1e3 * 6 * weights * 10 / 1e6)
    assert step_speed.floor(10, False, 1e6) == pytest.approx(1e3 * 4 * weights * 10 / 1e6)


def test_kernels_are_sorted_by_name():
    assert kind_of("void cutlass_80_gemm<...>") == "matrix product"
    assert kind_of("flash_fwd_kernel") == "attention"
    assert kind_of("kDequantizeBlockwise") == "dequantize"
    assert kind_of("vectorized_add") == "elementwise and sums"


def test_all_ways_train_on_the_same_four_steps():
    drawn = step_ways.samples_of_steps(2)
    assert len(drawn) == 8 and {len(sample.ids) for sample in drawn} == {512}
    assert drawn == step_ways.samples_of_steps(2) and drawn[:4] == step_ways.samples_of_steps(1)


def test_the_plain_loop_trains(on_a_cpu):
    model, given = tiny(), []
    parameters = [p for p in model.parameters() if p.requires_grad]

    def forward_backward(ids):
        given.append(ids)
        for p in parameters:
            p.grad = None
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    records = list(step_ways.plain_loop(forward_backward, parameters, step_ways.samples_of_steps(2), 2, 16))
    assert [record.step for record in records] == list(range(1, 17))
    assert {ids.shape for ids in given} == {(2, 12)}
    assert torch.equal(given[0], given[4]) and not any(torch.equal(given[0], ids) for ids in given[1:4])
    assert {record.tokens for record in records} == {24} and min(record.seconds for record in records) > 0
    assert records[-1].loss < records[3].loss  # on the same samples
    assert [r.learning_rate for r in records[:4]] == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4])


def test_sft_trainer_is_timed_from_step_to_step(on_a_cpu, monkeypatch, tokenizer):
    """By a clock that goes on in two places: before the first step, and while the GPU finishes a step."""
    pytest.importorskip("trl", reason="TRL has left Python 3.10")
    from trl.trainer.sft_trainer import SFTTrainer

    now, waited, train = [0.0], [], SFTTrainer.train

    def prepared(trainer):
        now[0] += 1000
        return train(trainer)

    def finished(*_):
        waited.append(len(waited) + 1)
        now[0] += waited[-1]

    monkeypatch.setattr(SFTTrainer, "train", prepared)
    monkeypatch.setattr(torch.cuda, "synchronize", finished)
    monkeypatch.setattr(sft_trainer, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    records = sft_trainer.sft_steps(tiny(), tokenizer, step_ways.samples_of_steps(2), 2, False, 5, use_cpu=True)
    assert [record.step for record in records] == [1, 2, 3, 4, 5] == waited
    assert [record.seconds for record in records] == [1, 2, 3, 4, 5]
    assert {record.tokens for record in records} == {24}
    assert all(3 < record.loss < 7 for record in records)  # about log 97, on random tokens


@pytest.fixture
def unsloth_speed(monkeypatch):
    """The module, with a stand-in for Unsloth that is plain transformers and PEFT on a CPU."""
    unsloth, asked = ModuleType("unsloth"), []

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(folder, **settings):
            asked.append(settings["use_gradient_checkpointing"])
            return build_random(TINY, None, device="cpu", compute_dtype=torch.float32), "a tokenizer"

        @staticmethod
        def get_peft_model(model, *, r, lora_alpha, target_modules, use_gradient_checkpointing, **_):
            asked.append(use_gradient_checkpointing)
            return add_adapter(model, rank=r, alpha=lora_alpha, targets=target_modules)

        @staticmethod
        def for_training(model):
            model.train()

    unsloth.FastLanguageModel, unsloth.asked = FastLanguageModel, asked
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    monkeypatch.delitem(sys.modules, "qlora_lab.experiments.unsloth_speed", raising=False)
    yield importlib.import_module("qlora_lab.experiments.unsloth_speed")
    sys.modules.pop("qlora_lab.experiments.unsloth_speed", None)


@pytest.mark.parametrize(
    ("who", "checkpointing", "mode"),
    [
        ("unsloth", True, "unsloth"),
        ("unsloth", False, False),
        ("unsloth, on the GPU", True, True),
        ("unsloth, plain loop", True, "unsloth"),
        ("unsloth, plain loop", False, False),
        ("unsloth, plain loop, on the GPU", True, True),
    ],
)
def test_unsloth_trains_as_its_row_says(on_a_cpu, unsloth_speed, monkeypatch, who, checkpointing, mode):
    trainers = []
    monkeypatch.setattr(unsloth_speed, "sft_steps", lambda *of: trainers.append(of[3:]) or steps(1.0, 1.0, 2.0))
    run = unsloth_speed.run("a folder", 64, who, 2, checkpointing, 6)
    assert sys.modules["unsloth"].asked == [mode, mode]
    if "plain" in who:
        assert not trainers and len(run["losses"]) == 6 and run["losses"][-1] < run["losses"][1]
    else:
        assert trainers == [(2, checkpointing, 6)] and run["milliseconds"] == 2000.0


def test_one_of_unsloths_runs_that_fails_does_not_end_the_others(unsloth_speed, monkeypatch, capsys):
    def run(folder, rank, who, batch, checkpointing, steps):
        if batch == 4:
            raise RuntimeError("no kernel for this")
        return {"milliseconds": 1.0}

    monkeypatch.setattr(unsloth_speed, "run", run)
    rows = [["unsloth", batch, True] for batch in (1, 4, 16)]
    monkeypatch.setattr(sys, "argv", ["unsloth_speed", "a folder", "20", "64", json.dumps(rows)])
    assert unsloth_speed.main() == 1
    out, error = capsys.readouterr()
    assert [json.loads(line)["batch_size"] for line in out.splitlines()] == [1, 16]
    assert "unsloth, batch 4:" in error and "no kernel for this" in error


def test_unsloths_plain_loop_stands_beside_its_trainer_at_every_setting():
    rows = unsloth_process.ROWS
    assert [row[1:] for row in rows if row[0] == "unsloth"] == SETTINGS
    assert [row[1:] for row in rows if row[0] == "unsloth, plain loop"] == SETTINGS
    for who in ("unsloth, on the GPU", "unsloth, plain loop, on the GPU"):
        assert [row[1:] for row in rows if row[0] == who] == [(1, True), (4, True), (16, True)]


def test_unsloth_has_a_process_of_its_own(on_a_cpu, monkeypatch, capsys):
    """It gets a model that transformers can read, and what it prints beside its runs is left out."""
    started = []

    class Child:
        returncode = 1
        stdout = ["Unsloth: patching\n", '{"who": "unsloth"}\n', "{}\n"]

        def __init__(self, command, cwd, env, **_):
            from transformers import AutoConfig, AutoTokenizer

            assert AutoConfig.from_pretrained(cwd).quantization_config["bnb_4bit_quant_type"] == "nf4"
            assert AutoTokenizer.from_pretrained(cwd).pad_token == "<pad>"
            started.append((command[1:4], command[-3:], env["UNSLOTH_DISABLE_STATISTICS"]))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(
        unsloth_process,
        "build_random",
        lambda *_, **how: build_random(TINY, "nf4", device="cpu", compute_dtype=torch.float32),
    )
    assert list(unsloth_process.unsloth_runs([("unsloth", 1, True)], 20)) == [{"who": "unsloth"}, {}]
    (start,) = started
    assert start[0][:2] == ["-m", "qlora_lab.experiments.unsloth_speed"]
    assert start[1:] == (["20", "64", '[["unsloth", 1, true]]'], "1")
    assert "exit status 1" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- the experiment


@pytest.fixture
def made(monkeypatch, some_gpu):
    """What was run on a pretended GPU, where TRL and Unsloth are installed."""
    made = []
    monkeypatch.setattr(record, "versions", lambda packages: dict.fromkeys(packages, "1"))
    monkeypatch.setattr(step_speed, "matrix_product_rate", lambda: made.append("rate") or 1e15)
    monkeypatch.setattr(step_speed, "running", lambda *of: made.append(of[:3]) or steps(1.0, 1.0, 0.5))
    monkeypatch.setattr(step_speed, "trl_steps", lambda *of: made.append(("trl", *of[:2])) or steps(1.0, 1.0, 0.5))
    monkeypatch.setattr(step_speed, "profile", lambda *of: made.append(("profile", *of)) or {"kernels": 1})
    monkeypatch.setattr(
        step_speed,
        "bundled",
        lambda who, n: made.append(("bundled", who)) or {**step_ways.result(steps(1.0)), "tokens": 5},
    )
    result = step_ways.result(steps(1.0, 1.0, 0.5))
    monkeypatch.setattr(
        step_speed,
        "unsloth_runs",
        lambda rows, n: (made.append(row) or {**step_speed.key_of(*row), **result} for row in rows),
    )
    return made


def test_every_way_is_timed_at_every_setting(made, tmp_path, capsys):
    assert main(["step", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "step-some-gpu.json").read_text())
    runs = [(run["who"], run["batch_size"], run["gradient_checkpointing"]) for run in written["runs"]]
    ours = [(who, *s) for s in SETTINGS for who in step_speed.ways_of(*s)]
    assert runs == [*ours, *unsloth_process.ROWS] and len(set(runs)) == len(runs)
    assert [who for who, *setting in ours if setting == [4, False]] == [
        "standard", "bf16", "graph", "unrecorded", "trl", "fast",
    ]  # fmt: skip
    assert made[0] == "rate" and set(written["bundled"]) == {"standard", "fast"} and len(written["profiles"]) == 8
    first = written["runs"][0]
    assert first["share_of_floor"] == step_speed.floor(512, True, 1e15) / first["milliseconds"]
    assert "unsloth, plain loop, batch 16, checkpointing" in capsys.readouterr().out

    made.clear()
    assert main(["step", "--output", str(tmp_path)]) == 2  # another run's times are not mixed in
    assert "is there already" in capsys.readouterr().err
    assert main(["step", "--output", str(tmp_path), "--continue-from", str(tmp_path / "step-some-gpu.json")]) == 0
    assert made == []


@pytest.mark.parametrize(
    ("only", "done"),
    [
        (["fast"], [("fast", *setting) for setting in SETTINGS]),
        (["bundled"], [("bundled", "standard"), ("bundled", "fast")]),
        (["unsloth"], unsloth_process.ROWS),
        (["unsloth, plain loop"], [row for row in unsloth_process.ROWS if row[0] == "unsloth, plain loop"]),
    ],
)
def test_only_what_is_named_is_timed(made, only, done):
    assert main(["step", "--only", *only]) == 0
    assert made == ["rate", *done]


def test_what_is_not_installed_is_left_out(made, monkeypatch, capsys):
    monkeypatch.setattr(record, "versions", lambda packages: {"torch": "1"})
    assert main(["step", "--only", "trl", "unsloth"]) == 0
    assert made == ["rate"]
    out = capsys.readouterr().out
    assert "trl is not installed: left out" in out and "unsloth is not installed: left out" in out
