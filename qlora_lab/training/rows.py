"""A file's rows, one at a time: JSON lines, a JSON array, plain text, or a table (`tables.py`), compressed or not.

What a file is, its first bytes say, then its name. Whatever its size, at most one row and a piece of the file are in
memory. Each row comes with the place where it stands, which a message about it can name.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO, Any

from qlora_lab.errors import UserError
from qlora_lab.training.tables import Row, rows_of_csv, rows_of_parquet

LONGEST = 64 * 2**20  # bytes of a line, characters of a JSON value: longer ones are no training sample
PIECE = 2**20
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
PACKED_SUFFIXES = ("", ".gz", ".bz2", ".xz")
REFUSED = {
    b"PK\x03\x04": "is a zip archive (as Excel's files are): unpack it, or save the table as CSV in UTF-8",
    b"\xff\xfe": "is UTF-16 text: save the file as UTF-8",
    b"\xfe\xff": "is UTF-16 text: save the file as UTF-8",
    b"\x28\xb5\x2f\xfd": "is packed with Zstandard: unpack it, or pack it with gzip",
}


def rows_of_file(path: pathlib.Path) -> Iterator[Row]:
    """The rows of a file.

    Raises:
        UserError: when the row is reached that is malformed (named by its line), or the file cannot be read.
    """
    try:
        with _opened(path) as file:
            yield from _rows(file, path)
    except UnicodeError as error:  # only from csv's and Parquet's own text; lines say where they stand
        raise UserError(f"{path.name} is not UTF-8 text: {error}") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path.name} is damaged, it cannot be unpacked to its end: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _opened(path: pathlib.Path) -> IO[bytes]:
    with path.open("rb") as file:
        head = file.read(8)
    for magic, unpack in PACKED.items():
        if head.startswith(magic):
            return unpack(path, "rb")
    return path.open("rb")


def _rows(file: IO[bytes], path: pathlib.Path) -> Iterator[Row]:
    name = path.name
    head = file.read(4096)
    for magic, reason in REFUSED.items():
        if head.startswith(magic):
            raise UserError(f"{name} {reason}")
    file.seek(0)
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if head.startswith(b"PAR1"):
        return rows_of_parquet(file, name)
    if ".csv" in suffixes or ".tsv" in suffixes:
        return rows_of_csv(_text_lines(file, name), name, "\t" if ".tsv" in suffixes else None)
    if ".txt" in suffixes:
        return _paragraphs(file, name)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"["):
        return _json_array(file, name)
    if start.startswith(b"{") and ".json" in suffixes and not _first_line_is_json(file, head):
        return _json_document(file, name)
    return ((where, json_object(line, where)) for where, line in _text_lines(file, name) if line.strip())


# ---------------------------------------------------------------------------------------------------------------- lines


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, ended by \\n, \\r\\n or \\r, but (as opposed to `splitlines`) not by Unicode's own."""
    number = 0
    while line := file.readline(LONGEST):
        if len(line) == LONGEST and not line.endswith(b"\n"):
            raise UserError(f"{name}, line {number + 1} has more than {LONGEST:,} bytes: that is no sample")
        for part in line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
            number += 1
            yield number, part


def _text_lines(file: IO[bytes], name: str) -> Iterator[tuple[str, str]]:
    """Where each line stands, and its text; with or without a byte order mark."""
    for number, line in _lines(file, name):
        try:
            yield f"{name}, line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}, line {number} is not UTF-8 text: {error.reason}; save the file as UTF-8"
            ) from error


def _paragraphs(file: IO[bytes], name: str) -> Iterator[Row]:
    """Plain text: what stands between blank lines is one row."""
    begun, held, length = "", [], 0
    for where, line in _text_lines(file, name):
        if line.strip():
            begun = begun or where
            held.append(line)
            length += len(line)
            if length > LONGEST:
                raise UserError(f"{begun} begins a paragraph of over {LONGEST:,} characters: part it")
        elif held:
            yield begun, {"text": "\n".join(held)}
            begun, held, length = "", [], 0
    if held:
        yield begun, {"text": "\n".join(held)}


# ----------------------------------------------------------------------------------------------------------------- JSON


def json_object(text: str, where: str) -> dict[str, Any]:
    """Parse one JSON object. Raises UserError: it is none, in one sentence that begins with `where`."""
    try:
        row = json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 10,000 deep
        raise UserError(f"{where} is not JSON that can be read: {error}") from error
    return _require_object(row, where)


def _require_object(row, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{where} holds {shown(row)}, not an object like {{"prompt": ..., "response": ...}}')
    return row


def shown(value) -> str:
    """The beginning of a value, as JSON in plain ASCII, for a message."""
    try:
        return json.dumps(value)[:40]
    except (ValueError, TypeError, RecursionError):
        return f"a {type(value).__name__}"


def _first_line_is_json(file: IO[bytes], head: bytes) -> bool:
    line = head.partition(b"\n")[0]
    if len(line) == len(head):  # a long line, or a short file: one object in one line is JSON lines, too
        line = file.readline(LONGEST)
        file.seek(0)
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return not (isinstance(value, dict) and _wrapped(value) is not None)


def _wrapped(document: dict[str, Any]) -> list | None:
    """The rows that a document has under a name such as "data"; None if it has none."""
    lists = [value for key, value in document.items() if key in ("data", "rows", "train", "examples", "samples")]
    return lists[0] if len(lists) == 1 and isinstance(lists[0], list) else None


def _json_document(file: IO[bytes], name: str) -> Iterator[Row]:
    """One object over several lines: a sample, or rows under a name such as "data"."""
    data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise UserError(f"{name} is one JSON value of more than {LONGEST:,} bytes: save it as JSON lines, a row a line")
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name}, line {line} is not UTF-8 text: {error.reason}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"{name}, line {error.lineno}"
        raise UserError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}, line 1 is not JSON that can be read: {error}") from error
    document = _require_object(document, f"{name}, line 1")
    if (rows := _wrapped(document)) is not None:
        for number, row in enumerate(rows, 1):
            yield f"{name}, row {number}", _require_object(row, f"{name}, row {number}")
    else:
        yield f"{name}, line 1", document


def _json_array(file: IO[bytes], name: str) -> Iterator[Row]:
    """The objects of an array, each parsed when it is reached."""
    text = _Scanner(file, name)
    text.take("[")
    if text.next_character() != "]":
        while True:
            text.next_character()  # past the blanks, to where the object begins
            where = f"{name}, line {text.line}"
            yield where, _require_object(text.value(), where)
            if text.next_character() != ",":
                break
            text.take(",")
    text.take("]")
    if text.next_character():
        raise UserError(f"{name}, line {text.line} goes on after the array's end: save it as one array, or JSON lines")


class _Scanner:
    """Reads JSON values from a file, a piece at a time, and knows the line."""

    def __init__(self, file: IO[bytes], name: str):
        self.file, self.name = file, name
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False

    def next_character(self) -> str:
        """The next one that is no blank; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self._advance(self.at + 1)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._read(PIECE)

    def take(self, character: str) -> None:
        """Go past this character, which must come next."""
        found = self.next_character()
        if found != character:
            found = repr(found) if found else "its end"
            raise UserError(f"{self.name}, line {self.line} is not valid JSON: expected {character!r}, found {found}")
        self._advance(self.at + 1)

    def value(self) -> Any:
        """Go past a value, and return it. More of the file is read as long as the value may be incomplete."""
        piece = PIECE
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                certain = error.pos < len(self.text) - 100 and "Unterminated" not in error.msg
                if certain or self.ended or len(self.text) - self.at > LONGEST:
                    line = self.line + self.text.count("\n", self.at, error.pos)
                    raise UserError(
                        f"{self.name}, line {line} is not valid JSON: {error.msg} at column {error.colno}"
                        if line > self.line
                        else f"{self.name}, line {line} is not valid JSON: {error.msg}"
                    ) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.name}, line {self.line} is not JSON that can be read: {error}") from error
            else:
                if end < len(self.text) or self.ended:
                    self._advance(end)
                    return value
            self._read(piece)
            piece *= 2

    def _advance(self, to: int) -> None:
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def _read(self, size: int) -> None:
        data = self.file.read(size)
        self.ended = not data
        try:
            more = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n", self.at) + error.object.count(b"\n", 0, error.start)
            raise UserError(
                f"{self.name}, line {line} is not UTF-8 text: {error.reason}; save the file as UTF-8"
            ) from error
        self.text, self.at = self.text[self.at :] + more, 0
