import datetime
import importlib.metadata
import json
import pathlib

import pytest

from qlora_lab.errors import UserError
from qlora_lab.experiments.record import Record

RECORDS = pathlib.Path(__file__).resolve().parents[2] / "data" / "records"


def today() -> str:
    return datetime.date.today().isoformat()


def begun(folder, device="Some GPU 80GB", **how) -> Record:
    return Record.begin("rows", folder, device, **{"packages": ("torch", "no-such-package"), **how})


def test_a_record_says_on_what_with_what_and_when(tmp_path):
    record = begun(tmp_path / "new", settings={"steps": 3}, total_memory=8)
    assert not (tmp_path / "new").exists()
    record.add("runs", {"seed": 0})
    record.put("alone", "nf4", 1.5)
    record.note(rate=2)
    written = json.loads((tmp_path / "new" / "rows-some-gpu-80gb.json").read_text())
    assert written == {
        "schema": 1,
        "command": "python -m qlora_lab.experiments rows",
        "device": "Some GPU 80GB",
        "date": today(),
        "versions": {"torch": importlib.metadata.version("torch")},
        "settings": {"steps": 3},
        "total_memory": 8,
        "runs": [{"seed": 0}],
        "alone": {"nf4": 1.5},
        "rate": 2,
    }
    assert list(written)[0] == "schema"


def test_each_row_is_written_when_it_comes(tmp_path):
    record = begun(tmp_path)
    for seed in range(3):
        record.add("runs", {"seed": seed})
        assert Record.read(record.path).rows("runs") == [{"seed": n} for n in range(seed + 1)]
    record.add("runs", {"seed": -1}, order=lambda row: row["seed"])
    assert [row["seed"] for row in Record.read(record.path).rows("runs")] == [-1, 0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [record.path.name]  # no part is left


def test_a_record_without_a_folder_is_kept_in_memory():
    record = begun(None)
    record.add("runs", {"seed": 0})
    assert record.path is None and record.rows("runs", seed=0) == [{"seed": 0}] == record.content["runs"]


@pytest.mark.parametrize("when", ["json", "half written", "renamed"])
def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path, monkeypatch, when):
    record = begun(tmp_path)
    record.add("runs", {"seed": 0})
    before = record.path.read_bytes()

    def broken(*_, **__):
        raise OSError("No space left on device")

    def half(path, text, **_):
        with open(path, "w") as file:
            file.write(text[:40])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "json":
            patch.setattr("json.dumps", broken)
        elif when == "half written":
            patch.setattr(pathlib.Path, "write_text", half)
        else:
            patch.setattr(pathlib.Path, "replace", broken)
        with pytest.raises((OSError, KeyboardInterrupt)):
            record.add("runs", {"seed": 1})
    assert record.path.read_bytes() == before
    assert record.rows("runs") == [{"seed": 0}]  # nor is the row counted that was not written
    record.add("runs", {"seed": 1})
    assert Record.read(record.path).rows("runs") == [{"seed": 0}, {"seed": 1}]


def test_rows_are_found_by_what_they_have():
    record = Record(None, {"runs": [{"seed": 0, "preset": "lean"}, {"seed": 0}, {"seed": 1, "preset": None}]})
    assert record.rows("runs", seed=0) == [{"seed": 0, "preset": "lean"}, {"seed": 0}]
    assert record.rows("runs", preset=None) == [{"seed": 0}, {"seed": 1, "preset": None}]
    assert record.rows("caps") == [] and record.named("alone") == {}


# ---------------------------------------------------------------------------------------------------------- going on


def test_going_on_loses_nothing_and_keeps_both_dates(tmp_path):
    """Of a record without a schema number, with a section and notes that nobody writes any more."""
    then = {
        "command": "python -m qlora_lab.memory.record",
        "device": "Some GPU 80GB",
        "date": "2026-11-24, 2026-11-25",
        "versions": {"torch": "1.0", "gone": "3"},
        "settings": {"steps": 3},
        "allocator": "grows",
        "runs": [{"seed": 0}],
        "alone": {"nf4": 1.5},
        "other_hosts": [{"note": "slower"}],
    }
    path = tmp_path / "rows-some-gpu-80gb.json"
    path.write_text(json.dumps(then))
    record = begun(tmp_path, settings={"steps": 3}, allocator="new", continue_from=path)
    assert json.loads(path.read_text()) == then  # not before there is something new
    record.add("runs", {"seed": 1})
    record.put("alone", "fp4", 2.5)
    written = json.loads(path.read_text())
    torch_now = importlib.metadata.version("torch")
    assert written == {
        **then,
        "schema": 1,
        "command": "python -m qlora_lab.experiments rows",
        "date": f"2026-11-24, 2026-11-25, {today()}",
        "versions": {"torch": f"1.0, {torch_now}", "gone": "3"},
        "runs": [{"seed": 0}, {"seed": 1}],
        "alone": {"nf4": 1.5, "fp4": 2.5},
    }
    again = begun(tmp_path, settings={"steps": 3}, continue_from=path)
    assert again.content["date"] == written["date"] and again.content["versions"] == written["versions"]
    assert again.rows("runs") == written["runs"]


def test_going_on_in_another_folder_leaves_the_earlier_record_alone(tmp_path):
    first = begun(tmp_path / "a")
    first.add("runs", {"seed": 0})
    before = first.path.read_bytes()
    second = begun(tmp_path / "b", continue_from=first.path)
    second.add("runs", {"seed": 1})
    assert first.path.read_bytes() == before
    assert Record.read(second.path).rows("runs") == [{"seed": 0}, {"seed": 1}]


def test_a_record_that_is_there_is_not_lost(tmp_path):
    begun(tmp_path).add("runs", {"seed": 0})
    other = begun(tmp_path / "b")
    other.add("runs", {"seed": 5})
    for continue_from in (None, other.path):
        with pytest.raises(UserError, match="rows-some-gpu-80gb.json is there already, and would be lost"):
            begun(tmp_path, continue_from=continue_from)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"device": "Other GPU"}, "it was made on Some GPU 80GB, this is Other GPU"),
        ({"settings": {"steps": 4, "rank": 2}}, "its steps was 3, now it is 4"),
        ({"settings": {"steps": 3}}, "its rank was 2, now it is None"),
    ],
)
def test_what_differs_is_not_mixed(tmp_path, how, told):
    first = begun(tmp_path, settings={"steps": 3, "rank": 2})
    first.add("runs", {"seed": 0})
    with pytest.raises(UserError, match=f"^cannot continue .*: {told}$"):
        begun(tmp_path / "b", continue_from=first.path, **{"settings": {"steps": 3, "rank": 2}, **how})


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_every_record_that_was_taken_is_read(path, tmp_path):
    """And can be gone on with, if all that held for it holds: nothing of it is lost."""
    content = json.loads(path.read_text(encoding="utf-8"))
    record = Record.read(path)
    assert record.content == content
    for name, section in content.items():
        if isinstance(section, list) and all(isinstance(row, dict) for row in section):
            assert record.rows(name) == section
    how = {"packages": (), "settings": content.get("settings"), "continue_from": path}
    going_on = Record.begin(path.name.partition("-nvidia")[0], tmp_path, content["device"], **how)
    changed = {name for name in going_on.content if going_on.content[name] != content.get(name)}
    assert changed <= {"schema", "command", "date"} and going_on.content["date"].startswith(content["date"])
    if "nvidia" in path.name:
        assert going_on.path.name == path.name


def test_there_are_records():
    assert len(list(RECORDS.glob("*.json"))) >= 10


@pytest.mark.parametrize("schema", [2, 99, "2", None])
def test_a_newer_schema_is_refused_in_one_sentence(tmp_path, schema):
    record = begun(tmp_path)
    record.note(schema=schema)
    with pytest.raises(UserError, match=f"has schema {schema}, and 1 is the newest that is known here: "):
        Record.read(record.path)
    with pytest.raises(UserError, match="has schema"):
        begun(tmp_path, continue_from=record.path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"command": "x", "dev', "is no record, or a damaged one"),
        ("[1, 2]", "is no record: it does not tell its command"),
        ('{"command": "x", "device": "y", "versions": {}}', "is no record: it does not tell its date"),
    ],
)
def test_what_is_no_record_is_told(tmp_path, text, told):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=told):
        Record.read(tmp_path / "x.json")


def test_a_missing_record_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot read the record .*no.json: No such file"):
        begun(tmp_path, continue_from=tmp_path / "no.json")
