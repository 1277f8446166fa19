"""Exercises of 08_your_data."""

import os
import re
import shlex
from collections.abc import Callable

from qlora_lab.classroom.judging import Verdict, call, described, exercise, right, wrong
from qlora_lab.errors import UserError
from qlora_lab.evaluation.scores import found, parse_score
from qlora_lab.training.data import stream_samples
from qlora_lab.training.formats import Understood, parse_columns
from qlora_lab.training.likeness import NUMBERS, Repeats, Twins

ROWS = [
    {"customer": customer, "message": f"message {number}"}
    for number, customer in enumerate("A B C A D E F B G H A I J C K L M N B O".split())
]


@exercise("8.1", "a split that keeps customers together", item="train", points=2, todo="complete `split_by`")
def check_split_by(split_by: Callable[[list[dict], str, float], tuple[list, list]]) -> Verdict:
    """split_by(rows, column, share): the rows in two lists; rows with the same value in `column` stay together."""
    rows = [dict(row) for row in ROWS]
    came = call(split_by, [dict(row) for row in rows], "customer", 0.25)
    if not isinstance(came, tuple | list) or len(came) != 2 or not all(isinstance(part, list) for part in came):
        return wrong(f"split_by gives {described(came)}, expected two lists: rows to train on, rows to test on.")
    train, test = came
    if not all(isinstance(row, dict) and "customer" in row for row in [*train, *test]):
        return wrong("Return the rows themselves, not their customers or their numbers.")
    numbers = sorted(row["message"] for row in [*train, *test])
    if len(numbers) != len(set(numbers)):
        return wrong("Some rows are in both lists, or twice in one: each belongs to one of them.")
    if len(numbers) < len(rows):
        return wrong(f"{len(rows) - len(numbers)} of {len(rows)} rows are in neither list: lose none.")
    both = sorted({row["customer"] for row in train} & {row["customer"] for row in test})
    if both:
        return wrong(f"Customer {both[0]} is in both lists: choose among customers, not among rows.")
    if not train or not test:
        return wrong("One of the lists is empty: about a quarter of the rows should be in the second.")
    share = len(test) / len(rows)
    if 0.6 < share < 0.9:
        return wrong(f"{share:.0%} of the rows are to test on, expected about 25 %: the first list is to train on.")
    if not 0.1 <= share <= 0.45:
        return wrong(f"{share:.0%} of the rows are to test on, expected about 25 %.")
    shop = [{"shop": row["customer"], "customer": str(i), "message": row["message"]} for i, row in enumerate(rows)]
    again = call(split_by, shop, "shop", 0.25)
    if {row["shop"] for row in again[0]} & {row["shop"] for row in again[1]}:
        return wrong('With column="shop" a shop is in both lists: go by `column`, not by "customer".')
    half = call(split_by, [dict(row) for row in rows], "customer", 0.5)
    if len(half[1]) <= len(test):
        return wrong(f"With share=0.5 there are {len(half[1])} rows to test on, with 0.25 {len(test)}: use `share`.")
    return right("Who is tested was never trained on. The same function serves documents, authors or days.")


# An answer, the reference, and whether the team is the same
REPLIES = [
    ("The invoice is attached. Team: office", "The invoice for order 17 is attached. Team: office", True),
    ("It arrives on Monday. Team: parcels", "It arrives on Friday. Team: parcels", True),
    ("It arrives on Friday. Team: parcels", "It arrives on Friday. Team: returns", False),
    ("Our office will write. Team: returns", "Please send it back. Team: returns", True),
    ("I like your office", "The invoice for order 17 is attached. Team: office", False),
    ("It arrives on Monday. Team:  parcels", "It arrives on Friday. Team: parcels", True),
    ("The parcels are with our office. Team: repairs", "The parcels are with our office. Team: office", False),
]


@exercise("8.2", "a score of your own", item="train", points=1, todo="write a pattern")
def check_pattern(pattern: str) -> Verdict:
    """pattern: a regular expression whose group is the team that an answer names."""
    if not isinstance(pattern, str):
        return wrong(f"expected a regular expression as a string, got {described(pattern)}.")
    try:
        score = parse_score(f"regex:{pattern.removeprefix('regex:')}")
    except UserError as error:
        return wrong(f"{error}.")
    compiled = re.compile(pattern.removeprefix("regex:"))
    for _, reference, _ in REPLIES:
        if found(compiled, reference) is None:
            return wrong(f"It finds nothing in {reference!r}, so no answer to it could be scored.")
    for answer, reference, same in REPLIES:
        took, expected = found(compiled, answer), found(compiled, reference)
        if score.of(answer, reference) == same:
            continue
        if took is None and "  " in answer:
            return wrong("It finds nothing where two blanks stand before the team. \\s+ is any number of blanks.")
        scored = f"{answer!r} is scored {score.of(answer, reference):.0%} against {reference!r}"
        if len({found(compiled, text) for _, text, _ in REPLIES}) == 1:
            return wrong(f"{scored}: your pattern finds {expected!r} everywhere. Put what varies into a group: (...).")
        if expected == reference or took == answer:
            return wrong(f"{scored}: your pattern takes the whole reply, which is exact match again.")
        return wrong(f"{scored}: your pattern finds {took!r} and {expected!r}. Look for what stands before the team.")
    return right("It asks for what the shop needs to be right, and lets the wording differ.")


LEAST = 12


def columns_in(flags: str) -> str:
    """What --columns is given in a command line's flags; the first word if it is no flag. Raises ValueError: quotes.

    >>> columns_in("--split-by who --columns prompt=a,response=b"), columns_in("prompt=a"), columns_in("--split-by who")
    ('prompt=a,response=b', 'prompt=a', '')
    """
    words = shlex.split(flags)
    if "--columns" in words[:-1]:
        return words[words.index("--columns") + 1]
    return words[0] if words and not words[0].startswith("--") else ""


@exercise("8.3", "a file of your own", item="train", points=3, todo="name your file in `my_file`")
def check_my_file(my_file: str | os.PathLike, my_columns: str = "") -> Verdict:
    """my_file: a path to samples of the learner's own task; my_columns: flags, of which --columns is read if needed."""
    if not isinstance(my_file, str | os.PathLike):
        return wrong(f"expected a path, got {described(my_file)}.")
    if not os.path.exists(my_file):
        return wrong(f"there is nothing at {str(my_file)!r}: paths start from the notebook's folder.")
    understood = Understood()
    try:
        columns = columns_in(my_columns)
        parsed = parse_columns(columns) if columns else None
        samples = list(stream_samples(str(my_file), "train", parsed, understood=understood))
    except (UserError, ValueError) as error:
        return wrong(f"{error}.")
    if any("Team: repairs" in chat[-1]["content"] for _, chat in samples):
        return wrong("That is the bicycle shop's file: bring samples of a task of your own.")
    if len(samples) < LEAST:
        return wrong(f"{len(samples)} samples were read, expected {LEAST} or more. {understood.remarks()}")
    repeats = Repeats()
    for sample in samples:
        repeats.see(*sample)
    repeated = repeats.found()
    if repeated.example:
        return wrong(
            f"{repeated.example[0]} repeats {repeated.example[1]}: keep one of each. `python -m qlora_lab.data FILE "
            "--clean NEW.jsonl` does."
        )
    if repeated.disagreement:
        one, other = repeated.disagreement
        return wrong(f"{one} and {other} ask the same and answer differently: which one shall the model learn?")
    if len({chat[-1]["content"] for _, chat in samples}) == 1 and samples[0][1][0]["role"] != "text":
        return wrong("All answers are the same: the model would learn to say that, whatever is asked.")
    twins = Twins(samples)
    for sample in samples:
        twins.see(*sample)
    alike = [twin for twin in twins.found() if twin.kind != NUMBERS]
    if len(alike) > len(samples) // 4:
        return wrong(
            f"{len(alike)} of {len(samples)} samples are nearly the same as another one ({alike[0].judged} and "
            f"{alike[0].trained}, say): if some are held out, the score will flatter. Keep one of each, or "
            "`python -m qlora_lab.data FILE --clean FOLDER --drop-near`, and name the folder."
        )
    said = f"{len(samples)} samples, read as {' and '.join(understood.formats)}: enough for a first run."
    if len(twins.found()) > len(samples) // 2:
        said += " Most differ in numbers only: if these are not what you ask about, ask it in other words, too."
    return right(said)
