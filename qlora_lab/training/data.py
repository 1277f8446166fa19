"""Read training samples from JSON lines, and check each line."""

from __future__ import annotations

import io
import json
import os
import pathlib

import numpy

from qlora_lab.errors import UserError

DATA_FOLDER = pathlib.Path(__file__).parents[2] / "data"


def load_samples(source: str | pathlib.Path, split: str = "train"):
    """Read samples into a data set of 🤗 datasets, and check each line.

    A line is `{"prompt": ..., "response": ...}`, with an optional `"system"`, or `{"messages": [...]}`.

    Args:
        source: the name of one of the course's data sets ("orders"), a folder with `{split}.jsonl`, or a .jsonl file.
        split: "train", "validation", "test", ... ; ignored for a file.

    Returns:
        datasets.Dataset with one column, `messages`: a list of {"role", "content"} that ends with the assistant's.

    Raises:
        UserError: there is no such file, or it is empty; or a line, named by its number, is not JSON, or has a field
            that is missing, empty or of the wrong type.
    """
    import datasets

    return datasets.Dataset.from_list([{"messages": chat} for chat in read_chats(source, split)])


def read_chats(source: str | pathlib.Path, split: str = "train") -> list[list[dict[str, str]]]:
    """The messages of `load_samples`, one list per line, without the time to import 🤗 datasets."""
    path = _find(source, split)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path.name}, line {number} is not UTF-8 text: {error.reason}; save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    lines = io.StringIO(text, newline=None)  # unlike splitlines(), does not split at Unicode's line separators
    chats = [_messages(line, f"{path.name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not chats:
        raise UserError(f"{path} is empty: it needs at least one line of JSON")
    return chats


def split_chats(
    source: str | pathlib.Path, splits: tuple[str, ...], samples: int, seed: int
) -> tuple[list[list[dict[str, str]]], dict[str, list[list[dict[str, str]]]]]:
    """The chats to train on, and by split those to judge a model on.

    Args:
        source: as in `load_samples`. Of a single file, a tenth of the lines at most is held out, as "test" and as
            "validation".
        splits: of a folder, those to judge on, where it has them.
        samples: at most so many of a split.
        seed: chooses the lines that are held out.
    """
    chats = read_chats(source, "train")
    if os.path.isfile(source):
        held_out = min(samples, len(chats) // 10)
        if not held_out:
            return chats, {}
        order = numpy.random.default_rng(seed).permutation(len(chats))
        judged = [chats[i] for i in order[:held_out]]
        return [chats[i] for i in order[held_out:]], {"test": judged, "validation": judged}
    there = [split for split in splits if samples and has_split(source, split)]
    return chats, {split: read_chats(source, split)[:samples] for split in there}


def _find(source: str | pathlib.Path, split: str) -> pathlib.Path:
    if os.path.isfile(source):
        return pathlib.Path(source)
    folder = _folder(source)
    if not os.path.isdir(folder):
        known = ", ".join(sorted(p.name for p in DATA_FOLDER.glob("*") if (p / "train.jsonl").is_file()))
        raise UserError(f"no data at {str(source)!r}: give a .jsonl file, a folder, or one of: {known}")
    if not has_split(source, split):
        raise UserError(f"{folder} has no {split}.jsonl")
    return folder / f"{split}.jsonl"


def _folder(source: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(source) if os.path.isdir(source) else DATA_FOLDER / source


def has_split(source: str | pathlib.Path, split: str) -> bool:
    """Whether the data is a folder that holds this split."""
    return os.path.isfile(_folder(source) / f"{split}.jsonl")


def _messages(line: str, where: str) -> list[dict[str, str]]:
    """The messages of one line, in either of its two forms."""
    row = _json_object(line, where)
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{where}: messages must be a list of {{role, content}}")
        for number, message in enumerate(messages, 1):
            empty = message.get("role") == "system" and message.get("content") == ""  # replaces a template's own
            _require_text(message, ("role",) if empty else ("role", "content"), f"{where}, message {number}")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UserError(f"{where}: messages must hold a question and end with the assistant's answer")
        return [{"role": message["role"], "content": message["content"]} for message in messages]
    fields = ("prompt", "response") if row.get("system") in (None, "") else ("system", "prompt", "response")
    _require_text(row, fields, where)
    roles = {"system": "system", "prompt": "user", "response": "assistant"}
    return [{"role": roles[field], "content": row[field]} for field in fields]


def _json_object(line: str, where: str) -> dict:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 10,000 deep
        raise UserError(f"{where} is not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f'{where} holds {json.dumps(row)[:40]}, not an object like {{"prompt": ..., "response": ...}}')
    return row


def _require_text(row: dict, fields: tuple[str, ...], where: str) -> None:
    """Raise UserError unless each field holds text that is not blank and can be written as UTF-8."""
    for field in fields:
        value = row.get(field)
        if not isinstance(value, str) or not value.strip():
            found = f", but {json.dumps(value)[:40]}" if field in row else f" (it has: {', '.join(row) or 'nothing'})"
            raise UserError(f"{where} has no text in {field!r}{found}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} has half a character in {field!r}, {ascii(value[error.start])} at position "
                f"{error.start + 1}: the text may have been cut inside an emoji; repair the line or remove it"
            ) from error


def load_prose() -> list[str]:
    """The course's paragraphs of general English (`data/prose/`)."""
    lines = (DATA_FOLDER / "prose" / "paragraphs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
