"""Training data, wherever it is and whatever its format: found, read a sample at a time, and checked.

`rows.py` reads a file's rows, `formats.py` makes each one a chat.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from array import array
from collections.abc import Iterator
from typing import Any

from qlora_lab.errors import UserError
from qlora_lab.places import DATA
from qlora_lab.training.formats import Chat, LeftOut, Understood, named, to_chat
from qlora_lab.training.holding_out import hold_out
from qlora_lab.training.rows import PACKED_SUFFIXES, SUFFIXES, rows_of_file
from qlora_lab.training.tables import Row, rows_of_table

JUDGED = ("validation", "test", "shifted")  # splits that no run trains on
ON_HUB = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?")


def load_samples(
    source: str | pathlib.Path,
    split: str = "train",
    columns: dict[str, str] | None = None,
    format: str | None = None,
):
    """Read samples into a data set of 🤗 datasets, and check each line.

    Args:
        source: the name of one of the course's data sets ("orders"), a file (JSON lines, a JSON array, CSV, Parquet,
            text, packed or not), a folder with such a file for each split, a folder of `save_to_disk`, or the name
            of a data set on the hub, "owner/name" or "owner/name:config".
        split: "train", "validation", "test", ... ; ignored for what has no splits.
        columns, format: what cannot be recognized, see `formats.to_chat`.

    Returns:
        datasets.Dataset with one column, `messages`: a list of {"role", "content"} that ends with the assistant's.

    Raises:
        UserError: there is no such data, or it is empty; or a line, named by its number, is malformed.
    """
    import datasets

    parts, chats = [], []
    for chat in stream_chats(source, split, columns, format):
        chats.append({"messages": chat})
        if len(chats) == 50_000:
            parts, chats = [*parts, datasets.Dataset.from_list(chats)], []
    if chats:
        parts.append(datasets.Dataset.from_list(chats))
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def read_chats(
    source: str | pathlib.Path,
    split: str = "train",
    columns: dict[str, str] | None = None,
    format: str | None = None,
    understood: Understood | None = None,
) -> list[Chat]:
    """The messages of `load_samples`, one list per sample, without the time to import 🤗 datasets."""
    return list(stream_chats(source, split, columns, format, understood))


def stream_chats(
    source: str | pathlib.Path,
    split: str = "train",
    columns: dict[str, str] | None = None,
    format: str | None = None,
    understood: Understood | None = None,
) -> Iterator[Chat]:
    """The same, one at a time: of a file of any size, one row is in memory.

    Args:
        understood: is told what was understood, complete when the last chat has come.
    """
    return (chat for _, chat in stream_samples(source, split, columns, format, understood))


def stream_samples(
    source: str | pathlib.Path,
    split: str = "train",
    columns: dict[str, str] | None = None,
    format: str | None = None,
    understood: Understood | None = None,
) -> Iterator[tuple[str, Chat]]:
    """The same, each with the place where it stands: "file, line 3"."""
    return ((where, chat) for where, _, chat in stream_rows(source, split, columns, format, understood))


def stream_rows(
    source: str | pathlib.Path,
    split: str = "train",
    columns: dict[str, str] | None = None,
    format: str | None = None,
    understood: Understood | None = None,
) -> Iterator[tuple[str, dict[str, Any], Chat]]:
    """The same, with the row that the chat was made of between the two: all of its columns, as they were read."""
    understood = understood if understood is not None else Understood()
    rows, path = _rows(source, split)
    understood.name = path.name
    for where, row in rows:
        try:
            chat = to_chat(row, where, columns, format, understood)
        except LeftOut as reason:
            understood.leave_out(str(reason), where)
            continue
        understood.samples += 1
        yield where, row, chat
    if understood.left_out and not understood.samples:
        raise UserError(f"nothing is left of {path}: {understood.remarks().removeprefix('note: ')}")
    if not understood.samples:
        raise UserError(f"{path} is empty: it needs at least one line of JSON")


def number_of(row: dict[str, Any], column: str, where: str) -> int:
    """A number (64 bits of a hash) for the row's value in a column to split by, the same in every process.

    Raises:
        UserError: the row has no such column.
    """
    if column not in row:
        raise UserError(f"{where} has no column {column!r} to split by (it has: {named(row)})")
    value = json.dumps(row[column], sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "big", signed=True)


def split_chats(
    source: str | pathlib.Path,
    splits: tuple[str, ...],
    samples: int,
    seed: int,
    columns: dict[str, str] | None = None,
    format: str | None = None,
    understood: Understood | None = None,
    validates: bool = False,
    split_by: str | None = None,
) -> tuple[list[Chat], dict[str, list[Chat]]]:
    """The chats to train on, and by split those to judge a model on.

    Args:
        source: as in `load_samples`. Without splits of its own, some of it is held out as "test", see `hold_out`.
        splits: those to judge on, of those that the source has.
        samples: at most so many of a split.
        seed: chooses the samples that are held out.
        columns, format, understood: as in `read_chats`; `understood` is told of the chats to train on.
        validates: whether others are held out as "validation"; if not, the same are. No matter where there are splits.
        split_by: a column. Samples with the same value there are all held out, or none of them is.

    Raises:
        UserError: the source has splits of its own and is to be split by a column, or none of its values can be held
            out; and what `load_samples` raises.
    """
    if has_splits(source):
        if split_by:
            raise UserError(f"--split-by {split_by}: {source} comes in splits of its own, so nothing is held out of it")
        chats = read_chats(source, "train", columns, format, understood)
        present = [split for split in splits if samples and has_split(source, split)]
        return chats, {split: read_chats(source, split, columns, format)[:samples] for split in present}
    chats, values = [], array("q") if split_by else None
    for where, row, chat in stream_rows(source, "train", columns, format, understood):
        chats.append(chat)
        if values is not None:
            values.append(number_of(row, str(split_by), where))
    held_out = hold_out(len(chats), samples, seed, validates, values)
    if not held_out.judged:
        return chats, {}
    trained, judged, validating = (
        [chats[i] for i in of] for of in (held_out.trained, held_out.judged, held_out.validating)
    )
    return trained, {"test": judged, "validation": validating if validates else judged}


def has_splits(source: str | pathlib.Path) -> bool:
    """Whether the data comes in splits: not so a file, nor a folder that `Dataset.save_to_disk` has written."""
    return _is_on_hub(source) or not os.path.isfile(source) and not os.path.isfile(_folder(source) / "state.json")


def has_split(source: str | pathlib.Path, split: str) -> bool:
    """Whether the data is a folder, or a data set of the hub, that holds this split."""
    if _is_on_hub(source):
        return split in _from_hub(source, "get_dataset_split_names")
    folder = _folder(source)
    return os.path.isdir(folder) and has_splits(source) and bool(_saved_split(folder, split) or _files(folder, split))


def _rows(source: str | pathlib.Path, split: str) -> tuple[Iterator[Row], pathlib.Path]:
    """The rows of a split, and the file or folder that they are in."""
    if os.path.isfile(source):
        return rows_of_file(pathlib.Path(source)), pathlib.Path(source)
    if _is_on_hub(source):
        return _hub_rows(source, split), pathlib.Path(source)
    folder = _folder(source)
    if not os.path.isdir(folder):
        known = ", ".join(sorted(p.name for p in DATA.glob("*") if (p / "train.jsonl").is_file()))
        raise UserError(f"no data at {str(source)!r}: give a file, a folder, or one of: {known}")
    saved = _saved_split(folder, split) if has_splits(source) else folder
    if saved:
        return _saved_rows(saved), saved
    files = _files(folder, split)
    if not files:
        raise UserError(f"{folder} has no {split}.jsonl (nor another file of rows with that name, see README)")
    stems = sorted({_stem(file) for file in files})
    if len(stems) < len(files):
        raise UserError(f"{folder} has {split} twice: {', '.join(file.name for file in files)}; keep one of them")
    return (row for file in files for row in rows_of_file(file)), files[0] if len(files) == 1 else folder


def _folder(source: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(source) if os.path.isdir(source) else DATA / source


def _files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """A split's files: `train.jsonl`, or parts as on the hub, `data/train-00000-of-00002.parquet`."""
    endings = {suffix + packed for suffix in SUFFIXES for packed in PACKED_SUFFIXES}
    stems = re.compile(re.escape(split) + r"(-\d+-of-\d+)?")
    found = [path for path in (*folder.glob(f"{split}*"), *folder.glob(f"data/{split}*")) if path.is_file()]
    return sorted(p for p in found if stems.fullmatch(_stem(p)) and p.name.removeprefix(_stem(p)).lower() in endings)


def _stem(path: pathlib.Path) -> str:
    return path.name.partition(".")[0]


def _saved_split(folder: pathlib.Path, split: str) -> pathlib.Path | None:
    """The split's folder in what `DatasetDict.save_to_disk` has written."""
    saved = folder / split
    return saved if (folder / "dataset_dict.json").is_file() and (saved / "state.json").is_file() else None


def _saved_rows(folder: pathlib.Path) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # a missing file, Arrow, JSON ...
        first = str(error).partition("\n")[0]
        raise UserError(f"cannot read {folder} as a folder of save_to_disk: {first}") from error
    yield from rows_of_table(table, folder.name)


def _is_on_hub(source: str | pathlib.Path) -> bool:
    """Whether this looks like the name of a data set on the hub, and nothing here has that name."""
    return bool(ON_HUB.fullmatch(str(source))) and not os.path.exists(source) and not (DATA / source).exists()


def _from_hub(source: str | pathlib.Path, function: str, **options):
    """Call a function of 🤗 datasets with the name and the config of a data set of the hub."""
    import datasets

    name, _, config = str(source).partition(":")
    try:
        return getattr(datasets, function)(name, config or None, **options)
    except Exception as error:  # from the network, the hub, a missing split or config ...
        first = str(error).partition("\n")[0]
        raise UserError(f"no data at {str(source)!r}: no such file or folder, and from the hub: {first}") from error


def _hub_rows(source: str | pathlib.Path, split: str) -> Iterator[Row]:
    """The rows of a split, as they come over the network. No code of the data set's is run: datasets 4 dropped that."""
    table = _from_hub(source, "load_dataset", split=split, streaming=True)
    try:
        yield from rows_of_table(table, str(source))
    except UserError:
        raise
    except Exception as error:  # from the network, Arrow, JSON ...
        first = str(error).partition("\n")[0]
        raise UserError(f"cannot read {source} from the hub: {first}") from error


def load_prose() -> list[str]:
    """The course's paragraphs of general English (`data/prose/`)."""
    lines = (DATA / "prose" / "paragraphs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
