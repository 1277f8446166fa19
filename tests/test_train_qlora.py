"""The command line, as a user calls it: on a tiny random model, in processes of their own."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from qlora_lab import train_qlora
from tests.conftest import in_two_processes

QUICK = [
    "--steps",
    "6",
    "--batch-size",
    "4",
    "--eval-samples",
    "2",
    "--rank",
    "4",
    "--checkpoint-every",
    "2",
    "--quiet",
]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qlora_lab.train_qlora", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


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
    promised = {
        "model", "method", "steps", "losses", "before", "after", "tokens_per_second", "train_seconds",
        "peak_memory_bytes", "trainable_parameters", "adapter",
    }  # fmt: skip
    assert promised <= set(report)
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


def test_killed_and_resumed_run_has_the_same_losses(finished, tiny_folder, tmp_path):
    output = tmp_path / "run"
    arguments = ["--model", tiny_folder, "--output", output, "--json", *QUICK]
    command = [sys.executable, "-m", "qlora_lab.train_qlora", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(output.glob("checkpoints/checkpoint-*2")) and time.time() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "report.json").exists(), "it was over before it could be killed"
    resumed = run(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    report = json.loads(resumed.stdout)
    assert 2 <= report["resumed_at"] < 6
    assert report["losses"] == json.loads(finished[1].stdout)["losses"]
    assert report["after"] == json.loads(finished[1].stdout)["after"]


def test_two_processes_train_to_the_same_loss(tiny_folder, tmp_path, capsys):
    """In float32: their sums differ in the last bits only. Rows and texts differ in length, so neither has half."""
    command = ["--model", tiny_folder, "--json", *QUICK, "--eval-samples", "3", "--compute-dtype", "float32"]
    done = in_two_processes("qlora_lab.train_qlora", *command, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert train_qlora.main([str(word) for word in [*command, "--output", tmp_path / "one"]]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert (report["processes"], alone["processes"]) == (2, 1)
    assert report["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for moment in ("before", "after"):
        assert report[moment]["perplexity"] == pytest.approx(alone[moment]["perplexity"], rel=1e-5)
        assert report[moment]["exact_match"] == alone[moment]["exact_match"]


def test_lora_trains_the_same_number_of_parameters(finished, tiny_folder, tmp_path):
    done = run("--model", tiny_folder, "--output", tmp_path / "run", "--json", "--method", "lora", *QUICK)
    report, qlora = json.loads(done.stdout), json.loads(finished[1].stdout)
    assert report["method"] == "lora"
    assert report["trainable_parameters"] == qlora["trainable_parameters"]
    assert report["losses"] != qlora["losses"]


def test_report_for_people(finished, tiny_folder, tmp_path):
    done = run(
        "--model", tiny_folder, "--output", tmp_path / "run", "--beside", finished[0], "--method", "lora", *QUICK
    )
    beside = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert [line[0] for line in beside] == ["qlora", "lora"]
    assert float(beside[0][4]) == pytest.approx(
        json.loads(finished[1].stdout)["after"]["perplexity"]["prose"], abs=0.001
    )
    for line in ("exact match, test", "exact match, shifted", "perplexity, prose", "peak memory", "adapter: "):
        assert line in done.stdout


def test_own_file_holds_some_lines_out(tiny_folder, tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"Say {n}.", "response": str(n)} for n in range(30)]
    path.write_text("\n".join(map(json.dumps, rows)))
    done = run("--model", tiny_folder, "--data", path, "--output", tmp_path / "run", "--json", *QUICK[:-1])
    report = json.loads(done.stdout)
    assert "2 of 30 samples are held out" in done.stderr
    assert set(report["after"]["exact_match"]) == {"test"}
    assert set(report["after"]["perplexity"]) == {"validation", "prose"}


def test_ctrl_c_leaves_a_usable_adapter(tiny_folder, tmp_path):
    output = tmp_path / "run"
    arguments = ["--model", tiny_folder, "--output", output, "--json", *QUICK, "--steps", "10000"]
    command = [sys.executable, "-m", "qlora_lab.train_qlora", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not list(output.glob("checkpoints/checkpoint-*2")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
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

    monkeypatch.setattr(sys.modules["qlora_lab.finetuning.train"], "token_loss_sum", pressed_twice)
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


def jsonl(path: pathlib.Path, *lines: str) -> pathlib.Path:
    path.write_text("\n".join(lines))
    return path


GOOD = '{"prompt": "a", "response": "b"}'


def test_bad_arguments(capsys):
    assert "invalid choice: 'dora'" in fails(capsys, "--method", "dora")
    assert "'0' is not a whole number of at least 1" in fails(capsys, "--steps", 0)
    assert "'-1.0' is not a positive number" in fails(capsys, "--lr=-1.0")
    assert "'many' is not a whole number" in fails(capsys, "--rank", "many")
    assert "unrecognized arguments: --ranks" in fails(capsys, "--ranks", 3, "--steps", 1)


def test_unknown_model(capsys, tmp_path):
    message = fails(capsys, "--model", "smolm2-135m-instruct", "--output", tmp_path / "run")
    assert "did you mean 'smollm2-135m-instruct'" in message


def test_folder_without_config(capsys, tmp_path):
    (tmp_path / "model").mkdir()
    assert "no config.json" in fails(capsys, "--model", tmp_path / "model", "--output", tmp_path / "run")


def test_unknown_target(capsys, tiny_folder, tmp_path):
    arguments = ["--model", tiny_folder, "--targets", "q_proj,upproj", "--eval-samples", 0, "--quiet"]
    message = fails(capsys, *arguments, "--output", tmp_path / "run")
    assert "no linear layer named 'upproj': did you mean up_proj" in message


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([GOOD, "{"], "line 2 is not valid JSON"),
        ([GOOD, GOOD, '{"prompt": "a"}'], "line 3 has no text in 'response'"),
        ([], "is empty"),
    ],
)
def test_bad_data(capsys, tmp_path, lines, expected):
    path = jsonl(tmp_path / "mine.jsonl", *lines)
    assert expected in fails(capsys, "--data", path, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()  # a mistake in the data claims no output folder


def test_long_samples_are_counted(tiny_folder, tmp_path):
    done = run("--model", tiny_folder, "--max-length", 80, "--output", tmp_path / "run", "--json", *QUICK)
    assert " of 2000 samples are longer than 80 tokens (the longest has " in done.stderr
    left_out = json.loads(done.stdout)["samples_left_out"]
    assert f"note: {left_out} of 2000" in done.stderr
    assert 0 < left_out < 2000


def test_nothing_fits(capsys, tiny_folder, tmp_path):
    message = fails(capsys, "--model", tiny_folder, "--max-length", 9, "--output", tmp_path / "run", "--quiet")
    assert "2000 of 2000 samples are longer than 9 tokens" in message
    assert "raise --max-length" in message


def test_output_of_another_run(capsys, finished, tiny_folder):
    output, _ = finished
    before = sorted(output.rglob("*"))
    message = fails(capsys, "--model", tiny_folder, "--output", output, *QUICK)
    assert "holds another run: give another --output, or --resume" in message
    assert sorted(output.rglob("*")) == before


def test_resume_with_other_settings(capsys, finished, tiny_folder):
    message = fails(capsys, "--model", tiny_folder, "--output", finished[0], "--resume", *QUICK, "--rank", 8)
    assert "--rank was 4, now it is 8" in message


def test_resume_without_a_run(capsys, tiny_folder, tmp_path):
    message = fails(capsys, "--model", tiny_folder, "--output", tmp_path / "none", "--resume", *QUICK)
    assert "nothing to resume" in message


def test_beside_no_run(capsys, tmp_path):
    assert "holds no finished run" in fails(capsys, "--beside", tmp_path, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_output_that_cannot_be_written(capsys, tiny_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = fails(capsys, "--model", tiny_folder, "--output", tmp_path / "file" / "run", *QUICK)
    assert "cannot write to" in message


def test_full_disk_keeps_what_was_saved(capsys, finished, tiny_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_qlora, "save_adapter", full)
    message = fails(capsys, "--model", tiny_folder, "--output", tmp_path / "run", *QUICK)
    assert "No space left on device; what was saved before is untouched" in message
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-000006"))


def test_divergence_is_one_sentence(capsys, tiny_folder, tmp_path, monkeypatch):
    module = sys.modules["qlora_lab.finetuning.train"]
    original, calls = module.token_loss_sum, []

    def poisoned(model, batch, *chunk):
        calls.append(model.training)
        return original(model, batch, *chunk) * (float("nan") if sum(calls) == 4 else 1)

    monkeypatch.setattr(module, "token_loss_sum", poisoned)
    message = fails(capsys, "--model", tiny_folder, "--output", tmp_path / "run", *QUICK)
    assert "the loss is nan" in message
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-000002"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--preset", "lean"], "--preset lean keeps its adapters in bfloat16 and this run computes in float32"),
        (["--preset", "in-backward"], "paged_adamw_32bit pages GPU memory, and this model is on a CPU"),
        (["--preset", "in-backward", "--optimizer", "adamw_torch", "--accumulation", "2"], "needs accumulation=1"),
        (["--preset", "slim"], "invalid choice: 'slim'"),
    ],
)
def test_presets_that_cannot_run_here_are_refused(arguments, sentence, tiny_folder, tmp_path, capsys):
    command = ["--model", tiny_folder, "--output", tmp_path / "run", *QUICK, "--compute-dtype", "float32", *arguments]
    assert train_qlora.main(list(map(str, command))) == 2
    assert sentence in capsys.readouterr().err


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
