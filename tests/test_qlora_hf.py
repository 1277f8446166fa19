"""examples/qlora_hf.py on a tiny model: what it sets up, what it learns, and that a killed run goes on to the same end.

About 40 seconds of one core, most of which is imports: the script is run twice in this process and once in its own.
"""

import json
import os
import pathlib
import re
import runpy
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
    rows = (ROOT / "data" / "orders" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    (folder / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def arguments(folder: pathlib.Path, output: str) -> list[str]:
    given = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", folder / output]
    return [*map(str, given), *f"--steps {STEPS} --lr 2e-2 --batch 2 --accumulate 1".split()]


def run(monkeypatch, folder: pathlib.Path, output: str) -> dict:
    """The script's global names after it has run in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments(folder, output)])
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, which this script's users see as well
        return runpy.run_path(str(SCRIPT), run_name="__main__")


def losses(names: dict) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in names["trainer"].state.log_history if "loss" in row}


@pytest.fixture(scope="module")
def whole(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run(monkeypatch, folder, "whole")


def test_it_learns_the_answers_and_their_end_and_nothing_else(whole):
    trainer, tokenizer = whole["trainer"], whole["tokenizer"]
    rows = {json.loads(line)["response"] for line in (ROOT / "data/orders/train.jsonl").read_text().splitlines()[:20]}
    learned = set()
    for sample in [*trainer.train_dataset, *trainer.eval_dataset]:
        answer = [label for label in sample["labels"] if label != -100]
        assert sample["labels"] == [-100] * (len(sample["input_ids"]) - len(answer)) + answer
        assert tokenizer.decode(answer).endswith("<|im_end|>\n")
        learned.add(tokenizer.decode(answer).removesuffix("<|im_end|>\n"))
        assert sample["input_ids"][:3] == tokenizer.encode("<|im_start|>system", add_special_tokens=False) + [198]
    assert learned == rows
    assert len(trainer.eval_dataset) == 2 and len(trainer.train_dataset) == 18
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


def test_a_killed_run_goes_on_with_the_same_losses(whole, folder, monkeypatch):
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    command = [sys.executable, str(SCRIPT), *arguments(folder, "killed")]
    seen = 0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
    ) as process:
        for line in process.stdout:
            seen += bool(re.search(r"\{'loss'", line))
            if seen == 5:  # the last checkpoint is of step 4
                process.kill()
                break
    assert seen == 5 and not (folder / "killed" / "adapter").exists()
    assert sorted(path.name for path in (folder / "killed").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    trained, step = [], trl.SFTTrainer.training_step

    def counted(trainer, *given, **more):
        trained.append(trainer.state.global_step + 1)
        return step(trainer, *given, **more)

    monkeypatch.setattr(trl.SFTTrainer, "training_step", counted)
    again = run(monkeypatch, folder, "killed")
    assert trained == [5, 6, 7, 8]
    assert losses(again) == losses(whole)
    assert (folder / "killed" / "adapter" / "adapter_model.safetensors").exists()
    one, other = (names["trainer"].model.state_dict() for names in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one if "lora_" in name)
