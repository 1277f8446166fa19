"""Rows as people have them, made chats; and what is said about it."""

import json

import pytest

from qlora_lab.errors import UserError
from qlora_lab.training.data import has_split, has_splits, load_samples, read_chats
from qlora_lab.training.formats import LeftOut, Understood, parse_columns, to_chat


def said(*texts: str, system: str = "") -> list[dict[str, str]]:
    """A chat in which user and assistant take turns."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def chat_of(row: dict, columns=None, format=None) -> list[dict]:
    return to_chat(row, "mine.jsonl, line 3", columns, format, Understood())


U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"name": "weather", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        ({"instruction": "a", "input": "", "output": "b"}, said("a", "b")),
        ({"instruction": "a", "input": "of c", "output": "b", "text": "all"}, said("a\n\nof c", "b")),
        ({"instruction": "a", "context": "c", "response": "b", "category": "d"}, said("a\n\nc", "b")),
        ({"instruction": "a", "output": "b", "system": "s"}, said("a", "b", system="s")),
        ({"instruction": "a", "output": "b", "history": [["1", "2"]]}, said("1", "2", "a", "b")),
        ({"prompt": "a", "response": "b"}, said("a", "b")),
        ({"prompt": "a", "completion": "b"}, said("a", "b")),
        ({"question": "a", "answer": "b"}, said("a", "b")),
        ({"question": "a", "context": "c", "answer": "b"}, said("c\n\na", "b")),
        ({"query": "a", "response": "b"}, said("a", "b")),
        ({"input": "a", "output": "b"}, said("a", "b")),
        ({"messages": [U, A]}, said("a", "b")),
        ({"messages": [U, A], "system": "s"}, said("a", "b", system="s")),
        ({"messages": [{"role": "developer", "content": "s"}, U, A]}, said("a", "b", system="s")),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "!"}]}, A]},
            said("a!", "b"),
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, said("a", "b")),
        ({"conversations": [{"from": "system", "value": "s"}, U, A]}, said("a", "b", system="s")),
        ({"conversation": [U, A]}, said("a", "b")),
        ({"messages": [{**U, "name": "Ann"}, {**A, "weight": 1}]}, [{**U, "name": "Ann"}, {**A, "weight": 1}]),
        ({"prompt": [U], "completion": [A]}, said("a", "b")),
        ({"prompt": [U, A, U], "completion": "c"}, [U, {**A, "weight": 0}, U, {**A, "content": "c"}]),
        ({"text": "Once"}, [{"role": "text", "content": "Once"}]),
        (
            {"tools": [TOOL], "messages": [U, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            [
                {**U, "tools": json.dumps([{"type": "function", "function": TOOL}])},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
            ],
        ),
        (
            {"messages": [U, {"role": "assistant", "function_call": {"name": "f", "arguments": {"x": 1}}}]},
            [
                U,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
                },
            ],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                    {"from": "observation", "value": "4"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            [
                U,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "content": "4"},
                A,
            ],
        ),
    ],
)
def test_rows_of_all_formats(row, chat):
    assert chat_of(row) == chat


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "critic", "content": "a"}, A]}, 'message 1 has the role "critic": expected system'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A]},
            'message 1 has a part of the type "image_url": only text',
        ),
        ({"messages": [{"role": "user", "content": [3]}, A]}, r"has no text in 'content', but \[3\]"),
        ({"messages": [U, A], "images": ["a.png"]}, "has 'images': only text can be trained on"),
        ({"messages": [U, A], "tools": 3}, "tools must be a list of objects"),
        ({"messages": [U, A], "tools": "[{"}, "should hold a function call as JSON"),
        ({"messages": [U, {"role": "assistant", "tool_calls": [{}]}]}, "a tool call without a function's name"),
        ({"messages": [{"role": "system", "content": "s"}, U, A], "system": "t"}, "two system messages"),
        ({"conversations": [{"from": "function_call", "value": "no"}]}, "should hold a function call as JSON"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is a preference .*--columns prompt=prompt,response=chosen"),
        ({"role": "user", "content": "a"}, "is a single message: a sample is a conversation, "),
        ({"from": "human", "value": "a"}, "is a single message: a sample is a conversation, "),
        ({"prompt": "a", "label": "b"}, r"no text in 'response' \(it has: prompt, label\): --columns"),
        ({"frage": "a", "antwort": "b"}, r"it has: frage, antwort.*--columns prompt=...,response=..."),
        ({"instruction": "a", "output": "b", "history": [["1"]]}, r"history must be a list of \[question, answer\]"),
        ({"messages": [{**U, "name": "\ud83d"}, A]}, "message 1 has half a character in 'tools or names'"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(UserError, match=f"mine.jsonl, line 3.*{message}"):
        chat_of(row)


EMPTY = "with an empty response"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "response": ""}, EMPTY),
        ({"prompt": "a", "response": None}, EMPTY),
        ({"instruction": "a", "output": " \n\t"}, "with an empty output"),
        ({"prompt": "", "response": "b"}, "with an empty prompt"),
        ({"text": " "}, "with an empty text"),
        ({"messages": [U, {"role": "assistant", "content": ""}]}, EMPTY),
        ({"messages": [U, {"role": "assistant", "content": None}]}, EMPTY),
        ({"messages": [{"role": "user", "content": " "}, A]}, "with an empty prompt"),
        ({"messages": [U, A, U, {"role": "assistant", "content": ""}]}, EMPTY),
        ({"messages": []}, "without an answer by the assistant"),
        ({"messages": [U]}, "without an answer by the assistant"),
        ({"messages": [A]}, "in which nothing is asked"),
        ({"messages": [A, U]}, "in which nothing is asked"),
        ({"messages": [{"role": "system", "content": "s"}, A]}, "in which nothing is asked"),
    ],
)
def test_nothing_to_learn_is_left_out_whatever_the_format(row, reason):
    with pytest.raises(LeftOut, match=reason):
        chat_of(row)


def test_columns_by_hand():
    assert parse_columns("prompt=frage, response = antwort") == {"prompt": "frage", "response": "antwort"}
    row = {"frage": "a", "antwort": "b", "prompt": "other"}
    assert chat_of(row, {"prompt": "frage", "response": "antwort"}) == said("a", "b")
    assert chat_of({**row, "s": "be"}, {"prompt": "frage", "response": "antwort", "system": "s"})[0]["content"] == "be"
    more = {**row, "messages": said("c", "d"), "system": "s", "history": [["1", "2"]]}
    assert chat_of(more, {"prompt": "frage", "response": "antwort"}) == said("a", "b")  # what is not named is not there
    assert chat_of({"log": [U, A]}, {"messages": "log"}) == said("a", "b")
    qa = {"qa": {"question": {"text": "a"}, "answer": "b"}, "a.b": "c", "none": None}
    assert chat_of(qa, {"prompt": "qa.question.text", "response": "qa.answer"}) == said("a", "b")
    assert chat_of(qa, {"prompt": "a.b", "response": "qa.answer"}) == said("c", "b")
    with pytest.raises(LeftOut, match="with an empty prompt"):
        chat_of(qa, {"prompt": "none.text", "response": "qa.answer"})
    for column in ("qa.reply", "qa.answer.text", "q.a"):
        with pytest.raises(UserError, match=rf"no column '{column}' \(it has: qa.question, qa.answer, a.b, none\)"):
            chat_of(qa, {"prompt": column, "response": "qa.answer"})
    assert chat_of({"body": "x"}, {"text": "body"}) == [{"role": "text", "content": "x"}]
    with pytest.raises(UserError, match=r"line 3 has no column 'answer' \(it has: frage, antwort, prompt\)"):
        chat_of(row, {"prompt": "frage", "response": "answer"})
    for text in ("", "prompt", "prompt=a", "frage=a,response=b", "prompt=a,prompt=b,response=c", "prompt=,response=b"):
        with pytest.raises(UserError, match="--columns"):
            parse_columns(text)


def test_format_by_hand():
    row = {"messages": [U, A], "text": "Once", "prompt": "p", "response": "r", "question": "q"}
    assert chat_of(row) == said("a", "b")
    assert chat_of(row, format="text") == [{"role": "text", "content": "Once"}]
    assert chat_of(row, format="prompt-response") == said("p", "r")
    assert chat_of(row, format="question-answer") == said("q", "r")
    with pytest.raises(UserError, match="line 3 has no text in 'prompt'|not in the format alpaca"):
        chat_of(row, format="alpaca")


def test_what_was_understood_is_said(tmp_path):
    path, understood = tmp_path / "mine.jsonl", Understood()
    rows = [{"messages": [U, A, U]}, {"messages": [U, A], "id": 7}, {"prompt": "a", "response": ""}]
    path.write_text("\n".join(map(json.dumps, [*rows, *rows, {"question": "a", "answer": "b"}])))
    assert len(read_chats(path, understood=understood)) == 5
    assert understood.summary() == (
        "mine.jsonl: 5 samples, read as messages (4) and question-answer (1); columns not used: id"
    )
    assert understood.remarks() == (
        "note: left out: 2 samples (the first is mine.jsonl, line 3) with an empty response; "
        "in 2 samples (the first is mine.jsonl, line 1) turns after the assistant's last answer are dropped"
    )
    path.write_text(json.dumps(rows[2]))
    with pytest.raises(UserError, match=r"nothing is left of .*: left out: 1 sample \(mine.jsonl, line 1\) with an"):
        read_chats(path)
    path.write_text(json.dumps(rows[1]))
    read_chats(path, understood=(clean := Understood()))
    assert clean.remarks() == ""
    path.write_text(json.dumps({"prompt": "a", "response": "b", "system": "s", "history": [], "tools": None}))
    read_chats(path, understood=(used := Understood()))
    assert used.summary() == "mine.jsonl: 1 sample, read as prompt-response"


def test_folders_of_datasets_and_splits_in_other_files(tmp_path):
    import datasets

    train, test = [{"messages": said("a", str(n))} for n in range(3)], [{"messages": said("a", "t", "b", "u")}]
    tool = {"tools": [TOOL], "messages": [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(train), test=datasets.Dataset.from_list(test))
    splits.save_to_disk(tmp_path / "dict")
    datasets.Dataset.from_list([tool, *train]).save_to_disk(tmp_path / "one")
    assert read_chats(tmp_path / "dict") == [row["messages"] for row in train]
    assert read_chats(tmp_path / "dict", "test") == [test[0]["messages"]]
    assert [has_split(tmp_path / "dict", split) for split in ("train", "test", "validation")] == [True, True, False]
    assert has_splits(tmp_path / "dict") and not has_splits(tmp_path / "one")
    assert read_chats(tmp_path / "one")[1:] == [row["messages"] for row in train]
    assert read_chats(tmp_path / "one")[0] == chat_of(tool)  # the keys that Arrow gave the other messages are gone
    assert load_samples(tmp_path / "one", "test")["messages"][3][1]["content"] == "2"
    for number, rows in enumerate((splits["train"], splits["test"])):
        rows.to_parquet(str(tmp_path / f"train-0000{number}-of-00002.parquet"))
    (tmp_path / "test.csv").write_text("prompt,response\na,b\n")
    assert len(read_chats(tmp_path)) == 4 and has_split(tmp_path, "test")
    assert read_chats(tmp_path, "test") == [said("a", "b")]
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "response": "b"}')
    with pytest.raises(UserError, match="has test twice: test.csv, test.jsonl; keep one"):
        read_chats(tmp_path, "test")
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*one as a folder of save_to_disk"):
        read_chats(tmp_path / "one")


def test_what_arrow_keeps_as_json_text_is_what_it_was(tmp_path):
    """datasets 5 reads messages that have different keys so; in a folder of save_to_disk and in Parquet, too."""
    import datasets

    tool = {"tools": [TOOL], "messages": [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [tool, {"messages": [U, A, U, A]}])))
    table = datasets.load_dataset("json", data_files=str(tmp_path / "mine.jsonl"), split="train", cache_dir=tmp_path)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "mine.parquet")
    for source in ("mine.jsonl", "saved", "mine.parquet"):
        assert read_chats(tmp_path / source) == [chat_of(tool), said("a", "b", "a", "b")]


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds "ann/talks", with the splits train and test, the latter in the config "more" alone."""
    import datasets

    def load_dataset(name, config, split, streaming):
        assert streaming
        if name != "ann/talks":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nand more")
        rows = [{"prompt": f"Say {split} {n}", "response": "x"} for n in range(3)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = lambda name, config: ["train", "test"] if config == "more" else ["train"]  # noqa: E731
    monkeypatch.setattr(datasets, "get_dataset_split_names", names)


def test_names_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_chats("ann/talks") == [said(f"Say train {n}", "x") for n in range(3)]
    assert read_chats("ann/talks:more", "test")[0] == said("Say test 0", "x")
    assert has_splits("ann/talks") and has_split("ann/talks:more", "test") and not has_split("ann/talks", "test")
    with pytest.raises(
        UserError, match="no data at 'ann/walks': no such file or folder, .* reach 'ann/walks' on the Hub$"
    ):
        read_chats("ann/walks")
    with pytest.raises(UserError, match="ann/talks, row 1 has no column 'q'"):
        read_chats("ann/talks", columns={"prompt": "q", "response": "a"})
    (tmp_path / "ann" / "talks").mkdir(parents=True)
    with pytest.raises(UserError, match="ann/talks has no train.jsonl"):
        read_chats("ann/talks")


def test_a_hub_that_breaks_off_is_one_sentence(hub, monkeypatch):
    import datasets

    def broken():
        yield {"prompt": "a", "response": "b"}
        raise ConnectionError("reset by peer")

    table = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    with pytest.raises(UserError, match="cannot read ann/talks from the hub: reset by peer"):
        read_chats("ann/talks")


@pytest.mark.parametrize("name", ["orders", "mine.jsonl", "./mine/train", "/mine/train", "a/b/c", "~/mine", "../mine"])
def test_what_is_no_name_on_the_hub_is_not_looked_up_there(name):
    with pytest.raises(UserError, match="^(no data at|.*orders has no other.jsonl)"):
        read_chats(name, "other")
    assert not has_split(name, "other")
