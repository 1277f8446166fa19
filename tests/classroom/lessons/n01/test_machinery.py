"""What the lesson reads out of orders, beside the templates that the orders were written with."""

import json
import re
import runpy
from pathlib import Path

import pytest

from qlora_lab.classroom.lessons.n01 import machinery
from qlora_lab.training.data import stream_chats

GENERATOR = runpy.run_path(str(Path(__file__).resolve().parents[4] / "data" / "orders" / "generate.py"))
FIELD_OF = {"n": "customer", "i": "item", "c": "colour", "q": "quantity", "y": "city", "t": "total"}


def fields_of(template):
    return tuple(FIELD_OF[letter] for letter in re.findall(r"{([nicqyt])}", template))


def test_numbers_are_read_as_the_generator_writes_them():
    for number in range(2, 70):
        in_words = GENERATOR["in_words"](number)
        assert machinery.numbers_in(f"On the 7th, {in_words} lamps") == [(7, 7), (12, number)]


@pytest.mark.parametrize("split, templates", [("train", "TEMPLATES"), ("shifted", "SHIFTED_TEMPLATES")])
def test_orders_name_things_in_the_sequences_of_the_templates(split, templates):
    expected = {fields_of(template) for template in GENERATOR[templates]}
    assert machinery.sequences(stream_chats("orders", split)) == expected


def test_decoys_are_found_where_templates_have_them():
    beginnings = {"Not ": True, "In ": True, "Last year it was ": True, "What ": False, "For ": False}
    seen = {}
    for *_, order, answer in stream_chats("orders", "shifted"):
        text, values = order["content"], json.loads(answer["content"])
        for beginning, has_decoy in beginnings.items():
            if text.startswith(beginning):
                assert bool(machinery.decoys(text, values)) is has_decoy, text
                seen[beginning] = True
    assert set(seen) == set(beginnings)


def test_wrong_quantities_are_told_apart():
    order = {"customer": "A B", "item": "lamp", "colour": "red", "quantity": 31, "city": "Bern", "total": 70}
    text = "Not 34 but 31 red lamps to A B in Bern for 70 euros"
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": json.dumps(order)}]
    answers = [json.dumps(order | {"quantity": quantity}) for quantity in (31, 34, 70, 3)] + ["no JSON"]
    assert machinery.wrong_quantities(answers, [chat] * 5) == {"the total": 1, "a decoy": 1, "something else": 2}
    assert machinery.shares_by_field(answers, [chat] * 5)["quantity"] == 0.2
    assert machinery.shares_by_field(answers, [chat] * 5)["city"] == 0.8


def test_quantities_are_told_by_where_they_stand():
    order = {"customer": "A B", "item": "lamp", "colour": "red", "quantity": 31, "city": "Bern", "total": 70}
    texts = [
        "31 red lamps, A B, Bern, 70",
        "Not 34 but 31 red lamps, A B, Bern, 70",
        "70 euros: 31 red lamps, A B, Bern",
    ]
    answer = {"role": "assistant", "content": json.dumps(order)}
    chats = [[{"role": "user", "content": text}, answer] for text in texts]
    said = [json.dumps(order), json.dumps(order | {"quantity": 34}), "no JSON"]
    assert list(machinery.quantities_by_place(said, chats).values()) == [(1, 1), (0, 1), (0, 1)]
