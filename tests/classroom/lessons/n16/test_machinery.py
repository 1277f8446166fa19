"""What the lesson's folded cells do: commands that fail, a llama.cpp that is missing, samples that end nothing."""

import gguf
import pytest
import torch

from qlora_lab.classroom.lessons.n16 import machinery
from qlora_lab.errors import UserError

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


def test_a_short_card_has_its_head_and_its_scores(tmp_path):
    middle = "## Run it\n\nx\n\n## Settings\n\n- y\n\n"
    card = f"---\nlicense: mit\n---\n# Title\n\n{middle}## Scores\n\n| a |\n\nWritten with z.\n"
    (tmp_path / "README.md").write_text(card)
    assert machinery.short_card(tmp_path / "README.md") == (
        "---\nlicense: mit\n---\n# Title\n\n[...]\n\n## Scores\n\n| a |"
    )


def test_rounding_to_8_bits_is_that_of_gguf():
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(16))
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))
    torch.testing.assert_close(machinery.in_8_bits(x), theirs, rtol=2**-10, atol=1e-6)  # its scales are F16
