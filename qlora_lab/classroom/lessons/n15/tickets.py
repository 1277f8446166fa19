"""A small file as people have it, for 15_your_data to read, to split, to learn from and to be judged on; and cleaning.

A bicycle shop's support tickets, as a spreadsheet exports them: columns with the shop's own names, replies that are
missing, rows that stand twice, and customers who write again in almost the same words. All of it is made up here.
"""

import csv
import json
import os
import random
from pathlib import Path

from qlora_lab.errors import UserError
from qlora_lab.experiments.tickets import COLUMNS, SEED, tickets
from qlora_lab.training.data import stream_samples
from qlora_lab.training.formats import Chat, parse_columns
from qlora_lab.training.likeness import Twins

__all__ = ["tickets"]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=";"))


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    """Write them as a spreadsheet does where the comma is the decimal sign: separated by semicolons."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, delimiter=";", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


def split_customers(rows: list[dict[str, str]], train: int, validation: int) -> dict[str, list[dict[str, str]]]:
    """By split, all rows of so many customers, drawn at random; the others are to test on."""
    customers = sorted({row["customer"] for row in rows})
    random.Random(SEED).shuffle(customers)
    ends = {"train": (0, train), "validation": (train, train + validation), "test": (train + validation, None)}
    return {
        split: [row for row in rows if row["customer"] in customers[start:end]] for split, (start, end) in ends.items()
    }


def without_twins(samples: list[tuple[str, Chat]]) -> list[tuple[str, Chat]]:
    """The samples, each with the place where it stands, without those that are an earlier one again, or nearly."""
    order = {where: number for number, (where, _) in enumerate(samples)}
    while True:
        twins = Twins(samples)
        for where, chat in samples:
            twins.see(where, chat)
        later = {twin.judged for twin in twins.found() if order[twin.trained] < order[twin.judged]}
        if not later:  # the last of those that have a twin has an earlier one
            return samples
        samples = [(where, chat) for where, chat in samples if where not in later]


def cleaned(source: str | os.PathLike, columns: str, path: Path) -> Path:
    """Write the samples of a file to `path` as JSON lines, without those that are left out, and without twins.

    Args:
        source, columns: as `train_qlora` takes them; columns may be "".

    Raises:
        UserError: what `load_samples` raises; or tools, which are not written here.
    """
    parsed = parse_columns(columns) if columns else None
    samples = list(stream_samples(str(source), "train", parsed))
    kept = without_twins(samples)
    if with_tools := [where for where, chat in kept if "tools" in chat[0]]:
        raise UserError(f"{with_tools[0]} has tools, which a cleaned file would lose: remove the twins by hand")
    rows = (
        {"text": chat[0]["content"]} if chat[0]["role"] == "text" else {"messages": chat}  # plain text is one message
        for _, chat in kept
    )
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(kept)} of {len(samples)} samples kept, in {path.name}")
    return path
