import pytest
import torch

from qlora_lab.experiments import splits
from qlora_lab.experiments.tickets import greeted_otherwise, tickets
from qlora_lab.models.loading import load_model


@pytest.mark.parametrize("seed", range(3))
def test_customers_are_on_one_side_or_on_both(seed):
    customers = {row["message"]: row["customer"] for row in tickets(seed, messy=False)}
    shared = {}
    for way in splits.WAYS:
        sides = [{customers[chat[0]["content"]] for chat in chats} for chats in splits.split(way, seed)]
        shared[way] = len(sides[0] & sides[1])
    assert shared["by customer"] == 0 < shared["at random"]


def test_those_who_came_later_are_others():
    later = {chat[0]["content"] for chat in splits.later_tickets(0)}
    assert len(later) == 128 and not later & {row["message"] for row in tickets(0)}
    assert not {chat[0]["content"] for chat in splits.later_tickets(1)} & later


def test_a_ticket_greeted_anew_has_the_same_answer():
    trained, _ = splits.split("at random", 0)
    anew = splits.greeted_anew(trained)
    assert len({question["content"] for question, _ in anew}) == len(anew) < len(trained)
    assert not {question["content"] for question, _ in anew} & {question["content"] for question, _ in trained}
    assert greeted_otherwise("Hi again, where is it?") == "Dear shop, where is it?"
    answers = {greeted_otherwise(question["content"]): answer for question, answer in trained}
    assert all(answers[question["content"]] == answer for question, answer in anew)


def test_a_run_is_judged_on_what_was_held_out_on_later_ones_and_on_those_seen(monkeypatch, tiny_folder):
    monkeypatch.setattr(splits, "load_model", lambda **named: load_model(tiny_folder, **named))
    run = splits.train_split("by customer", 1, torch.device("cpu"), steps=1, later=2)
    held_out = len(splits.split("by customer", 1)[1])
    assert {kind: len(bits) for kind, bits in run["exact"].items()} == {"held out": held_out, "later": 2, "seen": 2}
    assert (run["way"], run["seed"], len(run["losses"])) == ("by customer", 1, 1)
    assert "by customer  seed 1: held out 0/" in splits.summary(run)
