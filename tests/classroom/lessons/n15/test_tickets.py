"""The tickets of lesson 15 have the mess that it speaks about, splits share no customer, cleaning leaves no twin."""

import json

import pytest

from qlora_lab.classroom.lessons.n15.tickets import (
    cleaned,
    read_rows,
    split_customers,
    tickets,
    without_twins,
    write_rows,
)
from qlora_lab.errors import UserError
from qlora_lab.training.data import stream_samples
from qlora_lab.training.likeness import Twins


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def twins_in(samples):
    twins = Twins(samples)
    for sample in samples:
        twins.see(*sample)
    return twins.found()


def test_tickets_are_written_and_read_as_they_are(tmp_path):
    rows = tickets()
    assert read_rows(write_rows(tmp_path / "new" / "tickets.csv", rows)) == rows
    assert sum(not row["reply"] for row in rows) == 4 and sum(not row["message"] for row in rows) == 1


def test_every_row_is_in_one_split_and_every_customer_too():
    rows = tickets()
    splits = split_customers(rows, train=28, validation=8)
    assert sorted(row["ticket"] for part in splits.values() for row in part) == [row["ticket"] for row in rows]
    customers = [{row["customer"] for row in part} for part in splits.values()]
    assert [len(some) for some in customers] == [28, 8, 28] and len(set.union(*customers)) == 64


def test_of_twins_the_first_is_kept():
    text = "is broken since the last ride in the rain and makes a noise"
    samples = [
        ("f, line 1", chat(f"Hi, my lamp {text}", "Sorry")),
        ("f, line 2", chat("Where is my order 7?", "On its way")),
        ("f, line 3", chat(f"Hello, my lamp {text}", "Sorry")),
        ("f, line 4", chat("Where is my order 7?", "On its way")),
        ("f, line 5", chat(f"Dear all, my lamp {text}", "Sorry")),
    ]
    assert len(twins_in(samples)) == 5
    assert [where for where, _ in without_twins(samples)] == ["f, line 1", "f, line 2"]


def test_a_cleaned_file_has_no_twins_and_the_same_samples(tmp_path, capsys):
    source = write_rows(tmp_path / "tickets.csv", tickets())
    columns = "prompt=message,response=reply"
    path = cleaned(source, columns, tmp_path / "clean.jsonl")
    before = [chat for _, chat in stream_samples(source, "train", {"prompt": "message", "response": "reply"})]
    after = list(stream_samples(path))
    assert capsys.readouterr().out == f"{len(after)} of 84 samples kept, in clean.jsonl\n"
    assert 55 < len(after) < 70 and not twins_in(after)
    assert all(chat in before for _, chat in after)


def test_plain_text_stays_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("One paragraph.\n\nAnother paragraph.\n\nOne paragraph.\n")
    path = cleaned(tmp_path / "a.txt", "", tmp_path / "b.jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"text": "One paragraph."},
        {"text": "Another paragraph."},
    ]


def test_tools_are_not_lost_silently(tmp_path):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    row = {"messages": chat("Where?", "There"), "tools": [tool]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="a.jsonl, line 1 has tools"):
        cleaned(tmp_path / "a.jsonl", "", tmp_path / "b.jsonl")
    assert not (tmp_path / "b.jsonl").exists()
