"""`--check`: good files pass, and each kind of broken one is told by its name."""

import dataclasses
import json

import pytest

from qlora_lab.export import __main__ as command
from qlora_lab.export import architectures, check, gguf_files, vocabulary
from tests.export.conftest import family_config, make_run, needs_llama_cpp

SAID = [("Order one tea.", "<|im_end|>"), ("Order two cakes.", "a"), ("Pay.", "b")]


@pytest.fixture
def run(small_tokenizer, tmp_path):
    """A run that was judged on three lines of data."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"prompt": prompt, "response": response}) for prompt, response in SAID]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    config = family_config("llama tied", max_position_embeddings=512)
    return make_run(tmp_path, config, small_tokenizer, data=str(folder))


def checked(capsys, run, *arguments) -> tuple[int, dict, str]:
    capsys.readouterr()
    code = command.main([str(run), "--to", str(run.parent / "out"), "--check", "--json", *arguments])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


@pytest.mark.parametrize("form", ["merged", pytest.param("gguf", marks=needs_llama_cpp)])
def test_a_good_export_passes(form, run, capsys):
    code, report, said = checked(capsys, run, "--as", form)
    assert code == 0 and report["check"]["broken"] == ""
    assert report["check"]["equal"] == 1 and report["check"]["samples"] == 3
    assert json.loads((run.parent / "out" / "check.json").read_text()) == report["check"]


def break_template(patch):
    """The file's template forgets the token that ends a turn: what most exports that never stop have in common."""
    real = vocabulary.add_vocabulary

    def without_end(writer, read):
        real(writer, dataclasses.replace(read, template=read.template.replace("<|im_end|>", "")))

    patch.setattr(gguf_files, "add_vocabulary", without_end)


def break_special_tokens(patch):
    """Control tokens are written as plain words, so llama.cpp reads their letters."""
    real = vocabulary.token_types
    patch.setattr(vocabulary, "token_types", lambda *a: [vocabulary.NORMAL if t == 3 else t for t in real(*a)])


def break_weights(patch):
    patch.setattr(architectures, "interleave", lambda rows, heads: rows)


BROKEN = [
    (break_template, "the chat template's text differs in llama.cpp: trained on"),
    (break_special_tokens, "the prompt has other tokens in llama.cpp from the 1. on: trained on [1, "),
    (break_weights, "of the answers are equal, and of f16 at least 95% should be"),
]


@needs_llama_cpp
@pytest.mark.parametrize(("plant", "named"), BROKEN, ids=["template", "special tokens", "weights"])
def test_a_broken_file_is_told_by_its_fault(plant, named, run, capsys, monkeypatch):
    plant(monkeypatch)
    code, report, said = checked(capsys, run, "--as", "gguf")
    assert code == 2 and named in report["check"]["broken"]
    assert said.startswith(f"error: {run.parent / 'out'} is broken: ") and said.count("\n") == 1
    if plant is break_weights:
        assert report["check"]["parts"] and "parts at token" in report["check"]["parts"][0]


def compared(trained: list[str], exported: list[str], stopped: list[bool], tokenizer, kind: str = "f16"):
    chats = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in trained]
    return check.compare(chats, trained, exported, stopped, kind, None, 1, tokenizer, "")


def test_what_runs_on_is_broken(tokenizer):
    right = ["one tea", "two teas"] * 5
    on = [f"{text} and on and on" for text in right]
    assert "10 answers run on where the trained model stops, the first with ' and on" in (
        compared(right, on, [False] * 10, tokenizer).broken
    )
    assert compared(right, right, [True] * 10, tokenizer).broken == ""


def test_a_few_unequal_answers_are_rounding_and_many_are_a_fault(tokenizer):
    right = ["one tea", "two teas"] * 20
    for unequal, broken in ((2, False), (3, True)):
        found = compared(right, ["three cups"] * unequal + right[unequal:], [True] * 40, tokenizer)
        assert bool(found.broken) == broken and found.equal == 1 - unequal / 40
        assert found.exact_match == (1, 1 - unequal / 40) and len(found.parts) == unequal
    assert compared(right, ["three cups"] * 10 + right[10:], [True] * 40, tokenizer, "q4_0").broken == ""
    assert (
        "parts at token 2, after 'one': trained ' tea'"
        in (compared(["one tea"], ["one cup"], [True], tokenizer).parts[0])
    )


def test_it_prints_as_figures_and_a_verdict(tokenizer):
    good = str(compared(["one tea"], ["one tea"], [True], tokenizer))
    assert "1 judged samples: 100.0% equal answers" in good and good.endswith("it answers as the trained model does")
    assert "BROKEN: " in str(compared(["one tea"], ["two"], [True], tokenizer))


def test_data_without_judged_samples_is_refused(run, capsys):
    (run.parent / "data" / "test.jsonl").unlink()
    assert command.main([str(run), "--to", str(run.parent / "out"), "--check"]) == 2
    assert "has no samples to judge on" in capsys.readouterr().err
    assert not (run.parent / "out").exists()
