"""Modelfile, Ollama's template, model card."""

import copy
import json
import re

import pytest

from qlora_lab.export import __main__ as command
from qlora_lab.export.go_template import turn_texts
from qlora_lab.export.papers import model_card, modelfile
from qlora_lab.export.trained_run import read_run
from qlora_lab.export.vocabulary import read_vocabulary
from qlora_lab.models.bundled import fetch
from qlora_lab.training.templates import prompt_text
from tests.export.conftest import WORDS, family_config, make_run

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim }}"
    "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] + '<end_of_turn>\\n' }}{% endfor %}"
)
UPPER = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
CHATS = [
    [{"role": "user", "content": "two teas"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": '{{ two }} "teas"'}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]


def go(template: str, messages: list[dict[str, str]], system: str) -> str:
    """Go's text/template for the few words that ours use, read from the template itself."""
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    loop = re.fullmatch(r"(.*)\{\{ range \.Messages \}\}\{\{ (if .*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S)
    branches = re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}(.*?)(?=\{\{ else |\Z)', loop[2], re.S)
    around = {role: (before, after) for role, before, after in branches}
    return loop[1] + "".join(m["content"].join(around[m["role"]]) for m in messages) + loop[3]


@pytest.mark.parametrize("template", [None, LLAMA3, MISTRAL, "bundled"], ids=["none", "LLaMA 3", "Mistral", "ChatML"])
def test_ollama_formats_as_the_chat_template_does(template, small_tokenizer):
    tokenizer = copy.deepcopy(small_tokenizer)
    if template != "bundled":
        tokenizer.chat_template, tokenizer.bos_token = template, "<repo_name>"
    texts = turn_texts(tokenizer)
    for chat in CHATS:
        assert go(texts.go(False), chat, texts.system) == prompt_text(chat, tokenizer)


def test_a_template_that_refuses_system_turns_gets_none(small_tokenizer):
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.chat_template, tokenizer.bos_token = GEMMA, "<repo_name>"
    texts = turn_texts(tokenizer)
    assert list(texts.around) == ["user", "assistant"]
    for chat in (CHATS[0], CHATS[2]):
        assert go(texts.go(False), chat, "") == prompt_text(chat, tokenizer)


def test_a_template_that_does_more_is_not_imitated(small_tokenizer):
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.chat_template = UPPER
    assert turn_texts(tokenizer) is None
    assert "# No TEMPLATE" in modelfile("m.gguf", read_vocabulary(small_tokenizer, WORDS), tokenizer)


def test_the_modelfile_of_the_bundled_model(tokenizer):
    text = modelfile("m.gguf", read_vocabulary(tokenizer, len(tokenizer)), tokenizer)
    assert text.startswith(
        'FROM ./m.gguf\nTEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n'
    )
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""\n' in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n')


def test_the_start_token_that_ollama_adds_is_not_in_its_template(small_tokenizer):
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.bos_token = "<repo_name>"
    tokenizer.chat_template = LLAMA3
    read = read_vocabulary(tokenizer, WORDS)
    assert read.add_start
    assert "<repo_name>" not in modelfile("m.gguf", read, tokenizer)


def test_the_card_says_base_data_settings_scores_and_no_path(tmp_path, small_tokenizer):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer, rank="16")
    judged = {"exact_match": {"test": 0.0}, "perplexity": {"prose": 20.0}}
    after = {"exact_match": {"test": 0.98}, "perplexity": {"prose": 20.5}}
    (run / "report.json").write_text(json.dumps({"before": judged, "after": after}))
    assert command.main([str(run), "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card and "\nvllm serve .\n" in card
    head = card.split("---")[1]
    assert "license" not in head and "base_model" not in head and "tags: [qlora, lora]" in head
    assert "- rank: 16" in card and "look it up" in card
    assert "| exact match, test | 0.0% | 98.0% |" in card and "| perplexity, prose | 20.000 | 20.500 |" in card


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("gguf", "\nllama-server -m base-orders-F16.gguf\nollama create base-orders -f Modelfile\n"),
        ("base", "\nllama-server -m base-nf4-F16.gguf\nollama create base-nf4 -f Modelfile\n"),
        ("adapter", "\nllama-server -m base-nf4-F16.gguf --lora base-orders-adapter.gguf\n"),
    ],
)
def test_the_card_names_files_from_its_own_folder_and_the_command_from_here(
    form, expected, tmp_path, small_tokenizer, capsys, monkeypatch
):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert command.main(["run", "--to", "out", "--as", form]) == 0
    size, *lines = capsys.readouterr().out.splitlines()
    card = (tmp_path / "out" / "README.md").read_text()
    assert expected in card and "out/" not in card and str(run.parent) not in card
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert size == f"out/{file.name}: {file.stat().st_size / 1e6:,.1f} MB"
    assert f"out/{file.name}" in lines[-1 if form == "adapter" else 0]
    if form == "adapter":
        assert lines[0] == "python -m qlora_lab.export run --to BASE --as base"


def test_the_card_of_the_bundled_model_names_base_and_licence(tmp_path, small_tokenizer):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer, model="smollm2-135m-instruct")
    assert fetch().is_dir()
    card = model_card(read_run(run), "A test.", ["run me"])
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlicense: apache-2.0\n---" in card
