"""A small file as people have it: a bicycle shop's support tickets, as a spreadsheet exports them. All made up here.

Columns with the shop's own names, replies that are missing, rows that stand twice, and customers who write again in
almost the same words. And a fault that no program finds: where a day is in the reply, a colleague has looked it up, and
the message does not hold it.
"""

import csv
import random
from pathlib import Path

COLUMNS: tuple[str, ...] = ("ticket", "customer", "message", "reply", "agent")
READ_AS = {"prompt": "message", "response": "reply"}  # as `--columns prompt=message,response=reply`
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


def tickets(seed: int = SEED, messy: bool = True) -> list[dict[str, str]]:
    """The rows of 64 customers, by column. messy: with rows that stand twice, and some without a reply or a message."""
    draw, rows = random.Random(seed), []
    for customer in range(CUSTOMERS):
        message, reply = KINDS[customer % len(KINDS)]
        facts = {"i": draw.choice(ITEMS), "n": str(draw.randint(1000, 9999)), "d": draw.choice(DAYS)}
        row = {"customer": f"C{customer:03}", "reply": reply.format(**facts), "agent": draw.choice(("Kim", "Sam"))}
        greetings = [draw.choice(GREETINGS), *([draw.choice(AGAIN)] if draw.random() < 0.4 else [])]
        rows += [{**row, "message": f"{greeting} {message.format(**facts)}"} for greeting in greetings]
    draw.shuffle(rows)
    if messy:
        rows += [dict(rows[at]) for at in (7, 30, 51)]  # exported twice
        for at in (12, 40, 60, 75):
            rows[at]["reply"] = ""  # nobody has answered yet
        rows[21]["message"] = ""
    return [{"ticket": str(number), **row} for number, row in enumerate(rows, 5001)]


def write_tickets(path: Path) -> Path:
    """Write them as a spreadsheet does where the comma is the decimal sign: separated by semicolons."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, delimiter=";", lineterminator="\n")
        table.writeheader()
        table.writerows(tickets())
    return path


def greeted_otherwise(message: str) -> str:
    """The same message with a greeting that none of them has."""
    greeting = next(text for text in (*GREETINGS, *AGAIN) if message.startswith(text))
    return f"Dear shop,{message.removeprefix(greeting)}"
