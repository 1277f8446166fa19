"""Modelfile, Ollama's template, model card."""

import copy
import json
import re

import pytest
import torch

from qlora_lab.export import __main__ as command
from qlora_lab.export.go_template import turn_texts
from qlora_lab.export.papers import adapter_card, model_card, modelfile, quoted
from qlora_lab.export.vocabulary import read_vocabulary
from qlora_lab.models.faults import use_differentiable_kernels
from qlora_lab.training.templates import prompt_text
from tests.export.conftest import WORDS, family_config, make_run, trained_model

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


PARAMETERS = {  # that Ollama's page on Modelfiles names, and their types
    **dict.fromkeys(("num_ctx", "repeat_last_n", "seed", "num_predict", "draft_num_predict", "top_k"), int),
    **dict.fromkeys(("repeat_penalty", "temperature", "top_p", "min_p"), float),
    "stop": str,
}


def read_modelfile(text: str) -> list[tuple[str, object]]:
    """A Modelfile as Ollama reads it (parser/parser.go): instructions, and parameters, by name.

    An argument ends at the end of a line on which it is whole. In quotes it is whole at the closing ones, three or one,
    and nothing is escaped. Outside of it, lines that begin with # are comments.
    """
    found, rest = [], text
    while rest := rest.lstrip():
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        start = re.match(r"(FROM|TEMPLATE|SYSTEM|PARAMETER (\w+)) ", rest)
        assert start, f"no instruction of a Modelfile: {rest[:40]!r}"
        lines, value = rest[start.end() :].split("\n"), None
        for count in range(1, len(lines) + 1):
            said = "".join(c for c in "\n".join(lines[:count]) if c.isprintable() or c in "\n\t").strip()
            marks = next((marks for marks in ('"""', '"') if said.startswith(marks)), "")
            if not marks or (len(said) >= 2 * len(marks) and said.endswith(marks)):
                value = said[len(marks) : len(said) - len(marks)]
                break
        assert value is not None, f"never closed: {rest[:40]!r}"
        rest = "\n".join(lines[count:])
        found.append((start[2] or start[1], PARAMETERS[start[2]](value) if start[2] else value))
    return found


@pytest.mark.parametrize("template", [None, LLAMA3, MISTRAL, "bundled"], ids=["none", "LLaMA 3", "Mistral", "ChatML"])
def test_ollama_formats_as_the_chat_template_does(template, small_tokenizer):
    tokenizer = copy.deepcopy(small_tokenizer)
    if template != "bundled":
        tokenizer.chat_template, tokenizer.bos_token = template, "<repo_name>"
    vocabulary = read_vocabulary(tokenizer, WORDS)
    read = dict(read_modelfile(modelfile("a model.gguf", vocabulary, tokenizer)))
    assert read["FROM"] == "./a model.gguf"
    for chat in CHATS:
        start = tokenizer.bos_token if vocabulary.add_start else ""
        assert start + go(read["TEMPLATE"], chat, read.get("SYSTEM", "")) == prompt_text(chat, tokenizer)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        *[
            (text, True)
            for text in ("<|im_end|>", 'say "stop"', "two\nlines", '"\n', "\\n", "a\ttab ", "<｜end▁of｜>", "")
        ],
        *[(text, False) for text in ('"""', 'a\n"""', "zero\u200bwidth")],
    ],
)
def test_ollama_reads_the_text_that_was_written_or_none_is(text, kept):
    assert quoted(text) is not None if kept else quoted(text) is None
    if kept:
        assert read_modelfile(f"FROM x\nPARAMETER stop {quoted(text)}\nSYSTEM y\n")[1] == ("stop", text)


def test_a_template_with_braces_of_go_is_not_imitated(small_tokenizer):
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.chat_template = MISTRAL.replace("[INST] ", '{{ "{{ .Content }}" }}')
    assert turn_texts(tokenizer) is None


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
    file, template, *others = read_modelfile(text)
    assert file == ("FROM", "./m.gguf") and template[0] == "TEMPLATE"
    assert others == [
        ("SYSTEM", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ("stop", "<|im_end|>"),
        ("temperature", 0.0),
        ("repeat_penalty", 1.0),
    ]


def test_the_start_token_that_ollama_adds_is_not_in_its_template(small_tokenizer):
    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.bos_token = "<repo_name>"
    tokenizer.chat_template = LLAMA3
    read = read_vocabulary(tokenizer, WORDS)
    assert read.add_start
    assert "<repo_name>" not in modelfile("m.gguf", read, tokenizer)


@pytest.mark.parametrize("guessed", [True, False])
def test_the_card_says_base_data_settings_scores_and_no_path(guessed, tmp_path, small_tokenizer):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer, rank="16")
    pattern = {"regex:a|(b)": {"test": 1.0}}
    before = {"exact_match": {"test": 0.0}, "perplexity": {"prose": 20.0}, "f1": {"test": 0.25}, **pattern}
    after = {"exact_match": {"test": 0.54}, "perplexity": {"prose": 20.5}, "f1": {"test": 0.75}, **pattern}
    report = {"steps": 30, "before": before, "after": after, "judged": {"test": 50, "prose": 6}}
    report["dullest_guess"] = {"exact_match": {"test": 0.02}} if guessed else {}
    (run / "report.json").write_text(json.dumps(report))
    assert command.main([str(run), "--to", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card and "\nvllm serve .\n" in card
    head = card.split("---")[1]
    assert "license" not in head and "base_model" not in head and "tags: [qlora, lora]" in head
    assert "- rank: 16" in card and "- steps: 30" in card and "look it up" in card
    more = [" dullest guess |", " 2% (1 of 50) |", " - |"] if guessed else ["", "", ""]
    assert f"\n| measure | before | after |{more[0]}\n" in card
    assert f"\n| exact match, test | 0% (0 of 50) | 54% (27 of 50) |{more[1]}\n" in card
    assert rf"| regex:a\|(b), test | 100% (50 of 50) | 100% (50 of 50) |{more[2]}" in card
    assert f"\n| token F1, test | 25% (of 50) | 75% (of 50) |{more[2]}\n" in card
    assert f"\n| perplexity, prose | 20.000 | 20.500 |{more[2]}\n" in card and ("Dullest guess: " in card) == guessed


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


BUNDLED = {"model": "smollm2-135m-instruct", "data": "orders", "method": "qlora"}


def test_the_cards_of_the_bundled_model_name_base_and_licence():
    for card in (model_card(BUNDLED, {}, "A test.", ["run me"]), adapter_card(BUNDLED, {}, False)):
        assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlicense: apache-2.0\n---" in card
        assert "Apache-2.0" in card and "in Q4_1" in card and "| not judged |" in card
    assert "base_model_relation: adapter" in card and 'locate("smollm2-135m-instruct")' in card
    aware = adapter_card({**BUNDLED, "merge_aware": "q4_0"}, {}, False)
    assert "rounded to q4_0" in aware and "rounded to" not in card


@pytest.mark.parametrize(("method", "own_tokenizer"), [("qlora", False), ("lora", True)])
def test_the_adapters_card_loads_it_beside_its_base(method, own_tokenizer, tmp_path, small_tokenizer, monkeypatch):
    run = make_run(tmp_path, family_config("llama tied"), small_tokenizer, method=method)
    settings = json.loads((run / "run.json").read_text())
    if own_tokenizer:
        small_tokenizer.save_pretrained(run / "adapter")
    card = adapter_card(settings, {"compute_dtype": "float32"}, own_tokenizer)
    assert str(tmp_path) not in card and "base_model" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    (run / "adapter" / "base").symlink_to(tmp_path / "base")
    monkeypatch.chdir(run / "adapter")
    names: dict = {}
    exec(code, names)
    use_differentiable_kernels(names["model"])  # those for AVX512-BF16 round the scales
    ids = torch.tensor([names["tokenizer"]("two teas")["input_ids"]])
    ours = trained_model(run)
    with torch.no_grad():
        torch.testing.assert_close(names["model"](ids).logits, ours(ids).logits)
