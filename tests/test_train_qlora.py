"""The command line, as a user calls it, on a tiny random model: now and then in a process of its own (10 s each)."""

import dataclasses
import gc
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from peft import PeftModel

from qlora_lab import train_qlora
from qlora_lab.adapters.files import INITIAL, load_lora
from qlora_lab.adapters.merge_aware import merge_requantized
from qlora_lab.adapters.peft_adapter import load_adapter
from qlora_lab.adapters.quantized_linear import dense_weight, dequantize_linears
from qlora_lab.errors import UserError
from qlora_lab.evaluation import judge
from qlora_lab.evaluation.losses import Loss, text_loss
from qlora_lab.export.check import trained_model
from qlora_lab.export.merged_weights import MergedWeights
from qlora_lab.export.trained_run import read_run
from qlora_lab.finetuning import add_adapter, load_model, load_samples
from qlora_lab.models.sharded import CheckpointWeights
from qlora_lab.training.chat import tokenize_chat
from qlora_lab.training.data import load_prose
from qlora_lab.training.run_folder import LENGTH, save_adapter
from qlora_lab.training.step_records import StepRecord
from tests.conftest import ended, kill_train_qlora, processes

QUICK = "--steps 6 --batch-size 4 --eval-samples 2 --rank 4 --checkpoint-every 2 --quiet".split()


GOOD = '{"prompt": "a", "response": "b"}'


def jsonl(path: pathlib.Path, *lines: str) -> pathlib.Path:
    path.write_text("\n".join(lines))
    return path


def call(capsys, *arguments) -> tuple[dict, str]:
    """Run in this process, to a good end; what --json printed, and standard error."""
    assert train_qlora.main([*map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    return json.loads(out), err


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qlora_lab.train_qlora", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def told(monkeypatch) -> dict:
    """What the command line tells `load_model` and `train`. The model is loaded; nothing is trained."""
    told = {}

    def load(name, quantization, **named):
        told["load"] = {"name": name, "quantization": quantization, **named}
        model, told["tokenizer"] = load_model(name, quantization, **named)
        return model, told["tokenizer"]

    def train(model, batches, settings, **named):
        told.update(model=model, batches=batches, settings=settings, named=named)
        return [StepRecord(step, 1.0, 1.0, 1.0, tokens=10, seconds=0.1) for step in range(1, settings.steps + 1)]

    monkeypatch.setattr(train_qlora, "load_model", load)
    monkeypatch.setattr(train_qlora, "train", train)
    return told


@pytest.fixture
def judged(monkeypatch) -> dict:
    """What a model is judged on by the command line. The answer to everything is "yes"; a token costs 0.5 nats."""
    judged, answer = {"asked": [], "texts": []}, judge.generate

    def generate(model, tokenizer, conversations, max_new_tokens, dtype):
        judged.update(max_new_tokens=max_new_tokens, dtype=dtype)
        judged["asked"].append(conversations)
        return ["yes"] * len(conversations) if conversations else answer(model, tokenizer, [])

    def text_loss(model, samples, pad_token_id, dtype):
        judged["texts"].append(samples)
        return Loss(0.5 * len(samples), len(samples))

    monkeypatch.setattr(judge, "generate", generate)
    monkeypatch.setattr(judge, "text_loss", text_loss)
    return judged


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """One whole run: its output folder and its report."""
    output = tmp_path_factory.mktemp("finished") / "run"
    done = run("--model", tiny_folder, "--output", output, "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    return output, done


def test_json_and_nothing_else_on_standard_output(finished, tiny_folder):
    output, done = finished
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert set(report) == {
        "model", "method", "steps", "losses", "before", "after", "tokens_per_second", "train_seconds",
        "peak_memory_bytes", "trainable_parameters", "adapter",  # these are promised
        "processes", "sharded", "device", "compute_dtype", "samples_left_out", "resumed_at", "interrupted",
        "validation_losses", "adapter_step", "out_of_patience", "judged", "dense_base_bytes", "dullest_guess",
    }  # fmt: skip
    assert report["model"] == str(tiny_folder)
    assert len(report["losses"]) == report["steps"] == 6
    for moment in ("before", "after"):
        assert set(report[moment]["exact_match"]) == {"test", "shifted"}
        assert set(report[moment]["perplexity"]) == {"validation", "prose"}
    assert report == json.loads((output / "report.json").read_text())


def test_adapter_loads_with_plain_peft(finished, tiny_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.arange(100, 120)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, finished[0] / "adapter")
    assert not torch.allclose(adapted(ids).logits, before, atol=1e-4)
    trained = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert trained == json.loads(finished[1].stdout)["trainable_parameters"]


def test_the_adapters_card_has_scores_with_counts_and_no_path(finished, tiny_folder):
    card = (finished[0] / "adapter" / "README.md").read_text()
    report = json.loads(finished[1].stdout)
    of = report["judged"]["test"]
    values = (report[key]["exact_match"]["test"] for key in ("before", "after", "dullest_guess"))
    cells = " | ".join(f"{value:.0%} ({value * of:.0f} of {of})" for value in values)
    assert (
        f"\n| measure | before | after | dullest guess |\n|---|---|---|---|\n| exact match, test | {cells} |\n" in card
    )
    assert "- rank: " in card and "PeftModel.from_pretrained" in card
    assert str(tiny_folder.parent) not in card and str(finished[0].parent) not in card


def test_killed_and_resumed_run_has_the_same_losses(finished, tiny_folder, tmp_path):
    output = tmp_path / "run"
    arguments = ["--model", tiny_folder, "--output", output, "--json", *QUICK]
    kill_train_qlora(arguments, output, 3)
    resumed = run(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    report = json.loads(resumed.stdout)
    assert report["resumed_at"] == 2
    assert report["losses"] == json.loads(finished[1].stdout)["losses"]
    assert report["after"] == json.loads(finished[1].stdout)["after"]


# Of three samples, one process judges one more than the other; of four processes, one judges none of its own.
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.whole)])
def test_several_processes_train_to_the_same_loss(tiny_folder, tmp_path, capsys, count):
    """In float32: their sums differ in the last bits only. Rows and texts differ in length, so shares do, too."""
    command = ["--model", tiny_folder, "--json", *QUICK, "--eval-samples", "3", "--compute-dtype", "float32"]
    done = ended(processes(count, "qlora_lab.train_qlora", *command, "--output", tmp_path / "several"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert train_qlora.main([str(word) for word in [*command, "--output", tmp_path / "one"]]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert (report["processes"], alone["processes"]) == (count, 1)
    assert report["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for moment in ("before", "after"):
        assert report[moment]["perplexity"] == pytest.approx(alone[moment]["perplexity"], rel=1e-5)
        assert report[moment]["exact_match"] == alone[moment]["exact_match"]


def test_the_adapter_that_was_asked_for(capsys, tiny_folder, tmp_path, told):
    """Its kind, its beginning and its learning rates; what 4 bits lost, LoftQ's adapter mends in part."""
    flags = ["--model", tiny_folder, "--eval-samples", 0, "--output"]
    call(capsys, *flags, tmp_path / "a", "--adapter", "dora", "--lora-plus", "4", "--init", "loftq")
    assert told["settings"].lora_plus == 4
    layers = {
        name: layer for name, layer in told["model"].get_base_model().named_modules() if hasattr(layer, "base_layer")
    }
    dense = safetensors.torch.load_file(tiny_folder / "model.safetensors")
    assert len(layers) == 14
    for name, layer in layers.items():
        assert layer.use_dora["default"] and layer.scaling["default"] == 2
        lost = dense[f"{name}.weight"].float() - dense_weight(layer.base_layer).float()
        mended = lost - layer.get_delta_weight("default")
        best = torch.linalg.svdvals(lost)[16:].norm()
        torch.testing.assert_close(mended.norm(), best, rtol=1e-3, atol=1e-5)
        lengths = (dense[f"{name}.weight"].float() - mended).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, lengths, rtol=1e-3, atol=1e-5)
    call(capsys, *flags, tmp_path / "b", "--adapter", "rslora", "--alpha", 8)
    layer = next(layer for layer in told["model"].modules() if hasattr(layer, "base_layer"))
    assert layer.scaling["default"] == 2 and not layer.use_dora["default"] and not layer.lora_B["default"].weight.any()


def test_dora_with_loftq_and_lora_plus_is_a_whole_run(capsys, tiny_folder, tmp_path):
    from peft import PeftModel

    flags = ["--adapter", "dora", "--init", "loftq", "--lora-plus", "4"]
    report, _ = call(capsys, "--model", tiny_folder, "--output", tmp_path / "run", *QUICK, *flags)
    assert report["losses"][-1] < report["losses"][0]
    base, tokenizer = load_model(tiny_folder, quantization="nf4", device="cpu", compute_dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    magnitudes = [name for name, _ in adapted.named_parameters() if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 14
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == report["trainable_parameters"]


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_pissa_run_goes_on_is_loaded_and_is_exported_as_what_it_was(capsys, tiny_folder, tmp_path, method):
    """Judged, and asked once more: on whatever way a run comes back, the base is without what the adapters began as."""
    output = tmp_path / "run"
    flags = ["--model", tiny_folder, "--output", output, *QUICK, "--method", method, "--init", "pissa"]
    whole, _ = call(capsys, *flags)
    assert whole["losses"][-1] < whole["losses"][0]
    before = safetensors.torch.load_file(output / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(output / "checkpoints" / "checkpoint-000006")
    shutil.rmtree(output / "adapter")
    resumed, _ = call(capsys, *flags, "--resume")
    assert resumed["resumed_at"] == 4
    assert (resumed["losses"], resumed["after"]) == (whole["losses"], whole["after"])
    after = safetensors.torch.load_file(output / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    card = (output / "adapter" / "README.md").read_text()
    assert ("load_adapter(base" in card) == (method == "qlora") and "- init: pissa" in card
    assert {len(matrix) for name, matrix in after.items() if "lora_A" in name} == {4 if method == "qlora" else 8}
    run = read_run(output)
    assert run.left_over == (method == "qlora")
    base, _ = load_model(tiny_folder, "nf4" if run.quantized else None, device="cpu", compute_dtype=torch.float32)
    loaded = load_adapter(base, run.adapter, CheckpointWeights(str(tiny_folder)) if run.left_over else None)
    merged = dequantize_linears(loaded) if run.quantized else loaded
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        torch.testing.assert_close(trained_model(run)[0](ids).logits, merged.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    state = merged.merge_and_unload().state_dict()
    exported = MergedWeights(run)
    for name in exported.adapted:
        torch.testing.assert_close(exported[name], state[name], rtol=1e-5, atol=1e-5)
    without_adapter = MergedWeights(run, with_adapter=False)
    for name, A, B in exported.matrices():
        together = without_adapter[name] + exported.alpha_over_rank * B @ A
        torch.testing.assert_close(together, exported[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["run", "adapter"])
def test_a_pissa_run_without_what_it_began_as_is_refused(capsys, tiny_folder, tmp_path, file):
    flags = ["--model", tiny_folder, "--output", tmp_path / "run", *QUICK, "--init", "pissa"]
    call(capsys, *flags)
    folder = tmp_path / "run" if file == "run" else tmp_path / "run" / "adapter"
    (folder / INITIAL).unlink()
    if file == "run":
        message = fails(capsys, *flags, "--resume")
        assert f"without its {INITIAL} nobody knows what the base was trained as" in message
    else:
        with pytest.raises(UserError, match=r"is not plain LoRA \(init_lora_weights\)"):
            MergedWeights(read_run(tmp_path / "run"))


def test_lora_trains_the_same_number_of_parameters(capsys, finished, tiny_folder, tmp_path):
    report, _ = call(capsys, "--model", tiny_folder, "--output", tmp_path / "run", "--method", "lora", *QUICK)
    qlora = json.loads(finished[1].stdout)
    assert report["method"] == "lora"
    assert report["trainable_parameters"] == qlora["trainable_parameters"]
    assert report["losses"] != qlora["losses"]


def test_report_for_people(capsys, finished, tiny_folder, tmp_path):
    arguments = ["--model", tiny_folder, "--output", tmp_path / "run", "--beside", finished[0], "--method", "lora"]
    assert train_qlora.main([*map(str, arguments), *QUICK]) == 0
    shown = capsys.readouterr().out
    beside = [re.split(" {2,}", line) for line in shown.splitlines()[-2:]]
    assert [line[0] for line in beside] == ["qlora", "lora"]
    assert float(beside[0][4]) == pytest.approx(
        json.loads(finished[1].stdout)["after"]["perplexity"]["prose"], abs=0.001
    )
    for line in ("exact match, test", "exact match, shifted", "perplexity, prose", "peak memory", "adapter: "):
        assert line in shown


def test_own_file_holds_some_lines_out(capsys, tiny_folder, tmp_path, told, judged):
    """Those lines are judged on and never trained on; which ones, the seed decides."""
    rows = [{"prompt": f"Say {n}.", "response": str(n)} for n in range(30)]
    path = jsonl(tmp_path / "mine.jsonl", *map(json.dumps, rows))
    arguments = ["--model", tiny_folder, "--data", path, *QUICK[:-1]]

    def asked(samples) -> set[str]:  # the user's words, as the template has them
        texts = [told["tokenizer"].decode(sample.ids) for sample in samples]
        return {text.split("user\n")[1].split("<|im_end|>")[0] for text in texts}

    held_out = []
    for name, seed in (("run", 0), ("again", 0), ("other", 1)):
        report, err = call(capsys, *arguments, "--output", tmp_path / name, "--seed", seed)
        assert "held out to judge the model on: 2 of 30 samples\n" in err  # --eval-samples 2, and a fifth would be 6
        assert report["judged"] == {"test": 2}
        assert set(report["after"]["exact_match"]) == {"test"}
        assert set(report["after"]["perplexity"]) == {"validation", "prose"}
        held_out.append({chat[-1]["content"] for chat in judged["asked"][-1]})
        trained = asked(told["batches"].samples)
        assert len(held_out[-1]) == 2 and asked(judged["texts"][-1]) == held_out[-1]
        assert not held_out[-1] & trained
        assert held_out[-1] | trained == {row["prompt"] for row in rows}
    assert held_out[0] == held_out[1] != held_out[2]


def test_what_is_learned_is_shown_before_it_is(capsys, tiny_folder, tmp_path, told):
    turns = [("user", "Is it in?"), ("assistant", "Yes."), ("user", "Where?"), ("assistant", "There.")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = jsonl(tmp_path / "mine.jsonl", *[json.dumps(chat)] * 4)
    for learn, count, words in (("all", 6, "every turn of the assistant"), ("last", 3, "the assistant's last turn")):
        arguments = ["--model", tiny_folder, "--data", path, *QUICK[:-1], "--learn", learn, "--output"]
        _, err = call(capsys, *arguments, tmp_path / learn)
        head = f"a sample as it is trained on, {count} of its {len(told['batches'].samples[0].ids)} tokens are learned"
        lines = err.splitlines()
        shown = lines[lines.index(f"{head} ({words}):") :]
        assert [line for line in shown if line.startswith("  learned ")] == [
            f"  learned  {text}<|im_end|>" for text in (("Yes.", "There.") if learn == "all" else ("There.",))
        ]
        assert "fewer than 10 samples: none is held out to judge the model on" in lines
    _, err = call(capsys, *arguments, tmp_path / "quiet", "--quiet")
    assert err == ""


def test_rows_with_the_same_value_are_all_held_out_or_none(capsys, tiny_folder, tmp_path, told, judged):
    rows = [{"prompt": f"Say {n}.", "response": str(n), "who": {"name": n // 4}} for n in range(40)]
    path = jsonl(tmp_path / "mine.jsonl", *map(json.dumps, rows))
    arguments = ["--model", tiny_folder, "--data", path, *QUICK[:-1], "--split-by", "who", "--eval-samples", 50]
    report, err = call(capsys, *arguments, "--output", tmp_path / "run", "--validate-every", 3)
    assert "held out to judge the model on: 8 of 40 samples, drawn by who\n4 others are held out to validate" in err
    texts = [told["tokenizer"].decode(sample.ids) for sample in told["batches"].samples]
    learned = {int(re.search(r"Say (\d+)", text)[1]) // 4 for text in texts}
    asked = {int(re.search(r"\d+", chat[-1]["content"])[0]) // 4 for chat in judged["asked"][-1]}
    assert (len(learned), len(asked), learned & asked) == (7, 2, set())


def test_replay_mixes_in_its_share_and_is_not_judged(capsys, tiny_folder, tmp_path, told, judged):
    rows = [{"prompt": f"Say {n}.", "response": str(n)} for n in range(30)]
    path = jsonl(tmp_path / "mine.jsonl", *map(json.dumps, rows))
    prose = load_prose()
    texts = jsonl(tmp_path / "texts.jsonl", *(json.dumps({"text": text}) for text in prose[:20]))
    arguments = ["--model", tiny_folder, "--data", path, *QUICK[:-1], "--max-length", 512, "--eval-samples", 50]
    report, err = call(capsys, *arguments, "--output", tmp_path / "run", "--replay", texts, "--replay-share", 0.25)
    decoded = [told["tokenizer"].decode(sample.ids) for sample in told["batches"].samples]
    mixed = [text for text in prose if any(text[:60] in sample for sample in decoded)]
    assert len(decoded) == 24 + 8 and len(mixed) == 8 and set(mixed) <= set(prose[:20])
    assert "8 of 32 samples an epoch (25%) are replayed from " in err
    assert report["samples_left_out"] == 0
    read = [told["tokenizer"].decode(sample.ids) for sample in max(judged["texts"], key=len)]
    assert len(read) == len(prose) - 8 and not [text for text in mixed if any(text[:60] in of for of in read)]


def test_a_run_that_held_out_in_another_way_does_not_go_on(capsys, tiny_folder, tmp_path):
    data = jsonl(tmp_path / "mine.jsonl", *[GOOD] * 20)
    arguments = ["--model", tiny_folder, "--data", data, "--output", tmp_path / "run", *QUICK[:-1], "--steps", 1]
    call(capsys, *arguments)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    del settings["held_out"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    message = fails(capsys, *arguments, "--resume")
    assert "what is held out was a tenth, now it is a fifth to judge" in message


def test_lines_are_held_out_as_datasets_does_it(tmp_path):
    """So runs of before this was our own line of code can be compared with, and resumed."""
    rows = [json.dumps({"prompt": f"Say {n}.", "response": str(n)}) for n in range(50)]
    path = jsonl(tmp_path / "mine.jsonl", *rows)
    args = train_qlora.parser().parse_args(["--data", str(path), "--seed", "7", "--eval-samples", "4"])
    trained, judged, _ = train_qlora.load_data(args)
    theirs = load_samples(path).train_test_split(test_size=4, seed=7)
    assert judged["test"] == judged["validation"] == list(theirs["test"]["messages"])
    assert trained == list(theirs["train"]["messages"])


def test_ctrl_c_leaves_a_usable_adapter(tiny_folder, tmp_path):
    output = tmp_path / "run"
    arguments = ["--model", tiny_folder, "--output", output, "--json", *QUICK, "--steps", "10000"]
    command = [sys.executable, "-m", "qlora_lab.train_qlora", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not list(output.glob("checkpoints/checkpoint-*2")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=300)
    finally:
        process.kill()  # or 10,000 steps go on beside the other tests
    assert process.returncode == 130
    assert "Traceback" not in stderr
    report = json.loads(stdout)
    assert report["interrupted"]
    assert 2 <= report["steps"] < 10000
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def test_ctrl_c_twice_in_the_first_step_is_reported_too(tiny_folder, tmp_path, capsys, monkeypatch):
    def pressed_twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys.modules["qlora_lab.training.steps.plain"], "token_loss_sum", pressed_twice)
    command = ["--model", str(tiny_folder), *QUICK, "--eval-samples", "0", "--output", str(tmp_path / "run")]
    assert train_qlora.main([*command, "--json"]) == 130
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["steps"], report["losses"], report["tokens_per_second"], report["interrupted"]) == (0, [], 0, True)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert train_qlora.main([*command, "--resume", "--beside", str(tmp_path / "run")]) == 130
    out = capsys.readouterr().out
    assert ": 0 steps on cpu" in out
    assert "stopped early" in out
    assert out.splitlines()[-1].split() == ["qlora", "-", "-", "-", "-", "0", *out.split()[-1:]]


# ----------------------------------------------------------------------------------------------- what each flag changes


def trained(told) -> dict:
    """The adapter's A and B by name."""
    return {name: p for name, p in told["model"].named_parameters() if p.requires_grad}


def everything(told) -> dict:
    """What was told, under the names of those who heard it."""
    adapter, matrices, batches = told["model"].peft_config["default"], trained(told), told["batches"]
    return {
        "name": pathlib.Path(told["load"]["name"]).name,
        "quantization": told["load"]["quantization"],
        "loaded in": told["load"]["compute_dtype"],
        "ranks": {len(p) for name, p in matrices.items() if "lora_A" in name},
        "alpha": adapter.lora_alpha,
        "dropout": adapter.lora_dropout,
        "targets": {name.split(".")[-4] for name in matrices},
        "adapter in": {p.dtype for p in matrices.values()},
        "samples": len(batches.samples),
        **{field: getattr(batches, field) for field in ("batch_size", "accumulation", "packing", "max_length", "seed")},
        **dataclasses.asdict(told["settings"]),
        **{key: value for key, value in told["named"].items() if key not in ("accelerator", "each_step")},
    }


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ("", {}),
        ("--rank 3", {"ranks": {3}, "alpha": 6}),
        ("--alpha 5", {"alpha": 5}),
        ("--targets 'q_proj, v_proj'", {"targets": {"q_proj", "v_proj"}}),
        ("--steps 47", {"steps": 47, "warmup_steps": 4}),
        ("--steps 7", {"steps": 7, "warmup_steps": 1}),
        (  # 25 samples, 6 a step: 5 steps an epoch, the last of them with what comes next; 40.5 steps
            "--epochs 8.1 --batch-size 2 --accumulation 3",
            {"steps": 41, "warmup_steps": 4, "batch_size": 2, "accumulation": 3},
        ),
        ("--batch-size 6", {"batch_size": 6}),
        ("--accumulation 5", {"accumulation": 5}),
        ("--packing", {"packing": True}),
        ("--max-length 45", {"max_length": 45, "samples": 20}),
        ("--lr 0.25", {"learning_rate": 0.25}),
        ("--lora-plus 8", {"lora_plus": 8.0}),
        ("--schedule constant", {"schedule": "constant"}),
        ("--optimizer adamw_8bit", {"optimizer": "adamw_8bit"}),
        ("--gradient-checkpointing", {"gradient_checkpointing": True}),
        ("--fast", {"fast": True}),
        ("--seed 5", {"seed": 5}),
        ("--checkpoint-every 7", {"checkpoint_every": 7}),
        ("--quiet", {"progress": False}),
        ("--method qlora", {"quantization": "nf4", "dense_base": True}),
        ("--method qlora --no-dense-base", {"quantization": "nf4"}),
        ("--compute-dtype bfloat16", {"loaded in": torch.bfloat16, "compute_dtype": torch.bfloat16}),
        (
            "--preset in-backward --optimizer adamw_torch",
            {"update_in_backward": True, "max_grad_norm": None, "gradient_checkpointing": True},
        ),
        (
            "--preset lean --optimizer adamw_8bit --compute-dtype bfloat16",
            {
                "loaded in": torch.bfloat16,
                "adapter in": {torch.bfloat16},  # computes in what base and adapters have, without autocast
                "optimizer": "adamw_8bit",
                "gradient_checkpointing": True,
                "update_in_backward": True,
                "max_grad_norm": None,
                "loss_chunk": 128,
            },
        ),
    ],
)
def test_each_flag_reaches_what_it_names_and_nothing_else(capsys, tiny_folder, tmp_path, told, flags, changed):
    long = json.dumps({"prompt": "a " * 20, "response": "b"})  # 56 tokens with the template, where the others have 37
    data = jsonl(tmp_path / "mine.jsonl", *[GOOD] * 20, *[long] * 5)
    arguments = ["--model", tiny_folder, "--data", data, "--output", tmp_path / "run", "--eval-samples", 0]
    call(capsys, *arguments, "--method", "lora", "--compute-dtype", "float32", *shlex.split(flags))  # the last counts
    assert everything(told) == {
        "name": tiny_folder.name,
        "quantization": None,
        "loaded in": torch.float32,
        "ranks": {16},
        "alpha": 32,
        "dropout": 0,
        "targets": LLAMA,
        "adapter in": {torch.float32},
        "samples": 25,
        "batch_size": 8,
        "accumulation": 1,
        "packing": False,
        "max_length": 256,
        "seed": 0,
        "steps": 30,
        "learning_rate": 1.5e-3,
        "schedule": "cosine",
        "warmup_steps": 3,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optimizer": "paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch",
        "compute_dtype": torch.float32,
        "gradient_checkpointing": False,
        "activation_offloading": False,
        "loss_chunk": None,
        "dense_base": False,  # nothing is in 4 bits
        "update_in_backward": False,
        "fast": False,
        "merge_aware": None,
        "lora_plus": 1.0,
        "checkpoint_every": 10,
        "pad_token_id": 2,
        "checkpoints": tmp_path / "run" / "checkpoints",
        "resume": False,
        "progress": True,
        "validation": None,
        **changed,
    }


def test_a_merge_aware_run_is_judged_as_merged_and_leaves_an_ordinary_adapter(capsys, tiny_folder, tmp_path):
    base = ["--model", tiny_folder, "--steps", 3, "--batch-size", 2, "--rank", 2, "--compute-dtype", "float32"]
    report, _ = call(
        capsys, *base, "--eval-samples", 2, "--lr", 0.02, "--merge-aware", "q4_0", "--output", tmp_path / "run"
    )
    model, tokenizer = load_model(tiny_folder, "nf4", compute_dtype=torch.float32)
    load_lora(model, tmp_path / "run" / "adapter")
    texts = [tokenize_chat(chat, tokenizer) for chat in load_samples("orders", "validation")["messages"][:2]]
    beside = text_loss(model, texts).perplexity
    merged = text_loss(merge_requantized(model, "q4_0"), texts).perplexity
    assert report["after"]["perplexity"]["validation"] == pytest.approx(merged, rel=1e-5)
    assert abs(merged - beside) > 1e-3 * merged
    loaded, _ = load_model(tiny_folder, "nf4", compute_dtype=torch.float32)
    peft = PeftModel.from_pretrained(loaded, tmp_path / "run" / "adapter")
    assert text_loss(peft, texts).perplexity == pytest.approx(beside, rel=1e-5)


@pytest.mark.parametrize("flag", ["--fast", "--preset lean --compute-dtype bfloat16 --optimizer adamw_torch"])
def test_merge_aware_training_wants_the_plain_step(capsys, tiny_folder, tmp_path, flag):
    arguments = ["--model", str(tiny_folder), "--output", str(tmp_path / "run"), "--merge-aware", "nf4"]
    assert train_qlora.main([*arguments, *flag.split()]) == 2
    assert "merge_aware needs the plain step: leave out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_seed_makes_the_adapter(capsys, tiny_folder, tmp_path, told):
    arguments = ["--model", tiny_folder, "--method", "lora", "--rank", 2, "--eval-samples", 0]
    call(capsys, *arguments, "--output", tmp_path / "run", "--seed", 5)
    base, _ = load_model(tiny_folder)
    right = {name: p for name, p in add_adapter(base, rank=2, seed=5).named_parameters() if p.requires_grad}
    assert trained(told).keys() == right.keys()
    assert all(torch.equal(p, right[name]) for name, p in trained(told).items())


@pytest.mark.parametrize(
    "splits",
    [(), ("validation",), ("test",), ("shifted",), ("validation", "shifted"), ("validation", "test", "shifted")],
)
def test_any_splits_are_judged(capsys, tiny_folder, tmp_path, told, judged, splits):
    """Each by its own samples, at most --eval-samples of them: the first answers are right in `test` alone."""
    (tmp_path / "data").mkdir()
    for split in ("train", *splits):
        rows = [{"prompt": f"{split} {n}", "response": "yes" if split == "test" and n < 2 else "no"} for n in range(5)]
        jsonl(tmp_path / "data" / f"{split}.jsonl", *map(json.dumps, rows))
    arguments = ["--model", tiny_folder, "--data", tmp_path / "data", "--method", "lora", "--eval-samples", 3]
    report, _ = call(capsys, *arguments, "--output", tmp_path / "run")
    right = {split: share for split, share in {"test": 2 / 3, "shifted": 0}.items() if split in splits}
    texts = [text for text in ("prose", "validation") if splits and text in ("prose", *splits)]
    expected = {"exact_match": right, "perplexity": dict.fromkeys(texts, pytest.approx(math.exp(0.5)))}
    assert report["before"] == report["after"] == expected
    assert json.loads((tmp_path / "run" / "before.json").read_text()) == report["before"]
    prompts = [chat[-1]["content"] for chat in (judged["asked"] or [[]])[0]]
    assert prompts == [f"{split} {n}" for split in ("test", "shifted") if split in splits for n in range(3)]
    assert all(len(texts) == 3 for texts in judged["texts"])
    assert len(told["batches"].samples) == 5
    assert train_qlora.describe(report).startswith(str(tiny_folder))


def test_answers_have_room_for_the_longest_one(capsys, tiny_folder, tmp_path, told, judged):
    """Wherever it is: here in the last split, in the last line."""
    (tmp_path / "data").mkdir()
    for split, longest in (("train", 1), ("test", 2), ("shifted", 40)):
        rows = [{"prompt": "Count.", "response": " ".join(map(str, range(n)))} for n in (1, 2, longest)]
        jsonl(tmp_path / "data" / f"{split}.jsonl", *map(json.dumps, rows))
    arguments = ["--model", tiny_folder, "--data", tmp_path / "data", "--method", "lora", "--compute-dtype", "bfloat16"]
    call(capsys, *arguments, "--output", tmp_path / "run")
    assert judged["max_new_tokens"] == len(told["tokenizer"](rows[-1]["response"])["input_ids"]) + 8 > 48
    assert judged["dtype"] == torch.bfloat16


def test_what_is_too_long_to_train_on_is_not_judged_on_either(capsys, tiny_folder, tmp_path, told, judged):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"prompt": "Count.", "response": " ".join(map(str, range(n)))} for n in (1, 2, 300)]
        jsonl(tmp_path / "data" / f"{split}.jsonl", *map(json.dumps, rows))
    arguments = ["--model", tiny_folder, "--data", tmp_path / "data", "--method", "lora", "--max-length", 64, "--quiet"]
    _, err = call(capsys, *arguments, "--output", tmp_path / "run")
    assert "note: 1 of 3 samples are longer than 64 tokens" in err
    for split in ("validation", "test"):
        assert f"note: of those to judge on ({split}), 1 of 3 samples are longer than 64 tokens" in err
    assert [len(chats) for chats in judged["asked"]] == [2, 2] and judged["max_new_tokens"] < 64
    assert sorted(map(len, judged["texts"]))[:2] == [2, 2] and len(told["batches"].samples) == 2


def test_a_system_message_is_trained_on_and_asked_with(capsys, tiny_folder, tmp_path, told, judged):
    row = json.dumps({"system": "Answer in French.", "prompt": "Hello?", "response": "Bonjour."})
    path = jsonl(tmp_path / "mine.jsonl", *[row] * 10)
    call(capsys, "--model", tiny_folder, "--data", path, "--output", tmp_path / "run", "--method", "lora")
    asked = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "Hello?"}]
    assert judged["asked"][0] == [asked] * 2  # a fifth of ten
    assert (
        told["tokenizer"]
        .decode(told["batches"].samples[0].ids)
        .startswith("<|im_start|>system\nAnswer in French.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n")
    )


# ----------------------------------------------------------------------------------------------------------- bad input


def fails(capsys, *arguments) -> str:
    """Run in this process; expect exit code 2 and one sentence on standard error."""
    code = train_qlora.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1
    assert err.rstrip().endswith(message[0])
    return message[0]


def contents(folder: pathlib.Path) -> dict:
    """All that lies in a folder: bytes by path, None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def place(finished, tiny_folder, tmp_path_factory) -> pathlib.Path:
    """What bad commands are about: data with mistakes, models without this or that, folders of other runs."""
    place = tmp_path_factory.mktemp("place")
    (place / "file").write_text("in the way")
    (place / "file").chmod(0o755)  # one that may be entered, as it were
    (place / "nothing").mkdir()
    jsonl(place / "empty.jsonl")
    jsonl(place / "half.jsonl", GOOD, "{")
    jsonl(place / "few.jsonl", *[GOOD] * 9)
    for folder, splits in (("split", {"train": 1, "test": 1}), ("long", {"train": 1, "validation": 300})):
        (place / folder).mkdir()
        for split, words in splits.items():
            row = {"prompt": "a " * words, "response": "b"}
            jsonl(place / folder / f"{split}.jsonl", *[json.dumps(row)] * 5)
    shops = [{"prompt": f"{n}", "response": "b", "shop": 1} for n in range(12)]
    jsonl(place / "shop.jsonl", *(json.dumps({**row, **({} if n else {"customer": n})}) for n, row in enumerate(shops)))
    jsonl(place / "number.jsonl", GOOD, GOOD, '{"prompt": "a", "response": "b", "system": 5}')
    shutil.copytree(finished[0], place / "finished")
    shutil.copytree(finished[0], place / "damaged")
    for file in (place / "damaged" / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-9])
    shutil.copytree(finished[0], place / "unreadable")
    (place / "unreadable" / "run.json").write_text('{"model"')
    (place / "unreadable" / "report.json").write_text('{"method": "qlora"}')
    (place / "unknown").mkdir()
    (place / "unknown" / "config.json").write_text('{"model_type": "llamma"}')
    shutil.copytree(tiny_folder, place / "broken")
    (place / "broken" / "model.safetensors").write_bytes(b"no weights")
    return place


BEFORE_LOADING = [
    ("--ranks 3 --steps 1", "unrecognized arguments: --ranks"),
    ("--model smolm2-135m-instruct", "did you mean 'smollm2-135m-instruct'"),
    ("--model {place}/nowhere", "no such folder"),
    ("--model {place}/nothing", "no config.json"),
    ("--model {place}/unknown", "cannot read the config of"),
    ("--model nobody/nothing", "cannot read the config of 'nobody/nothing'"),
    ("--data ordes", "no data at 'ordes'"),
    ("--data {place}/nothing", "nothing has no train.jsonl"),
    ("--data {place}/empty.jsonl", "is empty"),
    ("--data {place}/half.jsonl", "half.jsonl, line 2 is not valid JSON"),
    ("--data {place}/number.jsonl", "number.jsonl, line 3 has no text in 'system', but 5"),
    ("--columns prompt", "'prompt' is no FIELD=COLUMN"),
    ("--columns prompt=question,response=answer", "train.jsonl, line 1 has no column 'question'"),
    ("--format csv", "invalid choice: 'csv'"),
    ("--format alpaca", "train.jsonl, line 1 is not in the format alpaca"),
    ("--learn first", "invalid choice: 'first'"),
    ("--split-by customer", "--split-by customer: orders comes in splits of its own"),
    ("--split-by customer --data {place}/shop.jsonl", "shop.jsonl, line 2 has no column 'customer' to split by"),
    ("--split-by shop --data {place}/shop.jsonl", "has 1 different values among 12 samples"),
    ("--replay {place}/empty.jsonl", "is empty"),
    ("--replay {place}/nowhere.jsonl", "no data at"),
    ("--replay-share 0.2", "--replay-share 0.2 is a share of other samples: name them with --replay FILE"),
    ("--replay orders --replay-share 1", "'1' is not a share between 0 and 1"),
    ("--method dora", "invalid choice: 'dora'"),
    ("--rank many", "'many' is not a whole number from 1"),
    ("--rank 65", "--rank 65 is more than these layers can use: choose at most 64"),
    ("--rank 33 --targets k_proj,v_proj", "choose at most 32"),
    ("--alpha nan", "'nan' is not a positive number"),
    ("--alpha 0", "'0' is not a positive number"),
    ("--alpha=-16", "'-16' is not a positive number"),
    ("--adapter adalora", "invalid choice: 'adalora'"),
    ("--merge-aware nf4 --init pissa", "--merge-aware trains LoRA or rsLoRA from B = 0"),
    (
        "--init loftq --method lora",
        "--init loftq corrects what 4 bits lose, and --method lora loses nothing",
    ),
    ("--merge-aware nf4 --adapter dora", "--merge-aware trains LoRA or rsLoRA from B = 0"),
    ("--lora-plus 0", "'0' is not a positive number"),
    ("--targets q_proj,upproj", "no linear layer named 'upproj': did you mean up_proj"),
    ("--targets embed_tokens", "no linear layer named 'embed_tokens'"),
    ("--targets ,", "no linear layer named ''"),
    ("--steps 0", "'0' is not a whole number from 1"),
    ("--steps 99999999999999999999", "is not a whole number from 1 to 1,000,000"),
    ("--steps 5 --epochs 1", "not allowed with argument"),
    ("--epochs inf", "'inf' is not a positive number"),
    ("--epochs 1e300", "'1e300' is not a positive number, 1,000,000 at most"),
    ("--batch-size 0", "'0' is not a whole number"),
    ("--batch-size 1e3", "'1e3' is not a whole number"),
    ("--accumulation=-1", "'-1' is not a whole number"),
    ("--max-length 0", "'0' is not a whole number"),
    ("--lr=-1.0", "'-1.0' is not a positive number"),
    ("--lr 1e-999", "'1e-999' is not a positive number"),
    ("--schedule linear", "invalid choice: 'linear'"),
    ("--preset slim", "invalid choice: 'slim'"),
    (
        "--preset lean --compute-dtype float32",
        "--preset lean keeps its adapters in bfloat16 and this run computes in float32",
    ),
    ("--preset in-backward --optimizer adamw_torch --accumulation 2", "needs accumulation=1"),
    ("--optimizer sgd", "invalid choice: 'sgd'"),
    ("--compute-dtype int8", "invalid choice: 'int8'"),
    ("--seed=-1", "'-1' is not a whole number from 0"),
    ("--seed 1.5", "'1.5' is not a whole number"),
    (f"--seed {2**64}", "is not a whole number from 0"),
    ("--eval-samples=-1", "'-1' is not a whole number from 0"),
    ("--checkpoint-every 0", "'0' is not a whole number"),
    ("--judge bleu", "no score is called 'bleu': choose from normalized, f1, json, regex:PATTERN"),
    ("--judge regex:(", "'(' is no regular expression"),
    ("--judge f1 --judge f1", "--judge f1 was given twice: give it once"),
    ("--judge regex:a --judge regex:b --judge regex:a", "--judge regex:a was given twice: give it once"),
    ("--judge f1 --eval-samples 0", "--eval-samples is 0: give at least 1"),
    ("--judge f1 --data {place}/long", "the data has no test split"),
    ("--judge json --data {place}/split", "number 1, 'b': it is no JSON object"),
    ("--judge regex:[0-9] --data {place}/split", "2 of 2 reference answers of test have no score"),
    ("--track mlflow", "invalid choice: 'mlflow'"),
    ("--validate-every 0", "'0' is not a whole number from 1"),
    ("--validate-every 2 --eval-samples 0", "--eval-samples is 0: give at least 1"),
    ("--validate-every 2 --data {place}/few.jsonl", "few.jsonl would need 10 samples or more"),
    ("--validate-every 2 --data {place}/split", "split would need a validation split"),
    ("--keep first", "invalid choice: 'first'"),
    ("--keep best", "--keep best goes by the validation loss: give --validate-every STEPS, too"),
    ("--patience 0 --validate-every 2", "'0' is not a whole number from 1"),
    ("--patience 3", "--patience 3 goes by the validation loss: give --validate-every STEPS, too"),
    ("--output {place}/file", "file is not a folder"),
    ("--output {place}/file/run", "cannot write to"),
    ("--output {place}/" + 300 * "x", "cannot write to"),
    ("--output {place}/finished", "holds another run: give another --output, or --resume"),
    ("--output {place}/nothing --resume", "nothing to resume"),
    ("--output {place}/unreadable --resume", "run.json is damaged: delete"),
    ("--output {place}/damaged --resume", "damaged/checkpoints has no other checkpoint, so start anew"),
    ("--beside {place}/nothing", "holds no finished run"),
    ("--beside {place}/unreadable", "holds no finished run"),
    ("--beside {place}/nowhere", "holds no finished run"),
]
ON_A_CPU = [
    ("--compute-dtype float16", "float16 compute needs a GPU"),
    ("--preset in-backward", "paged_adamw_32bit pages GPU memory, and this model is on a CPU"),
    ("--optimizer paged_adamw_8bit", "use 'adamw_8bit'"),
]
AFTER_LOADING = [
    ("--model {place}/broken", "cannot load"),
    ("--max-length 9", "nothing is left, raise --max-length"),
    ("--validate-every 2 --data {place}/long --max-length 64", "no validation sample is left: raise --max-length"),
]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        *BEFORE_LOADING,
        *[
            pytest.param(*case, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's"))
            for case in ON_A_CPU
        ],
        *AFTER_LOADING,
    ],
)
def test_a_refused_command_leaves_everything_as_it_was(capsys, monkeypatch, tiny_folder, place, flags, sentence):
    """And is refused as early as can be: before the model is loaded if possible, before it is judged in any case."""
    if (flags, sentence) not in AFTER_LOADING:
        monkeypatch.setattr(train_qlora, "load_model", lambda *_, **__: pytest.fail("too late: a model is loaded"))
    monkeypatch.setattr(judge.Judge, "__call__", lambda *_: pytest.fail("too late: the model is judged"))
    before = contents(place)
    flags = flags.format(place=place).split()
    output = [] if "--output" in flags else ["--output", place / "run"]
    assert sentence in fails(capsys, "--model", tiny_folder, *QUICK, *output, *flags)
    assert gc.isenabled()
    assert contents(place) == before


def test_every_flag_is_among_the_refused():
    named = {word.partition("=")[0] for flags, _ in BEFORE_LOADING for word in flags.split()}
    flags = {action.option_strings[-1] for action in train_qlora.parser()._actions if action.nargs != 0}
    assert sorted(flags - named) == []


def test_a_typo_is_told_in_seconds_and_before_slow_imports(bundled, tmp_path):
    """As a user calls it. What costs seconds to import and has nothing to say about a typo stays out."""
    code = """
import sys
from qlora_lab.train_qlora import main
code = main(sys.argv[1:])
print(*{"datasets", "peft", "bitsandbytes", "pandas"} & set(sys.modules))
sys.exit(code)
"""
    arguments = ["--model", bundled, "--targets", "q_porj", "--output", tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert (
        done.stderr == "error: the model has no linear layer named 'q_porj': did you mean q_proj or v_proj or o_proj?\n"
    )
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert not (tmp_path / "run").exists()


def test_batches_that_processes_cannot_share_are_refused():
    args = train_qlora.parser().parse_args(["--batch-size", "6", "--optimizer", "adamw_torch"])
    with pytest.raises(UserError, match="batch_size=6 cannot be shared evenly by 4 processes"):
        train_qlora.recipe(args, torch.device("cpu"), torch.float32, processes=4)


def test_a_folder_that_is_not_ours_to_write_is_refused(capsys, monkeypatch, tmp_path):
    """Said by hand: whoever runs tests as root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    monkeypatch.setattr(train_qlora, "load_model", lambda *_, **__: pytest.fail("too late: a model is loaded"))
    assert f"{tmp_path} is not a folder, or not one you may write to" in fails(capsys, "--output", tmp_path / "a" / "b")


def test_a_folder_that_was_taken_meanwhile_is_refused(capsys, monkeypatch, tiny_folder, tmp_path, told):
    """By another command, while this one loaded its model."""
    load = train_qlora.load_model

    def load_slowly(*arguments, **named):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text("another's")
        return load(*arguments, **named)

    monkeypatch.setattr(train_qlora, "load_model", load_slowly)
    arguments = ["--model", tiny_folder, "--output", tmp_path / "run", "--eval-samples", 0, "--quiet"]
    assert "holds another run" in fails(capsys, *arguments)
    assert (tmp_path / "run" / "run.json").read_text() == "another's"


def test_long_samples_are_counted(capsys, tiny_folder, tmp_path, told):
    report, err = call(
        capsys, "--model", tiny_folder, "--max-length", 80, "--output", tmp_path / "run", "--eval-samples", 0
    )
    assert " of 2000 samples are longer than 80 tokens (the longest has " in err
    assert f"note: {report['samples_left_out']} of 2000" in err
    assert 0 < report["samples_left_out"] < 2000
    assert report["samples_left_out"] == 2000 - len(told["batches"].samples)


OTHERWISE = {
    "model": "smollm2-135m-instruct", "data": "{data}", "columns": "prompt=system,response=response",
    "format": "prompt-response", "learn": "last", "method": "lora", "rank": 8, "alpha": 9,
    "adapter": "dora", "init": "loftq", "lora_plus": 4.0, "targets": "q_proj",
    "steps": 7, "epochs": 2, "batch_size": 2, "accumulation": 2, "packing": None, "max_length": 128, "lr": 0.001,
    "schedule": "constant", "preset": "in-backward", "optimizer": "adamw_8bit", "gradient_checkpointing": None,
    "fast": None, "merge_aware": "nf4", "compute_dtype": "bfloat16", "seed": 1, "eval_samples": 3,
    "checkpoint_every": 3, "judge": "f1", "track": "tensorboard", "validate_every": 2, "keep": "best", "patience": 3,
    "split_by": "customer", "replay": "orders", "replay_share": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("setting", [setting for setting in OTHERWISE if setting not in LENGTH])
def test_resume_with_other_settings(capsys, finished, place, tiny_folder, setting):
    """Every setting that shapes a run is among those that must be as they were, but for its length."""
    flag = "--" + setting.replace("_", "-")
    now = [] if OTHERWISE[setting] is None else [str(OTHERWISE[setting]).format(data=place / "nothing")]
    more = {
        "preset": ["--optimizer", "adamw_torch"],
        "keep": ["--validate-every", "2"],
        "replay_share": ["--replay", "orders"],
    }.get(setting, [])
    before = contents(place)
    message = fails(
        capsys, "--model", tiny_folder, "--output", place / "finished", "--resume", *QUICK, *more, flag, *now
    )
    assert "cannot resume" in message and "was" in message
    assert f"{flag} was " in message or setting in (
        "preset",
        "keep",
        "replay_share",
    )  # which change two, and one is named
    assert contents(place) == before


def test_nothing_that_shapes_a_run_is_left_out_of_that(finished):
    written = json.loads((finished[0] / "run.json").read_text())
    assert set(written) == set(OTHERWISE)
    per_call = {"output", "resume", "beside", "quiet", "json", "dense_base"}
    assert set(vars(train_qlora.parser().parse_args([]))) == per_call | set(written)


def test_a_finished_run_resumed_trains_nothing_and_judges_once(
    capsys, finished, place, tiny_folder, tmp_path, monkeypatch
):
    """What may differ from call to call does; the judgement before training is the one that was written down."""
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "before.json").write_text('{"exact_match": {"test": 0.25}, "perplexity": {}}')
    calls, judging = [], judge.Judge.__call__
    monkeypatch.setattr(judge.Judge, "__call__", lambda *of: calls.append(of) or judging(*of))
    arguments = ["--model", tiny_folder, "--output", tmp_path / "run", "--resume", *QUICK]
    report, _ = call(capsys, *arguments, "--beside", place / "finished")
    was = json.loads(finished[1].stdout)
    assert (report["steps"], report["resumed_at"], report["losses"]) == (6, 6, was["losses"])
    assert report["before"] == {"exact_match": {"test": 0.25}, "perplexity": {}}
    assert report["after"] == was["after"] and len(calls) == 1


def test_an_adapter_is_saved_whole_or_not_at_all(capsys, monkeypatch, tmp_path, tiny):
    """A disk that fills up in the middle leaves the adapter that was there, and never half a one."""
    save_pretrained = type(tiny).save_pretrained

    def half(model, folder, **named):
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tiny), "save_pretrained", half)
    with pytest.raises(OSError):
        save_adapter(tiny, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    monkeypatch.setattr(type(tiny), "save_pretrained", save_pretrained)
    save_adapter(tiny, tmp_path / "adapter")  # what the first try left behind is no hindrance
    whole = contents(tmp_path)
    assert sorted(path.name for path in whole if path.parent == tmp_path) == ["adapter"]
    names = {path.name for path in whole}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and not {"half", "README.md"} & names
    monkeypatch.setattr(type(tiny), "save_pretrained", half)
    with pytest.raises(OSError):
        save_adapter(tiny, tmp_path / "adapter")
    assert {path: content for path, content in contents(tmp_path).items() if path in whole} == whole


def test_full_disk_keeps_what_was_saved(capsys, finished, tiny_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_qlora, "save_adapter", full)
    message = fails(capsys, "--model", tiny_folder, "--output", tmp_path / "run", *QUICK)
    assert "No space left on device; what was saved before is untouched" in message
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-000006"))


def test_divergence_is_one_sentence(capsys, tiny_folder, tmp_path, monkeypatch):
    module = sys.modules["qlora_lab.training.steps.plain"]
    original, calls = module.token_loss_sum, []

    def poisoned(model, batch, *chunk):
        calls.append(model.training)
        return original(model, batch, *chunk) * (float("nan") if sum(calls) == 4 else 1)

    monkeypatch.setattr(module, "token_loss_sum", poisoned)
    message = fails(capsys, "--model", tiny_folder, "--output", tmp_path / "run", *QUICK)
    assert "the loss is nan" in message
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-000002"))


def test_a_preset_trains(tiny_folder, tmp_path, capsys):
    """Without clipping, and with checkpointing, as the preset has it; otherwise as without.

    Six batches of a random model differ more from one another than six steps improve it (in bf16 the last had a higher
    loss than the first): so each loss is compared with that of the model as it was, on the same batch.
    """
    command = ["--model", tiny_folder, "--json", *QUICK, "--eval-samples", "0", "--optimizer", "adamw_torch"]
    losses = []
    runs = {"plain": [], "preset": ["--preset", "in-backward"], "untrained": ["--lr", "1e-12"]}
    for name, arguments in runs.items():
        assert train_qlora.main([*map(str, command), "--output", str(tmp_path / name), *arguments]) == 0
        losses.append(json.loads(capsys.readouterr().out)["losses"])
    plain, preset, untrained = losses
    assert plain[0] == pytest.approx(preset[0], rel=1e-5)
    assert plain[1:] != preset[1:]
    assert all(trained < before for trained, before in zip(preset[1:], untrained[1:], strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the fast step trains")
def test_fast_without_a_gpu_is_said_and_trains_as_usual(tiny_folder, tmp_path, capsys):
    command = ["--model", tiny_folder, "--json", *QUICK, "--eval-samples", "0", "--output", tmp_path / "run", "--fast"]
    assert train_qlora.main([str(word) for word in command]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["losses"]) > 0
    assert "no fast step, the plain one takes over: it needs a GPU" in err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_out_of_memory_tells_the_prediction_and_a_knob(bundled, tmp_path):
    """A real failure: the process may not have the memory that 64 rows of 256 tokens want."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2); "
    call = "from qlora_lab.train_qlora import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--packing", "--batch-size", "64", "--eval-samples", "0", "--quiet", "--output", str(tmp_path / "run")]
    command = [sys.executable, "-c", limit + call, "--model", str(bundled), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "error: out of memory: try --gradient-checkpointing or --batch-size 32 --accumulation 2" in done.stderr
    assert "predicted for samples of 256 tokens" in done.stderr
    assert "activations" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_prediction_for_lora_is_not_taken_for_doras(tiny_folder):
    texts = {}
    for kind in ("lora", "rslora", "dora"):
        args = train_qlora.parser().parse_args(["--model", str(tiny_folder), "--adapter", kind])
        texts[kind] = train_qlora.out_of_memory(args, MemoryError())
    assert texts["rslora"] == texts["lora"] and "tokens on a GPU:\n" in texts["lora"]
    assert texts["dora"] == texts["lora"].replace("on a GPU:", "on a GPU, without what DoRA needs more than LoRA:")


def test_a_models_own_dropout_is_repeatable(tiny_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "dropout")
    config = json.loads((folder / "config.json").read_text())
    losses = []
    for number, dropout in enumerate([0.5, 0.5, 0.0]):
        (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": dropout}))
        torch.manual_seed(number)  # whatever was drawn before
        arguments = [
            "--model",
            folder,
            "--output",
            tmp_path / str(number),
            "--steps",
            1,
            "--batch-size",
            1,
            "--rank",
            2,
        ]
        assert train_qlora.main([*map(str, arguments), "--eval-samples", "0", "--json", "--quiet"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["losses"])
    assert losses[0] == losses[1] != losses[2]
