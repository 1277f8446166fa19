"""Runs of the command line that validate, keep the best adapter, stop early, leave a log, and score free text."""

import html
import json
import math
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qlora_lab import train_qlora
from qlora_lab.evaluation import judge
from qlora_lab.training import tracking
from qlora_lab.training.run_folder import RunFolder
from tests.conftest import in_two_processes, kill_train_qlora
from tests.test_train_qlora import GOOD, call, contents, fails, jsonl
from tests.training.test_tracking import read

# At this rate the tiny model's validation loss is lowest after some steps, and then it rises.
CARE = [
    *"--steps 60 --batch-size 4 --eval-samples 3 --rank 4 --checkpoint-every 3 --quiet --method lora".split(),
    *"--compute-dtype float32 --lr 0.04 --schedule constant --validate-every 2 --keep best --patience 2".split(),
]


def lines(output) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def answers(output) -> list[dict]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A run that nobody has stopped, in a process of its own: its folder and its report."""
    output = tmp_path_factory.mktemp("whole") / "run"
    arguments = ["--model", tiny_folder, "--output", output, "--json", *CARE]
    command = [sys.executable, "-m", "qlora_lab.train_qlora", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return output, json.loads(done.stdout)


def test_the_best_adapter_is_what_is_saved_and_judged(whole):
    """The judgement after training is of the adapter whose validation loss was the lowest, and so is the file."""
    output, report = whole
    steps, losses = zip(*report["validation_losses"], strict=True)
    assert list(steps) == list(range(2, report["steps"] + 1, 2))
    best = losses.index(min(losses))
    assert 0 < best == len(losses) - 3, "choose another learning rate for CARE"
    assert report["adapter_step"] == steps[best]
    assert (report["out_of_patience"], report["interrupted"]) == (True, False)
    assert report["after"]["perplexity"]["validation"] == pytest.approx(math.exp(min(losses)), rel=1e-6)
    newest = sorted((output / "checkpoints").iterdir())[-1]
    assert newest.name == f"checkpoint-{report['steps']:06d}"
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    for file, equal in (("best", True), ("adapter", False)):
        kept = {
            name.replace(".default", ""): value for name, value in load_file(newest / f"{file}.safetensors").items()
        }
        assert all(torch.equal(kept[name], value) for name, value in saved.items()) is equal


def test_the_log_is_the_report_step_by_step(whole):
    output, report = whole
    log = lines(output)
    assert [line["step"] for line in log] == list(range(1, report["steps"] + 1))
    assert [line["loss"] for line in log] == report["losses"]
    noted = [[line["step"], line["validation_loss"]] for line in log if "validation_loss" in line]
    assert noted == report["validation_losses"]


def test_a_killed_run_ends_like_one_that_was_not(whole, capsys, tiny_folder, tmp_path):
    output = tmp_path / "run"
    arguments = ["--model", tiny_folder, "--output", output, *CARE]
    kill_train_qlora(arguments, output, 5)
    report, _ = call(capsys, *arguments, "--resume")
    assert report["resumed_at"] == 3
    for key in ("losses", "validation_losses", "adapter_step", "out_of_patience", "before", "after"):
        assert report[key] == whole[1][key], key
    assert answers(output) == answers(whole[0])  # those before training, of the process that was killed
    timeless = [[{**line, "seconds": 0} for line in lines(folder)] for folder in (output, whole[0])]
    assert timeless[0] == timeless[1]
    again, _ = call(capsys, *arguments, "--resume")
    assert (again["steps"], again["resumed_at"], again["after"]) == (report["steps"], report["steps"], report["after"])
    assert answers(output) == answers(whole[0])

    (output / "answers.jsonl").write_text('{"split": "test"}\n')
    before = contents(output)
    assert "answers.jsonl is damaged: without it" in fails(capsys, *arguments, "--resume")
    assert contents(output) == before
    (output / "answers.jsonl").unlink()  # as in a run of before answers were kept
    call(capsys, *arguments, "--resume")
    assert [set(row) for row in answers(output)] == [{"split", "asked", "expected", "after"}] * 6


def test_answers_are_kept_beside_the_report_and_shown_on_a_page(whole):
    output, report = whole
    rows = answers(output)
    assert [row["split"] for row in rows] == ["test"] * 3 + ["shifted"] * 3
    assert all(set(row) == {"split", "asked", "expected", "before", "after"} for row in rows)
    assert "answers" not in report
    page = (output / "report.html").read_text(encoding="utf-8")
    for row in rows:
        assert html.escape(row["expected"]) in page and html.escape(row["asked"][-1]["content"]) in page
    assert "validation loss was the lowest" in page and "Validation loss: lowest at step" in page


def test_an_interrupted_run_shows_no_answers_of_an_earlier_end(whole, capsys, monkeypatch, tiny_folder, tmp_path):
    """It was finished once, is made longer, and is stopped: what the model answered then is not what it answers now."""
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    monkeypatch.setattr(sys.modules["qlora_lab.training.steps.plain"], "token_loss_sum", pressed_twice)
    arguments = ["--model", tiny_folder, "--output", output, *CARE, "--resume", "--steps", 61, "--patience", 20]
    assert train_qlora.main([*map(str, arguments)]) == 130
    assert [set(row) for row in answers(output)] == [{"split", "asked", "expected", "before"}] * 6
    assert "Interrupted" in (output / "report.html").read_text(encoding="utf-8")


def pressed_twice(*_):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_any_path_can_be_written_down(tmp_path):
    """A name that is no text in UTF-8, as Linux allows it."""
    folder = RunFolder(tmp_path, {}, False, {})
    folder.write("report.html", "na\udcefve")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "na\\udcefve"
    folder.write("report.json", {"adapter": "\\na\udcefve \ud83d"})
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {"adapter": "\\na\udcefve \ud83d"}


def test_letters_of_all_languages_are_kept_as_they_are(tmp_path):
    folder = RunFolder(tmp_path, {}, False, {})
    answers = [{"split": "test", "expected": "ü\u2028\x85\r\n你", "before": {"answer": "¿Dónde?"}}, {"split": "test"}]
    folder.write("answers.jsonl", answers[:1])
    assert folder.answers() == answers[:1]
    assert "¿Dónde?" in (tmp_path / "answers.jsonl").read_text(encoding="utf-8")


def test_two_processes_stop_at_the_same_step(whole, tiny_folder, tmp_path):
    done = in_two_processes(
        "qlora_lab.train_qlora", "--model", tiny_folder, "--output", tmp_path / "two", "--json", *CARE, "--patience", 1
    )
    assert done.returncode == 0, done.stderr
    report, alone = json.loads(done.stdout), whole[1]["validation_losses"]
    losses = [loss for _, loss in alone]
    rises = next(n for n in range(1, len(losses)) if losses[n] > losses[n - 1])
    assert (report["processes"], report["out_of_patience"]) == (2, True)
    assert (report["steps"], report["adapter_step"]) == (alone[rises][0], alone[rises - 1][0])
    for ours, theirs in zip(report["validation_losses"], alone, strict=False):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert [line["step"] for line in lines(tmp_path / "two")] == list(range(1, report["steps"] + 1))


def test_a_run_that_is_out_of_patience_goes_on_with_more(whole, capsys, tiny_folder, tmp_path):
    output = tmp_path / "run"
    arguments = ["--model", tiny_folder, "--output", output, *CARE]
    first, _ = call(capsys, *arguments, "--patience", 1)
    assert first["steps"] < whole[1]["steps"] and first["out_of_patience"]
    report, _ = call(capsys, *arguments, "--resume")
    assert report["validation_losses"] == whole[1]["validation_losses"]
    assert report["after"] == whole[1]["after"]


def test_the_report_says_which_adapter_it_is_about(whole):
    text = train_qlora.describe(whole[1])
    assert "stopped early: the validation loss no longer fell" in text
    assert f"the adapter is that of step {whole[1]['adapter_step']}, whose validation loss was the lowest" in text
    (first, loss), *_, (end, at_end) = whole[1]["validation_losses"]
    assert f"  {loss:.4f} at step {first}, {at_end:.4f} at step {end}\n" in text
    once = train_qlora.describe({**whole[1], "validation_losses": [(first, loss)]})
    assert f"  {loss:.4f} at step {first}\n" in once
    last = train_qlora.describe({**whole[1], "adapter_step": whole[1]["steps"], "out_of_patience": False})
    assert "stopped early" not in last and "that of step" not in last


def test_samples_that_choose_the_step_do_not_judge_the_answers(tmp_path):
    """Of a file without splits others are held out to validate; those to judge stay the same."""
    rows = [json.dumps({"prompt": f"Say {n}.", "response": str(n)}) for n in range(50)]
    arguments = ["--data", str(jsonl(tmp_path / "mine.jsonl", *rows)), "--eval-samples", "5"]
    trained, judged, _ = train_qlora.load_data(train_qlora.parser().parse_args(arguments))
    args = train_qlora.parser().parse_args([*arguments, "--validate-every", "2"])
    trained_too, apart, _ = train_qlora.load_data(args)
    assert judged["test"] == judged["validation"] == apart["test"]
    assert (len(trained), len(trained_too), len(apart["test"]), len(apart["validation"])) == (45, 40, 5, 5)
    assert not [chat for chat in [*trained_too, *apart["test"]] if chat in apart["validation"]]
    assert not [chat for chat in trained_too if chat in apart["test"]]


def test_a_run_of_before_a_flag_existed_goes_on(capsys, tiny_folder, tmp_path):
    """What its run.json does not name had the default; anything else is refused."""
    data = jsonl(tmp_path / "mine.jsonl", *[GOOD] * 20)
    arguments = ["--model", tiny_folder, "--data", data, "--output", tmp_path / "run", "--steps", 2, "--batch-size", 2]
    arguments += ["--rank", 2, "--eval-samples", 2, "--method", "lora", "--quiet"]
    first, _ = call(capsys, *arguments)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    for flag in ("validate_every", "keep", "patience"):
        del settings[flag]
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    assert train_qlora.main([*map(str, arguments), "--resume", "--validate-every", "1"]) == 2
    assert "--validate-every was None, now it is 1" in capsys.readouterr().err
    again, _ = call(capsys, *arguments, "--resume")
    assert again["losses"] == first["losses"]


# ------------------------------------------------------------------------------------------------------------- scoring


def test_answers_are_scored_as_asked(capsys, monkeypatch, tiny_folder, tmp_path):
    """Before and after, for both splits, in the report for programs and in that for people."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test", "shifted"):
        rows = [{"prompt": "Q", "response": '{"n": 1, "of": "a"}'}, {"prompt": "¿Dónde?", "response": '{"n": 2}'}]
        jsonl(tmp_path / "data" / f"{split}.jsonl", *map(json.dumps, rows))
    monkeypatch.setattr(judge, "generate", lambda *_, **__: ['{"of": "a", "n": 1.5}', '{"n": 2}'] * 2)
    arguments = ["--model", tiny_folder, "--data", tmp_path / "data", "--output", tmp_path / "run", "--method", "lora"]
    arguments += ["--steps", 1, "--rank", 2, "--judge", "json", "--judge", "f1"]
    arguments += ["--judge", r"regex:[\d.]+", "--judge", r'regex:"n": \d']
    report, _ = call(capsys, *arguments)
    assert report["before"]["json"] == report["after"]["json"] == {"test": 0.75, "shifted": 0.75}
    assert report["after"][r"regex:[\d.]+"] == report["after"]["exact_match"] == {"test": 0.5, "shifted": 0.5}
    assert report["after"][r'regex:"n": \d']["test"] == 1.0
    assert report["after"]["json_fields"] == dict.fromkeys(("test", "shifted"), {"n": 0.5, "of": 1.0})
    assert report["after"]["f1"]["test"] == pytest.approx((4 / 6 + 1) / 2)  # "of n 15", "n 1 of"
    shown = {
        line[:24].strip(): re.split(" {2,}", line[24:].strip()) for line in train_qlora.describe(report).splitlines()
    }
    assert shown["JSON fields, test"] == ["75% (of 2)", "75% (of 2)", "50% (of 2)"] and "token F1, test" in shown
    assert shown["n, test"] == ["50%"] * 3 and shown["of, shifted"] == ["100%"] * 3
    assert shown[r"regex:[\d.]+, shifted"] == shown["exact match, test"] == ["50% (1 of 2)"] * 3
    assert shown[""] == ["before", "after", "dullest guess"]
    assert "¿Dónde?" in (tmp_path / "run" / "answers.jsonl").read_text(encoding="utf-8")
    stopped = train_qlora.describe({**report, "after": {"exact_match": {}, "perplexity": {}}, "interrupted": True})
    assert "JSON fields, test             75% (of 2)               -" in stopped


# ------------------------------------------------------------------------------------------------------------ tracking


def test_a_tracked_run_is_tracked_step_by_step_and_only_if_asked(whole, capsys, tiny_folder, tmp_path):
    """Stopped by Ctrl-C after a step that no checkpoint has, then resumed: TensorBoard has each step once."""
    assert not (whole[0] / "tensorboard").exists() and not (whole[0] / "tracked.json").exists()
    output = tmp_path / "run"
    arguments = ["--model", tiny_folder, "--output", output, *CARE, "--patience", "1", "--track", "tensorboard"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_qlora.StepLog, "write", pressed_at(5, train_qlora.StepLog.write))
        assert train_qlora.main([*map(str, arguments)]) == 130
    assert [line["step"] for line in lines(output)] == [1, 2, 3, 4, 5]
    capsys.readouterr()
    report, err = call(capsys, *arguments, "--resume")
    assert report["resumed_at"] == 3
    seen = read(output / "tensorboard")
    assert [step for step, _ in seen["loss"]] == list(range(1, report["steps"] + 1))
    assert [loss for _, loss in seen["loss"]] == pytest.approx(report["losses"])
    assert seen["validation_loss"] == [(step, pytest.approx(loss)) for step, loss in report["validation_losses"]]
    for split, share in report["after"]["exact_match"].items():
        assert seen[f"exact_match/{split}"] == [(report["steps"], share)]


def pressed_at(step: int, write):
    def pressing(log, record) -> None:
        write(log, record)
        if record.step == step:
            signal.raise_signal(signal.SIGINT)

    return pressing


def test_a_missing_tracker_is_said_before_anything_is_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(train_qlora, "load_data", lambda *_: pytest.fail("too late: the data is read"))
    message = fails(capsys, "--track", "trackio", "--output", tmp_path / "run")
    assert message == "error: --track trackio needs the package trackio, which is not installed: pip install trackio"
    assert not (tmp_path / "run").exists()
