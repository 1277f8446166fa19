"""A file's samples without what should not be trained on."""

import datetime
import decimal
import json

import pytest

from qlora_lab.errors import UserError
from qlora_lab.training import cleaning
from qlora_lab.training.cleaning import clean
from qlora_lab.training.data import load_samples, read_chats

WORDS = (
    "sun moon rain snow wind fog hail storm cloud frost thaw flood drought breeze gale sleet dew mist ice heat".split()
)
COLUMNS = {"prompt": "frage", "response": "antwort"}


def row(number: int, greeting: str = "Hello", **more) -> dict:
    word = WORDS[number % len(WORDS)]
    text = f"{greeting} there, what do people call {word} number {number} in the old town of {word}?"
    return {"frage": text, "antwort": f"A {word} {number}.", "wer": number // 2, **more}


def lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_repeats_and_empty_ones_are_left_out_and_all_columns_are_kept(tmp_path):
    good = [row(n, note={"deep": [n, None, "é\u2028"]}) for n in range(12)]
    messy = [*good, {**good[3], "wer": 99}, {**good[4], "frage": f" {good[4]['frage']} "}]
    messy += [{**row(20), "antwort": ""}, {**row(21), "frage": "  "}, {**good[0], "antwort": "Another."}]
    cleaned = clean(lines(tmp_path / "mine.jsonl", messy), tmp_path / "out.jsonl", COLUMNS)
    assert rows_of(tmp_path / "out.jsonl") == [*good, messy[-1]]
    text = cleaned.describe()
    assert f"13 of 17 samples of {tmp_path / 'mine.jsonl'} kept, in {tmp_path / 'out.jsonl'}" in text
    assert "left out: 2 samples (the first is mine.jsonl, line 13) of which there is an earlier copy" in text
    assert "left out: 1 sample (mine.jsonl, line 15) with an empty response" in text
    assert "left out: 1 sample (mine.jsonl, line 16) with an empty prompt" in text
    assert load_samples(tmp_path / "out.jsonl", columns=COLUMNS)["messages"][0][0]["content"] == good[0]["frage"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "out.jsonl"]


def test_splits_share_no_value_and_are_read_as_splits(tmp_path):
    path = lines(tmp_path / "mine.jsonl", [row(n) for n in range(40)])
    cleaned = clean(path, tmp_path / "out", COLUMNS, split_by="wer")
    parts = {split: rows_of(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 28, "validation": 4, "test": 8}
    assert sorted((row for rows in parts.values() for row in rows), key=lambda row: int(row["antwort"].split()[2][:-1]))
    values = [{row["wer"] for row in rows} for rows in parts.values()]
    assert sum(map(len, values)) == 20 == len(set.union(*values))
    assert "no two of them share a value of 'wer'" in cleaned.describe("wer")
    assert "each: train 14, validation 2, test 4" in cleaned.describe("wer")
    assert len(read_chats(tmp_path / "out", "test", COLUMNS)) == 8


@pytest.mark.parametrize("drop", [False, True])
def test_near_duplicates_of_what_is_held_out_go_by_choice(tmp_path, drop):
    path = lines(tmp_path / "mine.jsonl", [row(n, greeting) for n in range(20) for greeting in ("Hello", "Hi")])
    cleaned = clean(path, tmp_path / "out", COLUMNS, drop_near=drop)
    parts = {split: rows_of(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "validation", "test")}
    held_out = {row["antwort"] for split in ("validation", "test") for row in parts[split]}
    twins = [row for row in parts["train"] if row["antwort"] in held_out]
    assert len(parts["test"]) == 8 and len(parts["validation"]) == 4
    assert bool(twins) != drop and (len(parts["train"]) < 28) == drop
    assert ("with a near-duplicate among those held out" in cleaned.describe()) == drop


def test_splits_of_a_folder_are_cleaned_against_each_other(tmp_path):
    (tmp_path / "mine").mkdir()
    lines(tmp_path / "mine" / "train.jsonl", [row(n) for n in range(6)])
    lines(tmp_path / "mine" / "test.jsonl", [row(2), row(2), row(4, "Hi"), row(9)])
    cleaned = clean(tmp_path / "mine", tmp_path / "out", COLUMNS, drop_near=True)
    assert rows_of(tmp_path / "out" / "test.jsonl") == [row(2), row(4, "Hi"), row(9)]
    assert rows_of(tmp_path / "out" / "train.jsonl") == [row(n) for n in (0, 1, 3, 5)]
    assert cleaned.kept == {"test": 3, "train": 4}
    lines(tmp_path / "mine" / "validation.jsonl", [row(9), row(3)])
    clean(tmp_path / "mine", tmp_path / "three", COLUMNS)
    assert rows_of(tmp_path / "three" / "test.jsonl") == [row(2), row(4, "Hi"), row(9)]  # 9 is in validation, too
    assert rows_of(tmp_path / "three" / "validation.jsonl") == [row(3)]
    assert rows_of(tmp_path / "three" / "train.jsonl") == [row(n) for n in (0, 1, 4, 5)]
    lines(tmp_path / "mine" / "test.jsonl", [row(n) for n in range(6)])
    with pytest.raises(
        UserError, match="is left to train on: left out: 7 samples .* of which there is an earlier copy"
    ):
        clean(tmp_path / "mine", tmp_path / "again", COLUMNS)
    assert not (tmp_path / "again").exists()


def test_columns_of_tables_are_kept_as_they_can_be(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = {"prompt": ["a", "b"], "response": ["c", "d"], "when": [datetime.date(2026, 1, 2), None]}
    table |= {"price": [decimal.Decimal("1.10"), None], "id": ["007", "NA"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "mine.parquet")
    clean(tmp_path / "mine.parquet", tmp_path / "out.jsonl")
    first, second = rows_of(tmp_path / "out.jsonl")
    assert first == {"prompt": "a", "response": "c", "when": "2026-01-02", "price": "1.10", "id": "007"}
    assert second == {"prompt": "b", "response": "d", "when": None, "price": None, "id": "NA"}
    parquet.write_table(pyarrow.table({**table, "thumb": [b"1", b"2"]}), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match="mine.parquet, row 1 holds bytes, which JSON lines cannot: remove that column"):
        clean(tmp_path / "mine.parquet", tmp_path / "other.jsonl")
    path = tmp_path / "half.jsonl"
    path.write_text(r'{"prompt": "a", "response": "b", "note": "\ud83d", "more": "ж"}')
    clean(path, tmp_path / "half-clean.jsonl")
    assert rows_of(tmp_path / "half-clean.jsonl")[0]["note"] == "\ud83d"


def test_what_is_refused_leaves_nothing(tmp_path, monkeypatch):
    path = lines(tmp_path / "mine.jsonl", [row(n) for n in range(9)])
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for out, named, sentence in (
        ("mine.jsonl", {}, "mine.jsonl is there already: name another, or delete it"),
        ("there", {}, "there is there already"),
        ("no/out.jsonl", {}, "there is no folder"),
        ("out.csv", {}, "a file that ends with .jsonl, or a folder for the splits, without an ending"),
        ("out.jsonl", {"split_by": "wer"}, "nothing is held out of a file, so name a folder"),
        ("out.jsonl", {"drop_near": True}, "nothing is held out of a file, so name a folder"),
        ("out", {}, "none of 9 samples can be held out"),
        ("out", {"split_by": "who"}, r"line 1 has no column 'who' to split by \(it has: frage"),
        ("out.jsonl", {"columns": None}, "line 1 has no text in 'prompt'"),
    ):
        with pytest.raises(UserError, match=sentence):
            clean(path, tmp_path / out, **{"columns": COLUMNS, **named})
    with pytest.raises(UserError, match="orders has splits, so name a folder"):
        clean("orders", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="no data at 'nowhere'"):
        clean("nowhere", tmp_path / "out.jsonl")
    monkeypatch.setattr(cleaning, "_line", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        clean(path, tmp_path / "out.jsonl", COLUMNS)
    assert sorted(tmp_path.rglob("*")) == before
