"""Answers to the exercises of 08_your_data: right ones, found by another way, and likely mistakes."""

import csv
import json
import tempfile
import zlib
from pathlib import Path

from qlora_lab.classroom.checks import check_my_file, check_pattern, check_split_by
from qlora_lab.experiments.tickets import tickets

FOLDER = Path(tempfile.mkdtemp())


def by_hash(rows, column, share):
    """Without a list of the values: each value's hash says on which side it is."""
    tested = [row for row in rows if zlib.crc32(row[column].encode()) % 100 < 100 * share]
    return [row for row in rows if row not in tested], tested


def by_rows(rows, column, share):
    count = round(share * len(rows))
    return rows[count:], rows[:count]


def by_one_customer(rows, column, share):
    return [row for row in rows if row[column] != rows[0][column]], [
        row for row in rows if row[column] == rows[0][column]
    ]


def once_each(rows, column, share):
    """Groups by customer, and keeps a row of each."""
    firsts = list({row[column]: row for row in rows}.values())
    count = round(share * len(firsts))
    return firsts[count:], firsts[:count]


def customers_only(rows, column, share):
    train, test = by_hash(rows, column, share)
    return [row[column] for row in train], [row[column] for row in test]


def saved(name, rows):
    path = FOLDER / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(name, rows):
    path = FOLDER / name
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


WORDS = "sun moon rain snow wind fog hail storm cloud frost thaw flood drought breeze".split()
MINE = [{"prompt": f"What is the word for {word}, spelled backwards?", "response": word[::-1]} for word in WORDS]
RENAMED = [{"frage": row["prompt"], "antwort": row["response"]} for row in MINE]
TOLD_TWICE = [*MINE[:-1], {**MINE[0], "response": "another one"}]
NEARLY = [  # each question twice, with another greeting
    {"prompt": f"{greeting}, {a} {b} {c} {a} {c} {b} {b} {a}?", "response": f"{a} {b} {c}"}
    for a, b, c in zip(WORDS[:7], WORDS[1:8], WORDS[2:9], strict=True)
    for greeting in ("Hello", "Hi")
]
SUMS = [{"prompt": f"What is {a} times {b}?", "response": str(a * b)} for a in range(2, 9) for b in range(a, 9)]

RIGHT = [
    (check_split_by, (by_hash,)),
    (check_pattern, (r"(?s).*Team:\s+([a-z]+)",)),
    (check_pattern, (r"regex:Team: +(\S+)",)),
    (check_my_file, (saved("mine.jsonl", MINE),)),
    (check_my_file, (table("mine.csv", RENAMED), "--columns prompt=frage,response=antwort")),
    (check_my_file, (table("mine.csv", RENAMED), "--split-by frage --columns prompt=frage,response=antwort")),
    (check_my_file, (table("mine.csv", RENAMED), "prompt=frage,response=antwort")),
    (check_my_file, (saved("sums.jsonl", SUMS),)),
]

WRONG = [  # and what the learner must be told
    (check_split_by, by_rows, "choose among customers, not among rows"),
    (check_split_by, lambda *of: by_hash(*of)[::-1], "the first list is to train on"),
    (check_split_by, lambda *of: by_hash(*of)[1], "expected two lists"),
    (check_split_by, lambda rows, *of: (rows, by_hash(rows, *of)[1]), "Some rows are in both lists"),
    (check_split_by, once_each, "are in neither list"),
    (check_split_by, lambda rows, *of: (rows, []), "One of the lists is empty"),
    (check_split_by, customers_only, "Return the rows themselves"),
    (check_split_by, lambda rows, column, share: by_hash(rows, "customer", share), 'not by "customer"'),
    (check_split_by, lambda rows, column, share: by_hash(rows, column, 0.25), "use `share`"),
    (
        check_split_by,
        lambda rows, column, share: by_hash(rows, column, 0.02 + share / 100),
        "One of the lists is empty",
    ),
    (check_pattern, 3, "expected a regular expression as a string"),
    (check_pattern, r"Team: (\w+", "is no regular expression"),
    (check_pattern, r"team: (\w+)", "finds nothing in"),
    (check_pattern, r"Team:", "Put what varies into a group"),
    (check_pattern, r"office|parcels|returns|repairs", "Look for what stands before the team"),
    (check_pattern, r".+", "exact match again"),
    (check_pattern, r"Team: (\w+)", "two blanks"),
    (check_my_file, 17, "expected a path"),
    (check_my_file, FOLDER / "nothing.jsonl", "there is nothing at"),
    (check_my_file, saved("few.jsonl", MINE[:5]), "5 samples were read, expected 12 or more"),
    (check_my_file, table("renamed.csv", RENAMED), "--columns prompt=...,response=..."),
    (check_my_file, (table("again.csv", RENAMED), "prompt=question"), "needs prompt and response"),
    (check_my_file, (table("again.csv", RENAMED), "--columns 'prompt=frage"), "No closing quotation"),
    (check_my_file, saved("twice.jsonl", [*MINE, MINE[3]]), "line 15 repeats twice.jsonl, line 4"),
    (check_my_file, saved("disagree.jsonl", TOLD_TWICE), "which one shall the model learn?"),
    (check_my_file, saved("same.jsonl", [{**row, "response": "yes"} for row in MINE]), "All answers are the same"),
    (check_my_file, saved("nearly.jsonl", NEARLY), "the score will flatter"),
    (check_my_file, (table("shop.csv", tickets()), "prompt=message,response=reply"), "the bicycle shop's file"),
]
