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
from qlora_lab.training.data import stream_samples
from qlora_lab.training.formats import Chat, parse_columns
from qlora_lab.training.likeness import Twins

COLUMNS: tuple[str, ...] = ("ticket", "customer", "message", "reply", "agent")
ITEMS = "saddle pump helmet lock bell basket chain pedal mirror trailer lamp tyre".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday".split()
GREETINGS = ("Hi,", "Hello,", "Good morning,", "Dear team,")
AGAIN = ("Hi again,", "Still waiting:", "Second try:")
# what a customer writes, and the shop's reply. {i} item, {n} order, {d} a day, which does not follow from the message
KINDS = [
    ("my {i} from order {n} came broken.", "Sorry about the {i}! A new one leaves on {d}. Team: repairs"),
    ("the {i} I bought is broken, order {n}.", "Sorry about the {i}! A new one leaves on {d}. Team: repairs"),
    ("where is my {i}? I paid for order {n} last week.", "Order {n} is on its way, it arrives on {d}. Team: parcels"),
    ("order {n} has not come, it is a {i}.", "Order {n} is on its way, it arrives on {d}. Team: parcels"),
    ("I do not want the {i} of order {n} any more.", "Please send the {i} back within 30 days. Team: returns"),
    ("can I return a {i}? It was order {n}.", "Please send the {i} back within 30 days. Team: returns"),
    ("I need an invoice for the {i}, order {n}.", "The invoice for order {n} is attached. Team: office"),
    ("order {n}, the {i}: the bill is missing.", "The invoice for order {n} is attached. Team: office"),
]
CUSTOMERS, SEED = 64, 15


def tickets() -> list[dict[str, str]]:
    """The rows, by column, mess included."""
    draw, rows = random.Random(SEED), []
    for customer in range(CUSTOMERS):
        message, reply = KINDS[customer % len(KINDS)]
        facts = {"i": draw.choice(ITEMS), "n": str(draw.randint(1000, 9999)), "d": draw.choice(DAYS)}
        row = {"customer": f"C{customer:03}", "reply": reply.format(**facts), "agent": draw.choice(("Kim", "Sam"))}
        greetings = [draw.choice(GREETINGS), *([draw.choice(AGAIN)] if draw.random() < 0.4 else [])]
        rows += [{**row, "message": f"{greeting} {message.format(**facts)}"} for greeting in greetings]
    draw.shuffle(rows)
    rows += [dict(rows[at]) for at in (7, 30, 51)]  # exported twice
    for at in (12, 40, 60, 75):
        rows[at]["reply"] = ""  # nobody has answered yet
    rows[21]["message"] = ""
    return [{"ticket": str(number), **row} for number, row in enumerate(rows, 5001)]


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
