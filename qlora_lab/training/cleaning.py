"""A data set without what should not be trained on: no repeats, and what a model is judged on is held apart.

All rows are read two or three times, one at a time. Between the readings about a hundred bytes are kept of each sample,
and those that are held out, if near-duplicates of them are to be left out.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import json
import pathlib
import shutil
import tempfile
import uuid
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from qlora_lab.errors import UserError
from qlora_lab.training.data import JUDGED, has_split, has_splits, number_of, stream_rows
from qlora_lab.training.formats import Chat, Understood, counted
from qlora_lab.training.holding_out import LEAST, hold_out
from qlora_lab.training.likeness import Twins, fingerprint, first_ones

TRAIN, VALIDATION, TEST = "train", "validation", "test"
FIRST = (TEST, "shifted", VALIDATION)  # what is in two splits stays in the first: rather judged on than chosen by
AS_TEXT = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)  # what JSON has no type for


@dataclass
class Cleaned:
    """What was written, and what was not.

    out: the file or folder. kept: by split, how many samples. values: by split, how many different values of the column
    to split by; empty without one. understood: how the rows were read, and why which were left out.
    """

    out: pathlib.Path
    kept: Counter[str] = field(default_factory=Counter)
    values: dict[str, set[int]] = field(default_factory=dict)
    understood: Understood = field(default_factory=Understood)

    def describe(self, split_by: str | None = None) -> str:
        """For people, in a few lines."""
        kept = sum(self.kept.values())
        read = kept + sum(count for count, _ in self.understood.left_out.values())
        lines = [f"{kept:,} of {read:,} samples of {self.understood.name} kept, in {self.out}"]
        splits = [split for split in (TRAIN, *JUDGED) if split in self.kept]
        if len(splits) > 1:
            lines[0] += ": " + ", ".join(f"{split} {self.kept[split]:,}" for split in splits)
        lines += [f"left out: {counted(*of)} {reason}" for reason, of in self.understood.left_out.items()]
        lines += [f"in {counted(*of)} {what} in training" for what, of in self.understood.changed.items()]
        if split_by:
            counts = ", ".join(f"{split} {len(self.values[split]):,}" for split in splits)
            lines.append(f"no two of them share a value of {split_by!r}; so many different ones are in each: {counts}")
        return "\n".join(lines)


def clean(
    source: str | pathlib.Path,
    out: pathlib.Path,
    columns: dict[str, str] | None = None,
    format: str | None = None,
    most: int = 50,
    seed: int = 0,
    split_by: str | None = None,
    drop_near: bool = False,
) -> Cleaned:
    """Write the rows of a data set, with all of their columns, but for those from which nothing should be learned.

    Left out are samples without a question or an answer, and those of which there is an earlier copy; in a folder,
    "test" comes before "validation", and both before "train".

    Args:
        source, columns, format: as in `data.load_samples`.
        out: a file that ends with .jsonl; or a folder, for a file a split: the splits of the source or, if it has none,
            "test" and "validation" as `hold_out` draws them, and "train".
        most, seed, split_by: how to hold out, see `data.split_chats`.
        drop_near: also leave out samples to train on that are nearly among those held out, see `likeness.Twins`; not
            those that are alike with their numbers aside only, which would be all of a table of sums.

    Raises:
        UserError: `out` is there already, or its folder is not; it is a file, and there are splits or `drop_near`; or
            there is nothing to hold out, or nothing left; and what `load_samples` raises. Nothing is written then.
    """
    as_file = out.suffix == ".jsonl"
    next(stream_rows(source, TRAIN, columns, format))  # if there is no such data, that is to be said first
    _require_possible(source, out, as_file, split_by, drop_near)
    splits = [*(split for split in FIRST if has_split(source, split)), TRAIN]
    cleaned = Cleaned(out)
    understood = cleaned.understood

    def read(told: Understood | None = None) -> Iterator[tuple[str, str, dict[str, Any], Chat]]:
        for split in splits:
            for where, row, chat in stream_rows(source, split, columns, format, told):
                yield split, where, row, chat

    fingerprints, values, goes_to = array("q"), array("q"), []
    for split, where, row, chat in read(understood):
        fingerprints.append(fingerprint(chat))
        goes_to.append(split)
        if split_by:
            values.append(number_of(row, split_by, where))
    understood.name = str(source)
    once = first_ones(fingerprints)
    if not as_file and not has_splits(source):
        _hold_out(goes_to, once, most, seed, [values[i] for i in once] if split_by else None)
    first = set(once)
    aside = (sample for number, sample in enumerate(read()) if number in first and goes_to[number] != TRAIN)
    twins = Twins([(where, chat) for _, where, _, chat in aside] if drop_near else [])

    def kept() -> Iterator[tuple[str, str, dict[str, Any]]]:
        for number, (_, where, row, chat) in enumerate(read()):
            split = goes_to[number]
            if number not in first:
                understood.leave_out("of which there is an earlier copy", where)
            elif split == TRAIN and twins.see(where, chat):
                understood.leave_out("with a near-duplicate among those held out", where)
            else:
                cleaned.kept[split] += 1
                if split_by:
                    cleaned.values.setdefault(split, set()).add(values[number])
                yield split, where, row

    with _in_one_go(out) as part:
        _write(kept(), part, as_file)
        if not cleaned.kept[TRAIN]:
            raise UserError(f"nothing of {source} is left to train on: {understood.remarks().removeprefix('note: ')}")
    return cleaned


def _require_possible(source, out: pathlib.Path, as_file: bool, split_by: str | None, drop_near: bool) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} is there already: name another, or delete it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")
    if out.suffix not in (".jsonl", ""):
        raise UserError(
            f"--clean {out}: name a file that ends with .jsonl, or a folder for the splits, without an ending"
        )
    if as_file and (has_splits(source) or split_by or drop_near):
        why = f"{source} has splits" if has_splits(source) else "nothing is held out of a file"
        raise UserError(f"--clean {out}: {why}, so name a folder to write train.jsonl and the others to")
    if split_by and has_splits(source):
        raise UserError(f"--split-by {split_by}: {source} comes in splits of its own")


def _hold_out(goes_to: list[str], once: list[int], most: int, seed: int, values: list[int] | None) -> None:
    """Let some of the samples go to "test" and "validation". Raises UserError if they are too few."""
    held_out = hold_out(len(once), most, seed, validates=True, values=values)
    if not held_out.judged:
        raise UserError(
            f"none of {len(once)} samples can be held out (--eval-samples {most}; it takes {LEAST} samples): to clean "
            "them only, name a file that ends with .jsonl"
        )
    for split, numbers in ((TEST, held_out.judged), (VALIDATION, held_out.validating)):
        for number in numbers:
            goes_to[once[number]] = split


@contextlib.contextmanager
def _in_one_go(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to. What is there in the end is moved to `out`; after an exception, nothing is left."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    try:
        yield folder / out.name
        (folder / out.name).rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(rows: Iterable[tuple[str, str, dict[str, Any]]], part: pathlib.Path, as_file: bool) -> None:
    """Write each row to the one file, or to that of its split."""
    with contextlib.ExitStack() as opened:
        files: dict[str, TextIO] = {}
        if not as_file:
            part.mkdir()
        for split, where, row in rows:
            if split not in files:
                path = part if as_file else part / f"{split}.jsonl"
                files[split] = opened.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            files[split].write(_line(row, where) + "\n")


def _line(row: dict[str, Any], where: str) -> str:
    """A row as JSON, as readable as it can be: half characters, in columns that play no part, need escapes."""

    def as_text(value) -> str:
        if isinstance(value, AS_TEXT):
            return str(value)
        raise UserError(f"{where} holds {type(value).__name__}, which JSON lines cannot: remove that column")

    text = json.dumps(row, ensure_ascii=False, default=as_text)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=as_text)
    return text
