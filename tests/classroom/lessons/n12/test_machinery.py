"""What the lesson's folded cells do: commands that fail, a llama.cpp that is missing, samples that end nothing."""

import types

import gguf
import pytest
import torch

from qlora_lab.adapters.lora import LoraLinear
from qlora_lab.adapters.quantized_linear import QuantizedLinear
from qlora_lab.classroom.lessons.n12 import machinery
from qlora_lab.errors import UserError
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


def test_samples_without_end_are_those_of_the_template_but_for_the_end(tokenizer):
    (sample,) = machinery.without_end([CHAT], tokenizer)
    text = tokenizer.decode(sample.ids)
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False).replace("<|im_end|>", "")
    assert tokenizer.eos_token_id not in sample.ids
    assert tokenizer.decode(sample.ids[sample.prompt_length :]) == "the last\n"


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
