"""The rows of tables, one at a time: CSV, Parquet, and data sets of 🤗 datasets.

Arrow, in which the last two are, gives every dictionary of a column the keys of all, and keeps what has no common type
as JSON text: here each row has what was put into it.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from typing import IO, Any

from qlora_lab.errors import UserError

Row = tuple[str, dict[str, Any]]  # where it stands, its fields


def rows_of_csv(lines: Iterator[tuple[str, str]], name: str, delimiter: str | None) -> Iterator[Row]:
    """A table with a header. Every cell stays the text that it is: nobody turns "007" into 7 or "NA" into nothing.

    Args:
        lines: where each stands, and its text.
        delimiter: None: the one of , ; | and tab that the header has most of.
    """
    texts = (f"{line}\n" for _, line in lines)
    header = next(texts, "")
    delimiter = delimiter or max(",;\t|", key=header.count)
    reader = csv.reader(itertools.chain([header] if header else [], texts), delimiter=delimiter, strict=True)
    number = 1
    try:
        columns = next(reader, [])
        if len(set(columns)) < len(columns):
            raise UserError(f"{name}, line 1 names a column twice: {', '.join(columns)[:100]}")
        number = reader.line_num + 1
        for cells in reader:
            where, number = f"{name}, line {number}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{where} has {len(cells)} cells, and the header names {len(columns)} columns: put quotes around "
                    f"text that holds {delimiter!r}"
                )
            yield where, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{name}, line {number} is not valid CSV: {error}") from error


def rows_of_parquet(file: IO[bytes], name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for where, row in _rows_of(parquet.ParquetFile(file).iter_batches(1000), name):
            number += 1
            yield where, row
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{name} is a damaged Parquet file, from row {number + 1} on: {first}") from error


def rows_of_table(table, name: str) -> Iterator[Row]:
    """The rows of a data set of 🤗 datasets, streamed or not, without decoding what else it holds (images, sound)."""
    return _rows_of(table.with_format("arrow").iter(1000), name)


def _rows_of(batches, name: str) -> Iterator[Row]:
    """batches: tables or record batches of Arrow."""
    number = 0
    for batch in batches:
        kinds = {column.name: column.type for column in batch.schema}
        for row in batch.to_pylist():
            number += 1
            yield f"{name}, row {number}", {key: _as_it_was(value, kinds[key]) for key, value in row.items()}


def _as_it_was(value, kind):
    """A value of an Arrow type, without the keys that it did not have, and with JSON text parsed."""
    if value is None:
        return None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if isinstance(value, dict):
        kinds = {field.name: field.type for field in kind}
        return {key: _as_it_was(inner, kinds[key]) for key, inner in value.items() if inner is not None}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_as_it_was(inner, kind.value_type) for inner in value]
    return value
