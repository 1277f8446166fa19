"""examples/qlora_hf.py on a tiny model: what it sets up, splits, learns, keeps, judges, merges; a killed run goes on.

About 50 seconds of one core, most of which is imports: the script trains three times in this process, once in its own.
"""

import ast
import contextlib
import csv
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from tests.conftest import tiny_config

trl = pytest.importorskip("trl")
ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "qlora_hf.py"
STEPS = 8  # a checkpoint and a validation after each two


@pytest.fixture(scope="module")
def folder(tmp_path_factory, bundled):
    """A random model whose tokenizer begins texts with a start token, as LLaMA's does, and a file of data."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder / "model")
    starting = AutoTokenizer.from_pretrained(bundled)
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    starting.save_pretrained(folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model")("a")["input_ids"][0] == 1
    rows = (ROOT / "data" / "orders" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    rows = [json.loads(row) | {"customer": number % 20} for number, row in enumerate(rows)]
    write(folder / "data.jsonl", rows)
    write(
        folder / "short.jsonl", [row | {"response": "yes" if number % 3 else "no"} for number, row in enumerate(rows)]
    )
    return folder


def write(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arguments(folder: pathlib.Path, output: str, data: str = "data.jsonl") -> list[str]:
    given = ["--model", folder / "model", "--data", folder / data, "--output", folder / output]
    return [*map(str, given), *f"--steps {STEPS} --every 2 --lr 2e-2 --batch 2 --accumulate 1".split()]


def run(monkeypatch, folder: pathlib.Path, *command: str) -> dict:
    """The script's global names after it has run in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, which this script's users see as well
        return runpy.run_path(str(SCRIPT), run_name="__main__")


def losses(names: dict) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in names["trainer"].state.log_history if "loss" in row}


@pytest.fixture(scope="module")
def whole(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run(monkeypatch, folder, *arguments(folder, "whole"), "--split-by", "customer")


@pytest.fixture(scope="module")
def judged(folder):
    """A run on short answers: the script's global names, what it printed, and the prompts that the model was given.

    It answers "yes" to the first question, "yes," to the second, and so on. The validation loss is lowest at step 4.
    """
    from transformers import GenerationMixin

    said, asked, evaluate = io.StringIO(), [], trl.SFTTrainer.evaluate

    def answer(model, input_ids, do_sample, max_new_tokens, **more):
        assert not do_sample and max_new_tokens > 20 and not model.training
        asked.append(input_ids[0].tolist())
        tokens = [10407] if len(asked) % 2 else [10407, 28]
        return torch.cat([input_ids, torch.tensor([[*tokens, 2]])], dim=1)

    def judge(trainer, *given, **more):
        return evaluate(trainer, *given, **more) | {"eval_loss": abs(trainer.state.global_step - 4.0)}

    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(said):
        monkeypatch.setattr(GenerationMixin, "generate", answer)
        monkeypatch.setattr(trl.SFTTrainer, "evaluate", judge)
        names = run(monkeypatch, folder, *arguments(folder, "judged", "short.jsonl"))
    return names, said.getvalue(), asked


def test_it_learns_the_answers_and_their_end_and_nothing_else(whole):
    trainer, tokenizer = whole["trainer"], whole["tokenizer"]
    rows = {json.loads(line)["response"] for line in (ROOT / "data/orders/train.jsonl").read_text().splitlines()[:40]}
    rows -= {chat["completion"][0]["content"] for chat in whole["data"]["test"]}
    learned = set()
    for sample in [*trainer.train_dataset, *trainer.eval_dataset]:
        answer = [label for label in sample["labels"] if label != -100]
        assert sample["labels"] == [-100] * (len(sample["input_ids"]) - len(answer)) + answer
        assert tokenizer.decode(answer).endswith("<|im_end|>\n")
        learned.add(tokenizer.decode(answer).removesuffix("<|im_end|>\n"))
        assert sample["input_ids"][:3] == tokenizer.encode("<|im_start|>system", add_special_tokens=False) + [198]
    assert learned == rows
    assert len(trainer.eval_dataset) == 4 and len(trainer.train_dataset) == 28
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1 and tokenizer.pad_token_id == tokenizer.eos_token_id  # it pads with the end token
    for row, length in enumerate(lengths):
        assert (batch["labels"][row, length:] == -100).all() and batch["labels"][row, length - 2] == 2


def test_the_base_is_nf4_twice_quantized_and_only_a_float32_adapter_is_trained(whole):
    from bitsandbytes.nn import Linear4bit

    model = whole["trainer"].model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 2 * 7
    assert all(
        layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers.values()
    )
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert whole["trainer"].args.gradient_checkpointing and not whole["trainer"].args.bf16


def test_the_loss_falls_and_what_is_saved_is_what_was_trained(whole, folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fell = losses(whole)
    assert list(fell) == list(range(1, STEPS + 1)) and fell[STEPS] < fell[1] - 1
    base = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=whole["four_bits"])
    loaded = PeftModel.from_pretrained(base, folder / "whole" / "adapter").state_dict()
    trained = whole["trainer"].model.state_dict()
    adapters = [name for name in trained if "lora_" in name]
    assert adapters and all(torch.equal(loaded[name], trained[name].to(loaded[name].dtype)) for name in adapters)


def test_no_customer_is_on_two_sides(whole, folder):
    """Of twenty with two orders each, a fifth is tested on, and a tenth validated on."""
    customer_of = {row["prompt"]: row["customer"] for row in read(folder / "data.jsonl")}
    of = {part: [customer_of[chat["prompt"][-1]["content"]] for chat in chats] for part, chats in whole["data"].items()}
    assert {part: (len(some), len(set(some))) for part, some in of.items()} == {
        "train": (28, 14), "validation": (4, 2), "test": (8, 4),
    }  # fmt: skip
    assert len(set().union(*of.values())) == 20


def test_the_checkpoint_with_the_lowest_validation_loss_is_left(judged, folder):
    from safetensors.torch import load_file

    adapters = {path.parent.name: load_file(path) for path in (folder / "judged").glob("*/adapter_model.safetensors")}
    assert set(adapters) == {"checkpoint-4", "checkpoint-8", "adapter"}
    kept = adapters["adapter"]
    assert all(torch.equal(kept[name], adapters["checkpoint-4"][name]) for name in kept)
    assert not any(torch.equal(kept[name], adapters["checkpoint-8"][name]) for name in kept)
    assert (folder / "judged" / "adapter" / "tokenizer_config.json").exists()


def test_every_test_question_is_answered_and_judged(judged, folder):
    names, said, asked = judged
    tokenizer, rows = names["tokenizer"], read(folder / "judged" / "answers.jsonl")
    assert [row["asked"] for row in rows] == [chat["prompt"][-1]["content"] for chat in names["data"]["test"]]
    assert [row["answered"] for row in rows] == ["yes", "yes,"] * 4
    assert {row["expected"] for row in rows} == {"yes", "no"}
    right = sum(row["expected"] == "yes" for row in rows[::2])
    assert f"exact match: {right} of 8; chance alone may move that by 35 points, up or down" in said
    usual = sum(row["expected"] == "yes" for row in rows)
    assert f"always the most frequent answer: {usual} of 8" in said and 0 < right < usual < 8
    assert re.search(r"^peak of torch's memory: (not known on a CPU|\d+\.\d GB)$", said, flags=re.MULTILINE)
    for ids, row in zip(asked, rows, strict=True):  # the start token once, and the answer's turn begun
        text = tokenizer.decode(ids)
        assert text.startswith("<|im_start|>system\nTurn the order")
        assert text.endswith(f"user\n{row['asked']}<|im_end|>\n<|im_start|>assistant\n")


def test_the_first_sample_is_shown_token_by_token(judged):
    names, said, _ = judged
    shown = dict(line.split(": ", 1) for line in said.splitlines() if line.startswith(("read", "learned")))
    chat = names["data"]["train"][0]
    assert ast.literal_eval(shown["learned"]) == [chat["completion"][0]["content"], "<|im_end|>", "\n"]
    tokens = ast.literal_eval(shown["read"])
    assert tokens[:3] == ["<|im_start|>", "system", "\n"] and len(tokens) > 30
    assert "".join(tokens).endswith(f"{chat['prompt'][-1]['content']}<|im_end|>\n<|im_start|>assistant\n")


def test_what_is_merged_answers_like_the_adapter_beside_its_base(judged, folder, monkeypatch):
    """In 16 bits, so nearly; and not like the adapter added to the weights that were never rounded to 4 bits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, folder, *arguments(folder, "judged"), "--merge")
    assert ended.value.code is None
    merged = AutoModelForCausalLM.from_pretrained(folder / "judged" / "merged", dtype=torch.float32)
    assert merged.dtype == torch.float32 and not hasattr(merged.config, "quantization_config")
    assert (folder / "judged" / "merged" / "tokenizer_config.json").exists()
    adapter = folder / "judged" / "adapter"
    beside = judged[0]["trainer"].model.eval()
    wrong = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model"), adapter
    ).merge_and_unload()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted, right, other = (each(ids).logits for each in (beside, merged, wrong))
    off, off_by_the_other = ((each - wanted).norm() / wanted.norm() for each in (right, other))
    assert off < 0.02 and off_by_the_other > 10 * off, (off, off_by_the_other)


def test_a_csv_file_is_read_as_it_stands_and_endless_templates_and_long_samples_are_told(folder, monkeypatch, capsys):
    from transformers import AutoTokenizer

    endless = AutoTokenizer.from_pretrained(folder / "model")
    endless.chat_template = endless.chat_template.replace("<|im_end|>", "")
    shutil.copytree(folder / "model", folder / "endless")
    endless.save_pretrained(folder / "endless")
    rows = [
        row | {"prompt": row["prompt"].replace(" ", '\r\n"; ', 1), "response": f"{n:03}"}
        for n, row in enumerate(read(folder / "data.jsonl"))
    ]
    with open(folder / "data.CSV", "w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=";")
        table.writeheader()
        table.writerows(rows)
    lengths = [
        len(endless.apply_chat_template(chat, return_dict=True)["input_ids"])
        for chat in (
            [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]},
             {"role": "assistant", "content": row["response"]}]
            for row in rows
        )
    ]  # fmt: skip
    limit = sorted(lengths)[len(lengths) // 2]
    command = [*arguments(folder, "out", "data.CSV"), "--model", str(folder / "endless"), "--max-length", str(limit)]
    with pytest.raises(SystemExit, match="no end token is learned"):
        run(monkeypatch, folder, *command)
    printed = capsys.readouterr().out
    said = re.findall(r"^\w+: (\d+) samples, (\d+) more", printed, flags=re.MULTILINE)
    assert sum(int(kept) for kept, _ in said) == sum(length <= limit for length in lengths) < len(lengths) == 40
    assert sum(int(gone) for _, gone in said) == sum(length > limit for length in lengths)
    shown = dict(line.split(": ", 1) for line in printed.splitlines() if line.startswith(("read", "learned")))
    response = "".join(ast.literal_eval(shown["learned"])).strip()
    prompt = next(row["prompt"] for row in rows if row["response"] == response)  # "007" is no 7
    assert prompt in "".join(ast.literal_eval(shown["read"]))


KILLED = """
import os, runpy, signal, sys, trl
step = trl.SFTTrainer.training_step
def killed(trainer, *given, **more):
    if trainer.state.global_step == 5:  # the last checkpoint is of step 4
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *given, **more)
trl.SFTTrainer.training_step = killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_goes_on_with_the_same_losses(whole, folder, monkeypatch):
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", KILLED, str(SCRIPT), *arguments(folder, "killed"), "--split-by", "customer"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "killed" / "adapter").exists()
    assert sorted(path.name for path in (folder / "killed").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    trained, step = [], trl.SFTTrainer.training_step

    def counted(trainer, *given, **more):
        trained.append(trainer.state.global_step + 1)
        return step(trainer, *given, **more)

    monkeypatch.setattr(trl.SFTTrainer, "training_step", counted)
    again = run(monkeypatch, folder, *arguments(folder, "killed"), "--split-by", "customer")
    assert trained == [5, 6, 7, 8]
    assert losses(again) == losses(whole)
    assert (folder / "killed" / "adapter" / "adapter_model.safetensors").exists()
    one, other = (names["trainer"].model.state_dict() for names in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one if "lora_" in name)
