"""Files of all kinds, whole and damaged, a row at a time."""

import bz2
import gc
import gzip
import json
import lzma
import pathlib
import random
import subprocess
import sys
import time
import tracemalloc

import pytest

from qlora_lab.errors import UserError
from qlora_lab.training import rows as module
from qlora_lab.training.data import read_chats
from qlora_lab.training.rows import rows_of_file

GOOD = '{"prompt": "a", "response": "b"}'
ROWS = [{"prompt": f"Say {n}, é☕", "response": f'{n}\n"quoted"'} for n in range(5)]


def file_of(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def written(folder, kind: str):
    """ROWS in a file of this kind."""
    import pandas

    lines = "\n".join(map(json.dumps, ROWS))
    path = folder / f"mine.{kind}"
    if kind in ("csv", "tsv"):
        pandas.DataFrame(ROWS).to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "semicolon.csv":
        pandas.DataFrame(ROWS).to_csv(path, index=False, sep=";", encoding="utf-8-sig")
    elif kind == "parquet":
        pandas.DataFrame(ROWS).to_parquet(path)
    elif kind == "array.json":
        path.write_text(json.dumps(ROWS, ensure_ascii=False))
    elif kind == "pretty.json":
        path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8-sig")
    elif kind == "under-a-name.json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=2))
    elif kind == "under-a-name-in-a-line.json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}) + "\n")
    elif kind == "lines.json":
        path.write_text(lines)
    elif kind == "cr.jsonl":
        path.write_bytes(lines.replace("\n", "\r").encode())
    else:
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind.rpartition(".")[2]]
        path.write_bytes(pack(lines.encode()))
    return path


KINDS = "csv tsv semicolon.csv parquet array.json pretty.json under-a-name.json lines.json cr.jsonl jsonl.gz jsonl.bz2"
KINDS += " under-a-name-in-a-line.json"


@pytest.mark.parametrize("kind", [*KINDS.split(), "jsonl.xz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    assert [row for _, row in rows_of_file(written(tmp_path, kind))] == ROWS
    chats = read_chats(tmp_path / f"mine.{kind}")
    assert [[message["content"] for message in chat] for chat in chats] == [list(row.values()) for row in ROWS]


def test_rows_say_where_they_stand(tmp_path):
    """As an editor counts: over lines within a cell, and from the line where an object of an array begins."""
    table = file_of(tmp_path, "a.csv", 'prompt,response\n"x\ny",b\nc,d\n')
    assert [where for where, _ in rows_of_file(table)] == ["a.csv, line 2", "a.csv, line 4"]
    array = file_of(tmp_path, "a.json", '[\n{"a":\n1},\n\n{"a": 2}\n]\n')
    assert [where for where, _ in rows_of_file(array)] == ["a.json, line 2", "a.json, line 5"]
    text = file_of(tmp_path, "a.txt", "\n\none\ntwo\n\n\nthree")
    assert list(rows_of_file(text)) == [("a.txt, line 3", {"text": "one\ntwo"}), ("a.txt, line 7", {"text": "three"})]


def test_cells_stay_as_they_are_written(tmp_path):
    path = file_of(tmp_path, "a.csv", "prompt,response\n007,NA\n1e3,\n")
    assert [row for _, row in rows_of_file(path)] == [
        {"prompt": "007", "response": "NA"},
        {"prompt": "1e3", "response": ""},
    ]


def test_rows_of_arrow_have_the_keys_that_were_put_in(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"tools": [{"x": 1}, {"y": {"z": "a"}}], "n": [1, 2]}, {"tools": [{"y": {"w": None, "v": [b"b"]}}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mine.parquet")
    found = [row for _, row in rows_of_file(tmp_path / "mine.parquet")]
    assert found == [rows[0], {"tools": [{"y": {"v": [b"b"]}}], "n": None}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[", "a.json, line 1 is not valid JSON"),
        ("a.json", f"[{GOOD}", r"a.json, line 1 is not valid JSON: expected '\]', found its end"),
        ("a.json", f"[{GOOD}\n{GOOD}]", "a.json, line 2 is not valid JSON: expected"),
        ("a.json", f"[{GOOD},\n]", "a.json, line 2 is not valid JSON: Expecting value"),
        ("a.json", f'[{GOOD},\n{{"prompt":\n "a}}]', "a.json, line 3 is not valid JSON: Unterminated string"),
        ("a.json", f"[{GOOD}]\n{GOOD}", "a.json, line 2 goes on after the array's end"),
        ("a.json", f'[{GOOD},\n"a"]', 'a.json, line 2 holds "a", not an object'),
        ("a.json", f"[\n{100_000 * '['}", "a.json, line 2 is not JSON that can be read"),
        ("a.json", f"[{GOOD},\n".encode() + b'{"prompt": "\xe9"}]', "a.json, line 2 is not UTF-8 text"),
        ("a.json", '{\n"prompt": "a",\n"response" "b"}', "a.json, line 3 is not valid JSON"),
        ("a.csv", "prompt,response\na\n", "a.csv, line 2 has 1 cells, and the header names 2 columns"),
        ("a.csv", "prompt,response\na,b,c\n", "a.csv, line 2 has 3 cells"),
        ("a.csv", 'prompt,response\na,"b', "a.csv, line 2 is not valid CSV: unexpected end of data"),
        ("a.csv", 'prompt,response\na,"b" c\n', "a.csv, line 2 is not valid CSV"),
        ("a.csv", f"prompt,response\na,{200_000 * 'b'}\n", "a.csv, line 2 is not valid CSV: field larger than"),
        ("a.csv", "prompt,prompt\na,b\n", "a.csv, line 1 names a column twice"),
        ("a.csv", b"prompt,response\na,caf\xe9\n", "a.csv, line 2 is not UTF-8 text"),
        ("a.parquet", b"PAR1 and nothing more", "a.parquet is a damaged Parquet file, from row 1 on"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], "a.jsonl.gz is damaged, it cannot be unpacked"),
        ("a.jsonl.gz", b"\x1f\x8bno gzip", "a.jsonl.gz is damaged, it cannot be unpacked"),
        ("a.jsonl.xz", lzma.compress(GOOD.encode())[:-9], "a.jsonl.xz is damaged, it cannot be unpacked"),
        ("a.xlsx", b"PK\x03\x04...", "a.xlsx is a zip archive"),
        ("a.jsonl", GOOD.encode("utf-16"), "a.jsonl is UTF-16 text: save the file as UTF-8"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, name, content, message):
    path = file_of(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as error:
        list(rows_of_file(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def malformed(draw: random.Random) -> bytes:
    """A line that is no sample, of a kind that occurs."""
    good = json.dumps({"prompt": "Où est le café ☕?", "response": "Là-bas.", "n": draw.randrange(10**6)})
    wrong = draw.choice(["7", "null", "[1]", "true", "{}", '{"a": 1}', "1e999", '[["a"]]', "-3.5"])
    typed = json.loads(wrong.replace("null", "8"))  # null is an empty cell: such a sample is left out, and counted
    broken = good.encode().replace(b'"', b"'", draw.randrange(1, 5))
    kinds = [
        lambda: good.encode()[: draw.randrange(1, len(good) - 1)],
        lambda: json.dumps({"prompt": typed, "response": typed}).encode(),
        lambda: json.dumps({"messages": typed}).encode(),
        lambda: json.dumps({"messages": [{"role": typed, "content": typed}]}).encode(),
        lambda: json.dumps({"conversations": [{"from": "human", "value": typed}]}).encode(),
        lambda: json.dumps({"messages": [{"role": draw.choice(["critic", ""]), "content": "x"}]}).encode(),
        lambda: b'{"prompt": "a", "response": "b\\u' + draw.choice([b"d83d", b"dfff", b"DC00"]) + b'"}',
        lambda: draw.choice([b"[", b'{"a":', b'{"messages": [']) * draw.choice([2000, 20_000]),
        lambda: b'{"prompt": "a", "response": ' + b"9" * draw.choice([4301, 50_000]) + b"}",
        lambda: b"\0" * draw.randrange(1, 50),
        lambda: good.replace("bas", "b\0s").encode(),
        lambda: good.encode().replace(b"\\u00e0", b"\xe0"),
        lambda: "été".encode("latin-1"),
        lambda: "été".encode("utf-16-le") + b"\xff\xfe",
        lambda: broken,
        lambda: good.encode() + good.encode(),
        lambda: bytes(draw.randrange(128, 256) for _ in range(draw.randrange(1, 40))),
        lambda: wrong.encode(),
        lambda: b'{"prompt": NaN, "response": Infinity}',
        lambda: b'{"prompt": {"a": ["\\ud800"]}, "response": "b"}',
    ]
    return draw.choice(kinds)()


def sentence_about(path, line: bytes) -> str:
    """What the reader says of a line that comes third, after two good ones, of which it may have gone on."""
    path.write_bytes(f"{GOOD}\n{GOOD}\n".encode() + line + f"\n{GOOD}\n".encode())
    with pytest.raises(UserError) as error:
        read_chats(path)
    return str(error.value)


def test_ten_thousand_malformed_lines_are_each_one_sentence_with_their_number(tmp_path):
    draw, path, seen = random.Random(0), tmp_path / "mine.jsonl", set()
    start = time.process_time()
    for _ in range(10_000):
        line = malformed(draw).replace(b"\n", b" ").replace(b"\r", b" ")
        sentence = sentence_about(path, line)
        assert sentence.startswith("mine.jsonl, line 3"), (line[:200], sentence)
        assert sentence.isprintable() and len(sentence) < 400, (line[:200], sentence)
        seen.add(sentence[:40])
    assert time.process_time() - start < 60
    assert len(seen) > 12


def test_malformed_lines_leave_no_memory_behind(tmp_path):
    """Lines of up to 260 kB; what their reading takes is free afterwards."""
    draw, held = random.Random(1), []
    tracemalloc.start()
    try:
        for number in range(300):
            line = malformed(draw).replace(b"\n", b" ").replace(b"\r", b" ")
            sentence_about(tmp_path / "mine.jsonl", line)
            if number in (99, 299):
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
        assert held[1] - held[0] < 1e5
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_large_file_is_never_in_memory(tmp_path, kind):
    """40 MB here; what is held does not depend on it."""
    path, text = tmp_path / f"large.{kind}", "words and more words, " * 45
    with path.open("w") as file:
        file.write({"jsonl": "", "json": "[", "csv": "prompt,response\n"}[kind])
        row = f'"{text}","b"\n' if kind == "csv" else json.dumps({"prompt": text, "response": "b"})
        between = {"jsonl": "\n", "json": ",\n", "csv": ""}[kind]
        file.write(between.join([row] * 40_000) + "]" * (kind == "json"))
    assert path.stat().st_size > 38e6
    tracemalloc.start()
    try:
        count = sum(1 for _ in rows_of_file(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000
    assert peak < 12e6


def test_two_hundred_megabytes_are_read_in_the_memory_of_a_few(tmp_path):
    """As Linux counts a process' memory; what is held does not depend on the file."""
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("not Linux")
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        line = json.dumps({"prompt": "words and more words, " * 45, "response": "b"}) + "\n"
        file.writelines([line * 1000] * 200)
    size = path.stat().st_size
    code = """
import re, sys
from qlora_lab.training.data import stream_chats
def peak():
    return int(re.search("VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1])  # kB, since this program began
before = peak()
count = sum(1 for _ in stream_chats(sys.argv[1]))
print(count, peak() / before)
"""
    done = subprocess.run([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True, timeout=300)
    path.unlink()
    count, growth = done.stdout.split()
    assert size > 200e6 and int(count) == 200_000
    assert float(growth) < 1.5  # of some ten megabytes, most of them Python's own


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 1000)
    path = file_of(tmp_path, "mine.jsonl", f"{GOOD}\n" + "x" * 5000)
    with pytest.raises(UserError, match="mine.jsonl, line 2 has more than 1,000 bytes"):
        list(rows_of_file(path))
    path = file_of(tmp_path, "mine.json", f"[{GOOD},\n" + '{"prompt": "' + "x" * 5_000_000)
    monkeypatch.setattr(module, "PIECE", 100)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="mine.json, line 2 is not valid JSON: Unterminated"):
            list(rows_of_file(path))
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
