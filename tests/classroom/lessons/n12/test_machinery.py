"""What the lesson's cells do: commands that fail, a missing llama.cpp, samples that end nothing, the plain merge."""

import types

import gguf
import pytest
import torch

from qlora_lab.adapters.lora import LoraLinear
from qlora_lab.adapters.quantized_linear import QuantizedLinear
from qlora_lab.classroom.lessons.n12 import machinery
from qlora_lab.classroom.source import REPOSITORY
from qlora_lab.errors import UserError
from qlora_lab.finetuning import add_lora, dequantize_linears, load_model, lora_layers, merge, save_lora, unload
from qlora_lab.models.loading import bnb_config
from qlora_lab.quantization import quantize

CHAT = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
    {"role": "user", "content": "another"},
    {"role": "assistant", "content": "the last"},
]


def test_a_command_that_fails_stops_the_notebook(tmp_path, capsys):
    line = f"python -m qlora_lab.export {tmp_path} --to {tmp_path / 'new'}"
    with pytest.raises(UserError, match="this command failed, see above: python -m qlora_lab.export"):
        machinery.terminal(line)
    assert "is no run of train_qlora" in capsys.readouterr().err


def test_a_missing_llama_cpp_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(machinery, "is_here", lambda: False)
    with pytest.raises(UserError, match="llama.cpp is not here: run %pip install xllamacpp"):
        machinery.serve(tmp_path)


def test_samples_hold_what_the_template_writes_and_learn_all_of_it_from_the_answer_on(tokenizer):
    for template in (tokenizer.chat_template, tokenizer.chat_template.replace("<|im_end|>", "")):
        (sample,) = machinery.as_written([CHAT], tokenizer, template)
        text = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
        assert tokenizer.decode(sample.ids) == text and text.endswith("the last\n") == ("im_end" not in template)
        assert tokenizer.decode(sample.ids[sample.prompt_length :]) == text[text.index("the last") :]


def test_the_measured_files_are_those_of_the_page_on_exports(capsys):
    page = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in page.splitlines() if line.startswith("| ")]
    (trained,) = [row for row in rows if row[0] == "the trained model, in transformers"]
    assert [trained[2], trained[5]] == [f"{machinery.TRAINED.kept} %", str(machinery.TRAINED.perplexity)]
    names = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_0 twice": "Q4_0, rounded twice (see below)"}
    for kind, file in machinery.MEASURED.items():
        (row,) = [row for row in rows if row[0] == names[kind] and len(row) == len(trained)]
        assert [row[1], row[3]] == [f"{file.equal} of 100", f"{file.kept} of {machinery.TRAINED.kept}"]
        assert (float(row[5]), float(row[7]), row[8]) == (file.perplexity, file.megabytes, file.verdict)
    machinery.show_measured({"f16": ..., "q8_0": 90, "q4_0": ...})
    lines = capsys.readouterr().out.splitlines()
    assert ["your guess: 90" in line for line in lines] == [line.startswith("q8_0") for line in lines] and len(
        lines
    ) == 6
    machinery.show_measured({"f16": ...})
    assert "you made no guess" in capsys.readouterr().out


def test_the_plain_way_dequantizes_and_merges_as_ours(tiny_folder, tmp_path):
    """transformers' `dequantize()`, PEFT's `merge_and_unload()`; and the same weights, written and read again."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours = add_lora(load_model(tiny_folder, "nf4", compute_dtype=torch.bfloat16, device="cpu")[0], rank=4, alpha=8)
    for layer in lora_layers(ours).values():
        layer.lora_B.data += 0.01
    save_lora(ours, tmp_path / "adapter")
    ours = dict(unload(merge(dequantize_linears(ours))).named_parameters())
    settings = {"dtype": torch.bfloat16, "use_safetensors": True, "trust_remote_code": False}
    config = bnb_config("nf4", True, torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, device_map="cpu", **settings)
    merged = PeftModel.from_pretrained(base.dequantize(), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **settings)
    for model in (merged, again):
        theirs = dict(model.named_parameters())
        assert theirs.keys() == ours.keys() and {weight.dtype for weight in theirs.values()} == {torch.bfloat16}
        for name, weight in theirs.items():
            torch.testing.assert_close(weight, ours[name], rtol=2**-7, atol=1e-6, check_device=False)


def test_a_command_shows_its_first_lines_or_all(monkeypatch, capsys):
    page = types.SimpleNamespace(main=lambda arguments: print(*arguments, "and more", sep="\n"))
    monkeypatch.setattr(machinery.importlib, "import_module", lambda name: page)
    machinery.terminal("python -m any first second", lines=1)
    assert capsys.readouterr().out == "first\n"
    machinery.terminal("python -m any first second")
    assert capsys.readouterr().out == "first\nsecond\nand more\n"


def test_on_levels_of_nf4_a_small_adapter_is_rounded_away_but_not_on_those_of_q4_0():
    generator = torch.Generator().manual_seed(16)
    base = QuantizedLinear(quantize(torch.randn(512, 512, generator=generator)))
    layer = LoraLinear(base, rank=4, alpha=8, generator=generator)
    with torch.no_grad():
        layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))
    assert machinery.survives([layer], "nf4") < 0.1
    assert machinery.survives([layer], "q4_0") > 1


def test_rounding_to_8_bits_is_that_of_gguf():
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(16))
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))
    torch.testing.assert_close(machinery.in_8_bits(x), theirs, rtol=2**-10, atol=1e-6)  # its scales are F16


def test_a_prompt_that_differs_in_the_file_is_told(tokenizer):
    question = [{"role": "user", "content": "Where?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def told(text, ids):
        return machinery.clue(1, types.SimpleNamespace(prompt=lambda _: text, ids=lambda _: ids), question)

    assert "the same text and the same tokens" in told(text, ids)
    assert "different text and the same tokens" in told(text + " ", ids)
    assert "the same text and different tokens" in told(text, ids[1:])
