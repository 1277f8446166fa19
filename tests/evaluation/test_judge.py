"""One judge for everybody. Two real processes put it to the test in tests/training/test_loop.py."""

from types import SimpleNamespace

import pytest
import torch

from qlora_lab.errors import UserError
from qlora_lab.evaluation import judge as module
from qlora_lab.evaluation.judge import Judge
from qlora_lab.evaluation.losses import Loss
from qlora_lab.evaluation.scores import parse_score
from qlora_lab.finetuning import exact_match, generate, load_model, load_samples, text_loss
from qlora_lab.training.chat import tokenize_chat


def chats(*pairs: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]


class Words:
    pad_token_id = 7

    def __call__(self, text: str) -> dict:
        return {"input_ids": text.split()}


def test_answers_are_compared_one_by_one_and_all_splits_at_once(monkeypatch):
    """Greedy answers to all but the last message, with room for 8 tokens more than the longest reference has."""
    asked = []

    def answers(model, tokenizer, conversations, max_new_tokens, dtype):
        asked.append((model, conversations, max_new_tokens, dtype))
        return ["A", "x", "C ", "D E F"]

    monkeypatch.setattr(module, "generate", answers)
    splits = {"test": chats("aA", "bB", "cC"), "shifted": chats(("d", "D E F"))}
    judgement = Judge(splits, {}, Words(), torch.bfloat16)("model")
    assert judgement.exact == {"test": "101", "shifted": "1"}
    assert judgement.as_dict() == {"exact_match": {"test": 2 / 3, "shifted": 1.0}, "perplexity": {}}
    assert judgement.answers == {"test": ["A", "x", "C "], "shifted": ["D E F"]}
    prompts = [chat[:1] for split in splits.values() for chat in split]
    assert asked == [("model", prompts, 3 + 8, torch.bfloat16)]


def test_scores_stand_beside_exact_match(monkeypatch):
    """One for each answer, their mean by split, and of JSON the shares by field."""
    answers = ['{"a": 1, "b": 2}', "The {}", '{"a": 1}']
    monkeypatch.setattr(module, "generate", lambda *_, **__: answers)
    splits = {"test": chats(("q", '{"a": 1, "b": 3}'), ("r", "{}")), "shifted": chats(("s", '{"a": 1}'))}
    scores = [parse_score(name) for name in ("normalized", "json")]
    judgement = Judge(splits, {}, Words(), scores=scores)("model")
    assert judgement.scores == {
        "normalized_match": {"test": [0, 1], "shifted": [1]},
        "json": {"test": [0.5, 0], "shifted": [1]},
    }
    assert judgement.as_dict() == {
        "exact_match": {"test": 0, "shifted": 1},
        "perplexity": {},
        "normalized_match": {"test": 0.5, "shifted": 1},
        "json": {"test": 0.25, "shifted": 1},
        "json_fields": {"test": {"a": 1, "b": 0}, "shifted": {"a": 1}},
    }
    alone = Judge(splits, {}, Words(), scores=scores[:1])("model").as_dict()
    assert set(alone) == {"exact_match", "perplexity", "normalized_match"}


def test_the_dullest_guess_is_the_reference_that_scores_most():
    """Worked out by hand. No two references are the same, so exact match has one right; three are of the same team."""
    replies = ("Order 1 is late. Team: post", "No. Team: office", "It comes. Team: post", "Sorry! Team: post")
    scores = [parse_score(name) for name in (r"regex:Team: (\w+)", "regex:Team", "f1")]
    splits = {"test": chats(*(("q", reply) for reply in replies)), "shifted": chats("xY", "zY", "xZ")}
    judge = Judge({"test": splits["test"]}, {}, Words(), scores=scores)
    # token F1 of the fourth, "sorry team post": 4/9, 1/3, 6/7 ("it comes team post": 4/7), 1
    assert judge.dullest() == {
        "exact_match": {"test": 0.25},
        r"regex:Team: (\w+)": {"test": 0.75},
        "regex:Team": {"test": 1.0},
        "f1": {"test": pytest.approx((4 / 9 + 2 / 6 + 4 / 7 + 1) / 4)},
    }
    assert Judge(splits, {}, Words()).dullest() == {"exact_match": {"test": 0.25, "shifted": 2 / 3}}
    objects = chats(("q", '{"a": 1, "b": 2}'), ("q", '{"a": 1, "b": 3}'), ("q", '{"a": 2, "b": 2}'))
    dullest = Judge({"test": objects}, {}, Words(), scores=[parse_score("json")]).dullest()
    assert dullest["json"] == {"test": pytest.approx((1 + 0.5 + 0.5) / 3)}
    assert dullest["json_fields"] == {"test": {"a": pytest.approx(2 / 3), "b": pytest.approx(2 / 3)}}


def test_a_single_reference_is_no_guess():
    judge = Judge({"test": chats("aA"), "shifted": chats("aA", "bB")}, {}, Words(), scores=[parse_score("f1")])
    assert judge.dullest() == {"exact_match": {"shifted": 0.5}, "f1": {"shifted": 0.5}}


def test_of_many_references_the_most_frequent_are_tried(monkeypatch):
    monkeypatch.setattr(module, "TRIED", 2)
    rare = [("q", f"no {n}") for n in range(9)]
    judge = Judge({"test": chats(*rare, ("q", "yes"), ("q", "yes"))}, {}, Words())
    assert judge.dullest() == {"exact_match": {"test": 2 / 11}}


def test_losses_are_those_of_each_text(monkeypatch):
    asked = []

    def loss(model, samples, pad_token_id, dtype):
        asked.append((samples, pad_token_id, dtype))
        return Loss(6.0, len(samples))

    monkeypatch.setattr(module, "text_loss", loss)
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("answers were not asked for"))
    losses = Judge({}, {"prose": [1, 2, 3], "validation": [4]}, Words(), torch.bfloat16).losses("model")
    assert {name: loss.per_token for name, loss in losses.items()} == {"prose": 2.0, "validation": 6.0}
    assert asked == [([1, 2, 3], 7, torch.bfloat16), ([4], 7, torch.bfloat16)]


def test_it_is_what_the_functions_say_of_a_real_model(tiny_folder):
    tiny, tokenizer = load_model(tiny_folder, device="cpu")
    orders = list(load_samples("orders", "test").select(range(3))["messages"])
    texts = [tokenize_chat(chat, tokenizer) for chat in orders]
    judgement = Judge({"test": orders}, {"orders": texts}, tokenizer)(tiny)
    longest = max(len(tokenizer(chat[-1]["content"])["input_ids"]) for chat in orders)
    answers = generate(tiny, tokenizer, [chat[:-1] for chat in orders], max_new_tokens=longest + 8)
    share = exact_match(answers, [chat[-1]["content"] for chat in orders])
    assert judgement.as_dict()["exact_match"] == {"test": share}
    assert judgement.losses["orders"] == text_loss(tiny, texts, pad_token_id=tokenizer.pad_token_id)


class Process:
    """One of two that share the samples."""

    num_processes = 2

    def __init__(self, index: int):
        self.process_index = index


def test_each_process_asks_its_share_and_all_get_the_same(monkeypatch):
    monkeypatch.setattr(
        module, "generate", lambda model, tokenizer, prompts, **_: [f"{p[0]['content']}!" for p in prompts]
    )
    splits = {"test": chats("ar", "br", "cr"), "shifted": chats("dr")}
    for index, others in ((0, [(1, "b?"), (3, "d?")]), (1, [(0, "a?"), (2, "c?")])):
        monkeypatch.setattr("accelerate.utils.gather_object", lambda own, others=others: own + others)
        answers = Judge(splits, {}, Words(), accelerator=Process(index)).answers("model")
        expected = ["a!", "b?", "c!", "d?"] if index == 0 else ["a?", "b!", "c?", "d!"]
        assert answers == {"test": expected[:3], "shifted": expected[3:]}


def test_a_limit_is_the_same_for_all_processes(monkeypatch):
    """That of the longest reference, whoever has it."""
    limits = []
    monkeypatch.setattr(module, "generate", lambda *_, max_new_tokens, **__: limits.append(max_new_tokens) or ["x"])
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [(0, "x"), (1, "x")])
    for index in (0, 1):
        judge = Judge({"test": chats("ab", ("c", "a b c d"))}, {}, Words(), accelerator=Process(index))
        judge.answers("model")
    assert limits == [12, 12]


def test_no_token_has_no_loss():
    with pytest.raises(UserError, match="no token to judge the model on"):
        _ = Loss(0.0, 0).per_token


def test_nothing_to_judge_is_nothing():
    judge = Judge({}, {}, SimpleNamespace(pad_token_id=0))
    assert judge.losses("model") == {}
