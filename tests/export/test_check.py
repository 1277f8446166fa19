"""`--check`: good files pass, lossy ones say what was lost, and each kind of broken one is told by its name."""

import dataclasses
import json
import math
import re

import pytest
import torch

from qlora_lab.export import __main__ as command
from qlora_lab.export import architectures, check, gguf_files, vocabulary
from qlora_lab.export.trained_run import read_run
from qlora_lab.training.templates import prompt_text
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
    assert code == 0 and (report["check"]["verdict"], report["check"]["why"]) == ("equal", "")
    assert report["check"]["equal"] == 1 and report["check"]["samples"] == 3
    trained, exported = report["check"]["perplexity"]
    assert exported == pytest.approx(trained, rel=0.01) and trained > 2
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
    (break_weights, "of 3 answers are unequal, and of a whole f16 file at most 2 should be"),
]


@needs_llama_cpp
@pytest.mark.parametrize(("plant", "named"), BROKEN, ids=["template", "special tokens", "weights"])
def test_a_broken_file_is_told_by_its_fault(plant, named, run, capsys, monkeypatch):
    plant(monkeypatch)
    code, report, said = checked(capsys, run, "--as", "gguf")
    assert code == 2 and report["check"]["verdict"] == "broken" and named in report["check"]["why"]
    assert said.startswith(f"error: {run.parent / 'out'} is broken: ") and said.count("\n") == 1
    if plant is break_weights:
        parts = " ".join(report["check"]["parts"])
        assert re.search(r"parts at token .* the trained model finds its own token [\d.,]+ times as likely", parts)
        trained, exported = report["check"]["perplexity"]
        assert abs(exported / trained - 1) > 0.01


def test_how_sure_the_trained_model_is_where_answers_part(run):
    """Of the last token of the answer, beside another in its place, with the whole prompt before it."""
    model, tokenizer = check.trained_model(read_run(run))
    chat = [{"role": "user", "content": "Order."}, {"role": "assistant", "content": "a"}]
    ids = tokenizer(prompt_text(chat[:-1], tokenizer), add_special_tokens=False)["input_ids"] + [40, 41]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
    gap = check.advantage(model, tokenizer, chat, [40, 41, 50], 60)
    assert gap == pytest.approx(float(found[50] - found[60]), abs=1e-5)


def test_the_trained_model_computes_in_float32_if_it_is_small(run, monkeypatch):
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "compute_dtype": "bfloat16"}))
    model, _ = check.trained_model(read_run(run))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rounded = model.get_input_embeddings().weight
    assert torch.equal(rounded, rounded.bfloat16().float()), "the weights are those of bf16"
    monkeypatch.setattr(check, "FLOAT32_AT_MOST", 1000)
    model, _ = check.trained_model(read_run(run))
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def told(answers: list[str], stopped: bool = True, perplexity: float = 1.5) -> check.Told:
    return check.Told(answers, [stopped] * len(answers), perplexity)


RIGHT = ["one tea", "two teas"] * 50


def verdict(answers: list[str], kind: str, stopped: bool = True, perplexity: float = 1.5) -> tuple[str, str]:
    return check.judged(told(RIGHT), told(answers, stopped, perplexity), RIGHT, kind)


def test_what_runs_on_is_broken():
    on = [f"{text} and on and on" for text in RIGHT]
    said, why = verdict(on, "f16", stopped=False)
    assert said == "broken" and "100 answers run on where the trained model stops, the first with ' and on" in why
    assert verdict(RIGHT, "f16") == ("equal", "")
    cut = told(RIGHT, stopped=False)
    assert check.judged(cut, cut, RIGHT, "f16") == ("equal", "")


def test_it_says_whether_the_trained_model_runs_on_too():
    ends = [True] * 8
    some = [i not in (2, 5) for i in range(8)]
    one = [i != 5 for i in range(8)]

    def line(trained, exported):
        return check.run_on(*(check.Told(["a"] * 8, stopped, 1.5) for stopped in (trained, exported)))

    start = "  2 of 8 run on to the limit of tokens (sample 3, 6): "
    assert line(some, ends) == []
    assert line(some, some) == [f"{start}so does the trained model"]
    assert line(one, some) == [f"{start}the trained model does in 1 of these"]
    assert line(ends, [False] * 8)[0].startswith("  8 of 8 run on to the limit of tokens (sample 1, 2, 3, 4, 5, ...): ")


@pytest.mark.parametrize("kind", check.UNEQUAL)
def test_a_few_unequal_answers_are_rounding_and_many_are_a_fault(kind):
    most = check.most_unequal(check.UNEQUAL[kind], 100)
    for unequal in (most, most + 1):
        many = f"{unequal} of 100 answers are unequal, and of a whole {kind} file at most {most} should be"
        expected = ("equal", "") if unequal == most else ("broken", many)
        assert verdict(["three cups"] * unequal + RIGHT[unequal:], kind) == expected


@pytest.mark.parametrize(
    ("lost", "expected"), [(0, "equal"), (7, "equal"), (8, "lossy"), (25, "lossy"), (50, "lossy"), (51, "broken")]
)
def test_a_file_in_four_bits_is_judged_by_the_right_answers_that_it_keeps(lost, expected):
    said, why = verdict(["no"] * lost + RIGHT[lost:], "q4_0")
    assert said == expected
    assert (
        expected == "equal" or f"of 100 answers that the trained model has right, {100 - lost} are left in q4_0" in why
    )


@pytest.mark.parametrize(("kept", "perplexity", "expected"), [(40, 1.1241, "lossy"), (13, 1.3125, "broken")])
def test_the_default_runs_own_files_in_q4_0(kept, perplexity, expected):
    """As measured (docs/export.md): rounded once, and rounded twice. The trained model has 61 of 100 right."""
    trained = told(RIGHT[:61] + ["three cups"] * 39, perplexity=1.1023)
    said, why = check.judged(trained, told(RIGHT[:kept] + ["no"] * (100 - kept), perplexity=perplexity), RIGHT, "q4_0")
    assert said == expected
    assert why.startswith(
        f"of 61 answers that the trained model has right, {kept} are left in q4_0, and the perplexity"
    )


def test_answers_that_were_wrong_before_are_no_loss():
    """Of the 100 answers the trained model has 40 right, and the file these and none of the others alike."""
    trained = told(RIGHT[:40] + ["three cups"] * 60)
    assert check.judged(trained, told(RIGHT[:40] + ["four"] * 60), RIGHT, "q4_1") == ("equal", "")


@pytest.mark.parametrize(
    ("perplexity", "expected"),
    [(1.57, "equal"), (1.58, "lossy"), (2.9, "lossy"), (3.1, "broken"), (math.nan, "broken")],
)
def test_free_texts_in_four_bits_are_judged_by_their_perplexity(perplexity, expected):
    """The trained model has none exactly right, and a perplexity of 1.5."""
    trained = told(["another text"] * 100)
    said, why = check.judged(trained, told(["texts"] * 100, perplexity=perplexity), RIGHT, "q4_0")
    assert said == expected and (expected == "equal") == (why == "")


@pytest.mark.parametrize(("rate", "count"), [(0.02, 3), (0.02, 50), (0.1, 100), (0.4, 100)])
def test_chance_exceeds_the_most_unequal_answers_once_in_a_thousand_checks(rate, count):
    """Summed exactly, term by term."""
    most = check.most_unequal(rate, count)
    terms = [math.comb(count, k) * rate**k * (1 - rate) ** (count - k) for k in range(count + 1)]
    assert sum(terms[most + 1 :]) < 1e-3 <= sum(terms[most:])


def test_of_many_conversations_some_are_read(tokenizer):
    chats = [[{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}] for i in range(101)]
    read = check.read_texts(chats, tokenizer)
    assert len(read) == 17 and read[1] == check.tokenize_chat(chats[6], tokenizer)
    assert len(check.read_texts(chats[:3], tokenizer)) == 3


GOOD = {
    **{"samples": 40, "equal": 0.975, "exact_match": (0.62, 0.6), "stopped": (1.0, 0.95), "perplexity": (1.1, 1.2)},
    **{
        "tokens_per_second": 130.4,
        "nbytes": 270_900_000,
        "verdict": "equal",
        "why": "",
        "parts": ("  sample 3 parts",),
    },
}


def test_it_prints_as_figures_and_a_verdict():
    good = check.Check(**GOOD)
    assert str(good) == (
        "40 judged samples: 97.5% equal answers, exact match 60.0% (trained model 62.0%), 95.0% stop by themselves "
        "(100.0%), perplexity of references 1.2000 (1.1000), 130 tokens/s, 270.9 MB\n  sample 3 parts\n"
        "EQUAL: it answers as the trained model does"
    )
    assert str(dataclasses.replace(good, verdict="broken", why="template")).endswith("\nBROKEN: template")


@pytest.mark.parametrize(("verdict", "code"), [("equal", 0), ("lossy", 0), ("broken", 2)])
def test_the_exit_code_tells_what_nobody_wants_from_what_is_for_the_user_to_say(
    verdict, code, run, capsys, monkeypatch
):
    found = check.Check(**{**GOOD, "verdict": verdict, "why": "" if verdict == "equal" else "so it is"})
    monkeypatch.setattr(command, "check_export", lambda *_: found)
    assert command.main([str(run), "--to", str(run.parent / "out"), "--check"]) == code
    said = capsys.readouterr()
    assert said.out.rstrip().endswith(str(found))
    assert said.err.endswith(f"error: {run.parent / 'out'} is broken: so it is\n" if code else "")


@pytest.mark.parametrize("form", ["merged", pytest.param("gguf", marks=needs_llama_cpp)])
def test_a_merge_aware_run_is_compared_as_merged(form, run, capsys, tmp_path):
    """Its file in Q4_0 holds the very weights that it learned under; a checkpoint for NF4 is loaded in 4 bits."""
    settings = json.loads((run / "run.json").read_text())
    settings["merge_aware"] = "q4_0" if form == "gguf" else "nf4"
    (run / "run.json").write_text(json.dumps(settings))
    code, report, _ = checked(capsys, run, "--as", form, "--weights", "q4_0" if form == "gguf" else "f32")
    trained, exported = report["check"]["perplexity"]
    assert code == 0 and exported == pytest.approx(trained, rel=0.01)
    plain = check.trained_model(read_run(run))[0]
    assert not hasattr(plain, "peft_config")


def test_data_without_judged_samples_is_refused(run, capsys):
    (run.parent / "data" / "test.jsonl").unlink()
    assert command.main([str(run), "--to", str(run.parent / "out"), "--check"]) == 2
    assert "has no samples to judge on" in capsys.readouterr().err
    assert not (run.parent / "out").exists()
