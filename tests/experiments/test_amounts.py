import pytest
import torch

from qlora_lab.experiments import amounts
from qlora_lab.models.loading import load_model
from qlora_lab.training.chat import tokenize, tokenize_text
from qlora_lab.training.data import load_prose, load_samples

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch, tiny_folder):
    monkeypatch.setattr(amounts, "load_model", lambda **named: load_model(tiny_folder, **named))


@pytest.mark.parametrize(("name", "orders", "others"), [("50", 50, 0), ("500 + replay", 500, 71)])
def test_a_way_trains_on_so_many_orders_and_one_paragraph_in_eight(tokenizer, name, orders, others):
    samples = amounts.samples_of(name, 3, tokenizer)
    known = set(tokenize(load_samples("orders", "train"), tokenizer, 256)[0])
    paragraphs = {tokenize_text(text, tokenizer) for text in load_prose()}
    assert [sum(sample in kind for sample in samples) for kind in (known, paragraphs)] == [orders, others]
    assert len(samples) == orders + others
    assert amounts.samples_of(name, 3, tokenizer) == samples != amounts.samples_of(name, 4, tokenizer)


def test_nothing_that_is_trained_on_is_judged_on(tokenizer):
    judge = amounts.judge_of(tokenizer, 100, torch.float32)
    trained = {sample for name in amounts.WAYS for sample in amounts.samples_of(name, 0, tokenizer)}
    assert not trained & {sample for samples in judge.texts.values() for sample in samples}
    assert {name: len(samples) for name, samples in judge.texts.items()} == {"validation": 100, "prose": 24}
    questions = {chat[-2]["content"] for chats in judge.conversations.values() for chat in chats}
    assert not questions & {chat[-2]["content"] for chat in load_samples("orders", "train")["messages"]}


def test_a_run_tells_its_curve_and_what_it_came_to(tiny, monkeypatch):
    monkeypatch.setattr(amounts, "EVERY", 2)
    run = amounts.train_amount("50", 1, CPU, steps=3, judged=3)
    assert (run["amount"], run["seed"], len(run["losses"])) == ("50", 1, 3)
    assert [step for step, _ in run["curve"]] == [2, 3]
    assert run["curve"][-1][1] == pytest.approx(run["after"]["validation"], rel=1e-6)
    assert {split: len(answers) for split, answers in run["exact"].items()} == {"test": 3, "shifted": 3}
    assert set(run["after"]) == {"validation", "prose"}
    best = min(loss for _, loss in run["curve"])
    assert f"best {best:.4f}" in amounts.summary(run)
